"""A whole recipe on a tiny random model: results, reuse, resumption, and what a recipe may not say."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.cli import recipe as pipeline
from kvlatent.cli import recipe_measures, recipe_sizes
from kvlatent.compose.policies import policy_of
from kvlatent.compress import budget
from kvlatent.data.blocks import TokenBlocks
from kvlatent.errors import UserError
from kvlatent.evaluation.config import NEAR_ONLY
from kvlatent.evaluation.joined import joined_scores, joined_text, rolling
from kvlatent.evaluation.needle import needle
from kvlatent.evaluation.tasks import TaskScore
from kvlatent.model.checkpoints import RECORD, load_model
from kvlatent.model.loading import load_tokenizer
from kvlatent.model.spec import LatentSpec

WORDS = ["river", "stone", "bread", "lamp", "morning", "harbour", "seven", "quiet", "under", "between", "carries"]


def write_text(path: Path, *, seed: int) -> str:
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(800)))
    return str(path)


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_teacher("llama").save_pretrained(folder / "teacher")
    byte_tokenizer.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path) -> dict[str, Any]:
    train = write_text(root / "train.txt", seed=1)
    heal = {"stage1_tokens": 128, "stage2_tokens": 128, "lora_rank": 2, "batch_size": 2}
    return {
        "title": "Tiny",
        "model": str(root / "teacher"),
        "block_size": 32,
        "calibration": {"text": [train], "tokens": 512},
        "training": {"text": [train]},
        "held_out": {"text": [write_text(root / "other.txt", seed=2)], "tokens": 256},
        "students": [
            {"budget": 0.5, "window": 0, "heal": heal},
            {"preset": "paper", "d_qk": 8, "d_vo": 8, "heal": heal},
        ],
        "bench": {"context": 16, "batch": 1, "new_tokens": 2},
        "generate": {"prompts": ["river stone", "bread"], "max_new_tokens": 4},
    }


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(recipe))  # which is YAML
    return path


@pytest.fixture(scope="module")
def done(root: Path, recipe: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A finished run and its results; tests only read it."""
    return root / "run", pipeline.run(write(recipe, root / "tiny.yaml"), root / "run")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").rglob("*.*")), ids=lambda path: path.stem
)
def test_the_recipes_can_be_read(path: Path) -> None:
    assert pipeline.read_recipe(path).students


def test_dims_and_a_budget_exclude_each_other(root: Path, recipe: dict[str, Any]) -> None:
    for dims in ({"d_qk": 8, "d_vo": 8, "budget": 0.5}, {"d_qk": 8}, {}):
        wrong = write(recipe | {"students": [dims], "training": None}, root / "wrong.yaml")
        with pytest.raises(UserError, match=r"best: .*d_qk and d_vo"):
            pipeline.run(wrong, root / "wrong")
    assert not (root / "wrong").exists()


