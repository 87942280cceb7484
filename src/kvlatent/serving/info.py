"""What a model is, without its weights."""

from __future__ import annotations

from typing import Any

from kvlatent.fields import Fit
from kvlatent.kernels.layout import bits_of
from kvlatent.model.checkpoints import record_of
from kvlatent.model.families import family_of
from kvlatent.model.graft import cached_heads, dims_by_layer, head_dim_of, spec_in
from kvlatent.model.loading import bare_model, load_config, told_dtype
from kvlatent.model.sizes import (
    cache_parts,
    contexts_told,
    far_token_bytes,
    layer_caches,
    most_tokens,
    window_bytes,
)
from kvlatent.serving.engines import engine_names

SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes per number by dtype."""


def describe(model: str, fit: Fit | None = None, *, dtype: str = "auto") -> dict[str, Any]:
    """Family, dims, layout, engines, size and cache bytes of a model, from its config alone.

    Of codes, `k_bits` and `v_bits` are a dim's by layer. Of a student with a window, `cache_bytes_per_token` is of a
    token that has left it, `window_bytes` what a sequence takes for those that haven't, and `step` says what a window
    costs beside bytes. `cache` has the bytes of whole sequences, as `cache_parts` gives them, and `n_max` the longest
    contexts beside the weights in `memory_gib`; both are of `dtype`.

    Args:
        model: Hub id, folder, GGUF file, or `config.json`.
        fit: Which contexts, and what memory.
        dtype: Of weights and cache; `auto` is the checkpoint's, or bfloat16.
    """
    fit = fit or Fit()
    config = load_config(model)
    spec = spec_in(config)
    shape = bare_model(config, model)
    d_qk, d_vo = dims_by_layer(config)
    kind = told_dtype(config, dtype)
    layers = layer_caches(config, kind.itemsize)
    weights = shape.num_parameters() * kind.itemsize
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
    if sliding := [layer.sliding for layer in layers if layer.sliding is not None]:
        about |= {"sliding_window": sliding[0], "sliding_layers": len(sliding)}
    if spec is not None:
        about |= {"latents": cached_heads(config), "preset": spec.preset, "teacher": record_of(model).get("teacher")}
    if spec is not None and spec.k_codes:
        about |= {
            "k_bits": [round(bits_of(x), 2) for x in spec.k_codes],
            "v_bits": [round(bits_of(x), 2) for x in spec.v_codes],
        }
    if spec is not None and spec.whole_layers:
        about |= {"whole_layers": list(spec.whole_layers)}
    if spec is not None and spec.window:
        whole = {name: window_bytes(config, size) for name, size in SIZES.items()}
        maps = sum(x.numel() for name, x in shape.named_parameters() if name.endswith("_map"))
        about |= {
            "window": spec.window,
            "sinks": spec.sinks,
            "window_bits": spec.window_bits,
            "window_bytes": whole,
            "step": (
                "queries, keys and values keep the teacher's weights for the tokens met whole; the maps to latents add "
                f"{maps:,} parameters, which every decode step multiplies by as well"
            ),
        }
    about |= {
        "dtype": str(kind).removeprefix("torch."),
        "weight_bytes": weights,
        "cache": [cache_parts(layers, tokens) for tokens in fit.context or contexts_told(config)],
    }
    if fit.memory is not None:
        left = int(fit.memory * 2**30) - weights
        found = {n: most_tokens(layers, memory=left, batch=n, grows=spec is not None) for n in fit.batch}
        about |= {"memory_gib": fit.memory, "n_max": [{"batch": n, "context": most} for n, most in found.items()]}
    return about
