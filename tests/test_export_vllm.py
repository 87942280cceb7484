"""How heads fit vLLM's cache, without vLLM: widths per backend, bytes of padding, and weights that change nothing."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import vllm_tokens_per_gib
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention, side_by_side
from kvlatent.model.spec import LatentSpec
from kvlatent.serving import vllm_plugin
from kvlatent.serving.export.vllm import (
    cache_bytes_per_token,
    cache_widths,
    check_windowless,
    gpu_backend,
    pad_heads,
)

SMOLLM2 = LatentSpec(
    preset="best",
    head_dim=64,
    d_qk=(32,) * 30,
    d_vo=(32,) * 30,
    qk_map="after_rope",
    inv_freq=tuple(0.5**j for j in range(32)),
    per_head_frequencies=False,
    scale=0.125,
)


def with_dims(*dims: tuple[int, int]) -> LatentSpec:
    return replace(SMOLLM2, d_qk=tuple(d for d, _ in dims), d_vo=tuple(d for _, d in dims))


def test_cpu_heads_take_the_next_size_that_has_a_kernel() -> None:
    spec = with_dims((8, 4), (32, 32), (34, 32), (16, 63), (64, 64))
    assert cache_widths(spec, "CPU_ATTN") == ((32, 32), (32, 32), (48, 48), (64, 64), (64, 64))


def test_cpu_heads_of_an_fp8_cache_are_multiples_of_32() -> None:
    spec = replace(with_dims((8, 4), (34, 32), (64, 64)), heads_per_latent=3)
    assert cache_widths(spec, "CPU_ATTN", fp8=True) == ((32, 32), (128, 128), (192, 192))
    assert cache_widths(with_dims((10, 24)), "EQUAL", fp8=True) == ((24, 24),)
    whole, padding = cache_bytes_per_token(with_dims((34, 32)), "CPU_ATTN", kv_heads=3, element_size=4, fp8=True)
    assert (whole, padding) == (3 * 128, 3 * 62)


def test_gpu_heads_are_multiples_of_eight() -> None:
    assert cache_widths(with_dims((10, 24), (32, 32)), "EQUAL") == ((24, 24), (32, 32))


def test_gpu_backends_with_two_sizes_keep_keys_and_values_apart() -> None:
    assert cache_widths(with_dims((48, 16), (42, 20), (8, 2)), "DIFFKV") == ((48, 24), (48, 24), (32, 24))
    assert cache_widths(with_dims((64, 4)), "DIFFKV") == ((64, 16),)


def test_gpus_take_two_sizes_where_that_is_less() -> None:
    assert gpu_backend(with_dims((32, 32))) == gpu_backend(with_dims((48, 40), (16, 8), (16, 8))) == "EQUAL"
    assert gpu_backend(with_dims((48, 16))) == gpu_backend(with_dims((48, 32), (32, 24))) == "DIFFKV"


def test_heads_wider_than_any_kernel_are_refused() -> None:
    with pytest.raises(UserError, match="at most 512"):
        cache_widths(replace(SMOLLM2, head_dim=600, d_qk=(64,), d_vo=(600,), qk_map="after_rope",
                             inv_freq=(0.1,) * 300), "CPU_ATTN")  # fmt: skip


def test_students_with_a_window_are_refused_with_what_would_run() -> None:
    check_windowless(SMOLLM2)
    with pytest.raises(UserError, match=r"newest 64 tokens whole.* transformers with kvlatent.* --window 0"):
        check_windowless(replace(SMOLLM2, window=64, sinks=4))


def test_smollm2_at_half_its_cache_holds_twice_the_tokens() -> None:
    """46,592 and 23,296 are what vLLM itself prints for student and teacher."""
    assert cache_bytes_per_token(SMOLLM2, "CPU_ATTN", kv_heads=3, element_size=4) == (23_040, 0)
    assert (vllm_tokens_per_gib(23_040), vllm_tokens_per_gib(46_080)) == (46_592, 23_296)


def test_padding_is_counted() -> None:
    whole, padding = cache_bytes_per_token(with_dims((48, 16)), "CPU_ATTN", kv_heads=3, element_size=2)
    assert (whole, padding) == (3 * 2 * 96, 3 * 2 * 32)
    assert cache_bytes_per_token(with_dims((48, 16)), "DIFFKV", kv_heads=3, element_size=2) == (3 * 2 * 64, 0)


@pytest.mark.parametrize(("preset", "dims"), [("best", (8, 4)), ("best", (12, 12)), ("portable", (8, 4))])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_padded_weights_attend_alike(
    name: str, preset: str, dims: tuple[int, int], tiny_student: Callable[..., PreTrainedModel], ids: torch.Tensor
) -> None:
    """Padded heads, queries and keys rotated by vLLM's rule (leading dims only), give the same attention."""
    student = tiny_student(name, preset, *dims)
    attention: LatentAttention = student.model.layers[1].self_attn
    spec = LatentSpec.from_dict(student.config.latent)
    widths = cache_widths(spec, "CPU_ATTN")
    x = student.model.embed_tokens(ids[:2])
    cos, sin = student.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    expected, _ = attention(x, (cos, sin))

    padded = {
        key: pad_heads(f"model.layers.1.self_attn.{key}", value, spec, widths)
        for key, value in attention.state_dict().items()
    }

    def project(part: str, heads: int) -> torch.Tensor:
        weight, bias = padded[f"{part}.weight"], padded.get(f"{part}.bias")
        return torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotate(y: torch.Tensor) -> torch.Tensor:
        first, second, rest = y.split([cos.shape[-1], cos.shape[-1], y.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    latents = 2 // spec.heads_per_latent
    key_heads = latents if spec.qk_map == "folded" else 2
    q, k, v = (project(f"{part}_proj", heads) for part, heads in (("q", 4), ("k", key_heads), ("v", latents)))
    if attention.q_norm is not None:
        q, k = (norm(y.transpose(1, 2)).transpose(1, 2) for norm, y in ((attention.q_norm, q), (attention.k_norm, k)))
    if spec.qk_map == "before_rope":
        q, k = q @ padded["q_map"], side_by_side(k, spec.heads_per_latent) @ padded["k_map"]
    q, k = rotate(q), rotate(k)
    if spec.qk_map == "after_rope":
        q, k = q @ padded["q_map"], side_by_side(k, spec.heads_per_latent) @ padded["k_map"]
    v = v[..., : widths[1][1]]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 32
    k, v = (y.repeat_interleave(4 // latents, dim=1) for y in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
    assert ("o_map" in padded) == (dims == (12, 12))
    out = out @ padded["o_map"] if "o_map" in padded else out
    found = torch.nn.functional.linear(
        out.transpose(1, 2).flatten(2), padded["o_proj.weight"], padded.get("o_proj.bias")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_other_weights_are_left_alone(tiny_student: Callable[..., PreTrainedModel]) -> None:
    student = tiny_student("qwen3", "best", 8, 4)
    spec = LatentSpec.from_dict(student.config.latent)
    touched = {
        name.split("self_attn.")[-1]
        for name, value in student.state_dict().items()
        if pad_heads(name, value, spec, cache_widths(spec, "CPU_ATTN")) is not value
    }
    assert touched == {"q_map", "k_map", "v_proj.weight", "o_proj.weight"}


def test_every_family_is_registered_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    registry = SimpleNamespace(register_model=known.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may call it again
    assert known["KVLatentQwen3ForCausalLM"] == "kvlatent.serving.vllm_model:KVLatentQwen3ForCausalLM"
    assert set(known) == {f"KVLatent{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