def test_run_measures_every_student_and_keeps_the_first(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
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


def test_run_folder_is_complete(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
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
    root: Path, done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.delattr(pipeline, "load_model")  # nothing is loaded
    began = time.perf_counter()
    assert cli.main(["run", str(root / "tiny.yaml"), "--out", str(out), "--json"]) == 0
    assert time.perf_counter() - began < 3
    said = capsys.readouterr()
    assert json.loads(said.out) == results
    assert said.err.count("reused") == len(said.err.splitlines()) == 13
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_run_prints_the_summary_table(
    root: Path, done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(root / "tiny.yaml"), "--out", str(done[0])]) == 0
    said = capsys.readouterr().out
    assert "Half the KV cache" in said
    assert "paper, healed" in said
    assert said.rstrip().endswith("report.html")


def test_damaged_results_of_a_finished_run_are_one_line(
    root: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(done[0], tmp_path / "run")
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(results | {"spec": "."}))
    assert cli.main(["run", str(root / "tiny.yaml"), "--out", str(copy)]) == 2
    assert "is not a results file of kvlatent: spec" in capsys.readouterr().err


def test_interrupted_run_goes_on_where_it_stopped(
    root: Path,
    recipe: dict[str, Any],
    done: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(recipe_measures, "benchmark", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["run", str(root / "tiny.yaml"), "--out", f"{tmp_path}/run"]) == 130
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.delattr(pipeline, "convert_loaded")
    monkeypatch.delattr(pipeline, "heal_student")
    results = pipeline.run(root / "tiny.yaml", tmp_path / "run")
    assert results["evaluate"] == done[1]["evaluate"]  # two seeded runs are equal


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
    pipeline.run(write(small | {"students": [*others, less]}, tmp_path / "all.yaml"), tmp_path / "all")
    assert measured == [0, 4]
    pipeline.run(write(small | {"students": [less]}, tmp_path / "alone.yaml"), tmp_path / "alone")
    alone, among = tmp_path / "alone" / "model", tmp_path / "all" / "students" / "less" / "model"
    assert (alone / "model.safetensors").read_bytes() == (among / "model.safetensors").read_bytes()
    assert not (tmp_path / "all" / pipeline.PLANNING).exists()


def test_a_step_done_again_renews_the_report(
    root: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.fixture(scope="module")
def roomy(
    recipe: dict[str, Any],
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A recipe without healing, for a teacher with positions for questions about far text."""
    folder = tmp_path_factory.mktemp("roomy")
    teacher = tiny_teacher("llama")
    teacher.config.max_position_embeddings = 700
    teacher.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    small = recipe | {"model": str(folder), "students": [{"preset": "paper", "d_qk": 8, "d_vo": 4}]}
    del small["training"]
    return small


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


# --- what is refused -------------------------------------------------------------------------------------------------


def test_text_for_healing_reaches_beyond_the_window(recipe: dict[str, Any], tmp_path: Path) -> None:
    short = changed(changed(recipe, "students.0.window", 16), "training.block_size", 16)
    with pytest.raises(UserError, match="best: blocks of 16 tokens hold nothing beyond a window of 16"):
        pipeline.run(write(short, tmp_path / "short.yaml"), tmp_path / "run")


def test_memory_is_checked_before_the_first_step(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "memory_of", lambda _: 100_000)
    with pytest.raises(UserError, match=r"convert: the teacher's float32 weights take 0\.0 GB"):
        pipeline.run(write(recipe, tmp_path / "large.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def changed(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(recipe))
    *parents, last = path.split(".")
    inner = copy
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("colour", "red", "colour: unknown entry"),
        ("students.0.heal.magic", 1, "students.0.heal.magic: unknown entry"),
        ("students.0.preset", "worst", "students.0.preset: Input should be 'best', 'portable' or 'paper'"),
        ("students.0.name", "paper", "there are two students paper"),
        ("students.1.name", "best", "there are two students best"),
        ("students.0.name", "../a", "students.0.name: String should match"),
        ("students.0.qk", "magic", "best: preset best can't reduce queries and keys by magic"),
        ("students", {}, "students"),
        ("students", [], "students"),
        ("calibration.tokens", 0, "calibration.tokens"),
        ("calibration.text", [], "calibration.text"),
        ("model", None, "model"),
        ("training", None, "training"),
        ("students.1.d_qk", 7, "even"),
        ("students.0.budget", 2, "at most 1"),
        ("students.1.d_qk", 12, "divide"),
        ("students.0.heal.stage1_tokens", -1, "stage1_tokens"),
        ("students.0.heal.learning_rate", float("nan"), "learning_rate: Input should be a valid number"),
        ("students.0.heal.temperature", float("inf"), "temperature: Input should be a valid number"),
        ("students.0.heal.stage2_tokens", 10**30, "stage2_tokens must be a number up to 1e+12"),
        ("students.0.heal.weight_decay", -0.1, "weight_decay must not be negative"),
        ("students.0.heal.clip", 0, "clip must be above 0"),
        ("students.0.heal.warmup", 1.5, "warmup is a share"),
        ("students.0.budget", float("nan"), "students.0.budget"),
        ("held_out.text", ["{root}/none.txt"], "does not exist"),
        ("held_out.text", ["{root}/train.txt"], "evaluate on other text"),
        ("calibration.tokens", 10**6, "too short"),
        ("model", "{root}/nowhere", "no such folder"),
        ("generate.prompts", ["bread", ""], "generate.prompts.1"),
        ("generate.max_new_tokens", 10**9, "exceed the 256 positions"),
        ("generate.max_new_tokens", 10**400, "generate.max_new_tokens"),
        ("bench.context", 256, "exceed the 256 positions"),
        ("bench.batch", 10**12, "exceeds the memory"),
        ("held_out.block_size", 257, "held_out: blocks: 257 tokens exceed the 256 positions"),
        ("training.block_size", 512, "training: blocks: 512 tokens exceed the 256 positions"),
        ("held_out.tokens", 31, "held_out: tokens must be at least one block of 32; got 31"),
        ("students.0.window", 32, "blocks of 32 tokens hold nothing beyond a window of 32"),
        ("students.0.budget", 0.01, "give at least 0.125"),
        ("seed", -1, "seed"),
        ("seed", 2**32, "seed"),
        ("seed", True, "seed: Input should be a valid integer"),
        ("block_size", "32", "block_size: Input should be a valid integer"),
        ("calibration.tokens", 128.0, "calibration.tokens: Input should be a valid integer"),
        ("students.0.d_qk", True, "students.0.d_qk: Input should be a valid integer"),
        ("students.0.budget", True, "students.0.budget: Input should be a valid number"),
        ("students.0.heal.lora_rank", 65, "lora_rank must be at most the 64 dims of the FFN; got 65"),
        ("students.0.heal.lora_rank", True, "students.0.heal.lora_rank: Input should be a valid integer"),
        ("students.0.heal.learning_rate", True, "students.0.heal.learning_rate: Input should be a valid number"),
        ("held_out.keep", 0.5, "held_out: Value error, keep is the share of tokens that a policy keeps"),
        ("bench.policy", "h2o", "bench.policy: Input should be 'streaming'"),
        ("held_out.policy", "spindle", "held_out: best: spindle merges keys as they are before RoPE"),
        ("generate.policy", "spindle", "generate: best: spindle merges keys as they are before RoPE"),
        ("students.0.heal.checkpointing", 1, "students.0.heal.checkpointing: Input should be a valid boolean"),
    ],
)
def test_bad_recipe_gives_one_line_and_leaves_nothing(
    root: Path,
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    value: Any,
    said: str,
) -> None:
    if isinstance(value, list):
        value = [item.format(root=root) for item in value]
    elif isinstance(value, str):
        value = value.format(root=root)
    file = write(changed(recipe, path, value), tmp_path / "bad.yaml")
    assert cli.main(["run", str(file), "--out", f"{tmp_path}/run"]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("kvlatent: ")
    assert said in line
    assert all(step.startswith("[1/") for step in progress)
    assert [item.name for item in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("joined", {"text": ["{used}"], "length": 64}, "evaluate on other text"),
        ("joined", {"text": ["none.txt"], "length": 701}, "joined: windows: 701 tokens exceed the 700 positions"),
        ("joined", {"text": ["none.txt"], "length": 64, "stride": 65}, "joined: Value error, windows of 64 tokens"),
        ("needle", {"contexts": [320], "depths": 5, "trials": 4}, "needle: Value error, every one of 5 depths needs"),
        ("needle", {"contexts": [], "trials": 5}, "needle.contexts"),
        ("needle", {"contexts": [320, 100], "trials": 5}, "needle: facts and question alone need"),
        ("needle", {"contexts": [701], "trials": 5}, "needle: contexts: 701 tokens exceed the 700 positions"),
        ("needle", {"contexts": [320], "trials": 5, "depth": 3}, "needle.depth: unknown entry"),
        ("retrieval", {"contexts": [256], "trials": 1}, "retrieval: retrieval from far text needs a context of over"),
        ("retrieval", {"contexts": [640, 800], "trials": 1}, "retrieval: contexts: 800 tokens exceed"),
        ("retrieval", {"contexts": [640]}, "retrieval.trials"),
        ("tasks", {"names": []}, "tasks.names"),
        ("tasks", {"names": ["none.yaml"]}, "tasks: "),  # no such file, or no lm-eval
        ("tasks", {"names": ["letters"], "limit": 0}, "tasks.limit"),
    ],
)
def test_a_question_that_cannot_be_asked_is_told_before_the_first_step(
    roomy: dict[str, Any], tmp_path: Path, entry: str, value: dict[str, Any], said: str
) -> None:
    if value.get("text") == ["{used}"]:
        value = value | {"text": roomy["calibration"]["text"]}
    with pytest.raises(UserError, match=re.escape(said)):
        pipeline.run(write(roomy | {entry: value}, tmp_path / "bad.yaml"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_recipe_needs_another_folder(
    recipe: dict[str, Any], done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    other = write(changed(recipe, "calibration.tokens", 128), tmp_path / "other.yaml")
    with pytest.raises(UserError, match=r"another recipe \(calibration\)"):
        pipeline.run(other, done[0])
    with pytest.raises(UserError, match="another recipe"):
        pipeline.run(write(recipe, tmp_path / "same.yaml"), done[0], seed=7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    os.mkfifo(tmp_path / "mine" / "pipe")  # which shows that nothing below another's folder is looked at
    with pytest.raises(UserError, match="not a run folder"):
        pipeline.run(other, tmp_path / "mine")


def test_later_steps_may_change_and_are_done_again(
    recipe: dict[str, Any],
    done: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(done[0], tmp_path / "run")
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
    measured = {f"evaluate {label}" for label in done[1]["evaluate"]["models"]}
    assert again("held_out.tokens", 128) == {"text", "report", *measured}
    assert again("title", "Small") == {"report"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seconds.json", "[]"), ("seconds.json", "{"), ("evaluate/teacher.json", "{}"),
        ("evaluate/teacher.json", '{"token_nll": [[1e999]], "bytes": 9}'),
        ("evaluate/teacher.json", '{"token_nll": [[1e6]], "bytes": 9}'),
        ("evaluate/teacher.json", '{"token_nll": [[1.0], [1.0, 2.0]], "bytes": 9}'),
        ("generations.json", "[" * 9999), ("bench.json", "\0"),
    ],
)  # fmt: skip
def test_damage_in_a_run_folder_is_one_line(
    root: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, content: str
) -> None:
    shutil.copytree(done[0], tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    (tmp_path / "run" / "report.html").unlink()
    with pytest.raises(UserError, match=r"is damaged .* remove it to make it again"):
        pipeline.run(root / "tiny.yaml", tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x, x]\nb: [*a, *a]", "no aliases"),
        ("title: a\ntitle: b", "given twice"),
        ("seed: " + "9" * 5000, "not YAML"),
        ("title: " + "[" * 5000, "nested too deeply"),
        ("title: 2001-99-99", "not YAML"),
        ("2001-09-09: a", "not YAML"),
        ('title: "\\ud800"', "the recipe"),
        ("x" * 1_000_001, "larger than 1 MB"),
    ],
    ids=["alias", "twice", "number", "deep", "date", "key", "surrogate", "large"],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        pipeline.read_recipe(tmp_path / "bad.yaml")


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


def test_mistakes_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    good = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    text = good.read_text()
    whole = pipeline.read_recipe(good)
    for old, new, said in (
        ("batch_size: 1}", "batch_size: 1, magic: 2}", "line {}: students.0.heal.magic: unknown entry"),
        ("    budget: 0.125", "    budget: none", "line {}: students.0.budget: Input should be a valid number"),
        ("    budget: 0.125", "    budget: 1\n  - budget: 0.5", "line {}: there are two students best"),
        ("held_out:", "diagnose: true\nheld_out:\n  policy: tova", "line {}: diagnose takes whole texts in one pass"),
        ("    budget: 0.125", "    budget: 1\n    budget: 0.5", "budget is given twice, the second time in line {}"),
    ):
        path.write_text(text.replace(old, new))
        line = next(n for n, one in enumerate(path.read_text().splitlines(), 1) if new.splitlines()[-1] in one)
        with pytest.raises(UserError, match=said.format(line)):
            pipeline.read_recipe(path)
    path.write_text(text.replace("title:", "tittle:"))
    with pytest.raises(UserError, match=r"line 3: (title: Field required|tittle: unknown entry)"):
        pipeline.read_recipe(path)
    path.write_text(text.replace("- preset: best", "- name: mine\n    preset: best"))
    assert pipeline.read_recipe(path).students == [whole.students[0].model_copy(update={"name": "mine"})]


def test_two_students_of_one_preset(recipe: dict[str, Any], tmp_path: Path) -> None:
    both = [{"name": "half", "budget": 0.5, "window": 0}, {"name": "less", "d_qk": 4, "d_vo": 4, "window": 0}]
    small = {key: value for key, value in recipe.items() if key != "training"} | {"students": both}
    results = pipeline.run(write(small, tmp_path / "small.yaml"), tmp_path / "run")
    assert list(results["evaluate"]["models"]) == ["teacher", "half, no training", "less, no training"]
    assert results["recipe"]["students"] == [student | {"preset": "best"} for student in both]
    made = [tmp_path / "run" / folder for folder in ("model", "students/less/model")]
    assert [AutoModelForCausalLM.from_pretrained(path).config.latent["d_qk"] for path in made][1] == [4, 4]
    assert "half, no training" in (tmp_path / "run" / "report.html").read_text()


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="not a file"):
        pipeline.read_recipe(tmp_path / "pipe.yaml")


def test_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        pipeline.read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("title: a\nseed: 1\nbench: {context: 8, batch: 1, context: 9}\n")
    with pytest.raises(UserError, match="context is given twice, the second time in line 3"):
        pipeline.read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("just words")
    with pytest.raises(UserError, match="the recipe"):
        pipeline.read_recipe(tmp_path / "bad.yaml")


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
