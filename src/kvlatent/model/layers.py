"""Running a stock model in parts: its body without layers, modules hooked for a call, logits a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.kernels.segment import capped

POSITIONS_PER_CHUNK = 512  # a 150k vocabulary in float32 then needs 0.3 GB of logits, whatever the block size


def layer_arguments(model: PreTrainedModel, starts: Int[Tensor, "batch"], block_size: int) -> list[dict[str, Any]]:
    """Positions, their embeddings and mask that each layer gets for blocks that begin at `starts`; no layer is run."""
    starts = starts.to(model.device)
    positions = starts[:, None] + torch.arange(block_size, device=starts.device)
    _, arguments = enter_layers(model, torch.zeros_like(positions), positions)
    names = ("position_embeddings", "attention_mask", "position_ids")
    return [{name: kwargs[name] for name in names} for kwargs in arguments]


def enter_layers(
    model: PreTrainedModel, ids: Int[Tensor, "batch seq"], position_ids: Tensor | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the model's body gives its first layer, and every layer's other arguments; no layer is run.

    The stock body decides on masks and position embeddings; asking it keeps windows, packing and mixed layer types
    right.
    """
    body, seen = model.model, _Entrance()
    layers = body.layers
    body.layers = nn.ModuleList([seen] * len(layers))
    try:
        with torch.no_grad():
            body(ids, position_ids=position_ids, use_cache=False)
    finally:
        body.layers = layers
    return seen.hidden[0], seen.arguments


class _Entrance(nn.Module):
    """Stands for a layer and remembers what it is given.

    It takes arguments of any name, because none is meant for it: they are handed to the layers that it stands for, and
    those refuse what they don't know. A name that is asked for and wasn't given is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden.append(hidden)
        self.arguments.append(kwargs)
        return hidden


@contextmanager
def hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Keep torch hooks for the body of a `with`, and remove them whatever happens there."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def input_and_output(module: nn.Module, run: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Call `run` and return the tensor that `module` was given meanwhile, and the result of `run`."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_hidden(args, kwargs))

    with hooks(iter([module.register_forward_pre_hook(note, with_kwargs=True)])):
        result = run()
    return seen[0], result


class _Reached(Exception):
    """Carries what a module was about to be given."""


def input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Call `run` until it reaches `module`, and return the tensor that it would be given there."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(_hidden(args, kwargs))

    with hooks(iter([module.register_forward_pre_hook(stop, with_kwargs=True)])):
        try:
            run()
        except _Reached as reached:
            tensor: Tensor = reached.args[0]
            return tensor
    raise AssertionError("the module is not part of what ran")


def _hidden(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module is called with, by place or by name."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def attention_input(layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What a decoder layer gives its attention for these hidden states (batch, seq, hidden): most normalise them."""
    return input_of(layer.self_attn, partial(layer, hidden, **arguments))


def embedded(model: PreTrainedModel, ids: Int[Tensor, "batch seq"]) -> Tensor:
    """What the body gives its first layer, (batch, seq, hidden): some scale their embeddings."""
    return enter_layers(model, ids.to(model.device))[0]


def before_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Final hidden states (…, hidden) whose product with the output head is the logits, before a soft cap."""
    config = model.config
    return hidden * (getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0))


def output_cap(model: PreTrainedModel) -> float | None:
    """The soft cap of the output's logits, if they have one."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def output_logits(model: PreTrainedModel, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
    """Logits of final hidden states, in float32."""
    return capped(model.get_output_embeddings()(before_head(model, hidden)).float(), output_cap(model))


def token_nll(
    model: PreTrainedModel, ids: Int[Tensor, "batch block_size"], **kwargs: Any
) -> Float[Tensor, "batch block_size-1"]:
    """Return nats per predicted token in float32, holding full-vocabulary logits of one chunk at a time."""
    hidden = (
        model.get_decoder()(input_ids=ids, **{"use_cache": False, **kwargs}).last_hidden_state[:, :-1].flatten(0, 1)
    )
    chunks = zip(hidden.split(POSITIONS_PER_CHUNK), ids[:, 1:].flatten().long().split(POSITIONS_PER_CHUNK), strict=True)
    nll = [F.cross_entropy(output_logits(model, states), targets, reduction="none") for states, targets in chunks]
    return torch.cat(nll).view(len(ids), -1)


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Raise a UserError if a sequence of `tokens` has more positions than the model was made for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(f"{tokens} tokens are more than the model's {limit} positions (max_position_embeddings)")


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
