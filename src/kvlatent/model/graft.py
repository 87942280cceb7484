"""Graft latent attention onto stock models, and what their configs and specs say of heads and dims."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.model.attention import attentions
from kvlatent.model.config import CONFIGS, OF_THE_CLASS
from kvlatent.model.families import PREFIX, family_of, linear_layers, unrotated_layers
from kvlatent.model.folder import head_is_tied
from kvlatent.model.models import MODELS
from kvlatent.model.rope import LatentRotaryEmbedding, frequencies_of
from kvlatent.model.spec import SLIDING, LatentSpec
from kvlatent.model.stock_weights import unfused

LATENT_DIMS = 256
"""The widest that a group of heads is by default before it is reduced: fused attention takes no wider heads."""


def spec_of(model: PreTrainedModel) -> LatentSpec | None:
    """The latent spec of a converted model; None for a stock model."""
    return spec_in(model.config)


def spec_in(config: PreTrainedConfig) -> LatentSpec | None:
    """The latent spec of a converted model's config; None for a stock one."""
    latent = getattr(config, "latent", None)
    return None if latent is None else LatentSpec.from_dict(latent)


def dims_by_layer(config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """d_qk and d_vo of every layer: a converted model's own, head_dim for both in a stock one."""
    latent = getattr(config, "latent", None)
    if latent is not None:
        return tuple(latent["d_qk"]), tuple(latent["d_vo"])
    whole = (head_dim_of(config),) * config.num_hidden_layers
    return whole, whole


def cached_dims(config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims of what is cached as one head, by layer: `dims_by_layer`, or those of a group that shares a latent."""
    spec = spec_in(config)
    return dims_by_layer(config) if spec is None else spec.latent_dims


def cached_heads(config: PreTrainedConfig) -> int:
    """Heads of the cache: the model's KV heads, or its latents."""
    spec = spec_in(config)
    return int(config.num_key_value_heads) // (1 if spec is None else spec.heads_per_latent)


def head_dim_of(config: PreTrainedConfig) -> int:
    """The teacher's dims per head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def heads_per_latent_of(config: PreTrainedConfig, asked: int | None = None) -> int:
    """How many KV heads share a latent: as many as were asked for, or as have `LATENT_DIMS` in all.

    Raises:
        UserError: Latents would not be alike.
    """
    heads, most = config.num_key_value_heads, max(1, LATENT_DIMS // head_dim_of(config))
    if asked is None:
        return max(m for m in range(1, heads + 1) if heads % m == 0 and m <= most)
    if asked < 1 or heads % asked:
        raise UserError(f"heads per latent must divide the model's {heads} KV heads; got {asked}")
    return asked


def check_teacher(config: PreTrainedConfig) -> None:
    """Raise `UserError` unless the model is of a supported architecture and not converted yet."""
    family_of(config)
    if config.model_type.startswith(PREFIX):
        raise UserError("the model is converted already; start from the original checkpoint")


def identity_spec(teacher: PreTrainedModel) -> LatentSpec:
    """The spec that keeps every dim and the teacher's own frequencies: the graft it describes equals the teacher."""
    config, rotary = teacher.config, teacher.model.rotary_emb
    head_dim = head_dim_of(config)
    by_type = not hasattr(rotary, "inv_freq")  # layers with a sliding window have their own
    inv_freq, scaling = frequencies_of(rotary, head_dim, "full_attention" if by_type else None)
    sliding_inv_freq, sliding_scaling = frequencies_of(rotary, head_dim, SLIDING) if by_type else ((), 1.0)
    return LatentSpec(
        preset="none",
        head_dim=head_dim,
        d_qk=(head_dim,) * config.num_hidden_layers,
        d_vo=(head_dim,) * config.num_hidden_layers,
        qk_map="folded",
        inv_freq=inv_freq,
        per_head_frequencies=False,
        scale=attentions(teacher)[0].scaling,
        rope_scaling=scaling,
        sliding_inv_freq=sliding_inv_freq,
        sliding_rope_scaling=sliding_scaling,
        unrotated=unrotated_layers(config),
        linear_layers=linear_layers(config),
    )


def rotated_dims(spec: LatentSpec) -> int:
    """How many dims of a whole head RoPE turns."""
    return 2 * sum(frequency != 0 for frequency in spec.inv_freq)


def graft(teacher: PreTrainedModel, *, share: bool = False) -> PreTrainedModel:
    """Return a copy of `teacher` on our classes, equal to it in every logit; conversion then reduces it in place.

    Args:
        teacher: The stock model.
        share: Hold the teacher's own tensors instead of copies of them.

    Raises:
        UserError: The architecture is not supported, or the model is a converted one already.
    """
    check_teacher(teacher.config)
    model_type = teacher.config.model_type
    fields = copy.deepcopy(teacher.config.to_dict())
    for key in OF_THE_CLASS:
        fields.pop(key, None)
    fields["tie_word_embeddings"] = head_is_tied(teacher)
    spec = identity_spec(teacher)
    config = CONFIGS[model_type](**fields, latent=spec.to_dict())
    config._attn_implementation = "sdpa"
    with torch.device("meta"), init.no_init_weights():
        student = MODELS[model_type](config)
    stock = unfused(teacher.state_dict(), teacher.config, head_dim=spec.head_dim, rotated=rotated_dims(spec))
    student.load_state_dict({name: value if share else value.clone() for name, value in stock.items()}, assign=True)
    if hasattr(teacher.model.embed_tokens, "embed_scale"):  # which is no part of the state
        student.model.embed_tokens.embed_scale = teacher.model.embed_tokens.embed_scale.clone()
    student.model.rotary_emb = LatentRotaryEmbedding.of(spec, config).to(teacher.device)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.requires_grad_(True).eval()
