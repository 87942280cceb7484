"""What is read from a checkpoint folder, which may be a stranger's: each file is checked here, where it comes in.

Nothing in a folder runs as code, reads outside it or is dropped in silence: no remote code, no pickles, no kernels from
a hub, no weights from elsewhere, and every tensor is either used or named in a refusal.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import snapshot_download
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvlatent.errors import UserError, first_error
from kvlatent.model.families import PREFIX, family_of
from kvlatent.model.spec import LatentSpec

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises in the body into a `UserError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub raise many kinds
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None


# --- config and tokenizer --------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=2**31)]


def _of_weights(dtype: Any) -> Any:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return dtype
    raise ValueError("weights are of 16 bits or more")


class Counts(BaseModel):
    """Entries of a config that transformers makes lists of while it reads it."""

    model_config = ConfigDict(strict=True)

    num_hidden_layers: Annotated[int, Field(ge=1, le=2**12)] | None = None
    num_labels: Annotated[int, Field(ge=0, le=2**16)] | None = None


Rope = bool | int | float | str | list[int | float] | None
"""An entry of RoPE's parameters, which are those of all layers, or by type of layers."""


class Shape(BaseModel):
    """Entries of a config that shapes and memory follow from; without bounds, nonsense would only fail much later."""

    model_config = ConfigDict(strict=True, from_attributes=True, allow_inf_nan=False)

    vocab_size: Count
    hidden_size: Annotated[int, Field(ge=1, le=2**20)]
    intermediate_size: Count | None = None
    """None where all FFNs are experts."""
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: Count | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=2**12)]
    num_attention_heads: Annotated[int, Field(ge=1, le=2**16)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=2**16)]
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)] | None = None
    max_position_embeddings: Count
    sliding_window: Count | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] = 0
    layer_norm_eps: Annotated[float, Field(ge=0, le=1)] = 0
    attn_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    final_logit_softcapping: Annotated[float, Field(gt=0)] | None = None
    logit_scale: float = 1
    tie_word_embeddings: bool
    rope_parameters: dict[str, Rope] | dict[str, dict[str, Rope]]
    dtype: Annotated[Any, AfterValidator(_of_weights)] = None


def read_config(source: str, **where: Any) -> PreTrainedConfig:
    """Read and check the config of a folder, hub id or (with `gguf_file`) GGUF file.

    Raises:
        UserError: The model is not supported, or its config asks for what no supported model needs.
    """
    try:
        Counts.model_validate(PreTrainedConfig.get_config_dict(source, **where)[0])
    except ValidationError as error:
        raise UserError(f"its config can't be right: {first_error(error)}") from None
    config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    family_of(config)
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, name, None)):
            raise UserError(f"its config names a kernel to download ({getattr(config, name)}), which is code")
    for name in ("use_kernels", "kernel_config", "transformers_weights", "is_encoder_decoder", "output_attentions"):
        if getattr(config, name, None):
            raise UserError(f"its config has {name}, which is not supported; remove the entry")
    try:
        Shape.model_validate(config)
    except ValidationError as error:
        raise UserError(f"its config can't be right: {first_error(error)}") from None
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if q_heads % kv_heads or (getattr(config, "head_dim", None) is None and config.hidden_size % (2 * q_heads)):
        raise UserError(
            f"its config can't be right: {q_heads} query heads, {kv_heads} KV heads, hidden_size {config.hidden_size}"
        )
    latent = getattr(config, "latent", None)
    if latent is not None:
        if not config.model_type.startswith(PREFIX):
            raise UserError(f"its config has a latent spec, but {config.model_type} models have none")
        spec = LatentSpec.from_dict(latent)
        if len(spec.d_qk) != config.num_hidden_layers:
            raise UserError(f"the latent spec names {len(spec.d_qk)} layers; the model has {config.num_hidden_layers}")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
        if spec.head_dim != head_dim:
            raise UserError(f"the latent spec is of heads of {spec.head_dim} dims; the model's have {head_dim}")
        if kv_heads % spec.heads_per_latent:
            raise UserError(f"the latent spec joins {spec.heads_per_latent} KV heads; the model has {kv_heads}")
    return config


def in_mxfp4(config: PreTrainedConfig) -> bool:
    """Whether experts are stored in MXFP4, which is read as numbers of 16 or 32 bits wherever a model is loaded."""
    quantized = getattr(config, "quantization_config", None)
    return quantized is not None and quantized.get("quant_method") == "mxfp4"


