"""Frequency lists against the paper's arrays, stability numbers of paper.md, rotation as complex multiplication."""

import copy
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvlatent.errors import UserError
from kvlatent.model.rope import (
    LatentRotaryEmbedding,
    frequency_aware_exponents,
    inverse_frequencies,
    plain_exponents,
    rotate,
    stability,
)

PAPER = {
    16: [4, 6, 8, 10, 12, 13, 14, 15],
    32: [8, 10, 12, 14, 16, 18, 20, 22, 24, 25, 26, 27, 28, 29, 30, 31],
    64: [
        16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44, 46,
        48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63,
    ],
    128: [
        32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62,
        64, 66, 68, 70, 72, 74, 76, 78, 80, 82, 84, 86, 88, 90, 92, 94,
        96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111,
        112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127,
    ],
}  # fmt: skip


@pytest.mark.parametrize("d", PAPER)
def test_frequency_list_equals_the_papers_array(d: int) -> None:
    assert frequency_aware_exponents(d) == PAPER[d] == reference.frequency_aware_exponents(d)
    got = inverse_frequencies(frequency_aware_exponents(d), d=d, theta=5e5)
    assert got == pytest.approx([5e5 ** (-e / d) for e in PAPER[d]], rel=1e-6)


@given(quarter=st.integers(1, 64))
def test_frequency_list_has_one_entry_per_pair_and_drops_the_fastest_quarter(quarter: int) -> None:
    d = 4 * quarter
    exponents = frequency_aware_exponents(d)
    assert len(exponents) == d // 2
    assert exponents == sorted(set(exponents))
    assert exponents[0] >= d // 4 and exponents[-1] == d - 1


@pytest.mark.parametrize("d", [0, 2, 6, 10])
def test_frequency_list_refuses_dims_without_whole_quarters(d: int) -> None:
    with pytest.raises(UserError, match=f"multiple of 4; got {d}"):
        frequency_aware_exponents(d)


@pytest.mark.parametrize(("head_dim", "d"), [(128, 64), (128, 32), (128, 16), (64, 32), (64, 16), (64, 8), (32, 16)])
def test_frequency_list_of_a_halved_head_is_an_exact_subset_of_the_original(head_dim: int, d: int) -> None:
    stretched = [e * head_dim // d for e in frequency_aware_exponents(d)]
    assert set(stretched) <= set(plain_exponents(head_dim))
    original = inverse_frequencies(plain_exponents(head_dim), d=head_dim, theta=10000.0)
    expected = [original[e // 2] for e in stretched]
    got = inverse_frequencies(frequency_aware_exponents(d), d=d, theta=10000.0)
    assert got == tuple(expected)


def test_original_pairs_behind_the_list_of_64_out_of_128_are_those_of_the_paper_page() -> None:
    assert frequency_aware_exponents(64) == [*range(16, 47, 2), *range(48, 64)]


@pytest.mark.parametrize(
    ("theta", "d", "plain", "aware"),
    [
        (1e4, 64, (-0.306, 34.6), (-0.245, 27.6)),
        (1e4, 16, (-0.661, 43.1), (-0.492, 37.7)),
        (5e5, 64, (0.014, 0.0), (0.364, 0.0)),
        (5e5, 16, (-0.337, 9.5), (0.102, 0.0)),
    ],
)
def test_stability_numbers_of_the_paper_page(
    theta: float, d: int, plain: tuple[float, float], aware: tuple[float, float]
) -> None:
    for exponents, (lowest, negative) in ((plain_exponents(d), plain), (frequency_aware_exponents(d), aware)):
        # paper.md sampled every fourth distance; over all of them the minima are up to .06 lower.
        curve = stability(inverse_frequencies(exponents, d=d, theta=theta), torch.arange(0, 8192, 4))
        assert curve[0] == 1
        assert curve.min().item() == pytest.approx(lowest, abs=6e-4)
        assert 100 * (curve < 0).double().mean().item() == pytest.approx(negative, abs=0.06)


@given(x=st.integers(0, 5000), frequencies=st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=6))
def test_stability_is_the_mean_cosine(x: int, frequencies: list[float]) -> None:
    got = stability(tuple(frequencies), torch.tensor([[x]]))
    assert got.shape == (1, 1)
    assert got.item() == pytest.approx(reference.mean_cosine(frequencies, x), abs=1e-9)


@given(half=st.integers(1, 5), seq=st.integers(1, 4), seed=st.integers(0, 99))
def test_rotate_turns_each_pair_as_a_complex_number(half: int, seq: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, seq, 2 * half, generator=generator, dtype=torch.float64)
    inv_freq = torch.rand(half, generator=generator, dtype=torch.float64)
    angles = torch.arange(seq)[:, None] * inv_freq
    got = rotate(x, angles.cos(), angles.sin())
    for h in range(2):
        for t in range(seq):
            torch.testing.assert_close(got[0, h, t], reference.rotated(x[0, h, t], t, inv_freq.tolist()))
    torch.testing.assert_close(rotate(got, angles.cos(), -angles.sin()), x)


def test_plain_list_and_rotation_are_bitwise_those_of_transformers(plain_teacher: PreTrainedModel) -> None:
    rotary = plain_teacher.model.rotary_emb
    if rotary.rope_type == "default":
        assert inverse_frequencies(plain_exponents(16), d=16, theta=10000.0) == tuple(rotary.inv_freq.tolist())
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 100, 200]])  # also a left-padded row
    q, k = torch.randn(2, 2, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    stock_cos, stock_sin = rotary(q, positions)
    expected = apply_rotary_pos_emb(q, k, stock_cos, stock_sin)
    ours = LatentRotaryEmbedding(tuple(rotary.inv_freq.tolist()), rotary.attention_scaling)
    cos, sin = ours(q, positions)
    assert cos.shape == (2, 6, 8)
    for got, wanted in zip(
        (rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])), expected, strict=True
    ):
        assert torch.equal(got, wanted)


def test_frequencies_stay_float32_whatever_the_model_is_cast_to() -> None:
    rotary = LatentRotaryEmbedding(inverse_frequencies(plain_exponents(16), d=16, theta=10000.0), 1.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(rotary).to(dtype)
        assert cast.inv_freq.dtype == torch.float32
        assert torch.equal(cast.inv_freq, rotary.inv_freq)
    x = torch.zeros(1, dtype=torch.bfloat16)
    cos, _ = copy.deepcopy(rotary).to(torch.bfloat16)(x, torch.tensor([[8191]]))
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(8191), abs=4e-3)
