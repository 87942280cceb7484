"""The CPU kernel against float64 loops: every stored dtype, width, mask, split, and views of longer buffers."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlatent.kernels import cpu_decode
from kvlatent.kernels.cpu_decode import decode_attention

pytestmark = pytest.mark.skipif(not cpu_decode.available(), reason="no llvmlite, or another OpenMP than GNU's")

CASES = [  # each builds a kernel
    (6, 5, torch.float32),
    (6, 5, torch.bfloat16),
    (6, 5, torch.float16),
    (2, 1, torch.float32),
    (64, 20, torch.bfloat16),
    (84, 20, torch.float32),  # keys one by one; no whole vectors
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads(
    d_qk: int, d_vo: int, dtype: torch.dtype, *, kv_len: int, kv_heads: int = 2, group_size: int = 3, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q in float32; k and v of `dtype` as views of buffers that hold NaN behind them."""
    generator = torch.Generator().manual_seed(d_qk + d_vo + kv_len)
    k_buffer = torch.full((batch, kv_heads, kv_len + 5, d_qk), math.nan, dtype=dtype)
    v_buffer = torch.full((batch, kv_heads, kv_len + 9, d_vo), math.nan, dtype=dtype)
    k, v = k_buffer[:, :, :kv_len], v_buffer[:, :, :kv_len]
    k.copy_(torch.randn(k.shape, generator=generator))
    v.copy_(torch.randn(v.shape, generator=generator))
    return torch.randn(batch, kv_heads * group_size, 1, d_qk, generator=generator), k, v


def wanted(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    bias = torch.zeros(len(q), 1, k.shape[2], dtype=torch.float64)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, 0], -math.inf)
    return reference.attention(q.double(), k.double(), v.double(), scale=scale, bias=bias)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kv_len", [1, 63, 130])
def test_every_width_and_dtype_matches_float64_loops(case: tuple[int, int, torch.dtype], kv_len: int) -> None:
    q, k, v = heads(*case, kv_len=kv_len)
    got = decode_attention(q, k, v, scale=0.4)
    torch.testing.assert_close(got.double(), wanted(q, k, v, scale=0.4), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_outputs_keep_their_dtype(dtype: torch.dtype) -> None:
    q, k, v = heads(6, 5, dtype, kv_len=70)
    got = decode_attention(q.to(dtype), k, v, scale=0.4)
    assert got.dtype == dtype
    exact = wanted(q.to(dtype), k, v, scale=0.4)
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@settings(max_examples=25)
@given(
    kv_len=st.integers(1, 200),
    padding=st.lists(st.integers(0, 199), min_size=2, max_size=2),
    holes=st.booleans(),
    shared=st.booleans(),
)
def test_masks_match_float64_loops(kv_len: int, padding: list[int], holes: bool, shared: bool) -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=kv_len)
    mask = torch.arange(kv_len) >= torch.tensor(padding)[:, None].clamp(max=kv_len - 1)  # left padding
    if holes:
        mask &= torch.rand(2, kv_len, generator=torch.Generator().manual_seed(kv_len)) < 0.5
        mask[:, -1] = True
    mask = mask[:, None, None]
    if shared:
        mask = mask[:1]
    got = decode_attention(q, k, v, scale=0.7, mask=mask)
    exact = wanted(q, k, v, scale=0.7, mask=mask.expand(2, -1, -1, -1))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_of_a_long_context_are_merged_exactly(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "SINGLE_THREAD_BYTES", 0)
    q, k, v = heads(6, 5, torch.float32, kv_len=3000, kv_heads=1, batch=1)
    q[:, 0] *= 30  # one head looks at few keys: parts differ by hundreds in their maxima
    mask = torch.ones(1, 1, 1, 3000, dtype=torch.bool)
    mask[..., 256:900] = False  # a part that isn't seen at all
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = decode_attention(q, k, v, scale=1.0, mask=mask)
    finally:
        torch.set_num_threads(before)
    logits = (q.double().view(1, 1, 3, 6) @ k.double().transpose(-1, -2)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(got.double().view(1, 1, 3, 5), logits.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-5)


def test_blocks_that_are_not_seen_are_not_read() -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=320)
    k[:, :, :256], v[:, :, :256] = math.nan, math.nan
    mask = (torch.arange(320) >= 256).expand(2, 1, 1, 320)
    got = decode_attention(q, k, v, scale=0.5, mask=mask)
    exact = wanted(q, k[:, :, 256:], v[:, :, 256:], scale=0.5)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-6)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=10)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 10)
    got = decode_attention(q, k, v, scale=0.5, mask=mask)
    assert torch.equal(got[1], torch.zeros(6, 1, 5))
    torch.testing.assert_close(got[:1].double(), wanted(q[:1], k[:1], v[:1], scale=0.5), rtol=1e-5, atol=2e-6)


def test_large_logits_do_not_overflow() -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=100)
    got = decode_attention(q * 1e4, k, v, scale=1.0)
    torch.testing.assert_close(got.double(), wanted(q * 1e4, k, v, scale=1.0), rtol=1e-3, atol=1e-4)


def test_the_kernel_can_be_switched_off() -> None:
    code = "from kvlatent.kernels import cpu_decode; print(cpu_decode.available())"
    environment = os.environ | {"KVLATENT_CPU_KERNEL": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
