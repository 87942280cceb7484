"""What a recipe may not say, and what a run folder may not hold: one line, and nothing is left."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import changed, write

from kvlatent import cli
from kvlatent.cli import recipe as pipeline
from kvlatent.errors import UserError


def test_dims_and_a_budget_exclude_each_other(tmp_path: Path, recipe: dict[str, Any]) -> None:
    for dims in ({"d_qk": 8, "d_vo": 8, "budget": 0.5}, {"d_qk": 8}, {}):
        wrong = write(recipe | {"students": [dims], "training": None}, tmp_path / "wrong.yaml")
        with pytest.raises(UserError, match=r"best: .*d_qk and d_vo"):
            pipeline.run(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


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
        ("held_out.text", ["{folder}/none.txt"], "does not exist"),
        ("held_out.text", ["{folder}/train.txt"], "evaluate on other text"),
        ("calibration.tokens", 10**6, "too short"),
        ("model", "{folder}/nowhere", "no such folder"),
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
    folder: Path,
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    value: Any,
    said: str,
) -> None:
    if isinstance(value, list):
        value = [item.format(folder=folder) for item in value]
    elif isinstance(value, str):
        value = value.format(folder=folder)
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
    recipe: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    other = write(changed(recipe, "calibration.tokens", 128), tmp_path / "other.yaml")
    with pytest.raises(UserError, match=r"another recipe \(calibration\)"):
        pipeline.run(other, finished[0])
    with pytest.raises(UserError, match="another recipe"):
        pipeline.run(write(recipe, tmp_path / "same.yaml"), finished[0], seed=7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    os.mkfifo(tmp_path / "mine" / "pipe")  # which shows that nothing below another's folder is looked at
    with pytest.raises(UserError, match="not a run folder"):
        pipeline.run(other, tmp_path / "mine")


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
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, content: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    (tmp_path / "run" / "report.html").unlink()
    with pytest.raises(UserError, match=r"is damaged .* remove it to make it again"):
        pipeline.run(finished[0].parent / "tiny.yaml", tmp_path / "run")


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
