"""What a model is, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers import initialization as init

from kvlatent.kernels.layout import Layout
from kvlatent.model.checkpoints import record_of
from kvlatent.model.families import family_of
from kvlatent.model.folder import one_line
from kvlatent.model.graft import cached_heads, dims_by_layer, head_dim_of, spec_in
from kvlatent.model.loading import load_config
from kvlatent.model.sizes import counted_context, far_token_bytes, predicted_cache_bytes, whole_token_bytes
from kvlatent.serving.engines import engine_names

SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes per number by dtype."""


def describe(model: str) -> dict[str, Any]:
    """Family, dims, layout, engines, size and cache bytes of a model, from its config alone.

    Of codes, `k_bits` and `v_bits` are a dim's by layer. Of a student with a window, `cache_bytes_per_token` is of a
    token that has left it, `window_bytes` what a sequence takes for those that haven't, and `step` says what a window
    costs beside bytes.
    """
    config = load_config(model)
    spec = spec_in(config)
    with one_line(f"can't load {model}"), torch.device("meta"), init.no_init_weights():
        shape = AutoModelForCausalLM.from_config(config)
        shape.tie_weights()
    d_qk, d_vo = dims_by_layer(config)
    about: dict[str, Any] = {
        "model": model,
        "family": family_of(config).name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "d_qk": list(d_qk),
        "d_vo": list(d_vo),
        "layout": "stock" if spec is None else spec.layout,
        "frequencies": head_dim_of(config) // 2 if spec is None else len(spec.inv_freq),
        "parameters": shape.num_parameters(),
        "positions": config.max_position_embeddings,
        "engines": engine_names(config),
        "cache_bytes_per_token": {name: far_token_bytes(config, size) for name, size in SIZES.items()},
    }
    if spec is not None:
        about |= {"latents": cached_heads(config), "preset": spec.preset, "teacher": record_of(model).get("teacher")}
    if spec is not None and spec.k_codes:
        about |= {
            "k_bits": [round(Layout(x).bits, 2) for x in spec.k_codes],
            "v_bits": [round(Layout(x).bits, 2) for x in spec.v_codes],
        }
    if spec is not None and spec.window:
        context = counted_context(config)
        whole = {name: (spec.window + spec.sinks) * whole_token_bytes(config, size) for name, size in SIZES.items()}
        at_context = {
            name: predicted_cache_bytes(config, batch=1, tokens=context, element_size=size)
            for name, size in SIZES.items()
        }
        maps = sum(x.numel() for name, x in shape.named_parameters() if name.endswith("_map"))
        about |= {
            "window": spec.window,
            "sinks": spec.sinks,
            "window_bytes": whole,
            "cache_bytes_at": {"context": context, **at_context},
            "step": (
                "queries, keys and values keep the teacher's weights for the tokens met whole; the maps to latents add "
                f"{maps:,} parameters, which every decode step multiplies by as well"
            ),
        }
    return about
