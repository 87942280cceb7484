"""The ridge against its closed form; refitted head maps against planted ones."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import soft_capped
from torch import Tensor, nn

from kvlatent.compress.maps import QKReduction
from kvlatent.compress.refit import LogitSamples, Ridge, far_bias, larger, refit_logits
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.rope import rotate


def problem(seed: int, *, inputs: int = 5, outputs: int = 3, samples: int = 12) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = torch.randn(outputs, inputs, generator=generator)
    return linear, torch.randn(samples, inputs, generator=generator), torch.randn(samples, outputs, generator=generator)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), strength=st.floats(0.01, 10.0))
def test_ridge_equals_the_closed_form(seed: int, strength: float) -> None:
    linear, x, y = problem(seed)
    old, xs, ys = (t.detach().double().numpy() for t in (linear.weight, x, y))
    ridge = Ridge(linear)
    ridge.add(x, y)
    ridge.solve(strength=strength)
    damping = strength * np.mean(np.sum(xs**2, axis=1))
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


def test_errors_are_measured_against_the_size_of_each_position() -> None:
    linear, x, y = problem(2)
    scaled = problem(2)[0]
    size = torch.rand(len(x), 1) + 0.5
    sized, plain = Ridge(linear), Ridge(scaled)
    sized.add(x, y, size=size)
    plain.add(x / size, y / size)
    sized.solve(strength=0.3)
    plain.solve(strength=0.3)
    torch.testing.assert_close(linear.weight, scaled.weight)


@pytest.mark.parametrize(("students_too", "kept"), [(True, 1.0), (False, 0.0)])
def test_a_false_sink_does_not_take_the_true_ones_away(students_too: bool, kept: float) -> None:
    linear, _, _ = problem(5, inputs=4, outputs=3)
    linear.weight.data /= linear.weight.norm(dim=0)
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(6))
    x[:10] = torch.tensor([1000.0, 0, 0, 0])  # ten sinks of the student's, of which the teacher has nine
    wanted = linear(x).detach()
    wanted[0] /= 1000
    ridge = Ridge(linear)
    ridge.add(x, wanted, size=larger(wanted, linear(x).detach() if students_too else wanted))
    ridge.solve(strength=0.01)
    found = (linear(x[1]) * wanted[1]).sum() / wanted[1].square().sum()
    assert found.item() == pytest.approx(kept, abs=0.1)


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


@settings(max_examples=10)
@given(times=st.integers(2, 9))
def test_the_pull_does_not_grow_with_the_text(times: int) -> None:
    linear, x, y = problem(4)
    before, weights = linear.weight.detach().clone(), []
    for repeats, strength in ((1, 3.0), (times, 3.0 * times)):
        linear.weight.data = before.clone()
        ridge = Ridge(linear)
        ridge.add(x.repeat(repeats, 1), y.repeat(repeats, 1))
        ridge.solve(strength=strength)
        weights.append(linear.weight.detach().clone())
    # The same text again and again moves weights as far as once, if the pull is made to grow with it.
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


# --- refit_logits

KV_HEADS, GROUP, SEQ, DIM, D_QK = 2, 2, 12, 8, 4
ANGLES = torch.arange(SEQ)[:, None] * torch.tensor([0.7, 0.05])
TURNS = {"none": None, "shared": (ANGLES.cos()[None], ANGLES.sin()[None])}
TURNS["per head"] = tuple(torch.stack((x, x.flip(-1))) for x in (ANGLES.cos(), ANGLES.sin()))


def random_maps(seed: int) -> QKReduction:
    generator = torch.Generator().manual_seed(seed)
    q_map, k_map = (torch.randn(heads, DIM, D_QK, generator=generator).double() / 3 for heads in (4, KV_HEADS))
    return QKReduction(q_map=q_map, k_map=k_map)


def turned(x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    if turn is None:
        return x
    cos, sin = (t if len(t) == 1 else t.repeat_interleave(x.shape[1] // len(t), dim=0) for t in turn)
    return rotate(x, cos, sin)


def logits_of(q: Tensor, k: Tensor, maps: QKReduction, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    q, k = turned(q @ maps.q_map.float(), turn), turned(k @ maps.k_map.float(), turn)
    return 0.5 * q @ k.repeat_interleave(GROUP, dim=1).mT


def planted(maps: QKReduction, turn: tuple[Tensor, Tensor] | None, *, blocks: int = 8) -> list[LogitSamples]:
    """Samples, in two batches, whose logits these maps give."""
    generator, samples = torch.Generator().manual_seed(7), []
    for _ in range(2):
        q = torch.randn(blocks, KV_HEADS * GROUP, SEQ, DIM, generator=generator)
        k = torch.randn(blocks, KV_HEADS, SEQ, DIM, generator=generator)
        rows = torch.arange(2, SEQ)
        logits = logits_of(q, k, maps, turn)[:, :, rows]
        probs = logits.masked_fill(torch.arange(SEQ) > rows[:, None], -torch.inf).softmax(-1)
        samples.append(LogitSamples(q=q[:, :, rows], k=k, rows=rows, logits=logits, probs=probs))
    return samples


def error_of(samples: list[LogitSamples], maps: QKReduction, turn: tuple[Tensor, Tensor] | None) -> float:
    """Variance of the logits' error under the attention, summed."""
    total = 0.0
    for s in samples:
        q = torch.zeros(*s.q.shape[:2], SEQ, DIM)
        q[:, :, s.rows] = s.q
        off = (logits_of(q, s.k, maps, turn)[:, :, s.rows] - s.logits).double()
        total += float((s.probs * off.square()).sum() - (s.probs * off).sum(-1).square().sum())
    return total


