"""What the two stages minimise: in-layer errors (stage 1), losses of the next token's distribution (stage 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.data.positions import positions_in_blocks, positions_in_documents
from kvlatent.healing.config import HealConfig
from kvlatent.healing.losses import Term, head_loss, hidden_mse, kl_term, ntp_loss, ntp_term, relative_error, top_k_term
from kvlatent.model.layers import before_head, enter_layers, output_cap


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token blocks for one forward, and what of them counts."""

    ids: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"] | None = None
    """Positions, if they don't simply count the block's tokens from 0."""
    counted: Bool[Tensor, "batch seq"] | None = None
    """The positions that losses are taken at, those before an answer's tokens; None is all."""
    positions: float
    """What losses summed over positions are divided by: the step's counted positions per forward."""
    top_k: tuple[Int[Tensor, "batch seq k"], Float[Tensor, "batch seq k"]] | None = None
    """The teacher's likeliest next tokens and their log-probabilities, if they are cached."""

    def to(self, device: torch.device) -> dict[str, Any]:
        """The fields as keyword arguments, on `device`."""
        fields: dict[str, Any] = {"ids": self.ids.to(device), "positions": self.positions}
        for name in ("position_ids", "counted"):
            value = getattr(self, name)
            fields[name] = None if value is None else value.to(device)
        fields["top_k"] = None if self.top_k is None else tuple(x.to(device) for x in self.top_k)
        return fields


@dataclass(frozen=True, kw_only=True)
class Text:
    """Training text in order: stage 1 takes the first blocks, stage 2 the following ones."""

    ids: Int[Tensor, "blocks seq"]
    answers: Bool[Tensor, "blocks seq"] | None = None
    """Tokens of answers, if losses are taken on those alone."""
    separator: int | None = None
    """The token that starts a document, if documents must not see each other."""
    starts: Int[Tensor, "blocks"] | None = None
    """The positions that blocks begin at, if not all at 0."""

    def batch(self, start: int, size: int, step: slice) -> Batch:
        """The blocks from `start` on.

        Args:
            start: The first block.
            size: Blocks.
            step: All blocks of the training step that these are part of.
        """
        ids, part = self.ids[start : start + size].long(), slice(start, start + size)
        counted, positions = None, float(ids.numel())
        if self.answers is not None:
            counted = self.answers[part].roll(-1, dims=1)
            counted[:, -1] = False  # what follows the block is not known
            all_counted = self.answers[step, 1:].sum().item()
            positions = max(1.0, all_counted * size / (step.stop - step.start))
        starts = torch.zeros(len(ids), dtype=torch.long) if self.starts is None else self.starts[part]
        position_ids = None
        if self.separator is not None:
            position_ids = starts[:, None] + positions_in_documents(ids, self.separator)
        elif self.starts is not None:
            position_ids = positions_in_blocks(starts, ids.shape[1])
        return Batch(ids=ids, position_ids=position_ids, counted=counted, positions=positions)


