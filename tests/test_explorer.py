"""The cache explorer counts what `kvlatent plan`, `info` and `rope-plot` count, in headless Chromium, without a word on
the console."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent import cli
from kvlatent.compress.checkpoints import target_of
from kvlatent.compress.config import ConvertConfig, PlanConfig
from kvlatent.compress.convert import convert_as
from kvlatent.compress.preview import plan_checkpoint
from kvlatent.errors import UserError
from kvlatent.evaluation.config import RopePlotConfig
from kvlatent.evaluation.rope_plot import frequency_lists
from kvlatent.fields import Fit
from kvlatent.model.families import FAMILIES
from kvlatent.model.loading import bare_model, load_config
from kvlatent.model.rope import stability
from kvlatent.model.sizes import cache_parts, layer_caches, most_tokens
from tests.conftest import TEACHERS
from tests.test_shipped_recipes import REAL

PAGE = Path(__file__).parents[1] / "docs" / "explorer.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


class _Answer(HTMLParser):
    """The text of the element with id `answer`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside, self.text = False, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = ("id", "answer") in attributes

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def evaluated(script: str, folder: Path, *, width: int = 1280) -> Any:
    """What the body of a function returns that is run on the page, once nothing was said on the console."""
    assert CHROMIUM is not None
    asked = (
        f"<script>{{ const answer = document.createElement('pre'); answer.id = 'answer'; answer.textContent = "
        f"JSON.stringify((() => {{ {script} }})()); document.body.append(answer); }}</script></body>"
    )
    page = folder / "asked.html"
    page.write_text(PAGE.read_text().replace("</body>", asked))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={folder}/profile", f"--window-size={width},900", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return json.loads(_Answer(done.stdout).text)


