"""A model as a GGUF file for llama.cpp: heads of one size as architecture llama, of two sizes as step35."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.errors import UserError
from kvlatent.files import new_file
from kvlatent.model.folder import head_is_tied
from kvlatent.model.graft import cached_heads
from kvlatent.serving.engines import check_gguf, gguf_dims, window_of
from kvlatent.serving.export.mixing import ROTATED
from kvlatent.serving.export.plain import frequency_factors, plain_weights, rope_theta

FileType = Literal["f32", "f16", "bf16", "q8_0"]
"""How matrices are stored; vectors are float32 in every file."""
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _MARKS, _SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ("ByteLevel with regex",): "gpt-2",
    ("Digits", "ByteLevel with regex"): "smollm",
    ("|".join((_ENDINGS, _WORD, r"\p{N}{1,3}", _MARKS, _SPACES)), "ByteLevel"): "llama-bpe",
    ("|".join((_ENDINGS, _WORD, r"\p{N}", _MARKS, _SPACES)), "ByteLevel"): "qwen2",
}
"""llama.cpp's name of a pre-tokenizer by its steps in tokenizer.json; under a wrong name text is split differently."""


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, file_type: FileType) -> None:
    """Write a model with its tokenizer and chat template as one GGUF file, whole or not at all.

    Args:
        model: A converted or stock model.
        tokenizer: A byte-level BPE tokenizer.
        out: The new file.
        file_type: Of matrices; `q8_0` falls back to float16 where rows are no multiple of 32.

    Raises:
        UserError: `out` exists, or llama.cpp has no place for the model or its tokenizer.
    """
    check_gguf(model.config)
    d_qk, d_vo = gguf_dims(model.config)
    kind, general_type = TYPES[file_type]
    arch = "llama" if d_qk == d_vo else "step35"
    vocabulary = _Vocabulary(tokenizer, model.config.vocab_size)

    def tensors() -> Iterator[tuple[str, Tensor, GGMLQuantizationType]]:
        for name, value in (_llama_tensors if arch == "llama" else _step35_tensors)(model, d_qk, d_vo):
            yield name, value, _stored_as(kind, name, value)

    layouts = [(name, *_layout(value.shape, stored), stored) for name, value, stored in tensors()]
    size = sum(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype, _ in layouts)
    with new_file(out, needed_bytes=size + 20_000_000) as partial:
        writer = gguf.GGUFWriter(partial, arch)
        writer.add_name(out.stem)
        writer.add_file_type(general_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model, d_qk, d_vo)
        vocabulary.add_to(writer)
        for name, shape, dtype, stored in layouts:
            nbytes = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, nbytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, value, stored in tensors():  # again, so that one tensor at a time is held in the new type
            writer.write_tensor_data(gguf.quants.quantize(value.float().numpy(), stored))
        writer.close()


# --- shape and tensors -----------------------------------------------------------------------------------------------


