"""Supported architectures: one row each. What differs between them is data; attention is one module for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlatent.errors import UserError
from kvlatent.model.spec import SLIDING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""Kinds of rotary embeddings."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: the stock classes that are grafted on, and what is special about its attention.

    Biases, windows and grouped heads are read off the stock modules; they need no entry here.
    """

    name: str
    """Stem of the transformers class names, as in `LlamaForCausalLM`."""
    qk_norm: bool = False
    """Queries and keys pass a norm, of each head or of all, so their reduction can't be folded into W_Q and W_K."""
    post_norm: bool = False
    """Norms follow attention and FFN, before what they give joins the residual stream; neither is refitted to that."""
    parallel: bool = False
    """Attention and FFN read one input and join the residual stream together; neither is refitted to that."""
    only_sliding_turn: bool = False
    """RoPE is of layers with a sliding window alone; the others know no positions."""
    gated: bool = False
    """W_Q also gives a gate for each dim of every head's output, before W_O."""
    interleaved: bool = False
    """RoPE rotates pairs of neighbouring dims, rather than dims half a head apart."""
    on_engines: bool = False
    """Whether exports and the plugin for vLLM know the family; students of others run on transformers alone."""


FAMILIES = {
    "llama": Family(name="Llama", on_engines=True),
    "mistral": Family(name="Mistral", on_engines=True),
    "qwen2": Family(name="Qwen2", on_engines=True),
    "qwen3": Family(name="Qwen3", qk_norm=True, on_engines=True),
    "mixtral": Family(name="Mixtral"),
    "qwen3_moe": Family(name="Qwen3Moe", qk_norm=True),
    "ministral3": Family(name="Ministral3"),
    "smollm3": Family(name="SmolLM3"),
    "granite": Family(name="Granite"),
    "olmo2": Family(name="Olmo2", qk_norm=True, post_norm=True),
    "olmo3": Family(name="Olmo3", qk_norm=True, post_norm=True),
    "phi3": Family(name="Phi3"),
    "glm4": Family(name="Glm4", interleaved=True, post_norm=True),
    "cohere": Family(name="Cohere", qk_norm=True, parallel=True, interleaved=True),
    "cohere2": Family(name="Cohere2", parallel=True, only_sliding_turn=True, interleaved=True),
    "gpt_oss": Family(name="GptOss"),
    "qwen3_next": Family(name="Qwen3Next", qk_norm=True, gated=True),
    "qwen3_5_text": Family(name="Qwen3_5", qk_norm=True, gated=True),
    "qwen3_5_moe_text": Family(name="Qwen3_5Moe", qk_norm=True, gated=True),
    "gemma2": Family(name="Gemma2", post_norm=True),
    "gemma3_text": Family(name="Gemma3", qk_norm=True, post_norm=True),
}
"""Family by the `model_type` of the stock config."""

REFUSED = {
    "use_bidirectional_attention": "attention in both directions",
}
"""What our attention can't compute, by the entry of a config that asks for it."""

PREFIX = "kvlatent_"
"""Converted checkpoints have model_type `kvlatent_<family>`."""


def family_of(config: PreTrainedConfig) -> Family:
    """Return the row for a stock or converted config.

    Raises:
        UserError: The architecture, or something about its attention, is not supported.
    """
    for name, what in REFUSED.items():
        if getattr(config, name, None):
            raise UserError(f"{what} ({name} of the config) is not supported")
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if family is None:
        if getattr(config, "kv_lora_rank", None):
            raise UserError(
                f"{config.model_type!r} models have multi-head latent attention (MLA): they cache one latent for all "
                "heads already, so there are no keys and values per head to reduce"
            )
        if (text := getattr(getattr(config, "text_config", None), "model_type", None)) in FAMILIES:
            raise UserError(
                f"{config.model_type!r} models wrap a text model, {text}, which is supported on its own: give a "
                "checkpoint or a config of that part alone"
            )
        raise UserError(f"{config.model_type!r} models are not supported; supported are {', '.join(FAMILIES)}")
    ropes = _ropes(config)
    for parameters in ropes:
        if (rope := parameters.get("rope_type", "default")) not in ROPE_TYPES:
            raise UserError(f"rope_type {rope!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        lists: list[Any] = [parameters.get(name) for name in ("short_factor", "long_factor")]
        if rope == "longrope" and not (all(isinstance(x, list) for x in lists) and len(lists[0]) == len(lists[1])):
            raise UserError("longrope of a config has two lists of as many factors, short_factor and long_factor")
    if len(ropes) > 1 and any(map(_by_length, ropes)):
        raise UserError("frequencies that depend on the input's length are supported in all layers, not in one type")
    return family


def rope_by_length(config: PreTrainedConfig) -> bool:
    """Whether RoPE's frequencies depend on the length of the input."""
    return any(map(_by_length, _ropes(config)))


def _by_length(parameters: dict[str, Any]) -> bool:
    rope = parameters.get("rope_type")
    lists = parameters.get("short_factor"), parameters.get("long_factor")  # alike in our exports
    return rope == "dynamic" or (rope == "longrope" and lists[0] != lists[1])


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """RoPE's parameters, of all layers or of each type of layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = [value for value in parameters.values() if isinstance(value, dict)]
    return by_type or [parameters]


def turns_alike(config: PreTrainedConfig) -> bool:
    """Whether all dims of the queries and keys of all layers rotate by one list of frequencies."""
    ropes = _ropes(config)
    whole = all(parameters.get("partial_rotary_factor", 1.0) == 1 for parameters in ropes)
    return len(ropes) == 1 and whole and not unrotated_layers(config) and not rope_by_length(config)


def unrotated_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Layers whose queries and keys know no positions."""
    layers = range(config.num_hidden_layers)
    if family_of(config).only_sliding_turn:
        return tuple(i for i in layers if config.sliding_window is None or config.layer_types[i] != SLIDING)
    turned = getattr(config, "no_rope_layers", None)  # 0 is a layer without RoPE
    return tuple(i for i in layers if turned and not turned[i])


def linear_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Layers of linear attention: they keep a state instead of keys and values, and nothing of them is reduced."""
    types = getattr(config, "layer_types", None) or ()
    return tuple(index for index, kind in enumerate(types) if kind == "linear_attention")


def norms_heads(config: PreTrainedConfig) -> bool:
    """Whether queries and keys pass a norm, which needs all dims of a head."""
    return family_of(config).qk_norm and bool(getattr(config, "use_qk_norm", True))
