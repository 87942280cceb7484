"""Hooks by which a policy's cache sees what a model's layers are given.

They act on that kind of cache alone, and are removed with the last copy of the cache that they were made for.
"""

from __future__ import annotations

import weakref
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvlatent.compose.attended import Observer, causal
from kvlatent.errors import UserError
from kvlatent.model.compatibility import CACHE_NAMES
from kvlatent.model.families import linear_layers
from kvlatent.model.graft import check_teacher, spec_of

if TYPE_CHECKING:
    from kvlatent.compose.evicting import PolicyCache


class Hooks:
    """What ties a cache, and its copies, to a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Register the hooks.

        Raises:
            UserError: The architecture is not supported.
        """
        if spec_of(model) is None:
            check_teacher(model.config)
        if linear_layers(model.config):
            raise UserError("layers of linear attention keep what a policy drops, so these models take none")
        self.model, mine = model, weakref.ref(self)
        handles: list[RemovableHandle] = []
        last = len(model.model.layers) - 1
        for index, layer in enumerate(model.model.layers):
            before, after = partial(_before, mine, index), partial(_after, mine, index)
            handles += [
                layer.self_attn.register_forward_pre_hook(before, with_kwargs=True),
                layer.self_attn.register_forward_hook(after, with_kwargs=True),
                layer.register_forward_pre_hook(partial(_enter, mine, index), with_kwargs=True),
                layer.register_forward_hook(partial(_leave, mine, index == last), with_kwargs=True),
            ]
        weakref.finalize(self, _remove, handles)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return self

    @cached_property
    def observer(self) -> Observer:
        """What gives the model's queries."""
        return Observer(self.model)


Mine = weakref.ref[Hooks]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _cache(mine: Mine, kwargs: dict[str, Any]) -> PolicyCache | None:
    """The cache that a module is given, if it is one that these hooks were made for."""
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    return cache if cache is not None and getattr(cache, "hooks", None) is mine() else None


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _before(
    mine: Mine, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache(mine, kwargs)
    return None if cache is None else (args, cache.before(index, _hidden(args, kwargs), kwargs))


def _after(
    mine: Mine, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
) -> None:
    if (cache := _cache(mine, kwargs)) is not None:
        cache.after(index, _hidden(args, kwargs), kwargs)


def _enter(
    mine: Mine, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Where earlier layers have shortened the prompt, shorten a layer's other arguments to it."""
    if (cache := _cache(mine, kwargs)) is None:
        return None
    if index == 0:
        cache.left = None
    return None if cache.left is None else (args, kwargs | shortened(cache, kwargs, _hidden(args, kwargs)))


def shortened(cache: PolicyCache, kwargs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
    """Positions, their embeddings and the mask of what is left of a prompt."""
    from kvlatent.compose.evicting import allowed

    assert cache.left is not None
    columns, valid = cache.left.columns, cache.left.valid
    batch, left = columns.shape

    def of_left(x: Tensor) -> Tensor:
        return x.expand(batch, -1, *x.shape[2:])[torch.arange(batch, device=x.device)[:, None], columns]

    mask = kwargs.get("attention_mask")
    if mask is not None:
        rows = torch.arange(batch, device=mask.device)[:, None, None]
        mask = allowed(mask).expand(batch, -1, -1, -1)[rows, 0, columns[:, :, None], columns[:, None]][:, None]
    if valid is not None:
        mask = (causal(left, left, slice(None), hidden.device) if mask is None else mask) & valid[:, None, None]
    return {
        "position_ids": of_left(kwargs["position_ids"]),
        "position_embeddings": tuple(map(of_left, kwargs["position_embeddings"])),
        "attention_mask": cache.written(mask, hidden.dtype),
    }


def _leave(
    mine: Mine, last: bool, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Shorten hidden states to what is left; behind the last layer put them at their places, others are no numbers."""
    cache = _cache(mine, kwargs)
    if cache is None or (left := cache.left) is None:
        return None
    if left.now is not None:
        output = output.gather(1, left.now[..., None].expand(-1, -1, output.shape[2]))
        cache.left = left._replace(now=None)
    if not last:
        return output
    whole = output.new_full((len(output), left.length, output.shape[2]), torch.nan)
    return whole.scatter(1, left.columns[..., None].expand(-1, -1, output.shape[2]), output)
