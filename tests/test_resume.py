"""Evaluations that are interrupted go on where they were, and end as others do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.evaluation import evaluate as evaluation

MEASURES = ("perplexity", "near_only_perplexity", "rolling", "needle", "retrieval", "diagnose", "lm_eval_tasks")


@pytest.fixture(scope="module")
def root(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with `teacher` and `student`, of 1,024 positions, and `text.txt`."""
    root = tmp_path_factory.mktemp("resume")
    for name, model in {"teacher": tiny_teacher("llama"), "student": tiny_student("llama", "portable", 8, 8)}.items():
        model.config.max_position_embeddings = 1024
        model.save_pretrained(root / name)
        byte_tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("The keeper of the lamp walked along the shore and counted boats. " * 40)
    return root


def command(root: Path, *more: str) -> list[str]:
    text = ["--text", f"{root}/text.txt", "--tokens", "1024", "--block-size", "512", "--far"]
    answers = ["--retrieval", "--retrieval-contexts", "700", "--trials", "2"]
    return ["eval", f"{root}/student", "--against", f"{root}/teacher", *text, *answers, *more, "--json"]


def answer(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(argv) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measurements that are made, in order; before one called `stop` the evaluation is interrupted."""
    made: list[str] = []

    def watched(name: str, measure: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*given: Any, **settings: Any) -> Any:
            if made[:1] == ["stop"] and len(made) == 4:
                raise KeyboardInterrupt
            made.append(name)
            return measure(*given, **settings)

        return instead

    for name in MEASURES:
        monkeypatch.setattr(evaluation, name, watched(name, getattr(evaluation, name)))
    return made


@pytest.mark.parametrize(
    "more",
    [["--joined"], ["--diagnose"], ["--policy", "snapkv", "--keep", "0.25", "--needle"]],
    ids=lambda more: more[0],
)
def test_an_interrupted_evaluation_goes_on(
    root: Path, tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    whole = answer(command(root, *more), capsys)
    wanted = calls.copy()
    calls[:] = ["stop"]
    out = ["--out", f"{tmp_path}/scores"]
    assert cli.main(command(root, *more, *out)) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".scores.evaluating"]
    done = calls[1:]
    assert done == wanted[:3]
    calls.clear()
    told = answer(command(root, *more, *out), capsys)
    assert done + calls == wanted, "nothing is measured twice"
    assert told == whole | {"out": f"{tmp_path}/scores"}
    assert json.loads((tmp_path / "scores" / "eval.json").read_text()) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    assert cli.main(command(root, *more, *out)) == 2 and "exists already" in capsys.readouterr().err


def test_what_was_measured_is_of_the_same_settings_and_whole(
    root: Path, tmp_path: Path, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    calls[:] = ["stop"]
    argv = command(root, "--out", f"{tmp_path}/scores")
    assert cli.main(argv) == 130
    capsys.readouterr()
    assert cli.main([*argv, "--trials", "3", "--seed", "1"]) == 2
    assert "other settings (seed, trials)" in capsys.readouterr().err
    weights = root / "student" / "model.safetensors"
    weights.touch()
    assert cli.main(argv) == 2 and "other settings (weights)" in capsys.readouterr().err
    work = tmp_path / ".scores.evaluating"
    for damage in ('{"kind": "Perplexity", "fields": {"bytes": 1}}', '{"kind": "os", "fields": {}}', "[", "\xff"):
        (work / "0 perplexity.json").write_text(damage, encoding="latin-1")
        (work / "settings.json").unlink()
        assert cli.main(argv) == 2
        assert "0 perplexity.json" in (said := capsys.readouterr().err) and "is damaged" in said
    (work / "settings.json").write_text("[]")
    assert cli.main(argv) == 2 and "settings.json" in capsys.readouterr().err


def test_what_is_refused_before_anything_is_measured_leaves_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", f"{root}/student", "--retrieval", "--retrieval-contexts", "300", "--out", f"{tmp_path}/scores"]
    assert cli.main([*argv, "--policy", "spindle", "--trials", "0"]) == 2
    assert "at least 1 trial" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
