"""Latent attention in vLLM: its own model classes of each family, with the attention replaced.

Heads shard over tensor-parallel ranks as in the stock classes; pipeline parallelism, prefix caching, chunked prefill
and compilation are theirs. Loaded inside vLLM only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvlatent.model.rope import rotate
from kvlatent.model.spec import LatentSpec
from kvlatent.serving.export.vllm import (
    Backend,
    cache_bytes_per_token,
    cache_widths,
    check_windowless,
    gpu_backend,
    heads_of_keys,
    pad_heads,
    values_per_head,
)

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or it would print nothing


class LatentAttention(nn.Module):
    """`kvlatent.model.attention.LatentAttention` on vLLM's layers: paged cache, fused QKV projection, sharded heads.

    Keys and values may be cached wider than d_qk and d_vo (see `cache_widths`); the weights then hold the zeros.
    """

    def __init__(
        self,
        stock: Any,
        spec: LatentSpec,
        layer: int,
        widths: tuple[int, int],
        rotary: RotaryEmbedding,
        vllm_config: VllmConfig,
        two_sizes: Any,
    ) -> None:
        """Take the place of `stock`: its heads, biases, QK-norms, window and name in the forward context.

        `two_sizes` is the backend that keeps keys and values apart; None leaves the choice to vLLM.
        """
        super().__init__()
        self.q_heads, self.kv_heads = stock.num_heads, stock.num_kv_heads  # of this rank
        self.group_size = self.q_heads // self.kv_heads
        self.latents, rest = divmod(self.kv_heads, spec.heads_per_latent)
        if rest:
            raise ValueError(
                f"{spec.heads_per_latent} KV heads share a latent, so {stock.total_num_kv_heads} heads can't be split "
                f"over {get_tensor_model_parallel_world_size()} ranks; use fewer, or pipeline parallelism"
            )
        self.qk_map = spec.qk_map
        width_k, width_v = widths
        rows_v, key_heads = values_per_head(spec, width_v), heads_of_keys(spec, self.kv_heads)
        projected = width_k if spec.qk_map == "folded" else spec.head_dim
        self.sizes = [self.q_heads * projected, key_heads * projected, key_heads * rows_v]
        self.width_v = width_v
        prefix, quant_config = stock.attn.layer_name.removesuffix(".attn"), vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            stock.hidden_size,
            projected,
            stock.total_num_heads,
            heads_of_keys(spec, stock.total_num_kv_heads),
            bias=stock.qkv_proj.bias is not None,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=rows_v,
        )
        output_map = spec.output_map[layer]
        self.o_proj = RowParallelLinear(
            stock.total_num_heads * (spec.head_dim if output_map else width_v),
            stock.hidden_size,
            bias=stock.o_proj.bias is not None,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.rotary_emb = rotary
        self.q_map = self.k_map = self.o_map = self.freq_index = None
        if output_map:
            self.o_map = _by_head(torch.empty(self.q_heads, width_v, spec.head_dim), stock.total_num_heads)
        if spec.qk_map != "folded":
            self.q_map = _by_head(torch.empty(self.q_heads, spec.head_dim, width_k), stock.total_num_heads)
            total, joined = stock.total_num_kv_heads // spec.heads_per_latent, spec.heads_per_latent * spec.head_dim
            self.k_map = _by_head(torch.empty(self.latents, joined, width_k), total)
        if spec.per_head_frequencies:
            pairs = (spec.head_dim if spec.qk_map == "after_rope" else spec.d_qk[layer]) // 2
            index = torch.empty(self.kv_heads, pairs, dtype=torch.long)
            self.freq_index = _by_head(index, stock.total_num_kv_heads)
        vllm_config.compilation_config.static_forward_context.pop(stock.attn.layer_name)
        self.attn = Attention(
            self.q_heads,
            width_k,
            spec.scale,
            num_kv_heads=self.latents,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=stock.attn.sliding_window,
            prefix=stock.attn.layer_name,
            attn_backend=two_sizes,
            head_size_v=width_v,
        )
        self.cached_as = _fp8_on_cpu(vllm_config.cache_config.cache_dtype)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend; (tokens, hidden) to (tokens, hidden)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (self.q_heads, -1))).flatten(1)
            k = self.k_norm(k.unflatten(-1, (self.kv_heads, -1))).flatten(1)
        if self.qk_map == "before_rope":
            q, k = self._reduce(q, k)
        q, k = self._rotate(positions, q, k)
        if self.qk_map == "after_rope":
            q, k = self._reduce(q, k)
        if v.shape[-1] > self.latents * self.width_v:
            v = v.unflatten(-1, (self.latents, -1))[..., : self.width_v].flatten(1)
        if self.cached_as is not None:
            k, v = (x.to(self.cached_as).to(x.dtype) for x in (k, v))
        heads = self.attn(q, k, v)
        output, _ = self.o_proj(heads if self.o_map is None else _mapped(heads, self.o_map))
        return output

    def _reduce(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_map is not None and self.k_map is not None
        return _mapped(q, self.q_map), _mapped(k, self.k_map)

    def _rotate(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.freq_index is None:
            return self.rotary_emb(positions, q, k)
        cos, sin = self.rotary_emb.cos_sin_cache[positions].chunk(2, dim=-1)  # (tokens, frequencies)
        cos, sin = cos[:, self.freq_index], sin[:, self.freq_index]  # (tokens, kv_heads, pairs)
        k = self._rotate_some(k.unflatten(-1, (self.kv_heads, -1)), cos, sin)
        cos, sin = (x.repeat_interleave(self.group_size, dim=1) for x in (cos, sin))
        return self._rotate_some(q.unflatten(-1, (self.q_heads, -1)), cos, sin), k

    @staticmethod
    def _rotate_some(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the leading dims that have a frequency; what follows is padding. (tokens, heads·d) comes out."""
        rotated = 2 * cos.shape[-1]
        return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1).flatten(1)


