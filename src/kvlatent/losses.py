"""Losses of the two healing stages; the vocabulary-wide ones never hold full logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 512
"""Positions whose logits are held at once."""


def hidden_mse(student: Float[Tensor, "*batch hidden"], teacher: Float[Tensor, "*batch hidden"]) -> Tensor:
    """Squared error over positions × hidden size (Eq. 6), in float32."""
    return F.mse_loss(student.float(), teacher.float())


def relative_error(student: Float[Tensor, "*batch hidden"], teacher: Float[Tensor, "*batch hidden"]) -> Tensor:
    """Squared error of each position over the teacher's squared norm there, averaged.

    A few positions carry hidden states hundreds of times larger than the rest (attention sinks); the plain squared
    error is about little else.
    """
    teacher = teacher.float()
    return ((student.float() - teacher).square().sum(-1) / teacher.square().sum(-1)).mean()


def kl_loss(
    hidden: Float[Tensor, "positions hidden"],
    head: Float[Tensor, "vocab hidden"],
    teacher_hidden: Float[Tensor, "positions teacher_hidden"],
    teacher_head: Float[Tensor, "vocab teacher_hidden"],
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Forward KL from teacher to student in nats per position (Eq. 9), without the T² factor, as the authors code it.

    Args:
        hidden: The student's final hidden states; gradients flow here.
        head: The student's output embedding; frozen, gets no gradient.
        teacher_hidden: The teacher's final hidden states.
        teacher_head: The teacher's output embedding.
        temperature: Divides both logits.
    """

    def chunk_loss(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            wanted = F.linear(teacher_hidden[part], teacher_head).float().div_(temperature).log_softmax(-1)
        return F.kl_div((logits / temperature).log_softmax(-1), wanted, log_target=True, reduction="sum")

    return _HeadLoss.apply(hidden, head, chunk_loss) / len(hidden)


def ntp_loss(
    hidden: Float[Tensor, "positions hidden"], head: Float[Tensor, "vocab hidden"], labels: Int[Tensor, "positions"]
) -> Tensor:
    """Next-token cross-entropy in nats per position (Eq. 8); `labels` are already the next tokens."""

    def chunk_loss(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, labels[part], reduction="sum")

    return _HeadLoss.apply(hidden, head, chunk_loss) / len(hidden)


class _HeadLoss(torch.autograd.Function):
    """Sum over positions of a loss of the logits; each chunk's gradient is taken at once and its logits dropped."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, chunk_loss: Callable[[Tensor, slice], Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        wanted = ctx.needs_input_grad[0]
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.set_grad_enabled(wanted):
                x = hidden[part].detach().requires_grad_(wanted)
                loss = chunk_loss(F.linear(x, head.detach()).float(), part)
            if wanted:
                (gradient[part],) = torch.autograd.grad(loss, x)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None
