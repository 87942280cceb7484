"""Segments of a context, attended one by one and merged, against float64 loops under one softmax; on every path."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from kvlatent.kernels import attention, cpu_decode, cuda_decode
from kvlatent.kernels.attention import merged, segment_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "cpu", "triton"])
def segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A way to attend to a segment: torch alone, the CPU kernel, or Triton (in its interpreter, without a GPU)."""
    home: ModuleType | None = {"torch": None, "cpu": cpu_decode, "triton": cuda_decode}[request.param]
    if home is None:
        monkeypatch.setattr(attention, "OWN_KERNELS", {})
        return segment_attention
    if not home.available():
        pytest.skip("not to be had here")
    return home.decode_segment


def tensors(widths: tuple[int, int], tokens: int, heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of two sequences and six heads, keys and values of `heads`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 6, 1, widths[0]), (2, heads, tokens, widths[0]), (2, heads, tokens, widths[1])
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    return q, k, v


def seen(mask: Tensor | None, tokens: int) -> Tensor:
    return torch.ones(2, tokens, dtype=torch.bool) if mask is None else mask.cpu().expand(2, -1, -1, -1)[:, 0, 0]


def some(tokens: int, share: float, seed: int) -> Tensor:
    """A mask; of the second sequence nothing is seen."""
    mask = torch.rand(2, 1, 1, tokens, generator=torch.Generator().manual_seed(seed)) < share
    mask[1] = False
    return mask.to(DEVICE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 150, 700])
def test_largest_logit_and_weight_are_those_of_the_loops(
    segment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tokens: int, masked: bool
) -> None:
    monkeypatch.setattr(cuda_decode, "processors", lambda device: 3)  # a long context in parts
    q, k, v = tensors((6, 5), tokens, 2, 0)
    mask = some(tokens, 0.6, 1) if masked else None
    if mask is not None:
        mask[0, ..., -1] = True
    out, largest, weight = segment(q, k, v, scale=0.7, mask=mask)
    assert out.shape == (2, 6, 1, 5) and largest.shape == weight.shape == (2, 6, 1, 1)
    assert largest.dtype == weight.dtype == torch.float32
    visible = seen(mask, tokens)
    for b in range(2):
        for h in range(6):
            logits = [
                0.7 * math.log2(math.e) * float(q[b, h, 0].double() @ k[b, h // 3, j].double())
                for j in range(tokens)
                if visible[b, j]
            ]
            if not logits:
                assert float(weight[b, h]) == 0 and not out[b, h].any()
                continue
            assert float(largest[b, h]) == pytest.approx(max(logits), rel=1e-5, abs=1e-5)
            assert float(weight[b, h]) == pytest.approx(sum(2 ** (x - max(logits)) for x in logits), rel=1e-5)


CASES: dict[str, Callable[[], list[Tensor | None]]] = {
    "all seen": lambda: [None, None],
    "holes": lambda: [some(40, 0.5, 1) | (torch.arange(40, device=DEVICE) == 3), some(300, 0.5, 2)],
    "nothing of the second": lambda: [None, torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=DEVICE)],
    "nothing of the first": lambda: [torch.zeros(2, 1, 1, 40, dtype=torch.bool, device=DEVICE), None],
    "nothing at all of a sequence": lambda: [some(40, 0.5, 1), some(300, 0.5, 2)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("apart", [1.0, 30.0])
def test_two_segments_of_other_widths_and_heads_merge_to_one_softmax(
    segment: Callable[..., Any], case: str, apart: float
) -> None:
    """Near tokens of 16 and 10 dims in two heads, far ones of 6 and 10 in one; logits of like and unlike size."""
    near, far = tensors((16, 10), 40, 2, 0), tensors((6, 10), 300, 1, 1)
    far = far[0] * apart, *far[1:]
    masks = CASES[case]()
    parts = [segment(*x, scale=0.4, mask=mask) for x, mask in zip((near, far), masks, strict=True)]
    got = merged(*parts)
    assert got.shape == (2, 6, 1, 10)
    visible = [seen(mask, len(x[1][0, 0])) for mask, x in zip(masks, (near, far), strict=True)]
    for b in range(2):
        for h in range(6):
            logits, values = [], []
            for (q, k, v), who in zip((near, far), visible, strict=True):
                head = h // (6 // k.shape[1])
                for j in range(k.shape[2]):
                    if who[b, j]:
                        logits.append(0.4 * (q[b, h, 0].double() @ k[b, head, j].double()).cpu())
                        values.append(v[b, head, j].double().cpu())
            wanted = torch.zeros(10, dtype=torch.float64)
            if logits:
                wanted = (torch.stack(logits).softmax(0)[:, None] * torch.stack(values)).sum(0)
            torch.testing.assert_close(got[b, h, 0].double().cpu(), wanted, rtol=2e-4, atol=2e-5)


def test_a_segment_without_tokens_weighs_nothing(segment: Callable[..., Any]) -> None:
    near, none = tensors((16, 10), 40, 2, 0), tensors((6, 10), 0, 1, 1)
    empty = torch.ones(1, 1, 1, 0, dtype=torch.bool, device=DEVICE)
    alone = segment(*near, scale=0.4, mask=None)
    for mask in (None, empty):
        out, largest, weight = segment(*none, scale=0.4, mask=mask)
        assert out.shape == (2, 6, 1, 10) and not out.any() and not weight.any() and not largest.isnan().any()
        torch.testing.assert_close(merged(alone, (out, largest, weight)), alone[0], rtol=1e-6, atol=1e-6)
    bias = torch.zeros(2, 1, 40, dtype=torch.float64)
    wanted = reference.attention(*(x.double().cpu() for x in near), scale=0.4, bias=bias)
    torch.testing.assert_close(alone[0].double().cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_cached_dtypes_are_merged_in_float32(segment: Callable[..., Any]) -> None:
    near, far = tensors((16, 10), 40, 2, 0), tensors((6, 10), 300, 1, 1)
    exact = merged(*(segment(*x, scale=0.4, mask=None) for x in (near, far)))
    half = [tuple(x.half() for x in part) for part in (near, far)]
    got = merged(*(segment(*x, scale=0.4, mask=None) for x in half))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), exact, rtol=1e-2, atol=5e-3)
