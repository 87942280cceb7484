"""GGUF files: read as checkpoints are, unpacked once into a cache that mends itself."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from reference import logits
from test_checkpoints_refused import refused
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
)
from windowless import convert

from kvlatent.data.blocks import separator_id
from kvlatent.errors import UserError
from kvlatent.model import unpacked
from kvlatent.model.checkpoints import load_model, locate, save_checkpoint


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
