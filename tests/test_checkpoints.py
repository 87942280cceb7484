"""Folders come back as they were saved, whole or not at all; what can't be loaded is refused in one line."""

import errno
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from windowless import convert

from kvlatent.compress.checkpoints import convert_checkpoint
from kvlatent.compress.config import ConvertConfig
from kvlatent.data.blocks import separator_id
from kvlatent.errors import UserError
from kvlatent.files import new_folder, refuse_existing
from kvlatent.model import unpacked
from kvlatent.model.checkpoints import load_model, locate, pick_device, pick_dtype, record_of, save_checkpoint
from kvlatent.model.families import FAMILIES
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.loading import load_config, stored_dtype
from kvlatent.model.models import set_spec
from kvlatent.model.offload import open_offloaded
from kvlatent.model.spec import LatentSpec
from kvlatent.serving.export.plain import plain_weights
from kvlatent.serving.export.stock import export_stock
from kvlatent.serving.info import describe

PRESETS = ["best", "portable", "paper"]


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


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


# --- GGUF


def write_gguf(teacher: PreTrainedModel, path: Path, *, fillers: int = 0) -> None:
    """As llama.cpp stores a Llama: rotary pairs of W_Q and W_K next to each other, and a byte-level BPE tokenizer."""
    config, state = teacher.config, {name: value.numpy() for name, value in teacher.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he", "in"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"[PAD{len(tokens) + at}]" for at in range(fillers))])
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 259 + [gguf.TokenType.UNUSED] * fillers
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "h e", "i n"])
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for part, short in (
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        *((f"self_attn.{p}_proj", f"attn_{'output' if p == 'o' else p}") for p in "qkvo"),
        *((f"mlp.{p}_proj", f"ffn_{p}") for p in ("gate", "up", "down")),
    ):
        names |= {f"model.layers.{i}.{part}": f"blk.{i}.{short}" for i in range(config.num_hidden_layers)}
    for stored, value in state.items():
        name, part = stored.rsplit(".", 1)
        if names[name].endswith(("attn_q", "attn_k")):  # (heads, halves, pairs, …) → (heads, pairs, halves, …)
            value = value.reshape(-1, 2, 8, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names[name]}.{part}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_loads_converts_and_is_unpacked_once(
    tiny_teacher: Callable[[str], PreTrainedModel],
    ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = tiny_teacher("llama")
    write_gguf(teacher, tmp_path / "tiny.gguf")
    loaded, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert "unpacking tiny.gguf" in capsys.readouterr().err
    torch.testing.assert_close(logits(loaded, ids), logits(teacher, ids), rtol=0, atol=1e-4)
    assert tokenizer.decode(tokenizer("the thin", add_special_tokens=False).input_ids) == "the thin"
    student = convert(loaded, d_qk=8, d_vo=4, ids=ids)
    save_checkpoint(student, tokenizer, tmp_path / "student", record={})
    again, _ = load_model(str(tmp_path / "student"), device="cpu")
    assert torch.equal(logits(again, ids), logits(student, ids))
    load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert "unpacking" not in capsys.readouterr().err
    assert len(list((tmp_path / "cache" / "kvlatent").iterdir())) == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvlatent"


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen2-mha-tied"])
def test_biases_of_a_gguf_file_are_read_and_other_tensors_refused(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, cache: Path, name: str
) -> None:
    teacher = tiny_teacher(name)
    write_gguf(teacher, tmp_path / "biases.gguf")
    loaded, _ = load_model(str(tmp_path / "biases.gguf"), device="cpu")
    assert loaded.config.model_type == teacher.config.model_type
    torch.testing.assert_close(logits(loaded, ids), logits(teacher, ids), rtol=0, atol=1e-4)
    (tmp_path / "other.gguf").write_bytes(
        (tmp_path / "biases.gguf").read_bytes().replace(b"blk.1.attn_q.bias", b"blk.1.attn_x.bias")
    )
    with pytest.raises(UserError, match=r"lacks 1 weights of its architecture, blk\.1\.attn_q\.bias among them"):
        load_model(str(tmp_path / "other.gguf"), device="cpu")


def write_gemma_gguf(teacher: PreTrainedModel, path: Path) -> None:
    """As llama.cpp stores a Gemma 3: weights of norms one larger, and a SentencePiece tokenizer, here of bytes."""
    config = teacher.config
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "  ", "▁"])
    writer.add_token_scores([0.0] * 262)
    kinds = {gguf.TokenType.CONTROL: 4, gguf.TokenType.BYTE: 256, gguf.TokenType.NORMAL: 2}
    writer.add_token_types([kind for kind, many in kinds.items() for _ in range(many)])
    for add, index in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2)):
        add(index)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, value in teacher.state_dict().items():
        if name != "lm_head.weight":
            stored = (value + 1 if "norm" in name else value).numpy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_of_gemma_3_is_read(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, cache: Path
) -> None:
    settings = tiny_teacher("gemma3_text").config.to_dict() | {"query_pre_attn_scalar": 256}
    settings |= {"num_hidden_layers": 6, "vocab_size": 262}
    left_out = {"layer_types": None, "rope_parameters": None}  # by GGUF files, so that the defaults are meant
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(Gemma3TextConfig(**settings | left_out), dtype=torch.float32).eval()
    write_gemma_gguf(teacher, tmp_path / "gemma.gguf")
    loaded, tokenizer = load_model(str(tmp_path / "gemma.gguf"), device="cpu")
    assert loaded.config.layer_types == teacher.config.layer_types and loaded.config.sliding_window == 6
    torch.testing.assert_close(logits(loaded, ids), logits(teacher, ids), rtol=0, atol=1e-4)
    assert tokenizer.decode(tokenizer("two  spaces", add_special_tokens=False).input_ids) == "two  spaces"


