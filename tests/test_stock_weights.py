"""Stock weights come apart into projections whose rotary pairs are half a head apart."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlatent.model.rope import rotate
from kvlatent.model.stock_weights import rotary_order


@given(half=st.integers(1, 8), turning=st.integers(1, 8), interleaved=st.booleans(), seed=st.integers(0, 99))
def test_reordered_heads_rotate_as_the_stock_ones(half: int, turning: int, interleaved: bool, seed: int) -> None:
    turning = min(turning, half)
    generator = torch.Generator().manual_seed(seed)
    x, angles = torch.rand(2 * half, generator=generator), torch.zeros(half)
    angles[:turning] = torch.rand(turning, generator=generator)
    wanted = x.clone()  # by its pairs, one after the other
    for j, angle in enumerate(angles[:turning]):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + turning)
        wanted[a] = x[a] * angle.cos() - x[b] * angle.sin()
        wanted[b] = x[b] * angle.cos() + x[a] * angle.sin()
    order = rotary_order(2 * half, 2 * turning, interleaved=interleaved)
    assert sorted(order.tolist()) == list(range(2 * half))
    got = rotate(x[order][None, None, None], angles.cos()[None], angles.sin()[None])[0, 0, 0]
    torch.testing.assert_close(got, wanted[order])
