"""A whole recipe on a tiny random model: results, reuse and resumption."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipe import changed, write
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.cli import recipe as pipeline
from kvlatent.cli import recipe_measures, recipe_sizes
from kvlatent.compose.policies import policy_of
from kvlatent.compress import budget, checkpoints
from kvlatent.data.blocks import TokenBlocks
from kvlatent.errors import UserError
from kvlatent.evaluation.config import NEAR_ONLY
from kvlatent.evaluation.joined import joined_scores, joined_text, rolling
from kvlatent.evaluation.needle import needle
from kvlatent.evaluation.tasks import TaskScore
from kvlatent.model.checkpoints import RECORD, load_model
from kvlatent.model.loading import load_tokenizer
from kvlatent.model.spec import LatentSpec


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").rglob("*.*")), ids=lambda path: path.stem
)
def test_the_recipes_can_be_read(path: Path) -> None:
    assert pipeline.read_recipe(path).students


def test_run_measures_every_student_and_keeps_the_first(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    names = ["teacher", "best, no training", "best, healed", "paper, no training", "paper, healed"]
    assert list(results["evaluate"]["models"]) == names
    assert results["evaluate"]["models"]["teacher"]["perplexity_ratio"] == 1
    teacher, student = results["bench"]["rows"]
    assert (teacher["model"], student["model"]) == ("teacher", "student")
    assert student["cache_bytes"] * 2 == teacher["cache_bytes"] == teacher["cache_bytes_predicted"]
    assert [set(generation) for generation in results["generations"]] == [{"prompt", "teacher", "student"}] * 2
    assert results["spec"]["preset"] == "best"
    assert results["record"]["torch"] == json.loads((out / "record.json").read_text())["torch"]
    assert set(results["seconds"]) >= {"text", "convert best", "heal best", "bench"}


def test_run_folder_is_complete(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    expected = {
        "bench.json", "evaluate", "generations.json", "metrics-paper.jsonl", "metrics.jsonl", "model", "recipe.yaml",
        "record.json", "report.html", "results.json", "seconds.json", "students", "text",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == expected
    assert "perplexity" in (out / "model" / "README.md").read_text().lower()
    assert "No measurements" not in (out / "model" / "README.md").read_text()
    spec = LatentSpec.from_dict(AutoModelForCausalLM.from_pretrained(out / "model").config.latent)
    assert sum(spec.d_qk) + sum(spec.d_vo) == 32  # half of two layers' 16 + 16
    assert {step["verb"] for step in json.loads((out / "model" / RECORD).read_text())["steps"]} == {"convert", "heal"}
    assert "<html" in (out / "report.html").read_text()[:200]


def test_running_again_reuses_everything(
    finished: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, results = finished
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.delattr(pipeline, "load_model")  # nothing is loaded
    began = time.perf_counter()
    assert cli.main(["run", str(finished[0].parent / "tiny.yaml"), "--out", str(out), "--json"]) == 0
    assert time.perf_counter() - began < 3
    said = capsys.readouterr()
    assert json.loads(said.out) == results
    assert said.err.count("reused") == len(said.err.splitlines()) == 13
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_run_prints_the_summary_table(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(finished[0].parent / "tiny.yaml"), "--out", str(finished[0])]) == 0
    said = capsys.readouterr().out
    assert "Half the KV cache" in said
    assert "paper, healed" in said
    assert said.rstrip().endswith("report.html")


def test_damaged_results_of_a_finished_run_are_one_line(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished[0], tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(results | {"spec": "."}))
    assert cli.main(["run", str(finished[0].parent / "tiny.yaml"), "--out", str(copy)]) == 2
    assert "is not a results file of kvlatent: spec" in capsys.readouterr().err


def test_interrupted_run_goes_on_where_it_stopped(
    recipe: dict[str, Any],
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(recipe_measures, "benchmark", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["run", str(finished[0].parent / "tiny.yaml"), "--out", f"{tmp_path}/run"]) == 130
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.delattr(pipeline, "convert_loaded")
    monkeypatch.delattr(pipeline, "heal_student")
    results = pipeline.run(finished[0].parent / "tiny.yaml", tmp_path / "run")
    assert results["evaluate"] == finished[1]["evaluate"]  # two seeded runs are equal


def test_budgets_of_a_run_are_spent_by_the_same_probe(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, probe = [], budget.planning_statistics
    monkeypatch.setattr(
        budget, "planning_statistics", lambda *a, **k: measured.append(k["near"].window) or probe(*a, **k)
    )
    small = {key: value for key, value in recipe.items() if key != "training"}
    less = {"name": "less", "budget": 0.25, "window": 0}
    others = [{"name": "half", "budget": 0.5, "window": 0}, {"name": "near", "budget": 0.5, "window": 4, "bits": 16}]
    path = write(small | {"students": [*others, less]}, tmp_path / "all.yaml")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "convert_as", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(path, tmp_path / "all")
    assert measured == [0]
    pipeline.run(path, tmp_path / "all")
    assert measured == [0, 4]  # what the first one measured was kept
    pipeline.run(write(small | {"students": [less]}, tmp_path / "alone.yaml"), tmp_path / "alone")
    alone, among = tmp_path / "alone" / "model", tmp_path / "all" / "students" / "less" / "model"
    assert (alone / "model.safetensors").read_bytes() == (among / "model.safetensors").read_bytes()
    assert not (tmp_path / "all" / pipeline.PLANNING).exists()


def test_a_step_done_again_renews_the_report(
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    small = recipe | {"students": [{"preset": "paper", "d_qk": 8, "d_vo": 4}]}
    small.pop("training")
    path, out = write(small, tmp_path / "small.yaml"), tmp_path / "run"
    results = pipeline.run(path, out)
    assert list(results["evaluate"]["models"]) == ["teacher", "paper, no training"]
    assert not (out / "text" / "training.safetensors").exists()
    assert (out / "model" / "config.json").is_file()
    (out / "bench.json").unlink()
    renewed = pipeline.run(path, out)
    assert renewed["bench"] == json.loads((out / "results.json").read_text())["bench"]
    assert renewed["evaluate"] == results["evaluate"]
    assert renewed["bench"] != results["bench"]


def test_long_blocks_are_judged_by_far_text_too(
    recipe: dict[str, Any],
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    teacher = tiny_teacher("llama")
    teacher.config.max_position_embeddings = 512
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    small = recipe | {"model": f"{tmp_path}/teacher", "students": [{"preset": "paper", "d_qk": 8, "d_vo": 8}]}
    small["held_out"] = recipe["held_out"] | {"tokens": 2048, "block_size": 512}
    small.pop("training")
    models = pipeline.run(write(small, tmp_path / "small.yaml"), tmp_path / "run")["evaluate"]["models"]
    assert list(models) == ["teacher", NEAR_ONLY, "paper, no training"]
    assert (models["teacher"]["far_gain_kept"], models[NEAR_ONLY]["far_gain_kept"]) == (1, pytest.approx(0))
    assert models["paper, no training"]["far_tokens"] == models[NEAR_ONLY]["far_tokens"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert NEAR_ONLY in page and "Far gain kept" in page
    assert "far gain" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_recipe_asks_for_needle_retrieval_and_tasks_as_eval_does(
    roomy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = iter(([1.0] * 9 + [0.0], [1.0] * 8 + [0.0] * 2))  # the teacher's answers, then the student's

    def answered(_model: Any, _tokenizer: Any, names: list[str], *, limit: int) -> dict[str, TaskScore]:
        samples = next(right)
        assert (names, limit) == (["letters"], 10)
        return {"letters": TaskScore(metrics={"acc": 0.5}, samples={"acc": samples}, chance={"acc": 0.5})}

    monkeypatch.setattr(recipe_measures, "lm_eval_tasks", answered)
    monkeypatch.setattr(recipe_sizes, "find_tasks", lambda _: None)
    (tmp_path / "whole.txt").write_text(" ".join(map(str, range(400))))
    asked = {
        "joined": {"text": [f"{tmp_path}/whole.txt"], "length": 128, "stride": 96},
        "needle": {"contexts": [320, 640], "depths": 2, "trials": 4},
        "retrieval": {"contexts": [640], "trials": 2},
        "tasks": {"names": ["letters"], "limit": 10},
    }
    results = pipeline.run(write(roomy | asked, tmp_path / "asked.yaml"), tmp_path / "run")
    student = load_model(f"{tmp_path}/run/model")[0]
    tokenizer = load_tokenizer(roomy["model"])
    expected = needle(student, tokenizer, context=640, depths=2, trials=4, seed=0)
    assert results["needle"]["student"]["640"] == expected
    assert [cell["trials"] for cell in expected["by_depth"]] == [2, 2]
    assert {*results["needle"]} == {"teacher", "student"} and {*results["needle"]["teacher"]} == {"320", "640"}
    assert {*results["retrieval"]["models"]["student"]} == {"key_value 640", "needles 640"}
    tested = results["retrieval"]["paired"]["needles 640"]["log_probability"]
    scores = [results["retrieval"]["models"][x]["needles 640"]["log_probability"] for x in ("student", "teacher")]
    assert tested["difference"] == pytest.approx(scores[0] - scores[1])
    assert results["tasks"]["paired"]["letters"]["acc"]["kept"] == pytest.approx(0.75)
    text = joined_text([f"{tmp_path}/whole.txt"], tokenizer, vocab_size=300)
    told = joined_scores(rolling(student, text, length=128, stride=96), text)
    assert {key: results["joined"]["models"]["student"][key] for key in told} == told
    assert results["joined"]["models"]["teacher"]["perplexity_ratio"] == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "windows of 128 tokens that advance by 96" in page
    assert "Needle found, student" in page and "<h2>Tasks</h2>" in page and "75.0 %" in page
    capsys.readouterr()
    asked["needle"] |= {"contexts": [640], "policy": "tova", "keep": 0.5}
    results = pipeline.run(write(roomy | asked, tmp_path / "asked.yaml"), tmp_path / "run")
    chosen = needle(student, tokenizer, context=640, depths=2, trials=4, seed=0, policy=policy_of("tova", 0.5))
    assert results["needle"]["student"] == {"640": chosen} and "kept_share" not in results["needle"]["teacher"]["640"]
    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line for line in lines if not line.endswith(": reused")] == ["needle", "report"]


def test_policies_of_a_recipe_are_those_of_the_commands(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {key: value for key, value in recipe.items() if key != "training"}
    small |= {"students": [{"budget": 0.5, "window": 0}], "block_size": 128}
    small["held_out"] = recipe["held_out"] | {"policy": "snapkv", "keep": 0.25}
    small["bench"] = {"context": 80, "batch": 1, "new_tokens": 2, "policy": "streaming", "keep": 0.25}
    small["generate"] = {"prompts": ["river stone " * 10], "max_new_tokens": 4, "policy": "tova"}
    results = pipeline.run(write(small, tmp_path / "small.yaml"), tmp_path / "run")
    model, told = str(tmp_path / "run" / "model"), results["evaluate"]["models"]
    text = ["--text", *recipe["held_out"]["text"], "--tokens", "256", "--block-size", "128"]
    assert (
        cli.main(["eval", model, "--against", recipe["model"], *text, "--policy", "snapkv", "--keep", "0.25", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    for name, wanted in (("teacher", found["against"]), ("best, no training", found)):
        for key in ("perplexity", "bits_per_byte", "perplexity_ratio"):
            assert told[name][key] == pytest.approx(wanted[key]), (name, key)
    assert told["best, no training"]["kept_share"] == 0.25 and "kept_share" not in told["teacher"]
    teacher, student = results["bench"]["rows"]
    assert (student["policy"], student["keep"], student["kept_share"]) == ("streaming", 0.25, 20 / 82)
    assert student["cache_bytes"] * 82 == teacher["cache_bytes"] * 10 and "policy" not in teacher
    prompt = ["generate", model, "--prompt", "river stone " * 10, "--max-new-tokens", "4", "--json"]
    assert cli.main([*prompt, "--policy", "tova"]) == 0
    assert results["generations"][0]["student"] == json.loads(capsys.readouterr().out)["completion"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "from what snapkv 0.25 has left of the first" in page and "12 % of the KV cache" in page
    again = small | {"bench": small["bench"] | {"keep": 0.5}}
    renewed = pipeline.run(write(again, tmp_path / "small.yaml"), tmp_path / "run")
    assert renewed["bench"]["rows"][1]["kept_share"] == 40 / 82 and renewed["evaluate"] == results["evaluate"]


def test_later_steps_may_change_and_are_done_again(
    recipe: dict[str, Any],
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.delattr(pipeline, "convert_loaded")
    monkeypatch.delattr(pipeline, "heal_student")

    def again(path: str, value: Any) -> set[str]:
        nonlocal recipe
        recipe = changed(recipe, path, value)
        capsys.readouterr()
        results = pipeline.run(write(recipe, tmp_path / "later.yaml"), tmp_path / "run")
        asked = pipeline.read_recipe(tmp_path / "later.yaml")
        assert results["recipe"] == asked.model_dump(mode="json", exclude_none=True)
        lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        return {line for line in lines if not line.endswith(": reused")}

    assert again("bench.new_tokens", 3) == {"bench", "report"}
    assert again("generate.prompts", ["lamp"]) == {"generate", "report"}
    measured = {f"evaluate {label}" for label in finished[1]["evaluate"]["models"]}
    assert again("held_out.tokens", 128) == {"text", "report", *measured}
    assert again("title", "Small") == {"report"}


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("1.5e3", 1500.0), ("2", 2.0), ("yes", None), ("'2'", None), (".nan", None)]
)
def test_numbers_are_written_as_numbers(
    recipe: dict[str, Any], tmp_path: Path, written: str, value: float | None
) -> None:
    file = write(changed(recipe, "students.0.heal.learning_rate", "HERE"), tmp_path / "tiny.yaml")
    file.write_text(file.read_text().replace('"HERE"', written))
    if value is None:
        with pytest.raises(UserError, match="learning_rate"):
            pipeline.run(file, tmp_path / "run")
    else:
        heal = pipeline.read_recipe(file).students[0].heal
        assert heal is not None and heal.learning_rate == value


def test_two_students_of_one_preset(recipe: dict[str, Any], tmp_path: Path) -> None:
    both = [{"name": "half", "budget": 0.5, "window": 0}, {"name": "less", "d_qk": 4, "d_vo": 4, "window": 0}]
    small = {key: value for key, value in recipe.items() if key != "training"} | {"students": both}
    results = pipeline.run(write(small, tmp_path / "small.yaml"), tmp_path / "run")
    assert list(results["evaluate"]["models"]) == ["teacher", "half, no training", "less, no training"]
    assert results["recipe"]["students"] == [student | {"preset": "best"} for student in both]
    made = [tmp_path / "run" / folder for folder in ("model", "students/less/model")]
    assert [AutoModelForCausalLM.from_pretrained(path).config.latent["d_qk"] for path in made][1] == [4, 4]
    assert "half, no training" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_our_recipes_are_valid(path: Path) -> None:
    recipe = pipeline.read_recipe(path)
    used = {*recipe.calibration.text, *(recipe.training.text if recipe.training else ())}
    assert used.isdisjoint(recipe.held_out.text)


def test_blocks_survive_the_disk(tmp_path: Path) -> None:
    blocks = TokenBlocks(torch.arange(12).view(3, 4), 40, ("a", "b"), frozenset({"x", "y"}))
    pipeline.save_blocks(blocks, tmp_path / "blocks.safetensors")
    read = pipeline.load_blocks(tmp_path / "blocks.safetensors")
    assert torch.equal(read.ids, blocks.ids)
    assert (read.bytes, read.sources, read.fingerprints) == (blocks.bytes, blocks.sources, blocks.fingerprints)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "blocks.safetensors").read_bytes()[:50])
    with pytest.raises(UserError, match="can't be read as token blocks"):
        pipeline.load_blocks(tmp_path / "cut.safetensors")