def test_the_tokens_of_a_gguf_file_are_the_models_own(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path, cache: Path
) -> None:
    write_gguf(tiny_teacher("llama"), tmp_path / "tiny.gguf", fillers=3)
    _, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert tokenizer.decode([*tokenizer("the thin", add_special_tokens=False).input_ids, 260, 262]) == "the thin"
    assert len(tokenizer) == 260
    assert not {"[PAD261]", "<|endoftext|>"} & tokenizer.get_vocab().keys()
    assert separator_id(tokenizer) == 0


def test_a_replaced_gguf_file_is_another_model_whatever_its_name_and_size(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, cache: Path
) -> None:
    first, second = tiny_teacher("llama"), tiny_teacher("llama")
    second.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    (tmp_path / "elsewhere").mkdir()
    for teacher, file in ((first, "model.gguf"), (second, "model.gguf"), (first, "elsewhere/model.gguf")):
        write_gguf(teacher, tmp_path / file)
        loaded, _ = load_model(str(tmp_path / file), device="cpu")
        torch.testing.assert_close(logits(loaded, ids), logits(teacher, ids), rtol=0, atol=1e-4)
    assert len(list(cache.iterdir())) == 2


def test_a_gguf_file_is_not_that_of_the_same_name_in_the_current_folder(
    tiny_teacher: Callable[[str], PreTrainedModel],
    ids: Tensor,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = tiny_teacher("llama"), tiny_teacher("llama")
    there.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    (tmp_path / "there").mkdir()
    write_gguf(here, tmp_path / "model.gguf")
    write_gguf(there, tmp_path / "there" / "model.gguf")
    monkeypatch.chdir(tmp_path)
    for file, teacher in (("there/model.gguf", there), ("model.gguf", here)):
        loaded, _ = load_model(file, device="cpu")
        torch.testing.assert_close(logits(loaded, ids), logits(teacher, ids), rtol=0, atol=1e-4)


def test_damage_in_the_cache_is_noticed_and_mended(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tiny_teacher("llama"), tmp_path / "model.gguf")
    folder = Path(locate(str(tmp_path / "model.gguf")))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert locate(str(tmp_path / "model.gguf")) == str(folder)
    assert (folder / "model.safetensors").read_bytes() == whole
    (folder / "config.json").unlink()
    locate(str(tmp_path / "model.gguf"))
    assert (folder / "config.json").is_file()
    assert capsys.readouterr().err.count("is damaged; unpacking model.gguf again") == 2
    assert list(cache.iterdir()) == [folder]


def test_of_first_uses_at_once_one_unpacks_for_all(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tiny_teacher("llama"), tmp_path / "model.gguf")
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(locate, [str(tmp_path / "model.gguf")] * 3))
    assert [str(path) for path in cache.iterdir()] == list(folders)
    assert capsys.readouterr().err.count("unpacking") == 1


def test_what_a_killed_process_has_left_is_removed_at_the_next_start(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path, cache: Path
) -> None:
    write_gguf(tiny_teacher("llama"), tmp_path / "model.gguf")
    for _ in ("unpacked", "found"):
        (cache / ".other-0123.partial-0123456789ab" / "model").mkdir(parents=True)
        folder = locate(str(tmp_path / "model.gguf"))
        assert list(cache.iterdir()) == [Path(folder)]


