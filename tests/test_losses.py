"""Chunked losses against naive float64, values and gradients."""

import itertools

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlatent.healing import losses
from kvlatent.healing.losses import (
    head_loss,
    hidden_mse,
    kl_loss,
    kl_term,
    ntp_loss,
    ntp_term,
    relative_error,
    top_k_term,
)


@pytest.fixture(autouse=True, params=[512, 3], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 10.0, 0.5])
@pytest.mark.parametrize("positions", [1, 3, 8])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_kl_equals_naive_float64_with_gradients(temperature: float, positions: int, cap: float | None) -> None:
    hidden, head = normal(positions, 6), normal(11, 6, seed=1)
    teacher_hidden, teacher_head = normal(positions, 4, seed=2), normal(11, 4, seed=3)
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = kl_loss(fast, head, teacher_hidden, teacher_head, temperature=temperature, cap=cap)
    wanted = reference.kl(
        reference.soft_capped(slow @ head.double().T, cap),
        reference.soft_capped(teacher_hidden.double() @ teacher_head.double().T, cap),
        temperature=temperature,
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    (3 * got).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)


def test_kl_of_equal_distributions_is_zero() -> None:
    hidden, head = normal(5, 6), normal(11, 6, seed=1)
    fast = hidden.clone().requires_grad_()
    loss = kl_loss(fast, head, hidden, head)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert fast.grad.abs().max() < 1e-6


@pytest.mark.parametrize("positions", [1, 3, 8])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_ntp_equals_naive_float64_with_gradients(positions: int, cap: float | None) -> None:
    hidden, head = normal(positions, 6), normal(11, 6, seed=1)
    labels = torch.randint(11, (positions,), generator=torch.Generator().manual_seed(2))
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = ntp_loss(fast, head, labels, cap=cap)
    wanted = reference.cross_entropy(reference.soft_capped(slow @ head.double().T, cap), labels)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)


def test_the_factor_of_the_temperature_scales_loss_and_gradients() -> None:
    hidden, head, wanted = normal(4, 6), normal(11, 6, seed=1), normal(4, 6, seed=2)
    plain, squared = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    first = kl_loss(plain, head, wanted, head, temperature=3.0)
    second = kl_loss(squared, head, wanted, head, temperature=3.0, squared=True)
    (first + second).backward()
    torch.testing.assert_close(second, 9 * first)
    torch.testing.assert_close(squared.grad, 9 * plain.grad)


def test_a_mix_is_the_weighted_sum_of_both() -> None:
    hidden, head, wanted = normal(8, 6), normal(11, 6, seed=1), normal(8, 6, seed=2)
    labels = torch.randint(11, (8,), generator=torch.Generator().manual_seed(2))
    mixed, apart = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = head_loss(mixed, head, (0.3 / 8, kl_term(wanted, head, temperature=2.0)), (0.7 / 8, ntp_term(labels)))
    expected = 0.3 * kl_loss(apart, head, wanted, head, temperature=2.0) + 0.7 * ntp_loss(apart, head, labels)
    torch.testing.assert_close(got, expected)
    (got + expected).backward()
    torch.testing.assert_close(mixed.grad, apart.grad)


def test_positions_without_a_next_token_count_nothing() -> None:
    hidden, head = normal(8, 6), normal(11, 6, seed=1)
    labels = torch.tensor([3, -1, 5, -1, -1, 0, 10, -100])
    some, few = hidden.clone().requires_grad_(), hidden[labels >= 0].clone().requires_grad_()
    got, wanted = head_loss(some, head, (1.0, ntp_term(labels))), 4 * ntp_loss(few, head, labels[labels >= 0])
    torch.testing.assert_close(got, wanted)
    (got + wanted).backward()
    torch.testing.assert_close(some.grad[labels >= 0], few.grad)
    assert not some.grad[labels < 0].any()


# --- the teacher's k likeliest tokens