class Stage(nn.Module):
    """The student with a stage's loss on top, so that wrappers for many devices see one forward per batch."""

    def __init__(
        self, trained: nn.Module, student: PreTrainedModel, teacher: PreTrainedModel, config: HealConfig
    ) -> None:
        super().__init__()
        self.trained = trained  # the student, possibly inside its LoRA wrapper
        self.stage, self.config = 1, config  # stage 0 only measures
        self._no_split_modules = student._no_split_modules  # where FSDP may cut
        self._unowned = (student, teacher)  # a tuple hides modules: the teacher is neither trained nor saved

    def forward(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: float,
        position_ids: Tensor | None = None,
        counted: Tensor | None = None,
        top_k: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss and, in stage 1, each layer's (layers,); arguments as the fields of `Batch`.

        Stage 0 is the mean nats of the next token.
        """
        student, teacher = self._unowned
        if self.stage == 0:
            hidden = student.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            hidden, labels = before_head(student, hidden), ids[:, 1:].flatten()
            return ntp_loss(hidden, student.lm_head.weight, labels, cap=output_cap(student)), None
        if self.stage == 1:
            relative = self.config.stage1_loss == "relative"
            losses = in_layer_losses(
                student, teacher, ids, relative=relative, position_ids=position_ids, counted=counted
            ) * (counted_positions(ids, counted) / positions)
            loss = losses.mean()
            if student.model.norm.weight.requires_grad:  # no layer's error sees it; DDP wants all in the graph
                loss = loss + 0.0 * student.model.norm.weight.sum()
            return loss, losses.detach()
        return self._end_to_end(ids, positions, position_ids, counted, top_k), None

    def _end_to_end(
        self, ids: Tensor, positions: float, position_ids: Tensor | None, counted: Tensor | None, top_k: Any
    ) -> Tensor:
        (student, teacher), config = self._unowned, self.config

        def chosen(x: Tensor) -> Tensor:
            return x.flatten(0, 1) if counted is None else x[counted]

        hidden = before_head(student, student.model(ids, position_ids=position_ids, use_cache=False).last_hidden_state)
        hidden = chosen(hidden)
        share = {"kl": 1.0, "ntp": 0.0, "mix": config.kl_weight}[config.loss]
        terms: list[tuple[float, Term]] = []
        if share:
            options: dict[str, Any] = {"temperature": config.temperature, "squared": config.temperature_squared}
            if top_k is not None:
                kl = top_k_term(chosen(top_k[0]), chosen(top_k[1]), **options)
            else:
                with torch.no_grad():
                    wanted = teacher.model(ids, position_ids=position_ids, use_cache=False).last_hidden_state
                wanted = chosen(before_head(teacher, wanted))
                kl = kl_term(wanted, teacher.lm_head.weight, cap=output_cap(teacher), **options)
            terms.append((share / positions, kl))
        if share < 1:
            labels = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -1)), 1)
            # Without chosen positions, each block's last one has no next token.
            known = positions if counted is not None else positions * (ids.shape[1] - 1) / ids.shape[1]
            terms.append(((1 - share) / known, ntp_term(chosen(labels))))
        return head_loss(hidden, student.lm_head.weight, *terms, cap=output_cap(student))


def counted_positions(ids: Tensor, counted: Tensor | None) -> int:
    """How many positions of a batch losses are taken at."""
    return ids.numel() if counted is None else int(counted.sum())


def in_layer_losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    *,
    relative: bool,
    position_ids: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """Error of each student layer on the teacher's hidden states (Eq. 6-7): layer l gets H^(l-1) and is held to H^l.

    Args:
        student: The converted model.
        teacher: The original.
        ids: Tokens.
        relative: Whether to measure each position's error relative to its norm.
        position_ids: As in `Batch`.
        counted: As in `Batch`.

    Returns:
        (layers,) losses; gradients stay within each layer.
    """
    hidden, of_teacher = enter_layers(teacher, ids, position_ids)
    _, of_student = enter_layers(student, ids, position_ids)
    losses: list[Tensor] = []
    for layer, model, kwargs, wanted_kwargs in zip(
        student.model.layers, teacher.model.layers, of_student, of_teacher, strict=True
    ):
        with torch.no_grad():
            wanted = model(hidden, **wanted_kwargs)
        losses.append(in_layer_loss(layer, hidden, wanted, kwargs, relative=relative, counted=counted))
        hidden = wanted
    return torch.stack(losses)


def in_layer_loss(
    layer: nn.Module,
    hidden: Float[Tensor, "batch seq hidden"],
    wanted: Float[Tensor, "batch seq hidden"],
    kwargs: dict[str, Any],
    *,
    relative: bool,
    counted: Bool[Tensor, "batch seq"] | None,
) -> Tensor:
    """Error of one layer between two of the teacher's hidden states, over the positions that count."""
    got = layer(hidden.to(next(layer.parameters()).dtype), **kwargs)
    if counted is not None:
        if not counted.any():
            return got.sum() * 0.0
        got, wanted = got[counted], wanted[counted]
    return (relative_error if relative else hidden_mse)(got, wanted)
