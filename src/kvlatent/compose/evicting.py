"""The cache that keeps to a policy, and what it does before and after every attention module."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvlatent.compose.attended import Received, causal
from kvlatent.compose.coded_layer import CodedLayer
from kvlatent.compose.hooks import Hooks
from kvlatent.compose.layers import EvictingLayer, EvictingWindowLayer, to_the_right
from kvlatent.compose.policy import LEAST, Policy, chosen
from kvlatent.errors import UserError
from kvlatent.model.cache import write_in_place
from kvlatent.model.families import rope_by_length
from kvlatent.model.graft import spec_of

MASKED_BY = ("sdpa", "eager")
"""Implementations of attention whose masks are tensors, so that every layer can be given its own."""


class Left(NamedTuple):
    """What a policy that shortens the first pass has left of a prompt."""

    columns: Int[Tensor, "batch left"]
    """Of the prompt, in order."""
    valid: Bool[Tensor, "batch left"] | None
    """Which of them are tokens; None is all."""
    length: int
    """Columns of the prompt."""
    now: Int[Tensor, "batch left"] | None
    """What of a layer's own columns stays, until its hidden states are shortened."""


class PolicyCache(DynamicCache):
    """A cache from which a policy takes tokens after every prefill, which is any forward pass of several tokens.

    Layers with a sliding window, which forget by themselves, stay as they are.
    """

    def __init__(self, policy: Policy, model: PreTrainedModel) -> None:
        """Build empty layers, and hook the model for as long as the cache lives.

        Raises:
            UserError: The model's cache can't be kept to the policy.
        """
        if (asked := model.config._attn_implementation) not in MASKED_BY:
            raise UserError(
                f"a policy gives each layer its own mask, so attention runs as sdpa or eager, not as {asked}"
            )
        super().__init__(config=model.config)
        self.policy, self.eager, spec = policy, asked == "eager", spec_of(model)
        check_combination(policy, model.config, after_rope=spec is not None and spec.qk_map == "after_rope")
        self.hooks = Hooks(model)
        self.acts_on: list[int] = []
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                near = spec if spec is not None and spec.window and index not in spec.whole_layers else None
                if policy.similar is not None and policy.keep < 1:
                    self.layers[index] = CodedLayer(self.hooks, index, keys=policy.similar[0], values=policy.similar[1])
                else:
                    self.layers[index] = EvictingWindowLayer(near.window, near.sinks) if near else EvictingLayer()
                self.acts_on.append(index)
        if spec is not None:
            write_in_place(self, model.config)
        self.left: Left | None = None
        if policy.observed(LEAST) or policy.similar is not None:
            self.hooks.observer  # noqa: B018 (now, rather than in the first prefill)

    def kept(self) -> dict[str, float]:
        """What is held of the tokens seen, over all sequences and all layers that the policy acts on.

        Returns:
            `kept_share`, of all tokens; of a model whose layers hold near tokens whole also `kept_far_share`, of the
            others, and `kept_far_tokens`, their mean number per layer and sequence. Shares of nothing are 1.
        """
        layers: list[Any] = [self.layers[index] for index in self.acts_on]
        tokens = layers[0].tokens  # later layers see fewer where the policy shortens

        def held(some: list[Any]) -> int:
            return sum(sum(layer.held_tokens()) for layer in some)

        near, seen = sum(min(layer.near, n) for layer in layers for n in tokens), sum(tokens) * len(layers)
        found = {"kept_share": (near + held(layers)) / seen if seen else 1.0}
        if windows := [layer for layer in layers if layer.near]:
            far = [max(0, n - layer.near) for layer in windows for n in tokens]
            found["kept_far_share"] = held(windows) / sum(far) if sum(far) else 1.0
            found["kept_far_tokens"] = held(windows) / max(1, len(far))
        return found

    def before(self, index: int, hidden: Float[Tensor, "batch seq hidden"], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Announce tokens to a layer, and give its attention the mask of what it holds.

        Args:
            index: The layer's.
            hidden: What its attention is given.
            kwargs: The other arguments.

        Returns:
            The arguments, with another mask.

        Raises:
            UserError: A mask that isn't causal with left padding alone.
        """
        if index not in self.acts_on:
            return kwargs
        layer: Any = self.layers[index]
        (batch, count, _), given = hidden.shape, kwargs.get("attention_mask")
        own = None if given is None else allowed(given)[..., -count:].expand(batch, -1, -1, -1)
        new = None if own is None else own[:, 0].diagonal(dim1=1, dim2=2)
        known, visible = layer.columns, layer.visible
        if given is not None and own is not None and new is not None and index == self.acts_on[0]:
            _check_padding(own, new, first=known == 0)
            if known and allowed(given)[:, 0, -1, :-count].sum(-1).tolist() not in (layer.tokens, layer.tokens[:1]):
                raise UserError("a policy chooses among all earlier tokens; got a mask that hides some of them")
        if new is not None and bool(new.all()):
            new = None
        layer.note(new, kwargs["position_ids"], batch)
        if known == 0 and new is None:
            return kwargs
        if count == 1:
            mask = None if layer.visible is None else layer.visible[:, None, None]
        else:
            now = causal(count, count, slice(None), hidden.device).expand(batch, -1, -1, -1) if own is None else own
            past = torch.ones(batch, known, dtype=torch.bool, device=hidden.device) if visible is None else visible
            mask = torch.cat((past[:, None, None].expand(-1, -1, count, -1), now), dim=-1)
        return kwargs | {"attention_mask": self.written(mask, hidden.dtype)}

    def written(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A boolean mask as the model's attention takes it."""
        if mask is None or not self.eager:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    @torch.no_grad()
    def after(self, index: int, hidden: Float[Tensor, "batch seq hidden"], kwargs: dict[str, Any]) -> None:
        """Take tokens out of a layer, now that its attention has met them.

        Args:
            index: The layer's.
            hidden: What its attention was given.
            kwargs: The other arguments, as `before` left them.
        """
        if index not in self.acts_on or self.policy.keep == 1:
            return
        layer: Any = self.layers[index]
        count, first_pass, at = hidden.shape[1], not layer.budgets, (self.acts_on.index(index), len(self.acts_on))
        if first_pass or (count > 1 and not self.policy.shortens):
            tokens = self.layers[self.acts_on[0]].tokens  # of the prompt, whatever earlier layers have left of it
            layer.budgets = [self.policy.budget(max(0, n - layer.near), *at) for n in tokens]
            kept = self._keep(index, layer, hidden, kwargs)
            if self.policy.shortens:
                self._leave(layer, kept, count)
            if self.policy.similar is not None:
                layer.encode()
        elif self.policy.steps:
            self._keep(index, layer, hidden, kwargs, decoding=True)
        else:
            layer.fresh += count
            oldest = self.policy.generated(self._written_far(layer), *at) if count == 1 else None
            if oldest is not None:
                self._keep_of_generated(index, layer, hidden, kwargs, *oldest)

    def _keep(
        self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], *, decoding: bool = False
    ) -> Bool[Tensor, "batch heads slots"] | None:
        """Take sequences that hold more than their budgets down to these, or below while decoding; None is all stay."""
        held = layer.held_tokens()
        if all(h <= n for h, n in zip(held, layer.budgets, strict=True)):
            return None
        spare = [self.policy.at_once(n) - 1 if decoding else 0 for n in layer.budgets]
        counts = [n if h <= n else n - more for h, n, more in zip(held, layer.budgets, spare, strict=True)]
        tokens = self.layers[self.acts_on[0]].tokens
        first = [max(0, self.policy.sinks - getattr(layer, "sinks", 0))] * len(tokens)
        window = getattr(layer, "window", 0)
        last = [max(0, self.policy.recent(*x) - window) for x in zip(tokens, layer.budgets, strict=True)]
        worth = self._worth(index, layer, hidden, kwargs, last)
        valid = layer.valid()
        if self.policy.steps and valid is None and counts == [layer.slots - 1] * len(tokens):
            span = worth[:, :, first[0] : layer.slots - last[0]]  # without padding all sequences are alike
            layer.drop(first[0] + span.shape[2] - 1 - span.flip(-1).argmin(-1))  # of equals the newest, as in `chosen`
            return None
        kept = chosen(worth, valid, counts, first=first, last=last)
        layer.take(*to_the_right(kept))
        return kept

    def _worth(
        self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], last: list[int]
    ) -> Float[Tensor, "batch heads slots"]:
        """What the policy says of a layer's slots: the newer the better where it doesn't look at attention."""
        tokens, slots = self.layers[self.acts_on[0]].tokens, torch.arange(layer.slots, device=hidden.device)
        looked = [min(self.policy.observed(n), n, hidden.shape[1]) for n in tokens]
        if (most := max(looked)) == 0:
            return slots.float().expand(len(tokens), 1, -1)
        weights = torch.zeros(len(tokens), most, device=hidden.device)
        for row, count in enumerate(looked):
            weights[row, most - count :] = self.policy.weights(count)
        received = self._received(index, layer, hidden, kwargs, weights, ahead=self.policy.ahead)
        if self.policy.ahead:
            newest = torch.ones(len(tokens), 1, device=hidden.device)
            received = received + self._received(index, layer, hidden, kwargs, newest, ahead=0)
        stays = slots >= layer.slots - torch.tensor(last, device=hidden.device)[:, None]
        return self.policy.rank(received.masked_fill(stays[:, None, None], 0.0))

    def _received(
        self,
        index: int,
        layer: Any,
        hidden: Tensor,
        kwargs: dict[str, Any],
        weights: Float[Tensor, "batch count"],
        *,
        ahead: int,
    ) -> Received:
        """Attention to a layer's slots of as many newest queries as there are weights."""
        count, mask = weights.shape[1], kwargs.get("attention_mask")
        mask = None if mask is None else allowed(mask)[:, :, -count:]
        queries = self.hooks.observer.queries(index, hidden, kwargs, count, ahead=ahead)
        return self.hooks.observer.received(index, layer, queries, weights, mask)

    def _keep_of_generated(
        self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], looked_at: int, stay: int
    ) -> None:
        """Of the oldest so many slots that came after the prompt keep so many, by the newest query's attention."""
        start = layer.slots - self._written_far(layer)
        worth = self._worth(index, layer, hidden, kwargs, [0] * len(hidden))[:, :, start : start + looked_at]
        best = worth.topk(stay, dim=-1).indices + start
        slots = torch.arange(layer.slots, device=hidden.device)
        kept = ((slots < start) | (slots >= start + looked_at)).expand(len(hidden), best.shape[1], -1).clone()
        kept.scatter_(2, best, True)
        valid = layer.valid()
        layer.take(*to_the_right(kept if valid is None else kept & valid[:, None]))
        layer.fresh -= looked_at

    @staticmethod
    def _written_far(layer: Any) -> int:
        """Slots that came after the prompt: of a window, those that have left it."""
        return int(layer.fresh - getattr(layer, "window", 0))

    def _leave(self, layer: Any, kept: Bool[Tensor, "batch heads slots"] | None, count: int) -> None:
        """Note which of the layer's columns later layers will see."""
        if kept is None:
            return
        stays = kept[:, 0]
        if isinstance(layer, EvictingWindowLayer):  # the slots were the columns between sinks and window
            stays = layer.whole_columns()
            start = layer.length - layer.window - kept.shape[2]
            stays[:, start : start + kept.shape[2]] |= kept[:, 0]
        columns, valid = to_the_right(stays[:, None])
        columns = columns[:, 0]
        before = self.left
        of_prompt = columns if before is None else before.columns.gather(1, columns)
        self.left = Left(of_prompt, valid, count if before is None else before.length, columns)