def _fp8_on_cpu(cache_dtype: str) -> torch.dtype | None:
    """What to round keys and values to before they are cached; None for no need.

    vLLM's CPU kernels (0.32) cut mantissas off instead of rounding them, which makes the cache's numbers 4 % smaller
    and their error twice as large. What fp8 can hold passes unchanged.
    """
    if not (current_platform.is_cpu() and is_quantized_kv_cache(cache_dtype)):
        return None
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def _mapped(x: Tensor, maps: Tensor) -> Tensor:
    """Every head times its map, heads that share a map as one: (tokens, heads·width) to (tokens, maps·new width)."""
    return torch.einsum("thd,hdr->thr", x.unflatten(-1, (len(maps), -1)), maps).flatten(1)


def _by_head(value: Tensor, total_heads: int) -> nn.Parameter:
    """A parameter that loads this rank's heads, the first axis, from those of the whole model.

    With fewer KV heads than ranks, neighbouring ranks hold the same head.
    """

    def load(parameter: nn.Parameter, whole: Tensor) -> None:
        ranks, rank, mine = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank(), len(parameter)
        if whole.shape[0] != total_heads:
            raise ValueError(f"a weight with {whole.shape[0]} heads; the model has {total_heads}")
        replicas = ranks * mine // total_heads
        parameter.data.copy_(whole.narrow(0, rank // replicas * mine, mine))

    parameter = nn.Parameter(value, requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def _rotary(spec: LatentSpec, head_size: int, max_position: int) -> RotaryEmbedding:
    """vLLM's rotary embedding with the spec's inverse frequencies; dims beyond theirs are padding and stay."""
    inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32)
    dtype = torch.get_default_dtype()
    rotary = RotaryEmbedding(head_size, 2 * len(inv_freq), max_position, 1.0, True, dtype, init_cache=False)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * inv_freq
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * spec.rope_scaling
    rotary.register_buffer("cos_sin_cache", table.to(dtype), persistent=False)
    return rotary


TWO_SIZES = "TRITON_ATTN_DIFFKV"
"""vLLM's backend with sizes of their own for keys and values that any GPU runs."""


def choose_backend(spec: LatentSpec) -> Backend:
    """The kind of attention backend that caches will be laid out for on this machine: the one asked for, if any."""
    if current_platform.is_cpu():
        return "CPU_ATTN"
    if asked := _asked_backend():
        return "DIFFKV" if asked.endswith("_DIFFKV") else "EQUAL"
    return gpu_backend(spec) if TWO_SIZES in AttentionBackendEnum.__members__ else "EQUAL"


def _asked_backend() -> str | None:
    from vllm.config import get_current_vllm_config

    asked = get_current_vllm_config().attention_config.backend
    return None if asked is None else str(asked.name)


def _diffkv_backend(width_v: int) -> Any:
    backend = AttentionBackendEnum[_asked_backend() or TWO_SIZES].get_class()
    backend.set_head_size_v(width_v)
    return backend


def graft(model: Any, vllm_config: VllmConfig) -> tuple[tuple[int, int], ...]:
    """Replace the attention of every layer of a stock vLLM body that this rank holds; returns `cache_widths`."""
    config = vllm_config.model_config.hf_config
    spec = LatentSpec.from_dict(config.latent)
    backend = choose_backend(spec)
    fp8 = is_quantized_kv_cache(vllm_config.cache_config.cache_dtype)
    widths = cache_widths(spec, backend, fp8=fp8)
    two_sizes = _diffkv_backend(widths[0][1]) if backend == "DIFFKV" else None
    rotaries: dict[int, RotaryEmbedding] = {}  # by dims of queries and keys when they are rotated, zeros included
    for index in range(model.start_layer, model.end_layer):
        layer = model.layers[index]
        rotated = spec.head_dim if spec.qk_map == "after_rope" else widths[index][0]
        if rotated not in rotaries:
            rotaries[rotated] = _rotary(spec, rotated, config.max_position_embeddings)
        layer.self_attn = LatentAttention(
            layer.self_attn, spec, index, widths[index], rotaries[rotated], vllm_config, two_sizes
        )
    heads, size = config.num_key_value_heads, torch.get_default_dtype().itemsize
    whole, padding = cache_bytes_per_token(spec, backend, kv_heads=heads, element_size=size, fp8=fp8)
    logger.info_once("kvlatent: the cache takes %d bytes per token, %d of them padding (%s)", whole, padding, backend)
    return widths


class _Latent:
    """Mixed into a stock `…ForCausalLM`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        spec = LatentSpec.from_dict(vllm_config.model_config.hf_config.latent)
        check_windowless(spec)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.spec = spec
        self.widths = graft(self.model, vllm_config)  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of ours; returns the names of the parameters that were filled."""
        padded = ((name, pad_heads(name, weight, self.spec, self.widths)) for name, weight in weights)
        loaded: set[str] = super().load_weights(padded)  # type: ignore[misc]
        return loaded


class KVLatentLlamaForCausalLM(_Latent, LlamaForCausalLM):
    """A converted Llama."""


class KVLatentMistralForCausalLM(_Latent, MistralForCausalLM):
    """A converted Mistral."""


class KVLatentQwen2ForCausalLM(_Latent, Qwen2ForCausalLM):
    """A converted Qwen2."""


class KVLatentQwen3ForCausalLM(_Latent, Qwen3ForCausalLM):
    """A converted Qwen3."""