def config_file(config: dict[str, Any], folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    path = folder / name / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_the_page_in_the_docs_is_the_one_in_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["explore", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == PAGE.read_bytes()
    assert cli.main(["explore", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_page_loads_nothing() -> None:
    page = PAGE.read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!data:,)|@import|url\(|\bfetch\(|XMLHttp|import\(""", page)


@browser
def test_configs_are_read_as_transformers_reads_them(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Those of the hub in the fields of their day, those that we write, and those that leave out all they can."""
    configs = {name.replace("/", " "): config for name, config in REAL.items()}
    configs |= {f"tiny {name}": tiny_teacher(name).config.to_dict() for name in TEACHERS}
    least = {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
        "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": None,
    }  # fmt: skip
    configs |= {f"least {name}": least | {"model_type": name, "num_key_value_heads": 4} for name in FAMILIES}
    windows = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 5}
    configs |= {f"slides {name}": configs[f"least {name}"] | windows for name in FAMILIES if name != "qwen3_moe"}
    script = """
      return Object.fromEntries(Object.entries(CONFIGS).map(([name, config]) => {
        const m = readModel(config);
        return [name, [m.kvHeads, m.headDim, m.parameters, m.sliding, m.rope.theta, m.rope.list]];
      }));"""
    found = evaluated(script.replace("CONFIGS", json.dumps(configs)), tmp_path)
    for name, config in configs.items():
        path = config_file(config, tmp_path, name)
        read = load_config(str(path))
        theta, lists = frequency_lists(RopePlotConfig(model=str(path), dims=(8,)))[1:]
        kv_heads, head_dim, parameters, sliding, page_theta, frequencies = found[name]
        assert kv_heads == read.num_key_value_heads, name
        assert parameters == bare_model(read, name).num_parameters(), name
        assert sliding == [layer.sliding for layer in layer_caches(read, 2)], name
        assert (page_theta, head_dim) == (theta, 2 * len(lists["kept"])), name
        assert frequencies == pytest.approx(list(lists["kept"]), rel=1e-5), name


BUDGETS: list[tuple[str, dict[str, Any]]] = [
    ("meta-llama/Llama-3.1-8B", {"budget": 0.125}),
    ("meta-llama/Llama-3.1-8B", {"budget": 0.5, "window": 0, "sinks": 0}),
    ("meta-llama/Llama-3.1-8B", {"budget": 0.25, "bits": 16}),
    ("meta-llama/Llama-2-7b-hf", {"budget": 0.1, "bits": 4, "window": 32, "sinks": 2}),
    ("Qwen/Qwen3-8B", {"budget": 1.0}),
    ("Qwen/Qwen3-30B-A3B", {"budget": 0.0625}),
    ("gemma-3-12b-text", {"budget": 0.5}),
    ("gemma-3-12b-text", {"budget": 0.45, "heads_per_latent": 2, "bits": 16}),
    ("smollm2", {"budget": 0.125, "heads_per_latent": 3}),
    ("smollm2", {"budget": 0.01}),
    ("smollm2", {"budget": 0.02}),
    ("gemma-3-12b-text", {"budget": 0.125}),
    ("smollm2", {"budget": 0.05, "bits": 16, "window": 0, "sinks": 0}),
    ("smollm2", {"budget": 0.5, "heads_per_latent": 2}),
    ("smollm2", {"budget": 0.5, "bits": 4, "window": 0, "sinks": 0}),
]
"""Some of which are refused."""


def asked_of_page(asked: dict[str, Any]) -> dict[str, Any]:
    return {"window": 128, "sinks": 4, "bits": None, "heads_per_latent": None} | asked


@browser
def test_built_in_models_are_those_of_the_hub(tmp_path: Path) -> None:
    names = {
        "Llama-3.1-8B": "meta-llama/Llama-3.1-8B", "Qwen3-8B": "Qwen/Qwen3-8B", "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
        "Gemma-3-12B (text)": "gemma-3-12b-text", "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    }  # fmt: skip
    script = "return Object.fromEntries(Object.entries(MODELS).map(([name, config]) => [name, readModel(config)]));"
    models, hub = (evaluated(script.replace("MODELS", configs), tmp_path) for configs in ("MODELS", json.dumps(REAL)))
    assert {name: models[name] for name in names} == {name: hub[other] for name, other in names.items()}
    published = {"Llama-3.1-70B": 70.6, "Mistral-7B-v0.3": 7.25, "SmolLM2-135M": 0.1345}  # billions of parameters
    assert {name: models[name]["parameters"] / 1e9 for name in published} == pytest.approx(published, rel=1e-3)
    assert models.keys() == names.keys() | published.keys()


@browser
@pytest.mark.parametrize("size", [2, 4])
def test_budgets_pay_for_what_plan_says(size: int, tmp_path: Path) -> None:
    fit = Fit(context=(100, 1000, 8192, 40000, 1 << 20), memory=80.0, batch=(1, 8))
    cases = [[REAL[model], asked_of_page(asked)] for model, asked in BUDGETS]
    script = """
      return CASES.map(([config, asked]) => {
        const m = readModel(config);
        try {
          const p = plan(m, asked, SIZE);
          return {
            cache: CONTEXT.map((n) => cacheParts(p.student, n)),
            teacher_cache: CONTEXT.map((n) => cacheParts(p.teacher, n)),
            parts: CONTEXT.map((n) => sum(Object.values(partsOf(p, n)))),
            weights: [p.weights * SIZE, p.studentWeights * SIZE], whole: p.left,
            n_max: BATCH.map((batch) => [
              mostTokens(p.student, MEMORY - p.studentWeights * SIZE, batch, true),
              mostTokens(p.teacher, MEMORY - p.weights * SIZE, batch, false),
            ]),
          };
        } catch (error) { return {error: error.message}; }
      });"""
    values = {"CASES": cases, "SIZE": size, "CONTEXT": fit.context, "BATCH": fit.batch, "MEMORY": 80 * 2**30}
    script = re.sub(r"\b(CASES|SIZE|CONTEXT|BATCH|MEMORY)\b", lambda word: json.dumps(values[word[0]]), script)
    refused = 0
    for number, ((model, asked), page) in enumerate(zip(BUDGETS, evaluated(script, tmp_path), strict=True)):
        path = config_file(REAL[model], tmp_path, str(number))
        dtype = {2: "bfloat16", 4: "float32"}[size]
        try:
            told = plan_checkpoint(str(path), Path("none.png"), PlanConfig(fit=fit, **asked), dtype=dtype)
        except UserError:
            assert page["error"], asked
            refused += 1
            continue
        kept = [{k: v for k, v in row.items() if k not in ("keys", "values")} for row in page["cache"]]
        assert kept == told["cache"] and page["teacher_cache"] == told["teacher_cache"], asked
        assert page["parts"] == pytest.approx([row["bytes"] for row in told["cache"]], abs=0.5)
        assert page["weights"] == [told["weight_bytes"], told["student_weight_bytes"]]
        assert page["whole"] == list(told["whole_layers"])
        assert page["n_max"] == [[row["context"], row["teacher_context"]] for row in told["n_max"]]
    assert refused == 5


DIMS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"d_qk": 8, "d_vo": 4}),
    ("llama", {"d_qk": 8, "d_vo": 5, "bits": 2}),
    ("llama", {"d_qk": 8, "d_vo": 8, "window": 0, "sinks": 0}),
    ("llama", {"d_qk": 8, "d_vo": 12, "window": 0, "sinks": 0}),
    ("llama-mha-tied", {"d_qk": 4, "d_vo": 6, "heads_per_latent": 1, "window": 0, "sinks": 0}),
    ("qwen2", {"d_qk": 8, "d_vo": 6, "heads_per_latent": 1, "window": 0, "sinks": 0}),
    ("qwen3", {"d_qk": 16, "d_vo": 2, "bits": 1, "window": 7, "sinks": 0}),
    ("gemma3_text", {"d_qk": 8, "d_vo": 6, "window": 4, "sinks": 1}),
    ("mistral", {"d_qk": 2, "d_vo": 2, "bits": 8, "window": 3, "sinks": 1}),
]


@browser
def test_dims_cost_what_students_cache(tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    contexts, memory = (1, 5, 70, 132, 133, 256), 2**21
    cases = [[tiny_teacher(name).config.to_dict(), asked_of_page(asked)] for name, asked in DIMS]
    script = """
      return CASES.map(([config, asked]) => {
        const p = plan(readModel(config), asked, 4);
        return [
          CONTEXTS.map((n) => cacheParts(p.student, n)), p.studentWeights, mostTokens(p.student, MEMORY, 2, true),
          CONTEXTS.map((n) => partsOf(p, n)),
        ];
      });"""
    values = {"CASES": cases, "CONTEXTS": contexts, "MEMORY": memory}
    script = re.sub(r"\b(CASES|CONTEXTS|MEMORY)\b", lambda word: json.dumps(values[word[0]]), script)
    for (name, asked), (caches, weights, most, parts) in zip(DIMS, evaluated(script, tmp_path), strict=True):
        teacher = tiny_teacher(name)
        given = {"window": 128, "sinks": 4} | asked
        request = target_of(teacher.config, ConvertConfig(text=("some",), block_size=1024, **given)).request
        student = convert_as(request, teacher, ids=torch.zeros(1, 256, dtype=torch.long))
        layers = layer_caches(student.config, 4)
        assert caches == [cache_parts(layers, tokens) for tokens in contexts], asked
        assert [sum(each.values()) for each in parts] == [row["bytes"] for row in caches]
        assert weights == student.num_parameters(), asked
        assert most == most_tokens(layers, memory=memory, batch=2, grows=True)


@browser
def test_curves_are_those_of_rope_plot(tmp_path: Path) -> None:
    script = f"""
      return ["meta-llama/Llama-3.1-8B", "gemma-3-12b-text", "smollm2"].map((name) => {{
        const m = readModel({json.dumps(REAL)}[name]);
        return curvesOf(m, 16, 4096).map((c) => [Array.from(c.values), c.negative, c.least, c.mean]);
      }});"""
    names = ["meta-llama/Llama-3.1-8B", "gemma-3-12b-text", "smollm2"]
    for name, curves in zip(names, evaluated(script, tmp_path), strict=True):
        path = config_file(REAL[name], tmp_path, name.replace("/", " "))
        lists = frequency_lists(RopePlotConfig(model=str(path), dims=(16,)))[2]
        assert list(lists) == ["kept", "plain, d = 16", "aware, d = 16"]
        for frequencies, (values, negative, least, mean) in zip(lists.values(), curves, strict=True):
            wanted = stability(frequencies, torch.arange(1, 4097))
            torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), wanted, rtol=0, atol=2e-3)
            assert negative == pytest.approx(float((wanted < 0).double().mean()), abs=2e-3)
            assert (least, mean) == pytest.approx((float(wanted.min()), float(wanted.mean())), abs=2e-3)


@browser
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium goes no narrower
def test_the_page_answers_what_is_typed(width: int, tmp_path: Path) -> None:
    script = """
      const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input", {bubbles: true})); };
      const refusal = () => $("error").hidden ? null : $("error").textContent;
      const seen = () => [refusal(), $("headline").textContent, $("parts").innerText];
      const chosen = (name) => { set("model", name); return [name, $("error").hidden]; };
      const found = {first: seen(), models: Object.keys(MODELS).map(chosen)};
      set("model", "SmolLM2-135M");
      document.querySelector("input[value=dims]").click();
      set("context", 8192); set("batch", 2);
      found.dims = seen(); found.shown = [$("budget"), $("d_qk")].map((x) => x.offsetParent !== null);
      set("bits", "2"); found.codes = seen();
      set("window", "0"); set("sinks", "0"); found.refused = seen()[0];
      set("window", "-1"); found.negative = [seen()[0], $("window").getAttribute("aria-invalid")];
      set("window", "128");
      take(JSON.stringify({model_type: "gpt2"}), "gpt2.json"); found.unknown = seen()[0];
      take("[1, 2", "broken.json"); found.broken = seen()[0];
      take(JSON.stringify(OTHER), "mine.json"); found.mine = [$("model").value, ...seen()];
      found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      return found;""".replace("OTHER", json.dumps(REAL["gemma-3-12b-text"]))
    found = evaluated(script, tmp_path, width=width)
    assert found["first"][0] is None and found["first"][1].endswith("of the teacher's cache")
    assert {name for name, right in found["models"] if not right} == {"Gemma-3-12B (text)"}  # an eighth is too little
    assert found["shown"] == [False, True]
    per_token = 2 * 3 * 64 * 30 * 2  # of SmolLM2 in bfloat16
    teacher, student = 2 * 8192 * per_token, 2 * (132 * per_token + 8060 * per_token // 2)
    assert found["dims"][1].startswith(
        f"{teacher / 1e6:.0f} MB → {student / 1e6:.0f} MB: {100 * student / teacher:.1f} %"
    )
    assert "as numbers" in found["dims"][2] and "Sizes of rows of codes" in found["codes"][2]
    assert "need a window" in found["refused"]
    assert found["negative"] == ["Window: give a whole number of at least 0", "true"]
    assert "gpt2 models are not supported" in found["unknown"] and "no config.json" in found["broken"]
    assert found["mine"][0] == "mine.json (yours)" and found["mine"][1] is None
    assert found["wide"] <= 0