@pytest.mark.parametrize("turn", TURNS)
def test_planted_maps_are_found_again(turn: str) -> None:
    wanted, off = random_maps(0), random_maps(1)
    samples = planted(wanted, TURNS[turn])
    start = QKReduction(q_map=wanted.q_map + 0.3 * off.q_map, k_map=wanted.k_map + 0.3 * off.k_map)
    found = refit_logits(samples, start, turn=TURNS[turn], scale=0.5, strength=1e-6, rounds=20, iterations=12)
    assert error_of(samples, found, TURNS[turn]) < 1e-3 * error_of(samples, start, TURNS[turn])


@settings(max_examples=10)
@given(seed=st.integers(0, 99), strength=st.sampled_from([1e-3, 0.1, 10.0]), turn=st.sampled_from(sorted(TURNS)))
def test_refitting_never_fits_its_text_worse_and_a_stronger_pull_moves_less(
    seed: int, strength: float, turn: str
) -> None:
    samples, start = planted(random_maps(seed), TURNS[turn]), random_maps(seed + 1)
    found, pulled = (
        refit_logits(samples, start, turn=TURNS[turn], scale=0.5, strength=x, rounds=1) for x in (strength, 1e5)
    )
    assert error_of(samples, found, TURNS[turn]) <= error_of(samples, start, TURNS[turn])
    assert (pulled.q_map - start.q_map).norm() < 0.01 * start.q_map.norm()


def test_parts_leave_out_no_more_than_keys_without_attention() -> None:
    (whole, _), at = planted(random_maps(0), None), 0
    parts = list(whole.parts())
    assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
    assert [part.k.shape[2] for part in parts] == [int(part.rows[-1]) + 1 for part in parts] == [5, 8, 11, 12]
    for part in parts:
        rows, seq = slice(at, at + len(part.rows)), part.k.shape[2]
        assert torch.equal(part.q, whole.q[:, :, rows]) and torch.equal(part.k, whole.k[:, :, :seq])
        assert torch.equal(part.logits, whole.logits[:, :, rows, :seq])
        assert torch.equal(part.probs, whole.probs[:, :, rows, :seq]) and not whole.probs[:, :, rows, seq:].any()
        at += len(part.rows)
    silent = next(replace(whole, probs=torch.zeros_like(whole.probs)).parts())
    assert silent.k.shape[2] == 1


def test_what_all_keys_of_a_query_share_does_not_count() -> None:
    samples, start = planted(random_maps(0), None), random_maps(1)
    shifted = [
        LogitSamples(q=s.q, k=s.k, rows=s.rows, logits=s.logits + 3 * s.q.sum(-1, keepdim=True), probs=s.probs)
        for s in samples
    ]
    one, other = (refit_logits(x, start, turn=None, scale=0.5, strength=0.1) for x in (samples, shifted))
    torch.testing.assert_close(one.k_map, other.k_map, rtol=1e-3, atol=1e-3)


def test_right_maps_stay() -> None:
    wanted = random_maps(0)
    found = refit_logits(planted(wanted, None), wanted, turn=None, scale=0.5, strength=0.1)
    torch.testing.assert_close(found.q_map, wanted.q_map, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.k_map, wanted.k_map, rtol=0, atol=1e-4)


# --- far_bias


@pytest.mark.parametrize("cap", [None, 0.7])
def test_far_logits_are_raised_by_what_they_lack_in_softmax(cap: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = FarMaps(
        *(torch.randn(shape, generator=generator) / 3 for shape in ((4, DIM, 4), (2, DIM, 4), (2, DIM, 4), (4, 4, DIM)))
    )
    samples = planted(random_maps(0), None)
    samples = [replace(s, probs=s.probs * (s.rows[:, None] - torch.arange(SEQ) >= 3)) for s in samples]
    found = far_bias(samples, maps, scale=0.5, cap=cap)
    for head in range(4):
        lacking = count = 0.0
        for s in samples:
            for block, row in itertools.product(range(len(s.q)), range(len(s.rows))):
                far = range(max(0, int(s.rows[row]) - 2))
                given = sum(float(s.probs[block, head, row, t]) for t in far)
                whole = sum(math.exp(soft_capped(s.logits[block, head, row, t], cap)) for t in far)
                query = s.q[block, head, row] @ maps.q[head]
                logits = [0.5 * query @ (s.k[block, head // 2, t] @ maps.k[head // 2]) for t in far]
                reduced = sum(math.exp(soft_capped(x, cap)) for x in logits)
                if far:
                    lacking += given * (1 - given) * math.log(whole / reduced)
                    count += given * (1 - given)
        assert float(found[head]) == pytest.approx(lacking / count, rel=1e-4)
    assert found.abs().min() > 1e-3
