"""GGUF files, dequantized once into the user's cache and checked by content: what is reused is what was read."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import torch
import xxhash
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.files import at_home, check_disk, discard, replaced, sole_writer, sweep
from kvlatent.model.folder import check_all_used, forget_quantization, one_line, read_config, read_tokenizer

HASHES = "hashes.json"
"""Of every other file in an unpacked folder."""


def unpacked(file: Path) -> Path:
    """The float32 safetensors folder of a GGUF file; made at the first use and again when it is damaged.

    Of processes that come first at the same time one unpacks and the others wait for it.

    Raises:
        UserError: The file can't be read, or its model is not supported.
    """
    sweep(_cache())
    folder = _cache() / f"{file.stem[:80]}-{_hash_of(file, hashlib.sha256)[:16]}"
    if _intact(folder):
        return folder
    with sole_writer(folder, wait=True):
        if _intact(folder):
            return folder
        if folder.is_dir():
            print(f"{folder} is damaged; unpacking {file.name} again", file=sys.stderr)
            discard(folder, of=folder)
        else:
            print(f"unpacking {file.name} into {folder}", file=sys.stderr)
        with one_line(f"can't read {file} as GGUF"):
            model, tokenizer = _read(file)
        check_disk(folder, sum(p.numel() * p.element_size() for p in model.parameters()) + 50_000_000)
        with one_line(f"can't write {folder}"), replaced(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            hashes = {path.name: _hash_of(path, xxhash.xxh3_128) for path in partial.iterdir()}
            (partial / HASHES).write_text(json.dumps(hashes, indent=2) + "\n")
    return folder


def _cache() -> Path:
    """`$XDG_CACHE_HOME/kvlatent`, by default under the home directory, or where temporary files go without one."""
    cache = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (cache if cache.is_absolute() else Path(tempfile.gettempdir())) / "kvlatent"


def _intact(folder: Path) -> bool:
    """Whether the files of an unpacked folder are those that were written."""
    try:
        hashes = json.loads((folder / HASHES).read_text())
        return {path.name for path in folder.iterdir()} == {*hashes, HASHES} and all(
            _hash_of(folder / name, xxhash.xxh3_128) == value for name, value in hashes.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _hash_of(path: Path, kind: Callable[[], Any]) -> str:
    about = path.stat()
    return _hash(path.resolve(), about.st_size, about.st_mtime_ns, kind)


@lru_cache
def _hash(path: Path, size: int, mtime_ns: int, kind: Callable[[], Any]) -> str:
    """Hash a file once per process; size and time tell whether it is still the same."""
    found = kind()
    with path.open("rb") as file:
        while part := file.read(2**24):
            found.update(part)
    return found.hexdigest()


def _read(file: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a GGUF file."""
    where = {"gguf_file": str(file.absolute())}  # by name alone, one in the current folder would come first
    config = read_config(str(file.parent), **where)
    reader = gguf.GGUFReader(file)
    _check_rope(reader, file)
    _check_merges(reader, file)
    names = {tensor.name for tensor in reader.tensors}
    if config.model_type == "llama":
        config = _with_biases(config, names)
    wanted = _tensor_names(config, reader)
    check_all_used(str(file), missing=wanted - names, unused=names - wanted - {"rope_freqs.weight"})
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, dtype=torch.float32, trust_remote_code=False, **where
    )
    forget_quantization(model)
    tokenizer = read_tokenizer(str(file.parent), **where)
    _drop_strangers(tokenizer, reader)
    return model, tokenizer


def _with_biases(config: PreTrainedConfig, names: set[str]) -> PreTrainedConfig:
    """The config of a file of architecture llama, which says by its tensors alone whether there are biases.

    A Llama has them on all of attention's linears or on none; with none on the output it was a Qwen2.
    """
    if "blk.0.attn_q.bias" in names and "blk.0.attn_output.bias" not in names:
        shape = config.to_dict()
        return Qwen2Config(**{name: shape[name] for name in shape if name not in ("model_type", "architectures")})
    config.attention_bias, config.mlp_bias = "blk.0.attn_q.bias" in names, "blk.0.ffn_gate.bias" in names
    return config


def _check_rope(reader: gguf.GGUFReader, file: Path) -> None:
    """Raise `UserError` if the file changes rotary frequencies in a way that transformers ignores."""
    own = any(tensor.name == "rope_freqs.weight" and (tensor.data != 1).any() for tensor in reader.tensors)
    scaled = [
        name
        for name, field in reader.fields.items()
        if name.endswith("rope.scaling.type")
        if field.contents() != "none"
    ]
    if own or scaled:
        raise UserError(
            f"{file} has frequencies of its own ({'rope_freqs' if own else scaled[0]}), which transformers ignores; "
            f"llama.cpp reads them (llama-server -m {file.name}), and kvlatent the folder that it was exported from"
        )


def _check_merges(reader: gguf.GGUFReader, file: Path) -> None:
    """Raise `UserError` if a BPE tokenizer merges nothing, which transformers can't read back."""
    kind, merges = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", "merges"))
    if kind is not None and kind.contents() == "gpt2" and not (merges is not None and any(merges.contents())):
        raise UserError(
            f"the tokenizer of {file} has no merges, which transformers can't read; give the folder that the file was "
            "exported from"
        )


def _drop_strangers(tokenizer: Any, reader: gguf.GGUFReader) -> None:
    """Take out of a BPE what is no token of the model.

    `[PAD316]` stands for an embedding without a token, and transformers adds an `<|endoftext|>` after the last one.
    """
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if tokens is None or kinds is None or core["model"]["type"] != "BPE":
        return
    numbered = enumerate(zip(tokens.contents(), kinds.contents(), strict=True))
    own = {at for at, (token, kind) in numbered if kind != gguf.TokenType.UNUSED or token != f"[PAD{at}]"}
    core["model"]["vocab"] = {token: at for token, at in core["model"]["vocab"].items() if at in own}
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] in own]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))


def _tensor_names(config: PreTrainedConfig, reader: gguf.GGUFReader) -> set[str]:
    """What llama.cpp calls the tensors of a model, in files of the architecture that the file names."""
    named = reader.get_field("general.architecture")
    kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if named is not None and name == named.contents()]
    names = gguf.get_tensor_name_map(kinds[0] if kinds else gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"), init.no_init_weights():
        shape = AutoModelForCausalLM.from_config(config)
        shape.tie_weights()
    return {names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in shape.named_parameters()}