def _add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel, d_qk: int, d_vo: int) -> None:
    config = model.config
    layers, q_heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, cached_heads(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(window_of(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta(model))
    writer.add_key_length(d_qk)
    writer.add_value_length(d_vo)
    if d_qk == d_vo:
        writer.add_block_count(layers)
        writer.add_head_count(q_heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_dimension_count(d_qk)
        return
    # step35 alternates full and windowed attention and rotates half of a full layer's dims, so the count is doubled.
    # llama.cpp wants at least one windowed layer: an identity at the end, with one head and a window of one token.
    writer.add_block_count(layers + 1)
    writer.add_head_count([q_heads] * layers + [1])
    writer.add_head_count_kv([kv_heads] * layers + [1])
    writer.add_rope_dimension_count(2 * d_qk)
    writer.add_rope_dimension_count_swa(d_qk)
    writer.add_sliding_window(1)
    writer.add_sliding_window_pattern([False] * layers + [True])
    writer.add_expert_feed_forward_length(0)


def _llama_tensors(model: PreTrainedModel, d_qk: int, d_vo: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors under llama.cpp's names; that architecture rotates neighbouring channels, so rows of W_Q, W_K move."""
    for name, value in _tensors(model, d_qk, d_vo, gguf.MODEL_ARCH.LLAMA):
        if name.startswith("blk.") and name.split(".")[2] in ("attn_q", "attn_k"):
            value = value.unflatten(0, (-1, 2, d_qk // 2)).transpose(1, 2).flatten(0, 2)
        yield name, value


def _step35_tensors(model: PreTrainedModel, d_qk: int, d_vo: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors under llama.cpp's names, an lm_head in any case, and a last layer that adds zero."""
    yield from _tensors(model, d_qk, d_vo, gguf.MODEL_ARCH.STEP35)
    if head_is_tied(model):
        yield "output.weight", model.get_input_embeddings().weight.detach()
    hidden, layer = model.config.hidden_size, f"blk.{model.config.num_hidden_layers}"
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (d_qk, hidden),
        "attn_k": (d_qk, hidden),
        "attn_v": (d_vo, hidden),
        "attn_output": (hidden, d_vo),
        "ffn_norm": (hidden,),
    }
    for name, shape in shapes.items():
        yield f"{layer}.{name}.weight", torch.zeros(shape)


def _tensors(model: PreTrainedModel, d_qk: int, d_vo: int, arch: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    factors = frequency_factors(model, d_qk=d_qk)
    if bool((factors != 1).any()):
        yield "rope_freqs.weight", factors.float()
    for name, value in plain_weights(model, d_qk=d_qk, d_vo=d_vo, mix_keys=d_qk % ROTATED != 0):
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), value


def _stored_as(kind: GGMLQuantizationType, name: str, value: Tensor) -> GGMLQuantizationType:
    if value.ndim == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and value.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return kind


def _layout(shape: torch.Size, kind: GGMLQuantizationType) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the array that `gguf.quants.quantize` gives."""
    if kind == GGMLQuantizationType.F32:
        return tuple(shape), np.dtype(np.float32)
    if kind == GGMLQuantizationType.F16:
        return tuple(shape), np.dtype(np.float16)
    return gguf.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


# --- tokenizer -------------------------------------------------------------------------------------------------------


class _Vocabulary:
    """A tokenizer in llama.cpp's terms; built before anything is written, because it may be refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            path = Path(folder, "tokenizer.json")
            self.json: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            model = self.json.get("model") or {}
            if model.get("type") != "BPE" or model.get("byte_fallback"):
                raise UserError(
                    "the tokenizer is no byte-level BPE, the kind that is written to GGUF; export --to stock keeps it"
                )
            self.pre = pre_tokenizer_name(self.json)
            self.special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
        ids = tokenizer.get_vocab()
        if max(ids.values()) >= size:
            raise UserError(f"the tokenizer has ids up to {max(ids.values())}, the model only {size} embeddings")
        added = {token["content"]: token["special"] for token in self.json.get("added_tokens", ())}
        kinds = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
        self.tokens, self.types = [f"[PAD{index}]" for index in range(size)], [TokenType.UNUSED] * size
        for token, index in ids.items():
            self.tokens[index], self.types[index] = token, kinds[added.get(token)]
        encoded = tokenizer("a")["input_ids"]
        for name, at in (("bos", 0), ("eos", -1)):  # what encoding a text adds; llama.cpp's own defaults differ by name
            marker = getattr(tokenizer, f"{name}_token_id")
            self.special.add_special_token[name] = marker is not None and encoded[at] == marker

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write tokens, types, merges, special ids and the chat template."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        self.special.merges = self.special.merges or [""]  # an array can't be empty
        self.special.add_to_gguf(writer, quiet=True)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a `tokenizer.json` splits text before BPE.

    Raises:
        UserError: It is none of those we know.
    """
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(map(_step, outer.get("pretokenizers", [outer])))
    if steps not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(f"the tokenizer splits text like none of those we know in llama.cpp, which are {known}")
    return PRE_TOKENIZERS[steps]


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel with regex" if regex else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return str(step.get("type"))
