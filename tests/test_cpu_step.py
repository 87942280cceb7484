"""What a decode step does between linear layers and caches on a CPU, against float64 and the same by torch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import logits
from test_window import windowed
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.kernels import cpu_decode, cpu_step
from kvlatent.kernels.codes import Codes, WholeCodes
from kvlatent.kernels.cpu_linear import MOST_ROWS
from kvlatent.model.cache import LatentCache
from kvlatent.model.rope import rotate

pytestmark = pytest.mark.skipif(not cpu_decode.available(), reason="no llvmlite, or another OpenMP than GNU's")
ROWS = [1, 2, 3, 4, 7, MOST_ROWS]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(9, 64, 144), (3, 5, 8), (2, 33, 131), (1, 192, 12)])
@pytest.mark.parametrize("threads", [1, 3])
def test_maps_match_float64(rows: int, heads: int, inputs: int, outputs: int, threads: int) -> None:
    x, maps = numbers(rows, heads, 1, inputs), numbers(heads, inputs, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cpu_step.mapped_rows(x, maps)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), x.double() @ maps.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("alike", [False, True], ids=["positions", "one position"])
def test_rotations_are_those_of_torch_to_the_last_bit(rows: int, alike: bool) -> None:
    q, k, angles = numbers(rows, 6, 1, 48), numbers(rows, 2, 1, 48), numbers(1 if alike else rows, 1, 24)
    cos, sin = angles.cos(), angles.sin()
    wanted = [rotate(x, cos[:, None], sin[:, None]) for x in (q, k)]
    for got, want in zip(cpu_step.turned_rows(q, k, cos, sin), wanted, strict=True):
        assert torch.equal(got, want)


def softmax_over_both(
    q: Tensor,
    near: list[Tensor],
    far: list[Tensor],
    maps: list[Tensor],
    bias: Tensor,
    masks: list[Tensor],
    scale: float,
) -> Tensor:
    """One sequence and head after the other, in float64: one softmax over near tokens and far ones."""
    out = torch.zeros(*q.shape[:3], maps[1].shape[2], dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            query = q[b, h, 0].double()
            sides = [(near, query, 0.0), (far, query @ maps[0][h].double(), bias[h].item())]
            logits, values = list[Tensor](), list[Tensor]()
            for i, ((k, v), asks, more) in enumerate(sides):
                head = h * k.shape[1] // q.shape[1]
                found = k[b, head].double() @ asks * scale + more
                logits.append(found.masked_fill(~masks[i][b, 0, 0], -math.inf))
                values.append(v[b, head].double())
            weights = torch.cat(logits).softmax(0)
            whole, latent = weights.split([len(x) for x in logits])
            out[b, h, 0] = (whole @ values[0] + latent @ values[1] @ maps[1][h].double()).nan_to_num(0.0)
    return out


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("coded", [False, True], ids=["numbers", "codes"])
def test_near_and_far_tokens_share_one_softmax(rows: int, coded: bool) -> None:
    q, maps = numbers(rows, 6, 1, 16), [numbers(6, 16, 24) / 4, numbers(6, 20, 16)]
    near = whole = [numbers(rows, 2, 30, 16, seed=s) for s in (1, 2)]
    far = stored = [numbers(rows, 1, 90, width) for width in (24, 20)]
    codes, means, near_codes = None, None, None
    if coded:
        codes = Codes(((8, 8), (16, 4))), Codes(((20, 4),))
        means = numbers(1, 1, 24), numbers(1, 1, 20)
        stored = [x.encode(y) for x, y in zip(codes, far, strict=True)]
        far = [x.decode(y, torch.float32) + mean for x, y, mean in zip(codes, stored, means, strict=True)]
        near_codes = WholeCodes(16), WholeCodes(16)
        whole = [near_codes[0].encode(x) for x in near]
        near = [near_codes[0].decode(x, torch.float32) for x in whole]
    bias = numbers(6, 1)
    masks = [
        torch.rand(rows, 1, 1, x[0].shape[2], generator=torch.Generator().manual_seed(3)) < 0.7 for x in (near, far)
    ]
    masks[1][0] = False  # of one sequence, nothing far
    masks[0][-1] &= rows == 1  # of another, nothing near
    got = cpu_step.attend(
        q, (*whole, masks[0]), (*stored, masks[1]), tuple(maps), scale=0.3, bias=bias, codes=codes, means=means,
        near_codes=near_codes,
    )  # fmt: skip
    wanted = softmax_over_both(q, near, far, maps, bias, masks, 0.3)
    close = {"rtol": 1e-3, "atol": 3e-3} if coded else {"rtol": 1e-5, "atol": 1e-5}  # queries and weights are rounded
    torch.testing.assert_close(got.double(), wanted, **close)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    none = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    side = numbers(1, 1, 4, 16), numbers(1, 1, 4, 16), none
    got = cpu_step.attend(
        numbers(1, 2, 1, 16), side, side, (numbers(2, 16, 16), numbers(2, 16, 16)), scale=1.0, bias=None, codes=None,
        means=None,
    )  # fmt: skip
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("codes", [False, True], ids=["numbers", "codes"])
def test_a_decode_step_takes_it_and_gives_what_torch_gives(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, monkeypatch: pytest.MonkeyPatch, codes: bool
) -> None:
    bits, calls = 8 if codes else 16, list[str]()
    model = windowed(tiny_teacher("llama"), 5, 2, codes=codes, window_bits=bits).float()

    def spied(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.append(name), kernel(*args, **kwargs))[1]

    for name in ("attend", "turned_rows"):
        monkeypatch.setattr(cpu_step, name, spied(name, getattr(cpu_step, name)))
    found = []
    for fits in (cpu_step.fits, lambda *tensors: False):
        monkeypatch.setattr(cpu_step, "fits", fits)
        cache = LatentCache(model.config)
        logits(model, ids[:2, :9], past_key_values=cache)
        found.append([logits(model, ids[:2, i : i + 1], past_key_values=cache) for i in range(9, 12)])
    layers = model.config.num_hidden_layers
    assert calls.count("attend") == calls.count("turned_rows") == 3 * layers
    torch.testing.assert_close(*found, rtol=1e-3, atol=0.05 if codes else 5e-4)  # a code may jump


def test_gradients_traces_and_other_dtypes_are_left_to_torch() -> None:
    x, maps = numbers(2, 3, 1, 16), numbers(3, 16, 16)
    assert not cpu_step.fits(x, maps)  # gradients may be wanted
    with torch.no_grad():
        assert cpu_step.fits(x, maps)
        assert not cpu_step.fits(x.bfloat16(), maps.bfloat16())
        assert not cpu_step.fits(x, numbers(3, 16, 7))
        assert not cpu_step.fits(x.expand(-1, -1, 2, -1), maps)
        assert not cpu_step.fits(numbers(MOST_ROWS + 1, 3, 1, 16), maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not cpu_step.fits(x, maps)
