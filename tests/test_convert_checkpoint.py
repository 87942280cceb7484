"""Planning, conversion and recipes spend a budget alike, and a student says what was asked for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.compress import checkpoints
from kvlatent.compress.checkpoints import calibrate_checkpoint, convert_checkpoint, target_of
from kvlatent.compress.config import CalibrateConfig, ConvertConfig, PlanConfig
from kvlatent.compress.planning import WINDOW
from kvlatent.compress.preview import plan_checkpoint
from kvlatent.compress.streamed import Stream, work_folder
from kvlatent.errors import UserError
from kvlatent.model.checkpoints import RECORD, load_model
from kvlatent.model.families import FAMILIES
from kvlatent.model.loading import load_config
from kvlatent.model.window import ALL_FAR, Near


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    tiny_teacher("llama").save_pretrained(folder / "teacher")
    byte_tokenizer.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(" ".join(f"{n * n} is the square of {n}." for n in range(400)))
    return folder


@pytest.mark.parametrize("heads_per_latent", [None, 1])
def test_what_plan_shows_is_what_convert_does(root: Path, tmp_path: Path, heads_per_latent: int | None) -> None:
    """On the same text, of which both plan on pieces, and on the same statistics."""
    teacher, text = str(root / "teacher"), (str(root / "text.txt"),)
    common: dict[str, Any] = {"budget": 0.4, "heads_per_latent": heads_per_latent, "window": 0}
    read: dict[str, Any] = {"text": text, "tokens": 6144, "block_size": 64}
    shown = plan_checkpoint(teacher, tmp_path / "a.png", PlanConfig(**common, **read))
    made = convert_checkpoint(teacher, tmp_path / "a", ConvertConfig(**common, **read))
    assert made["d_qk"] == list(shown["d_qk"]) and made["d_vo"] == list(shown["d_vo"])
    stats = tmp_path / "stats"
    settings = CalibrateConfig(text=text, tokens=1024, block_size=64, heads_per_latent=heads_per_latent, window=0)
    calibrate_checkpoint(teacher, stats, settings)
    shown = plan_checkpoint(teacher, tmp_path / "b.png", PlanConfig(**common, stats=stats))
    made = convert_checkpoint(teacher, tmp_path / "b", ConvertConfig(**common, stats=stats))
    assert made["d_qk"] == list(shown["d_qk"]) and made["d_vo"] == list(shown["d_vo"])


def test_the_record_keeps_what_was_asked_for(root: Path, tmp_path: Path) -> None:
    asked = ConvertConfig(budget=0.5, text=(str(root / "text.txt"),), tokens=512, block_size=32, window=0)
    convert_checkpoint(str(root / "teacher"), tmp_path / "student", asked)
    step = json.loads((tmp_path / "student" / RECORD).read_text())["steps"][0]
    stored = step["config"]
    assert (stored["budget"], stored["d_qk"], stored["context"], stored["qk"]) == (0.5, None, None, None)
    assert ConvertConfig(**stored | {"text": tuple(stored["text"])}) == asked
    assert step["qk"] == "project" and step["context"] == 256 and len(step["d_qk"]) == 2  # what became of it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": None}, "give either d_qk and d_vo or a budget"),
        ({"d_qk": 8, "d_vo": 8}, "one and not both"),
        ({"d_qk": 8}, "go together"),
        ({"budget": 1.5}, "got 1.5"),
        ({"qk": "magic"}, "can't reduce queries and keys by magic; stride, aware"),
        ({"qk": "fold"}, "one frequency list"),
        ({"qk": "pairs", "heads_per_latent": 2}, "heads share latents with fold and project only"),
        ({"text": ()}, "is calibrated: give text"),
        ({"preset": "paper"}, "not calibrated"),
        ({"preset": "portable", "stats": Path("stats")}, "give either text"),
        ({"context": 1000}, "context must be between 1 and"),
    ],
)
def test_requests_that_can_not_be_are_refused_before_anything_is_loaded(
    tiny_teacher: Callable[[str], PreTrainedModel], changes: dict[str, Any], said: str
) -> None:
    asked = ConvertConfig(budget=0.5, text=("text",), window=0)
    target_of(tiny_teacher("llama").config, asked)
    with pytest.raises(UserError, match=said):
        target_of(tiny_teacher("llama").config, replace(asked, **changes))


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({}, WINDOW),
        ({"budget": None, "d_qk": 32, "d_vo": 32}, WINDOW),
        ({"window": 64}, Near(64, 4)),
        ({"window": 0}, ALL_FAR),
        ({"preset": "portable"}, ALL_FAR),
        ({"qk": "pairs"}, ALL_FAR),
        ({"budget": None, "d_qk": 64, "d_vo": 64}, ALL_FAR),
    ],
)
def test_a_window_is_the_default_where_there_is_something_to_reduce(changes: dict[str, Any], near: Near) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=8192)
    assert target_of(config, replace(ConvertConfig(budget=0.5, text=("teacher",)), **changes)).request.near == near


WAYS: dict[str, dict[str, Any]] = {
    "codes": {"d_qk": 8, "d_vo": 8, "bits": 4, "window": 8},
    "codes, in order": {"budget": 0.9, "window": 8},
    "without a window, where weights are refitted": {"budget": 0.5, "window": 0},
    "portable": {"preset": "portable", "d_qk": 8, "d_vo": 8},
    "fold, which needs statistics": {"qk": "fold", "d_qk": 8, "d_vo": 8},
    "paper": {"preset": "paper", "d_qk": 8, "d_vo": 8, "text": ()},
}


@pytest.mark.parametrize(("name", "way"), [*(("llama", way) for way in WAYS), *((name, "codes") for name in FAMILIES)])
def test_one_layer_at_a_time_the_student_is_the_same(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    root: Path,
    tmp_path: Path,
    name: str,
    way: str,
) -> None:
    teacher = tiny_teacher(name)
    teacher.generation_config.repetition_penalty = 1.25
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    common = {"text": (str(root / "text.txt"),), "tokens": 1024, "block_size": 64} | WAYS[way]
    students = []
    for offload in (False, True):
        out = tmp_path / f"student-{offload}"
        made = convert_checkpoint(
            str(tmp_path / "teacher"), out, ConvertConfig(**common, offload=offload), device="cpu", dtype="float32"
        )
        students.append((load_model(str(out), device="cpu")[0], made, load_config(str(out)).to_dict()))
    (whole, made, config), (streamed, made_too, config_too) = students
    assert {**made, "out": "", "seconds": 0} == {**made_too, "out": "", "seconds": 0}
    assert config == config_too | {"_name_or_path": config["_name_or_path"]}
    assert streamed.generation_config.to_dict() == whole.generation_config.to_dict()
    wanted, found = whole.state_dict(), streamed.state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student-False", "student-True"}


class Killed(BaseException):
    """Stands for a signal."""


def test_a_conversion_goes_on_with_the_same_settings_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = (
        tmp_path / "student",
        ConvertConfig(
            d_qk=8, d_vo=8, window=8, text=(str(root / "text.txt"),), tokens=1024, block_size=64, offload=True
        ),
    )
    keep, layers = Stream.keep, list[int]()

    def noting(stream: Stream, index: int, layer: nn.Module) -> None:
        keep(stream, index, layer)
        layers.append(index)
        if layers == [0]:
            raise Killed

    monkeypatch.setattr(Stream, "keep", noting)
    with pytest.raises(Killed):
        convert_checkpoint(str(root / "teacher"), out, asked, device="cpu")
    assert work_folder(out).is_dir() and not out.exists()
    for changes in ({"d_vo": 4}, {"tokens": 512}):
        with pytest.raises(UserError, match=r"begun with other settings \(settings\)"):
            convert_checkpoint(str(root / "teacher"), out, replace(asked, **changes), device="cpu")
    convert_checkpoint(str(root / "teacher"), out, asked, device="cpu")
    assert layers == [0, 1] and not work_folder(out).exists()
    whole = convert_checkpoint(str(root / "teacher"), tmp_path / "at once", asked, device="cpu")
    assert {file.name for file in out.iterdir()} == {file.name for file in Path(whole["out"]).iterdir()}
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "at once" / file.name).read_bytes()


def test_a_killed_conversion_does_not_read_its_text_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stream that isn't there any more; whole conversions of the stream are alike."""
    stream = tmp_path / "dataset"
    stream.mkdir()
    for part in range(3):
        rows = (json.dumps({"text": f"{n * n} is the square of {n}. " * 4}) for n in range(40 * part, 40 * part + 40))
        (stream / f"train-{part}.jsonl").write_text("\n".join(rows))
    asked = ConvertConfig(
        d_qk=8, d_vo=8, window=8, text=(f"hf:{stream}",), tokens=1024, block_size=64, offload=True
    )  # fmt: skip
    wanted = convert_checkpoint(str(root / "teacher"), tmp_path / "whole", asked, device="cpu")
    keep = Stream.keep

    def killed(stream: Stream, index: int, layer: nn.Module) -> None:
        keep(stream, index, layer)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stream, "keep", killed)
        convert_checkpoint(str(root / "teacher"), tmp_path / "student", asked, device="cpu")
    shutil.rmtree(stream)
    made = convert_checkpoint(str(root / "teacher"), tmp_path / "student", asked, device="cpu")
    assert {**made, "out": "", "seconds": 0} == {**wanted, "out": "", "seconds": 0}
    for file in (tmp_path / "student").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    marks = [json.loads((tmp_path / name / RECORD).read_text())["fingerprints"] for name in ("whole", "student")]
    assert marks[0] == marks[1]


