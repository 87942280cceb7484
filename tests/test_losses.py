"""Chunked losses against naive float64, values and gradients."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlatent import losses
from kvlatent.losses import hidden_mse, kl_loss, ntp_loss, relative_error


@pytest.fixture(autouse=True, params=[512, 3], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 10.0, 0.5])
@pytest.mark.parametrize("positions", [1, 3, 8])
def test_kl_equals_naive_float64_with_gradients(temperature: float, positions: int) -> None:
    hidden, head = normal(positions, 6), normal(11, 6, seed=1)
    teacher_hidden, teacher_head = normal(positions, 4, seed=2), normal(11, 4, seed=3)
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = kl_loss(fast, head, teacher_hidden, teacher_head, temperature=temperature)
    wanted = reference.kl(
        slow @ head.double().T, teacher_hidden.double() @ teacher_head.double().T, temperature=temperature
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
def test_ntp_equals_naive_float64_with_gradients(positions: int) -> None:
    hidden, head = normal(positions, 6), normal(11, 6, seed=1)
    labels = torch.randint(11, (positions,), generator=torch.Generator().manual_seed(2))
    fast, slow = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    got = ntp_loss(fast, head, labels)
    wanted = reference.cross_entropy(slow @ head.double().T, labels)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)


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


@settings(deadline=None, max_examples=20)
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