def test_without_a_home_directory_the_cache_is_where_temporary_files_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # KeyError, as for a user that has no entry
    assert unpacked._cache() == Path(tempfile.gettempdir(), "kvlatent")
    refused("~/model", "no such folder: ~/model")


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0 and no more")
    with pytest.raises(UserError, match=r"can't read .*broken.gguf as GGUF"):
        load_model(str(tmp_path / "broken.gguf"), device="cpu")
    assert not (tmp_path / "cache").exists()


# --- refused


@pytest.fixture
def folder(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    save_checkpoint(tiny_student("llama"), byte_tokenizer, tmp_path / "student", record={})
    return tmp_path / "student"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(model: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(model), device="cpu")
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(folder, f"can't load {folder}: ")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"student holds no model\.safetensors")


def test_incomplete_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_map"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "k_map")


def test_unsupported_architectures_are_refused_with_the_list_of_supported_ones(tmp_path: Path) -> None:
    GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    refused(tmp_path, "'gpt2' models are not supported; supported are llama, mistral, qwen2, qwen3")


def test_foreign_specs_are_refused(folder: Path) -> None:
    latent = json.loads((folder / "config.json").read_text())["latent"]
    edit_config(folder, latent=latent | {"d_kv": 4})
    refused(folder, "unknown entries in the checkpoint's latent spec: d_kv")
    edit_config(folder, latent={k: v for k, v in latent.items() if k != "scale"})
    refused(folder, "spec is incomplete")
    edit_config(folder, latent=latent | {"d_qk": [7, 7]})
    refused(folder, "d_qk must be even")
    edit_config(folder, latent=latent | {"inv_freq": {"a": 1}})
    refused(folder, "spec is damaged: inv_freq")
    edit_config(folder, latent=latent | {"scale": "1"})
    refused(folder, "spec is damaged: scale")
    edit_config(folder, latent=[])
    refused(folder, "spec is damaged")
    edit_config(folder, latent=None)
    refused(folder, "needs its latent spec")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "no such folder")
    refused(tmp_path / "missing.gguf", "no such file")
    refused(tmp_path, "holds no config.json: not a Hugging Face checkpoint")