def likeliest(teacher_hidden: Tensor, teacher_head: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    top = (teacher_hidden @ teacher_head.T / temperature).log_softmax(-1).topk(k)
    return top.indices.int(), top.values


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_of_the_whole_vocabulary_is_the_kl(temperature: float) -> None:
    hidden, head, wanted = normal(8, 6), normal(11, 6, seed=1), normal(8, 6, seed=2)
    full, kept = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    first = kl_loss(full, head, wanted, head, temperature=temperature)
    term = top_k_term(*likeliest(wanted, head, temperature, 11), temperature=temperature)
    second = head_loss(kept, head, (1 / 8, term))
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    (first + second).backward()
    torch.testing.assert_close(kept.grad, full.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_top_k_equals_a_kl_whose_other_tokens_are_merged(k: int, temperature: float) -> None:
    hidden, head, wanted = normal(8, 6), normal(11, 6, seed=1), normal(8, 6, seed=2)
    tokens, log_probs = likeliest(wanted, head, temperature, k)
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = head_loss(fast, head, (1 / 8, top_k_term(tokens, log_probs, temperature=temperature)))
    naive = torch.zeros((), dtype=torch.float64)
    for position in range(8):
        q = (slow[position] @ head.double().T / temperature).softmax(-1)
        p = log_probs[position].double().exp()
        index = tokens[position].tolist()
        rest = sum(q[token] for token in range(11) if token not in index)
        naive = naive + sum(p[i] * (p[i].log() - q[token].log()) for i, token in enumerate(index))
        naive = naive + (1 - p.sum()) * ((1 - p.sum()).log() - torch.as_tensor(rest).log())
    naive = naive / 8
    torch.testing.assert_close(got.double(), naive, rtol=1e-4, atol=1e-6)
    (got.double() + naive).backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-3, atol=1e-5)


def test_more_tokens_come_closer_to_the_kl_from_below() -> None:
    hidden, head, wanted = normal(8, 6), normal(11, 6, seed=1), normal(8, 6, seed=2)
    values = [
        head_loss(hidden, head, (1 / 8, top_k_term(*likeliest(wanted, head, 1.0, k)))).item() for k in range(1, 11)
    ]
    assert all(less < more for less, more in itertools.pairwise(values))
    assert values[-1] == pytest.approx(kl_loss(hidden, head, wanted, head).item(), rel=1e-5)


def test_probabilities_that_rounding_pushed_beyond_one_stay_finite() -> None:
    hidden = normal(2, 6).requires_grad_()
    term = top_k_term(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, -7.0], [0.0005, -65504.0]]))
    loss = head_loss(hidden, normal(11, 6, seed=1), (1.0, term))
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_the_head_gets_no_gradient() -> None:
    hidden, head = normal(4, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    (kl_loss(hidden, head, normal(4, 6), head) + ntp_loss(hidden, head, torch.tensor([1, 2, 3, 4]))).backward()
    assert hidden.grad is not None and head.grad is None


def test_losses_without_gradients_work_too() -> None:
    hidden, head, labels = normal(4, 6), normal(11, 6, seed=1), torch.tensor([0, 5, 10, 3])
    with torch.no_grad():
        assert ntp_loss(hidden, head, labels).item() == pytest.approx(
            reference.cross_entropy(hidden.double() @ head.double().T, labels).item(), rel=1e-5
        )


@settings(max_examples=20)
@given(batch=st.integers(1, 3), seq=st.integers(1, 4), seed=st.integers(0, 99))
def test_hidden_losses_equal_loops(batch: int, seq: int, seed: int) -> None:
    student, teacher = normal(2, batch, seq, 5, seed=seed)
    squares, relatives = [], []
    for b in range(batch):
        for t in range(seq):
            error = sum((s - w) ** 2 for s, w in zip(student[b, t].tolist(), teacher[b, t].tolist(), strict=True))
            squares.append(error / 5)
            relatives.append(error / sum(w**2 for w in teacher[b, t].tolist()))
    assert hidden_mse(student, teacher).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert relative_error(student, teacher).item() == pytest.approx(sum(relatives) / len(relatives), rel=1e-5)


def test_half_precision_states_are_compared_in_float32() -> None:
    student, teacher = normal(2, 3, 5).bfloat16()
    for loss in (hidden_mse, relative_error):
        got = loss(student, teacher)
        assert got.dtype == torch.float32
        assert got == loss(student.float(), teacher.float())
