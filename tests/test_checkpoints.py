"""Folders come back as they were saved, whole or not at all."""

import errno
import json
import os
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from reference import logits
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from windowless import convert

from kvlatent.errors import UserError
from kvlatent.files import new_folder, refuse_existing
from kvlatent.model.checkpoints import load_model, record_of, save_checkpoint
from kvlatent.model.families import FAMILIES
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.loading import load_config, stored_dtype
from kvlatent.model.models import set_spec
from kvlatent.model.spec import LatentSpec

PRESETS = ["best", "portable", "paper"]


# --- save → load


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *(
            (name, preset)
            for name, family in FAMILIES.items()
            for preset in (PRESETS if family.on_engines else ["best"])
        ),
        *product(["llama-mha-tied", "qwen2-mha-tied", "llama-biases", "llama-llama3-rope", "llama-yarn"], PRESETS),
    ],
)
def test_loaded_students_say_exactly_what_saved_ones_said(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
    name: str,
    preset: str,
) -> None:
    student = tiny_student(name, preset)
    save_checkpoint(
        student, byte_tokenizer, tmp_path / "student", record={"steps": [{"verb": "convert"}]}, card="# Tiny"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert type(loaded) is type(student) and spec_of(loaded) == spec_of(student)
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    tied = student.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert record_of(str(tmp_path / "student")) == {"steps": [{"verb": "convert"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("name", ["llama", "qwen2-mha-tied"])
def test_bfloat16_checkpoints_keep_float32_frequencies(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
    name: str,
) -> None:
    student = tiny_student(name)
    save_checkpoint(student, byte_tokenizer, tmp_path / "float32", record={})
    student.to(torch.bfloat16)
    save_checkpoint(student, byte_tokenizer, tmp_path / "bfloat16", record={})
    with safe_open(tmp_path / "bfloat16" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.k_map").dtype == torch.bfloat16
    for folder in ("float32", "bfloat16"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert loaded.model.rotary_emb.inv_freq.tolist() == list(spec_of(student).inv_freq)
        assert torch.equal(logits(loaded, ids), logits(student, ids))
    as_saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert as_saved.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["qwen3", "llama-mha-tied"])
def test_sharded_checkpoints_load(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path, name: str
) -> None:
    student = tiny_student(name)
    student.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(student, ids))


def test_chosen_frequencies_and_uneven_dims_are_saved(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    student = graft(tiny_teacher("llama"))
    fields = spec_of(student).to_dict() | {"d_qk": [6, 10], "d_vo": [3, 16], "per_head_frequencies": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        set_spec(student, LatentSpec.from_dict(fields))
    student.model.layers[0].self_attn.freq_index.copy_(torch.tensor([[0, 3, 7], [1, 2, 4]]))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.freq_index.tolist() == [[0, 3, 7], [1, 2, 4]]
    assert torch.equal(logits(loaded, ids), logits(student, ids))


def test_load_model_gives_model_and_tokenizer_ready_for_use(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("qwen2")
    student.generation_config.do_sample, student.generation_config.top_k = True, 7
    save_checkpoint(student, byte_tokenizer, tmp_path / "student", record={})
    loaded, tokenizer = load_model(str(tmp_path / "student"), device="cpu")
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.generation_config.top_k == 7
    assert tokenizer("naïve 東京").input_ids == byte_tokenizer("naïve 東京").input_ids
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    assert load_model(str(tmp_path / "student"), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_generation_defaults_transformers_warns_about_survive_conversion(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    # As in some published checkpoints: sampling parameters without do_sample.
    (tmp_path / "teacher" / "generation_config.json").write_text('{"temperature": 0.9, "do_sample": false}')
    teacher, tokenizer = load_model(str(tmp_path / "teacher"), device="cpu")
    student = convert(teacher, preset="paper", d_qk=8, d_vo=4)
    save_checkpoint(student, tokenizer, tmp_path / "student", record={})
    assert load_model(str(tmp_path / "student"), device="cpu")[0].generation_config.temperature == 0.9


def test_a_loaded_student_can_be_saved_again(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("mistral")
    save_checkpoint(student, byte_tokenizer, tmp_path / "first", record={})
    model, tokenizer = load_model(str(tmp_path / "first"), device="cpu")
    save_checkpoint(model, tokenizer, tmp_path / "second", record={})
    again, _ = load_model(str(tmp_path / "second"), device="cpu")
    assert torch.equal(logits(again, ids), logits(student, ids))
    assert again.config.sliding_window == 6


def test_weights_are_written_as_they_are_stored_where_the_config_says_nothing(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tiny_teacher("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert stored_dtype(load_config(str(tmp_path)), "auto") == torch.bfloat16


# --- whole or not at all


def test_an_existing_output_is_refused_and_left_alone(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already: choose another --out, or remove it"):
        save_checkpoint(tiny_student("llama"), byte_tokenizer, tmp_path / "out", record={})
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    assert refuse_existing(tmp_path / "other") == tmp_path / "other"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("torn"), UserError("no")])
def test_an_interrupted_save_leaves_no_folder(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def torn(folder: Path) -> None:
        assert list(folder.iterdir())  # the model is written by now
        raise error

    monkeypatch.setattr(byte_tokenizer, "save_pretrained", torn)
    with pytest.raises(type(error)):
        save_checkpoint(tiny_student("llama"), byte_tokenizer, tmp_path / "out", record={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_unwritable_disk_is_a_users_error(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        pytest.raises(UserError, match=r"needs .* MB; .* MB are free there"),
        new_folder(tmp_path / "out", needed_bytes=10**18),
    ):
        pass

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(byte_tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match=r"can't write .*out: No space left on device"):
        save_checkpoint(tiny_student("llama"), byte_tokenizer, tmp_path / "out", record={})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"), new_folder(tmp_path / "file" / "out"):
        pass


def test_a_killed_save_leaves_no_half_written_checkpoint_under_the_final_name(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with new_folder(tmp_path / "out") as partial:
            (partial / "config.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out") as partial:  # and doesn't stand in the way of the next
        (partial / "config.json").write_text("whole")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"


def test_tokenizers_are_saved_with_their_models(folder: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = AutoTokenizer.from_pretrained(folder / "student")
    assert loaded("a b").input_ids == byte_tokenizer("a b").input_ids
    assert loaded.eos_token == "<eos>"