def check_combination(policy: Policy, config: PreTrainedConfig, *, after_rope: bool) -> None:
    """Refuse a policy that a model's cache can't be kept to; needs no weights.

    Args:
        policy: The policy.
        config: The model's.
        after_rope: Whether the model is a student whose maps of keys come after RoPE.

    Raises:
        UserError: The two can't be combined.
    """
    if policy.similar is not None and after_rope:
        raise UserError(
            f"{policy.name} merges keys as they are before RoPE, and this student's are reduced behind it; take "
            "another policy, or a student of --preset portable or paper"
        )
    turns = "keys back to before RoPE" if policy.similar is not None else "queries on" if policy.ahead else None
    if turns is not None and rope_by_length(config):
        raise UserError(f"{policy.name} turns {turns}, and RoPE's frequencies depend on this model's input's length")
    whole = [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]
    if not any(whole):
        raise UserError(
            "all layers of this model have a sliding window and forget by themselves: nothing is left for a policy"
        )
    if policy.shortens and not all(whole):
        raise UserError(
            f"{policy.name} takes tokens from all later layers, but some have a sliding window, which counts them; "
            "take another policy"
        )


def allowed(mask: Tensor) -> Bool[Tensor, "mask_batch 1 rows columns"]:
    """Where queries may look, by a mask of any kind."""
    return mask if mask.dtype == torch.bool else mask == 0


def _check_padding(own: Bool[Tensor, "batch 1 new new"], new: Bool[Tensor, "batch new"], *, first: bool) -> None:
    """Refuse masks of new tokens that aren't the causal triangle of left-padded sequences."""
    if not first and not bool(new.all()):
        raise UserError(
            "with a policy, padding inside a text isn't supported: continue all sequences by as many tokens"
        )
    triangle = causal(new.shape[1], new.shape[1], slice(None), new.device) & new[:, None, None]
    same = bool(((own == triangle) | ~new[:, None, :, None]).all())
    if not same or not bool((new[:, 1:] >= new[:, :-1]).all() and new[:, -1].all()):
        raise UserError("a policy takes causal masks with left padding alone, no packed texts and no right padding")
