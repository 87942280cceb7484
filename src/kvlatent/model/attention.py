"""LatentAttention, the one attention module of all families."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from kvlatent.kernels import cpu_step
from kvlatent.kernels.attention import latent_attention
from kvlatent.kernels.codes import Codes, WholeCodes
from kvlatent.kernels.cpu_linear import linear_outputs
from kvlatent.model.compatibility import WITHOUT_EFFECT, refuse_unknown
from kvlatent.model.families import family_of
from kvlatent.model.far_maps import FarMaps, joined, mapped
from kvlatent.model.rope import query_growth, rotate, turned_back
from kvlatent.model.spec import LatentSpec
from kvlatent.model.window import Far, Near, Segment, Whole, decode, sinks_of, to_heads, windowed_attention


class LatentAttention(nn.Module):
    """Grouped-query attention with queries and keys of d_qk dims and values of d_vo dims per head.

    Replaces the stock module of a decoder layer and keeps its parameter names. `q_proj` and `k_proj` give d_qk dims
    per head when the reduction is folded into them; otherwise head_dim dims, and the per-head maps `q_map`
    (q_heads, head_dim, d_qk) and `k_map` (kv_heads, head_dim, d_qk) reduce them before or after RoPE. Only reduced
    keys and values enter the cache (KV-Latent, arXiv:2507.11273, Section 3.1).

    With `heads_per_latent` m, the keys of m heads, side by side, have one `k_map` (latents, m·head_dim, m·d_qk), their
    values one projection, and the cache holds kv_heads/m heads of m times the dims, for the same bytes. Every query
    head has a `q_map` (q_heads, head_dim, m·d_qk) to the latent of its group. Folded, both are in W_Q and W_K.

    What heads read from a latent wider than head_dim comes back to head_dim by an `o_map` (q_heads, m·d_vo, head_dim)
    before W_O, unless folded. Where queries are many, keys and values are taken back to the heads instead of queries to
    the latent: (q·q_map)·k' = q·(k'·q_mapᵀ), the same attention for less arithmetic, as multi-head latent attention
    does it (arXiv:2405.04434).
    """

    q_map: Tensor | None
    k_map: Tensor | None
    v_map: Tensor | None
    o_map: Tensor | None
    freq_index: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None
    far_bias: Tensor | None

    def __init__(self, config: PreTrainedConfig, layer_idx: int, stock: nn.Module, spec: LatentSpec) -> None:
        """Build the module for layer `layer_idx` with the biases and QK-norms of `stock`; weights stay unset."""
        super().__init__()
        spec = spec.seen_by(layer_idx)
        self.config, self.layer_idx = config, layer_idx
        self.is_causal = True
        self.q_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group_size = self.q_heads // self.kv_heads
        self.d_qk, self.d_vo = spec.d_qk[layer_idx], spec.d_vo[layer_idx]
        self.heads_per_latent = spec.heads_per_latent
        self.latents = self.kv_heads // self.heads_per_latent
        self.scale, self.qk_map = spec.scale, spec.qk_map
        self.cap: float | None = getattr(config, "attn_logit_softcapping", None)
        self.turns = layer_idx not in spec.unrotated
        cached_keys, cached_values = (dims[layer_idx] for dims in spec.latent_dims)
        self.cached_keys = cached_keys
        rotated = spec.head_dim if spec.qk_map == "after_rope" else cached_keys

        def linear(name: str, inputs: int, outputs: int) -> nn.Linear:
            old: Any = getattr(stock, name, None) or stock.qkv_proj
            where = {"device": old.weight.device, "dtype": old.weight.dtype}
            return nn.Linear(inputs, outputs, bias=old.bias is not None, **where)

        hidden = config.hidden_size
        folded = spec.qk_map == "folded"
        self.q_proj = linear("q_proj", hidden, self.q_heads * (cached_keys if folded else spec.head_dim))
        self.k_proj = linear("k_proj", hidden, self.kv_heads * (self.d_qk if folded else spec.head_dim))
        self.near, self.window = Near(spec.window, spec.sinks), spec.window
        self.v_proj = linear("v_proj", hidden, self.kv_heads * (spec.head_dim if self.window else self.d_vo))
        output_map = spec.output_map[layer_idx]
        if gated := family_of(config).gated:  # of dims of heads, to which values return first
            output_map = output_map or cached_values != spec.head_dim or self.heads_per_latent > 1
        self.g_proj = linear("q_proj", hidden, self.q_heads * spec.head_dim) if gated else None
        self.o_proj = linear("o_proj", self.q_heads * (spec.head_dim if output_map else cached_values), hidden)
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.sinks: Tensor | None = getattr(stock, "sinks", None)  # learned logits (q_heads,), no tokens
        weight = self.q_proj.weight

        def head_map(heads: int, inputs: int, outputs: int) -> nn.Parameter:
            return nn.Parameter(weight.new_empty(heads, inputs, outputs).normal_(std=spec.head_dim**-0.5))

        if folded:
            self.q_map = self.k_map = None
        else:
            self.q_map = head_map(self.q_heads, spec.head_dim, cached_keys)
            self.k_map = head_map(self.latents, self.heads_per_latent * spec.head_dim, cached_keys)
        joint = self.heads_per_latent * spec.head_dim
        self.v_map = head_map(self.latents, joint, cached_values) if self.window else None
        self.o_map = head_map(self.q_heads, cached_values, spec.head_dim) if output_map else None
        rows = spec.rows_of(layer_idx)
        self.codes = None if rows is None else (Codes(rows[0].groups), Codes(rows[1].groups))
        self.near_codes = WholeCodes(spec.head_dim) if spec.window_bits < 16 else None
        for name, width in (("k_mean", cached_keys), ("v_mean", cached_values)):
            self.register_buffer(name, weight.new_zeros(self.latents, 1, width) if self.codes else None)
        self.register_buffer("far_bias", weight.new_zeros(self.q_heads, 1) if self.codes else None)
        # Which of the inverse frequencies each KV head rotates by; without it, all of them in order.
        index = torch.arange(rotated // 2, device=weight.device).repeat(self.kv_heads, 1)
        self.register_buffer("freq_index", index if spec.per_head_frequencies else None)

    def queries_keys_values(
        self,
        hidden_states: Float[Tensor, "batch seq hidden"],
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor | None = None,
        *,
        whole_queries: bool = False,
    ) -> tuple[
        Float[Tensor, "batch q_heads seq d_query"],
        Float[Tensor, "batch latents seq d_key"],
        Float[Tensor, "batch latents seq d_value"],
    ]:
        """Project, normalise, reduce and rotate, in the order the spec says; keys and values come out as cached.

        Args:
            hidden_states: The layer's normalised input.
            cos: Cosines of `LatentRotaryEmbedding`, (batch, seq, pairs).
            sin: Sines, likewise.
            position_ids: Positions, (batch, seq), for models whose queries grow with them; others need none.
            whole_queries: Leave out the queries' map after RoPE, so that they stay head_dim wide.
        """
        q, k, v = linear_outputs(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q = self._of_heads(q, self.q_norm, self.q_heads)
        k = self._of_heads(k, self.k_norm, self.latents if self.qk_map == "folded" else self.kv_heads)
        if self.qk_map == "before_rope":
            assert self.q_map is not None and self.k_map is not None
            q, k = _reduced(q, self.q_map), _reduced(k, self.k_map)
        v = _by_head(v, self.kv_heads if self.window else self.latents)
        maps_follow = self.qk_map == "after_rope" and not self.window
        q_map, k_map = (self.q_map, self.k_map) if maps_follow else (None, None)
        q_map = None if whole_queries else q_map
        q, k = self._turned(q, k, cos, sin) if self.turns else (q, k)
        if position_ids is not None and (growth := query_growth(self.config, position_ids)) is not None:
            q = q * growth.to(q.dtype)
        return q if q_map is None else _reduced(q, q_map), k if k_map is None else _reduced(k, k_map), v

    def _turned(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after RoPE."""
        if self.freq_index is None and q.shape[3] % (2 * cpu_step.LANES) == 0 and cpu_step.fits(q, k, cos, sin):
            return cpu_step.turned_rows(q, k, cos, sin)
        if self.freq_index is None:
            cos, sin = cos[:, None], sin[:, None]  # (batch, 1, seq, pairs)
        else:
            cos, sin = (x[..., self.freq_index].transpose(1, 2) for x in (cos, sin))  # (batch, kv_heads, seq, pairs)
        k = rotate(k, cos, sin)
        if self.freq_index is not None and self.group_size > 1:
            cos, sin = (x.repeat_interleave(self.group_size, dim=1) for x in (cos, sin))
        return rotate(q, cos, sin), k

    def turned_back(self, x: Float[Tensor, "batch heads seq head_dim"], cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries or keys of an unreduced attention as they were before it, by the cos and sin they got."""
        return turned_back(x, cos[:, None], sin[:, None]) if self.turns else x

    def far_maps(self) -> FarMaps:
        """How tokens are reduced that have left the window."""
        maps, held = self._parameters, self._buffers  # by attribute each would take a decode step microseconds
        q, k, v, o = (maps[f"{name}_map"] for name in "qkvo")
        assert q is not None and k is not None and v is not None and o is not None
        return FarMaps(q, k, v, o, held["k_mean"], held["v_mean"], self.codes, self.near_codes, held["far_bias"])

    def _split(self, k: Tensor, v: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Whole, Far]:
        """A sequence without a cache: all of it whole, and latents of what leaves the last query's window."""
        k, v = (maps.held_and_met(x)[1] for x in (k, v))
        sink_k, sink_v, columns = sinks_of(k, v, mask, self.near.sinks)
        far_k, far_v = maps.seen(*(x[:, :, : max(0, k.shape[2] - self.window)] for x in (k, v)))
        first = mask is None
        whole = Whole(k=k, v=v, start=0, sink_k=sink_k, sink_v=sink_v, sink_columns=columns, sinks_first=first)
        return whole, Far(k=far_k, v=far_v, start=0)

    def _windowed(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor, Tensor | None], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Attend to the newest tokens and the sinks whole, to all others through latents."""
        q, k, v = self.queries_keys_values(hidden, *positions)
        maps = self.far_maps().of(k.dtype)
        if mask is not None and mask.dtype != torch.bool:  # as eager attention has it: 0 where a query may look
            mask = mask == 0
        near, far = self._split(k, v, maps, mask) if cache is None else cache.update(k, v, self.layer_idx, maps, mask)
        softmax: dict[str, Any] = {"scale": self.scale, "cap": self.cap, "learned_sinks": self.sinks}
        if isinstance(near, Segment) and isinstance(far, Segment):
            out = decode(q, near, far, maps, **softmax)
        else:
            pays = taking_back_pays(maps.o, q.shape[2])
            out = windowed_attention(q, near, far, maps, window=self.window, mask=mask, unabsorbed=pays, **softmax)
        return self._given(out, hidden)

    def _given(self, out: Float[Tensor, "batch q_heads seq d_out"], hidden_states: Tensor) -> Tensor:
        """What W_O makes of the heads' outputs, behind their gates."""
        out = out.reshape(len(out), 1, -1) if out.shape[2] == 1 else out.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            out = out * linear_outputs(hidden_states, self.g_proj)[0].sigmoid()
        return linear_outputs(out, self.o_proj)[0]

    @staticmethod
    def _of_heads(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
        """Projected queries or keys, normalised: (batch, seq, heads·dim) → (batch, heads, seq, dim).

        Norms are of every head, with weights for one or, in two dims, for each, or of all heads together.
        """
        of_all = norm is not None and norm.weight.shape == x.shape[-1:]
        x = norm(x) if norm is not None and of_all else x
        if norm is None or of_all:
            return _by_head(x, heads)
        return norm(x.unflatten(-1, (heads, -1))).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        is_causal: bool | None = None,
        output_attentions: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend; same contract as the stock module, except that there are no attention weights to return.

        Args:
            hidden_states: The layer's normalised input, (batch, seq, hidden).
            position_embeddings: Cosines and sines of `LatentRotaryEmbedding`.
            attention_mask: True (or 0.0) where a query may look; without one, the causal triangle.
            cache: Where keys and values go, as transformers passes it since 5.24.
            past_key_values: The same, as transformers passed it before.
            position_ids: Positions, (batch, seq).
            is_causal: As stock attention takes it; this one is always causal.
            output_attentions: Whether attention weights are wanted.
            others: Arguments without effect here.

        Raises:
            TypeError: An argument that this module doesn't know.
            ValueError: Attention that isn't causal, or its weights, or another implementation was asked for.
        """
        refuse_unknown(self, (name for name in others if name not in WITHOUT_EFFECT))
        if is_causal is False:
            raise ValueError("latent attention is causal; is_causal=False is not supported")
        if output_attentions or self.config.output_attentions:
            raise ValueError("latent attention never forms attention weights, so output_attentions can't return them")
        check_implementation(self.config)
        cache = past_key_values if cache is None else cache
        queries, positions = hidden_states.shape[1], (*position_embeddings, position_ids)
        if self.window:
            return self._windowed(hidden_states, positions, attention_mask, cache), None
        k_back = self.q_map.mT if self.q_map is not None and self.qk_map == "after_rope" else None
        k_back, v_back = (x if taking_back_pays(x, queries) else None for x in (k_back, self.o_map))
        q, k, v = self.queries_keys_values(hidden_states, *positions, whole_queries=k_back is not None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        seen = queries if attention_mask is None else None  # of a longer buffer
        k, v = (x if back is None else to_heads(x[:, :, :seen], back) for x, back in ((k, k_back), (v, v_back)))
        out = latent_attention(q, k, v, mask=attention_mask, scale=self.scale, cap=self.cap, sinks=self.sinks)
        if self.o_map is not None and v_back is None:
            out = _reduced(out, self.o_map)
        return self._given(out, hidden_states), None


def attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer, or None in one of linear attention."""
    return getattr(layer, "self_attn", None)


def attentions(model: PreTrainedModel) -> list[Any]:
    """Those of all layers that have one."""
    return [found for layer in model.model.layers if (found := attention_of(layer)) is not None]


def _by_head(x: Float[Tensor, "batch seq outputs"], heads: int) -> Float[Tensor, "batch heads seq dim"]:
    """What a linear layer gives each head; one token's by one operator instead of two."""
    if x.shape[1] == 1:
        return x.reshape(len(x), heads, 1, -1)
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def check_implementation(config: PreTrainedConfig) -> None:
    """Raise `ValueError` for an `attn_implementation` whose masks `LatentAttention` can't read."""
    asked = config._attn_implementation
    if asked not in (None, "sdpa", "eager"):
        raise ValueError(f"latent attention runs as attn_implementation sdpa or eager, not as {asked}")


def side_by_side(
    x: Float[Tensor, "batch kv_heads seq dim"], heads_per_latent: int
) -> Float[Tensor, "batch latents seq joined"]:
    """Keys or values of the heads that share a latent, joined."""
    return joined(x, x.shape[1] // heads_per_latent)


def _reduced(
    x: Float[Tensor, "batch heads seq dim"], reduction: Float[Tensor, "maps joined d_qk"]
) -> Float[Tensor, "batch maps seq d_qk"]:
    """Every head's rows times its own map; heads that share a map are put side by side."""
    return mapped(side_by_side(x, x.shape[1] // len(reduction)), reduction.to(x.dtype))


def taking_back_pays(back: Tensor | None, queries: int) -> bool:
    """Whether taking latents back to heads (q_heads, latent, head_dim) costs less than what so many queries save."""
    if back is None:
        return False
    _, latent, head_dim = back.shape
    return queries * (latent - head_dim) > latent * head_dim