def test_impossible_devices_and_dtypes_are_refused() -> None:
    for device in ("quantum", "meta"):
        with pytest.raises(UserError, match=f"device '{device}' can't be used"):
            pick_device(device)
    with pytest.raises(UserError, match="dtype must be auto, float32, bfloat16 or float16; got 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


# --- a stranger's folder


@pytest.fixture
def stock(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    tiny_teacher("llama").save_pretrained(tmp_path / "stock")
    byte_tokenizer.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def refused_by_all(folder: Path, message: str) -> None:
    refused(folder, message)
    with pytest.raises(UserError, match=message):
        open_offloaded(str(folder), device="cpu")


def edit_weights(folder: Path, **changes: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_of_its_own_survives_a_config_that_says_tied(
    stock: Path, byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    edit_config(stock, tie_word_embeddings=True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(stock), ids)
    teacher, _ = load_model(str(stock), device="cpu")
    offloaded, layers = open_offloaded(str(stock), device="cpu")
    assert torch.equal(logits(teacher, ids), wanted)
    assert torch.equal(offloaded.lm_head.weight, teacher.lm_head.weight) and "lm_head.weight" in layers.files
    own = AutoModelForCausalLM.from_pretrained(stock)  # not by way of us
    assert "lm_head.weight" in dict(plain_weights(own, d_qk=16, d_vo=16))
    save_checkpoint(graft(own), byte_tokenizer, tmp_path / "student", record={})
    torch.testing.assert_close(logits(load_model(str(tmp_path / "student"))[0], ids), wanted, rtol=0, atol=1e-4)
    edit_weights(stock, **{"lm_head.weight": load_file(stock / "model.safetensors")["model.embed_tokens.weight"]})
    for model in (load_model(str(stock), device="cpu")[0], open_offloaded(str(stock), device="cpu")[0]):
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_tensors_without_a_place_are_refused(stock: Path) -> None:
    edit_weights(stock, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})  # of old: the config's
    load_model(str(stock), device="cpu")
    open_offloaded(str(stock), device="cpu")
    edit_weights(stock, **{"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})
    refused_by_all(stock, r"holds 1 tensors .* no place for, model\.layers\.0\.self_attn\.q_proj\.weight_scale_inv")


def test_what_is_quantized_is_not_read_layer_by_layer(stock: Path) -> None:
    edit_config(stock, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    edit_weights(stock, **{"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(UserError, match=r"stock is quantized \(fp8\), .*leave --offload out"):
        open_offloaded(str(stock), device="cpu")


def mxfp4_value(code: int) -> float:
    """A number of 4 bits by its definition: a sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    return (-1) ** (code >> 3) * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def with_experts_in_mxfp4(teacher: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save a gpt-oss whose experts are random numbers in MXFP4, as published; return it with these numbers."""
    config = teacher.config
    config.intermediate_size = 32
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator, packed = torch.Generator().manual_seed(0), {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in {"gate_up_proj": (64, 64), "down_proj": (32, 64)}.items():
            codes = torch.randint(16, (4, outputs, inputs // 32, 32), generator=generator)
            scales = torch.randint(122, 126, (4, outputs, inputs // 32), generator=generator)
            key = f"model.layers.{layer}.mlp.experts.{name}"
            packed[f"{key}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            packed[f"{key}_scales"] = scales.to(torch.uint8)
            numbers = torch.tensor([mxfp4_value(code) for code in codes.flatten().tolist()], dtype=torch.float64)
            weight = (numbers.view_as(codes) * 2.0 ** (scales[..., None] - 127)).flatten(2).mT
            teacher.get_parameter(key).data.copy_(weight)  # (experts, inputs, outputs)
    teacher.save_pretrained(folder)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    edit_weights(folder, **packed)
    kept = {k: x for k, x in load_file(folder / "model.safetensors").items() if f"{k}_blocks" not in packed}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return teacher.eval()


def test_experts_in_mxfp4_are_read_whole_and_layer_by_layer(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    wanted = with_experts_in_mxfp4(tiny_teacher("gpt_oss"), tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    loaded, _ = load_model(str(tmp_path / "teacher"), device="cpu", dtype="float32")
    assert torch.equal(logits(loaded, ids), logits(wanted, ids))
    opened, layers = open_offloaded(str(tmp_path / "teacher"), device="cpu", dtype="float32")
    with layers.visiting(opened.model.layers[1], 1):
        found, given = opened.model.layers[1].state_dict(), wanted.model.layers[1].state_dict()
        assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    (tmp_path / "text.txt").write_text(" ".join(f"{n * n} is the square of {n}." for n in range(200)))
    for offload in (False, True):
        asked = ConvertConfig(
            d_qk=8, d_vo=8, window=8, text=(str(tmp_path / "text.txt"),), tokens=512, block_size=64, offload=offload
        )
        convert_checkpoint(str(tmp_path / "teacher"), tmp_path / f"{offload}", asked, device="cpu", dtype="float32")
    students = [load_model(str(tmp_path / f"{offload}"), device="cpu")[0] for offload in (False, True)]
    assert not any(hasattr(student.config, "quantization_config") for student in students)
    torch.testing.assert_close(logits(students[1], ids), logits(students[0], ids), rtol=0, atol=1e-4)
    edit = load_file(tmp_path / "teacher" / "model.safetensors")
    edit.pop("model.layers.1.mlp.experts.down_proj_scales")
    save_file(edit, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*, model\.layers\.1\.mlp\.experts\.down_proj"):
        open_offloaded(str(tmp_path / "teacher"), device="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(stock: Path, value: float) -> None:
    edit_weights(stock, **{"model.norm.weight": torch.full((64,), value)})
    refused_by_all(stock, r"model\.norm\.weight holds values that are not finite")


def test_weights_of_another_shape_are_refused(stock: Path) -> None:
    edit_weights(stock, **{"lm_head.weight": torch.zeros(64, 260)})
    refused(stock, "mismatch")
    with pytest.raises(UserError, match=r"lm_head\.weight is of shape \(64, 260\); the architecture takes \(260, 64\)"):
        open_offloaded(str(stock), device="cpu")


@pytest.mark.parametrize(
    ("settings", "core"),
    [
        ({"model_max_length": "long"}, {}),
        ({"decoder": None}, {}),
        ({}, {"normalizer": {"type": "Replace", "pattern": {"Regex": "(.|\n)"}, "content": ""}}),
        ({}, {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]",
                        "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}}),
    ],
)  # fmt: skip
def test_tokenizers_that_would_fail_later_are_refused(
    stock: Path, settings: dict[str, Any], core: dict[str, Any]
) -> None:
    for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", core)):
        (stock / name).write_text(json.dumps(json.loads((stock / name).read_text()) | changes))
    refused(stock, "can't load .*stock|its tokenizer makes no tokens")


@pytest.mark.parametrize("entries", [{"num_labels": 10**9}, {"num_hidden_layers": 10**9, "model_type": "qwen3"}])
def test_a_config_of_a_billion_lists_is_refused_before_they_are_made(stock: Path, entries: dict[str, Any]) -> None:
    edit_config(stock, **entries)
    began = time.monotonic()
    refused_by_all(stock, f"its config can't be right: {next(iter(entries))}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("tokens", [{"eos_token_id": "2"}, {"eos_token_id": []}, {"pad_token_id": 10**30}])
def test_a_generation_config_names_tokens(stock: Path, tokens: dict[str, Any]) -> None:
    (stock / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], "pad_token_id": -1}))
    assert load_model(str(stock), device="cpu")[0].generation_config.eos_token_id == [0, 3]
    (stock / "generation_config.json").write_text(json.dumps(tokens))
    refused(stock, f"its generation config can't be right: {next(iter(tokens))}")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_pipes_among_the_files_are_refused(stock: Path, name: str) -> None:
    (stock / name).unlink(missing_ok=True)
    os.mkfifo(stock / name)
    refused_by_all(stock, f"{name} is no regular file")


def test_adapters_beside_the_weights_are_refused(stock: Path) -> None:
    (stock / "adapter_config.json").write_text("{}")
    refused_by_all(stock, "holds an adapter")


def test_pickles_are_not_read(stock: Path) -> None:
    torch.save(load_file(stock / "model.safetensors"), stock / "pytorch_model.bin")
    (stock / "model.safetensors").unlink()
    refused_by_all(stock, r"holds no model\.safetensors; pickles .* may run code")


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "{}/elsewhere.safetensors", "sub/x.safetensors", 3, []])
def test_an_index_names_files_beside_it(stock: Path, tmp_path: Path, where: object) -> None:
    (stock / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    name = where.format(tmp_path) if isinstance(where, str) else where
    names = load_file(tmp_path / "elsewhere.safetensors")
    (stock / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    refused_by_all(stock, "names no files beside it")


CODE = {"AutoConfig": "code.XConfig", "AutoModelForCausalLM": "code.X", "AutoTokenizer": ["code.T", "code.T"]}


def test_code_in_a_folder_is_not_run_nor_asked_about_nor_passed_on(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stock / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name in ("config.json", "tokenizer_config.json"):
        path = stock / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": CODE}))
    teacher, tokenizer = load_model(str(stock), device="cpu")
    student = convert(teacher, preset="paper", d_qk=8, d_vo=8)
    save_checkpoint(student, tokenizer, tmp_path / "student", record={})
    export_stock(student, tokenizer, tmp_path / "exported", record={})
    for folder in (tmp_path / "student", tmp_path / "exported"):
        assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    edit_config(stock, model_type="stranger")
    refused(stock, "can't load")
    with pytest.raises(UserError):
        describe(str(stock))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "kernels-community/flash-attn2"}, "names a kernel to download"),
        ({"transformers_weights": "../other.safetensors"}, "has transformers_weights"),
        ({"is_encoder_decoder": True}, "has is_encoder_decoder"),
        ({"output_attentions": True}, "has output_attentions"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_key_value_heads": 3}, "can't be right: 4 query heads, 3 KV heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "much"}, "rms_norm_eps"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": {}}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**30}}, "can't load"),
        ({"hidden_act": "tangent"}, "can't load .*tangent"),
        ({"dtype": "int8"}, "dtype: .*16 bits"),
        ({"latent": {"d_qk": 4}}, "has a latent spec, but llama models have none"),
    ],
)
def test_configs_that_cant_be_right_are_refused(stock: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(stock, **changes)
    refused(stock, message)
    with pytest.raises(UserError, match=message):
        describe(str(stock))


@pytest.mark.parametrize(
    "record",
    [
        '{"steps": 3}',
        '{"steps": [{"x": 1}]}',
        '{"steps": [{"verb": "heal", "seconds": "1"}]}',
        '{"fingerprints": [1]}',
        "[]",
        "[" * 100_000,
        "\xff",
        '{"teacher": {}}',
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, record: str) -> None:
    (tmp_path / "kvlatent.json").write_text(record, encoding="latin-1")
    with pytest.raises(UserError, match=r"kvlatent\.json is damaged: "):
        record_of(str(tmp_path))


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
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("a b").input_ids == byte_tokenizer("a b").input_ids
    assert loaded.eos_token == "<eos>"