def test_hidden_states_that_were_lost_are_noticed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = (
        tmp_path / "student",
        ConvertConfig(
            d_qk=8, d_vo=8, window=8, text=(str(root / "text.txt"),), tokens=1024, block_size=64, offload=True
        ),
    )
    keep = Stream.keep

    def killed(stream: Stream, index: int, layer: nn.Module) -> None:
        keep(stream, index, layer)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stream, "keep", killed)
        convert_checkpoint(str(root / "teacher"), out, asked, device="cpu")
    states = work_folder(out) / "hidden-student-1.bin"
    states.write_bytes(bytes(states.stat().st_size))
    with pytest.raises(UserError, match=r"damaged \(hidden states before layer 1: .* remove it to begin anew"):
        convert_checkpoint(str(root / "teacher"), out, asked, device="cpu")


def test_text_of_a_teacher_on_disk_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without --offload"):
        convert_checkpoint(str(root / "teacher"), tmp_path / "x", ConvertConfig(text=("teacher",), offload=True))


def test_what_is_refused_before_the_first_layer_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoints, "check_disk", full)
    asked = ConvertConfig(d_qk=8, d_vo=8, window=8, text=(str(root / "text.txt"),), block_size=64, tokens=128)
    with pytest.raises(UserError, match="the disk is full"):
        convert_checkpoint(str(root / "teacher"), tmp_path / "x", replace(asked, offload=True), device="cpu")
    assert not list(tmp_path.iterdir())
