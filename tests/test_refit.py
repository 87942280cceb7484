"""The ridge against its closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlatent.refit import Ridge


def problem(seed: int, *, inputs: int = 5, outputs: int = 3, samples: int = 12) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = torch.randn(outputs, inputs, generator=generator)
    return linear, torch.randn(samples, inputs, generator=generator), torch.randn(samples, outputs, generator=generator)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), strength=st.floats(0.01, 10.0))
def test_ridge_equals_the_closed_form(seed: int, strength: float) -> None:
    linear, x, y = problem(seed)
    old, xs, ys = (t.detach().double().numpy() for t in (linear.weight, x, y))
    ridge = Ridge(linear)
    ridge.add(x, y)
    ridge.solve(strength=strength)
    damping = strength * np.mean(np.diag(xs.T @ xs))
    # argmin ‖Y − XWᵀ‖² + λ‖W − W_old‖², as least squares on stacked rows
    rows = np.vstack((xs, np.sqrt(damping) * np.eye(5)))
    wanted = np.linalg.lstsq(rows, np.vstack((ys, np.sqrt(damping) * old.T)), rcond=None)[0].T
    np.testing.assert_allclose(linear.weight.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_ridge_does_not_depend_on_how_the_text_is_batched() -> None:
    one, x, y = problem(0)
    two = problem(0)[0]
    whole, parts = Ridge(one), Ridge(two)
    whole.add(x.view(3, 4, -1), y.view(3, 4, -1))
    for a, b in zip(x.split(5), y.split(5), strict=True):
        parts.add(a, b)
    whole.solve(strength=0.3)
    parts.solve(strength=0.3)
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-6)


def test_weights_that_are_right_already_stay() -> None:
    linear, x, _ = problem(0)
    before = linear.weight.detach().clone()
    ridge = Ridge(linear)
    ridge.add(x, linear(x).detach())
    ridge.solve(strength=0.3)
    torch.testing.assert_close(linear.weight.detach(), before, rtol=0, atol=1e-6)


def test_a_stronger_pull_stays_nearer_the_old_weights_and_fits_worse() -> None:
    distances, errors = [], []
    for strength in (0.01, 0.3, 10.0, 1e6):
        linear, x, y = problem(1)
        before = linear.weight.detach().clone()
        ridge = Ridge(linear)
        ridge.add(x, y)
        ridge.solve(strength=strength)
        distances.append((linear.weight - before).norm().item())
        errors.append((y - linear(x)).norm().item())
    assert distances == sorted(distances, reverse=True)
    assert errors == sorted(errors)
    assert distances[-1] == pytest.approx(0, abs=1e-4)


def test_inputs_that_never_fire_keep_their_weights() -> None:
    linear, x, y = problem(2)
    before = linear.weight.detach().clone()
    x[:, 2] = 0
    ridge = Ridge(linear)
    ridge.add(x, y)
    ridge.solve(strength=0.3)
    assert linear.weight.isfinite().all()
    torch.testing.assert_close(linear.weight[:, 2].detach(), before[:, 2])


def test_positions_count_by_the_inverse_of_their_mean_square() -> None:
    linear, x, y = problem(2)
    scaled = problem(2)[0]
    size = torch.rand(len(x), y.shape[-1]) + 0.5
    weight = size.square().mean(-1, keepdim=True).rsqrt()
    weighted, plain = Ridge(linear), Ridge(scaled)
    weighted.add(x, y, size=size)
    plain.add(x * weight, y * weight)
    weighted.solve(strength=0.3)
    plain.solve(strength=0.3)
    torch.testing.assert_close(linear.weight, scaled.weight)


def test_the_bias_is_kept_and_accounted_for() -> None:
    _, x, _ = problem(3)
    linear = torch.nn.Linear(x.shape[-1], 3)
    wanted = torch.nn.Linear(x.shape[-1], 3)
    with torch.no_grad():
        wanted.bias.copy_(linear.bias)
    ridge = Ridge(linear)
    ridge.add(x, wanted(x).detach())
    ridge.solve(strength=1e-9)
    torch.testing.assert_close(linear.weight, wanted.weight, rtol=1e-3, atol=1e-4)