def forget_quantization(model: PreTrainedModel) -> None:
    """Let a model whose weights were dequantized be saved as any other, and its students too."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


Token = Annotated[int, Field(ge=-1, le=2**31)]


class Generation(BaseModel):
    """Entries of a generation config that decoding goes by whatever else is asked for."""

    model_config = ConfigDict(strict=True, from_attributes=True)

    bos_token_id: Token | None = None
    eos_token_id: Token | Annotated[list[Token], Field(min_length=1)] | None = None
    pad_token_id: Token | None = None


def check_generation(model: PreTrainedModel) -> None:
    """Raise `UserError` unless a loaded model's generation config names tokens where it should."""
    try:
        Generation.model_validate(model.generation_config)
    except ValidationError as error:
        raise UserError(f"its generation config can't be right: {first_error(error)}") from None


SAMPLE = "A text: ä, 漢, 🙂.\n"
"""What every tokenizer has tokens for, if only one for what it doesn't know."""


def read_tokenizer(source: str, **where: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder, hub id or (with `gguf_file`) GGUF file, and try it, so that no text fails later.

    Raises:
        UserError: It makes no tokens.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    tokenizer.init_kwargs.pop("auto_map", None)  # names code that isn't copied with it
    settings = {name: getattr(tokenizer, name, value) for name, value in tokenizer.init_kwargs.items()}
    json.dumps(
        settings, ensure_ascii=False, default=_added
    ).encode()  # as saving does: what can't be written fails here
    if not tokenizer(SAMPLE)["input_ids"]:
        raise UserError("its tokenizer makes no tokens of a text")
    return tokenizer


def _added(value: Any) -> str:
    """What a tokenizer's settings hold beside JSON, as text."""
    if isinstance(value, AddedToken):
        return str(value)
    raise TypeError(f"its tokenizer's settings can't be saved: {value!r} is no JSON")


# --- weights ---------------------------------------------------------------------------------------------------------


class Index(BaseModel):
    """`model.safetensors.index.json`: which file holds which tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/\\]+\.safetensors$")]]


def weight_files(source: str) -> dict[str, Path]:
    """The safetensors file that holds each tensor of a folder or hub id.

    Raises:
        UserError: There are none, they don't lie in the folder, or an adapter lies beside them.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["model*.safetensors", INDEX, ADAPTER]))
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{source} holds an adapter ({ADAPTER}), which changes the model; merge it into the weights first "
            "(merge_and_unload of peft), or move it elsewhere"
        )
    if (folder / WEIGHTS).is_file():
        shards, promised = [WEIGHTS], {}
    elif (folder / INDEX).is_file():
        try:
            promised = Index.model_validate_json((folder / INDEX).read_bytes()).weight_map
        except ValidationError as error:
            raise UserError(f"{folder / INDEX} names no files beside it: {first_error(error)}") from None
        shards = sorted(set(promised.values()))
    else:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "; pickles (.bin, .pt, .pth) may run code and are not read: save it as safetensors" if pickles else ""
        raise UserError(f"{source} holds no {WEIGHTS}{why}")
    files: dict[str, Path] = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), folder / shard)
    if absent := sorted(set(promised) - set(files)):
        raise UserError(f"{source} lacks {absent[0]}, which its index names")
    return files


def weights_dtype(source: str) -> torch.dtype:
    """The dtype that a folder's or hub id's embeddings are stored in."""
    name = "model.embed_tokens.weight"
    with safe_open(weight_files(source)[name], framework="pt") as file:
        return file.get_slice(name)[:0].dtype


def check_all_used(what: str, *, missing: Collection[str], unused: Collection[str]) -> None:
    """Raise `UserError` unless the tensors of `what` are those that its architecture takes, no less and no more."""
    if missing:
        raise UserError(f"{what} lacks {len(missing)} weights of its architecture, {min(missing)} among them")
    if unused:
        raise UserError(
            f"{what} holds {len(unused)} tensors that its architecture has no place for, {min(unused)} among them; "
            "without them it would be another model"
        )


def check_finite(what: str, name: str, values: Tensor) -> None:
    """Raise `UserError` where a tensor holds an infinity or what is no number."""
    if values.is_floating_point() and values.numel() and not bool(torch.stack(values.aminmax()).isfinite().all()):
        raise UserError(
            f"{what}: {name} holds values that are not finite in {str(values.dtype).removeprefix('torch.')}"
        )


def head_is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embeddings, whatever the config says: fine-tuned checkpoints may hold both."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
