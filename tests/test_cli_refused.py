"""Bad input to any command gives one line, exit code 2, and leaves nothing behind."""

import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import check_refused, convert, healed
from transformers import GPT2Config, GPT2LMHeadModel

from kvlatent import cli
from kvlatent.errors import UserError
from kvlatent.model.checkpoints import RECORD


def make_bad_files(root: Path, folder: Path) -> None:
    """What the bad inputs below point at."""
    (root / "empty.txt").write_text(" \n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "foreign").mkdir()
    (root / "foreign" / "notes.md").write_text("no model")
    (root / "taken").mkdir()
    (root / "taken" / "mine").write_text("keep me")
    (root / "bad.gguf").write_bytes(b"GGUF")
    (root / "bad.stats").write_bytes(b"no statistics")
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        root / "gpt2"
    )
    (root / "mla.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 8}')
    (root / "wrapper.json").write_text('{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}')
    shutil.copytree(folder / "teacher", root / "truncated")
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(folder / "teacher", root / "garbled")
    (root / "garbled" / "config.json").write_text("{")
    shutil.copytree(folder / "student", root / "no-record")
    (root / "no-record" / RECORD).unlink()


TEXT = ["--text", "{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
CONVERT = ["convert", "{folder}/teacher", "--out", "{root}/out"]
DIMS = ["--d-qk", "8", "--d-vo", "8"]
HEAL = ["heal", "{folder}/student", "--out", "{root}/out", "--block-size", "32"]
STAGES = ["--stage1-tokens", "64", "--stage2-tokens", "64"]
EXPORT = ["export", "{folder}/student", "--to"]
EVAL = ["eval", "{folder}/student", "--block-size", "32", "--tokens", "64"]

BAD = {
    "odd d_qk": ([*CONVERT, *TEXT, "--d-qk", "7", "--d-vo", "8"], "even"),
    "d_qk above head_dim": ([*CONVERT, *TEXT, "--d-qk", "18", "--d-vo", "8"], "at most the model's head_dim 16"),
    "d_vo above head_dim": ([*CONVERT, *TEXT, "--d-qk", "8", "--d-vo", "17"], "between 1 and"),
    "d_qk alone": ([*CONVERT, *TEXT, "--d-qk", "8"], "go together"),
    "nothing to calibrate on": (["calibrate", "{folder}/teacher", "--out", "{root}/out"], "--text"),
    "dims and budget": ([*CONVERT, *TEXT, *DIMS, "--budget", "0.5"], "not both"),
    "budget above 1": ([*CONVERT, *TEXT, "--budget", "50"], "share"),
    "budget too small": ([*CONVERT, *TEXT, "--budget", "0.01"], "at least 0.125"),
    "no divisor for paper": ([*CONVERT, "--preset", "paper", "--d-qk", "12", "--d-vo", "8"], "divide"),
    "paper with text": ([*CONVERT, *TEXT, *DIMS, "--preset", "paper"], "not calibrated"),
    "no such reduction": ([*CONVERT, *TEXT, *DIMS, "--preset", "portable", "--qk", "project"], "can't reduce"),
    "budget for a shared list": ([*CONVERT, *TEXT, "--budget", "0.5", "--qk", "fold"], "one frequency list"),
    "best without text": ([*CONVERT, *DIMS], "--text"),
    "missing text": ([*CONVERT, *DIMS, "--text", "{root}/none.txt"], "does not exist"),
    "empty text": ([*CONVERT, *DIMS, "--text", "{root}/empty.txt"], "holds no text"),
    "no UTF-8": ([*CONVERT, *DIMS, "--text", "{root}/binary.txt"], "UTF-8"),
    "text too short": ([*CONVERT, *DIMS, "--text", "{folder}/train.txt", "--tokens", "99999"], "too short"),
    "no statistics": ([*CONVERT, *DIMS, "--stats", "{root}/bad.stats"], "no calibration statistics"),
    "unsupported family": (["info", "{root}/gpt2"], "supported are llama"),
    "unsupported family to convert": (["convert", "{root}/gpt2", "--out", "{root}/out", *TEXT, *DIMS], "supported are"),
    "truncated checkpoint": (["convert", "{root}/truncated", "--out", "{root}/out", *TEXT, *DIMS], "can't load"),
    "garbled config": (["info", "{root}/garbled"], "can't load"),
    "foreign folder": (["info", "{root}/foreign"], "no config.json"),
    "bad GGUF": (["info", "{root}/bad.gguf"], "GGUF"),
    "unknown folder": (["info", "{root}/nowhere"], "no such folder"),
    "unknown model": (["generate", "nobody/nothing", "--prompt", "x"], "can't load nobody/nothing"),
    "existing output": (["convert", "{folder}/teacher", "--out", "{root}/taken", *TEXT, *DIMS], "exists already"),
    "existing statistics": (["calibrate", "{folder}/teacher", *TEXT, "--out", "{root}/empty.txt"], "exists already"),
    "heads that latents don't divide": (
        ["convert", "{folder}/teacher", "--out", "{root}/out", *TEXT, "--heads-per-latent", "3"],
        "must divide",
    ),
    "heads that are kept apart": (
        ["convert", "{folder}/teacher", "--out", "{root}/out", *TEXT, "--qk", "pairs", "--heads-per-latent", "2"],
        "reduces every head on its own",
    ),
    "converted twice": (["convert", "{folder}/student", "--out", "{root}/out", *TEXT, *DIMS], "converted already"),
    "a share that is no number": ([*CONVERT, *TEXT, "--budget", "nan"], "share"),
    "a plan of an unknown kind": (
        ["plan", "{folder}/teacher", "--budget", "0.5", *TEXT[:2], "--out", "{root}/plan.txt"],
        "ends in .png",
    ),
    "unknown device": ([*CONVERT, *TEXT, *DIMS, "--device", "abacus"], "device"),
    "healing a teacher": (["heal", "{folder}/teacher", "--out", "{root}/out", *TEXT[:2], *STAGES], "not a converted"),
    "healing without tokens": ([*HEAL, *TEXT[:2], "--stage1-tokens", "0", "--stage2-tokens", "0"], "needs tokens"),
    "healing with negative tokens": ([*HEAL, *TEXT[:2], "--stage1-tokens", "-1", "--stage2-tokens", "64"], "negative"),
    "healing with too little text": ([*HEAL, *TEXT[:2], "--stage1-tokens", "0", "--stage2-tokens", "99999"], "short"),
    "healing by no number": ([*HEAL, *TEXT[:2], *STAGES, "--learning-rate", "nan"], "learning_rate must be a number"),
    "healing without end": ([*HEAL, *TEXT[:2], *STAGES, "--clip", "inf"], "clip must be a number up to 1e+12"),
    "healing by too high a rank": ([*HEAL, *TEXT[:2], *STAGES, "--lora-rank", "65"], "at most the 64 dims of the FFN"),
    "healing without a record": (
        ["heal", "{root}/no-record", "--out", "{root}/out", *TEXT[:2], *STAGES],
        "name it with --teacher",
    ),
    "evaluating on training text": ([*EVAL, "--text", "{folder}/train.txt"], "evaluate on other text"),
    "far gain of nobody": ([*EVAL, "--text", "{folder}/other.txt", "--far"], "--against"),
    "far gain on no text": ([*EVAL, "--against", "{folder}/teacher", "--needle", "--far"], "--text"),
    "far gain on short blocks": (
        [*EVAL, "--text", "{folder}/other.txt", "--against", "{folder}/teacher", "--far"],
        "at least 512; got 32",
    ),
    "retrieval from no context": (["eval", "{folder}/student", "--retrieval", "--trials", "0"], "at least 1 trial"),
    "evaluating on nothing": (EVAL, "nothing to evaluate on"),
    "context longer than the model": ([*CONVERT, *TEXT, *DIMS, "--context", "257"], "the model's 256 positions"),
    "healing in no context": ([*HEAL, *TEXT[:2], *STAGES, "--context", "0"], "context must be"),
    "context too long": (["bench", "{folder}/student", "--context", "999"], "exceed the 256 positions"),
    "own path of nothing": (["bench", "{folder}/student", "--own"], "give --against"),
    "benchmark in no memory": (["bench", "{folder}/student", "--memory", "nan"], "--memory must be above 0"),
    "benchmark against itself": (["bench", "{folder}/student", "--against", "{folder}/student"], "twice"),
    "empty prompt": (["generate", "{folder}/student", "--prompt", ""], "empty"),
    "no chat template": (["generate", "{folder}/student", "--prompt", "x", "--chat"], "no chat template"),
    "exporting best to stock": ([*EXPORT, "stock", "--out", "{root}/out"], "--preset portable"),
    "exporting best to gguf": ([*EXPORT, "gguf", "--out", "{root}/out"], "--preset portable"),
    "exporting a teacher to stock": (
        ["export", "{folder}/teacher", "--to", "stock", "--out", "{root}/out"],
        "ordinary checkpoint already",
    ),
    "exporting to a folder that exists": ([*EXPORT, "stock", "--out", "{root}/taken"], "exists already"),
    "exporting to a file that exists": ([*EXPORT, "gguf", "--out", "{root}/empty.txt"], "exists already"),
    "stock with a GGUF type": ([*EXPORT, "stock", "--type", "f16", "--out", "{root}/out"], "--type is for --to gguf"),
    "exporting an unsupported family": (
        ["export", "{root}/gpt2", "--to", "gguf", "--out", "{root}/out"],
        "supported are",
    ),
    "a config alone to convert": (
        ["convert", "{root}/gpt2/config.json", "--out", "{root}/out", *TEXT],
        "supported are",
    ),
    "a config alone to bench": (["bench", "{folder}/teacher/config.json"], "is a config alone"),
    "no config": (["info", "{root}/none.json"], "no such file"),
    "a config of latent attention": (["info", "{root}/mla.json"], "multi-head latent attention"),
    "a config of several models": (["info", "{root}/wrapper.json"], "wrap a text model, gemma3_text"),
    "a plan of a config by statistics": (
        ["plan", "{folder}/teacher/config.json", "--budget", "0.5", "--stats", "{root}/bad.stats"],
        "leave --stats out",
    ),
    "info on no context": (["info", "{folder}/teacher", "--context", "0"], "at least 1"),
    "info on no memory": (["info", "{folder}/teacher", "--memory", "-1"], "--memory must be above 0"),
    "doctor of nothing": (["doctor", "{root}/nowhere"], "no such folder"),
    "no run": (["report", "{root}/foreign"], "no results.json"),
    "no recipe": (["run", "{root}/none.yaml", "--out", "{root}/out"], "can't read recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_bad_files(tmp_path, folder)
    argv, said = BAD[name]
    check_refused([part.format(root=tmp_path, folder=folder) for part in argv], said, tmp_path, capfd)


LEAST = {
    "convert": ["m", "--out", "o"], "calibrate": ["m", "--out", "o"], "plan": ["m", "--out", "o", "--budget", "0.5"],
    "heal": ["m", "--out", "o", "--text", "t"], "eval": ["m", "--needle"], "generate": ["m", "--prompt", "x"],
    "export": ["m", "--to", "gguf", "--out", "o"], "report": ["run"], "run": ["a.yaml"], "sweep": ["a.yaml"],
    "rope-plot": [], "explore": [], "compress-prompt": ["m", "--prompt", "x"],
}  # fmt: skip
"""Arguments that a command can't do without, where they are more than a model."""


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_seeds_out_of_range_are_refused_by_every_command(
    command: str, seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [command, *LEAST.get(command, ["m"]), "--seed", seed]
    check_refused(argv, f"seed must be between 0 and 4294967295; got {seed}", tmp_path, capfd)


@pytest.mark.parametrize(
    ("verb", "slow"),
    [("calibrate", "compress.checkpoints.read_text"), ("convert", "compress.checkpoints.read_text"),
     ("plan", "compress.preview.load_model"), ("export", "serving.export.checkpoint.load_model")],
)  # fmt: skip
def test_an_output_has_one_command_from_its_start(
    verb: str, slow: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at what takes its time, a second one is refused, and before it does the same."""
    begun: list[int] = []
    out = tmp_path / "out.png"
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    argv = {
        "calibrate": ["calibrate", f"{folder}/teacher", *text],
        "convert": convert(folder),
        "plan": ["plan", f"{folder}/teacher", "--budget", "0.5", *text],
        "export": ["export", f"{folder}/teacher", "--to", "gguf"],
    }[verb]
    command = cli.parse([*argv, "--out", str(out)])

    def work(*_: Any, **__: Any) -> None:
        begun.append(1)
        assert len(begun) == 1
        with ThreadPoolExecutor(1) as other, pytest.raises(UserError, match=r"out\.png is being written by process"):
            other.submit(command.run).result()
        raise UserError("enough")

    monkeypatch.setattr(f"kvlatent.{slow}", work)
    with pytest.raises(UserError, match="enough"):
        command.run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["convert", "heal", "calibrate"])
def test_a_full_disk_gives_one_line_and_leaves_nothing(
    verb: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(100, 90, 10))
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    argv = {"convert": convert(folder), "heal": healed(folder), "calibrate": ["calibrate", f"{folder}/teacher", *text]}
    check_refused([*argv[verb], "--out", f"{tmp_path}/out"], "0 MB are free", tmp_path, capfd)
