"""Losses of the two healing stages; the vocabulary-wide ones never hold full logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvlatent.kernels.segment import capped, computed_in

CHUNK = 256
"""Positions whose logits are held at once."""

Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""A loss of the logits (chunk, vocab) of the positions in a slice: its sum over them, and its gradient."""


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


# --- losses of the logits --------------------------------------------------------------------------------------------


def kl_term(
    teacher_hidden: Float[Tensor, "positions teacher_hidden"],
    teacher_head: Float[Tensor, "vocab teacher_hidden"],
    *,
    temperature: float = 1.0,
    squared: bool = False,
    cap: float | None = None,
) -> Term:
    """Forward KL from teacher to student in nats (Eq. 9).

    Args:
        teacher_hidden: The teacher's final hidden states.
        teacher_head: The teacher's output embedding.
        temperature: Divides both logits.
        squared: Multiply by the temperature's square; the authors' code does not.
        cap: Soft cap of the teacher's logits.
    """
    scale = temperature**2 if squared else 1.0

    def term(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        wanted = capped(F.linear(teacher_hidden[part], teacher_head).float(), cap).div_(temperature).log_softmax(-1)
        got = _tempered(logits, temperature).log_softmax(-1)
        log_ratio = wanted - got
        wanted = wanted.exp_()
        loss = torch.dot(wanted.flatten(), log_ratio.flatten())
        return loss * scale, got.exp_().sub_(wanted).mul_(scale / temperature)

    return term


def top_k_term(
    tokens: Int[Tensor, "positions k"],
    log_probs: Float[Tensor, "positions k"],
    *,
    temperature: float = 1.0,
    squared: bool = False,
) -> Term:
    """Forward KL to a teacher of whom only the k likeliest tokens are known; all others count as one outcome.

    Merging outcomes can only lower a KL, so this is a lower bound of `kl_term`; with k = vocab they are equal.

    Args:
        tokens: The teacher's k likeliest next tokens.
        log_probs: Their log-probabilities at the same temperature.
        temperature: Divides the student's logits.
        squared: As in `kl_term`.
    """
    scale = temperature**2 if squared else 1.0

    def term(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        index, log_wanted = tokens[part].long(), log_probs[part].float()
        log_wanted = log_wanted - log_wanted.logsumexp(-1, keepdim=True).clamp(min=0.0)  # rounding may exceed 1
        wanted = log_wanted.exp()
        got = _tempered(logits, temperature).log_softmax(-1)
        loss = (wanted * (log_wanted - got.gather(-1, index))).sum()
        target_of_rest: Tensor | float = 0.0  # what the rest is pulled to, over what the student gives it
        if index.shape[-1] < logits.shape[-1]:
            tail = (1 - wanted.sum(-1, keepdim=True)).clamp(min=0.0)
            log_tail = got.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
            loss = loss + (torch.special.xlogy(tail, tail) - tail * log_tail).sum()
            target_of_rest = torch.where(tail > 0, tail / log_tail.exp(), 0.0)
        probs = got.exp_()
        gradient = probs * (1 - target_of_rest)
        gradient.scatter_(-1, index, probs.gather(-1, index) - wanted)
        return loss * scale, gradient.mul_(scale / temperature)

    return term


def ntp_term(labels: Int[Tensor, "positions"]) -> Term:
    """Next-token cross-entropy in nats (Eq. 8); `labels` are already the next tokens, negative where there is none."""

    def term(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        known = labels[part] >= 0
        index = labels[part].clamp(min=0)[:, None]
        got = logits.log_softmax(-1)
        loss = -(got.gather(-1, index)[:, 0] * known).sum()
        gradient = got.exp_()
        gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
        return loss, gradient.mul_(known[:, None])

    return term


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def head_loss(
    hidden: Float[Tensor, "positions hidden"],
    head: Float[Tensor, "vocab hidden"],
    *terms: tuple[float, Term],
    cap: float | None = None,
) -> Tensor:
    """Weighted sum of losses of the logits, each summed over positions.

    Every chunk's gradient is taken at once and its logits dropped, so that at most `CHUNK` positions' are held.

    Args:
        hidden: The student's final hidden states; gradients flow here.
        head: The student's output embedding; frozen, gets no gradient.
        *terms: Weights and losses.
        cap: Soft cap of the student's logits.
    """
    return _HeadLoss.apply(hidden, head, terms, cap)


def kl_loss(
    hidden: Float[Tensor, "positions hidden"],
    head: Float[Tensor, "vocab hidden"],
    teacher_hidden: Float[Tensor, "positions teacher_hidden"],
    teacher_head: Float[Tensor, "vocab teacher_hidden"],
    *,
    temperature: float = 1.0,
    squared: bool = False,
    cap: float | None = None,
) -> Tensor:
    """`kl_term` per position; arguments as there and for `head_loss`."""
    term = kl_term(teacher_hidden, teacher_head, temperature=temperature, squared=squared, cap=cap)
    return head_loss(hidden, head, (1 / len(hidden), term), cap=cap)


def ntp_loss(
    hidden: Float[Tensor, "positions hidden"],
    head: Float[Tensor, "vocab hidden"],
    labels: Int[Tensor, "positions"],
    *,
    cap: float | None = None,
) -> Tensor:
    """`ntp_term` per position; arguments as there and for `head_loss`."""
    return head_loss(hidden, head, (1 / len(hidden), ntp_term(labels)), cap=cap)


class _HeadLoss(torch.autograd.Function):
    """`head_loss`, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, head: Tensor, terms: tuple[tuple[float, Term], ...], cap: float | None
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        head = head.to(computed_in(hidden))  # once, not for every chunk
        # In float32, with the largest weight applied last: half precision would round a mean's gradients to zero.
        gradient = torch.empty_like(hidden, dtype=torch.float32) if wanted else None
        largest = max(weight for weight, _ in terms)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = capped(F.linear(hidden[part], head).float(), cap)
            by_logit: Tensor | None = None
            for weight, term in terms:
                loss, slope = term(logits, part)
                total += weight * loss
                slope = slope.mul_(weight / largest)
                by_logit = slope if by_logit is None else by_logit.add_(slope)
            if gradient is not None and by_logit is not None:
                if cap is not None:
                    by_logit.mul_(1 - (logits / cap).square())  # the slope of the tanh
                gradient[part] = by_logit.to(head.dtype) @ head
            del logits, slope  # before the next chunk's come
        if gradient is not None:
            gradient.mul_(largest)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_output).to(ctx.dtype), None, None, None
