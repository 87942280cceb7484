"""One pass over text: second moments of queries, keys and head outputs, layer by layer, saved as safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.compress.linear_algebra import moment
from kvlatent.compress.refit import probabilities
from kvlatent.data.positions import block_starts
from kvlatent.errors import UserError, first_error
from kvlatent.files import check_regular, new_file
from kvlatent.model.attention import LatentAttention, attention_of, side_by_side
from kvlatent.model.graft import graft, heads_per_latent_of
from kvlatent.model.layers import attention_input, embedded, layer_arguments
from kvlatent.model.offload import OffloadedLayers
from kvlatent.model.window import ALL_FAR, Near

NAMES = ("q", "k", "q_unrotated", "k_unrotated", "o")
"""The moments kept of each layer: queries, keys (per KV head), both again before RoPE, and head outputs."""
GROUPED = ("k_grouped", "k_unrotated_grouped", "o_grouped")
"""Keys and head outputs once more, with the dims of all KV heads that are to share a latent side by side."""
SINGLE = ("k_single", "v_single")
"""Single keys and values of a latent around zero, with a constant 1 behind their dims, so that the last column holds
sums: what noise on a key costs counts with the attention it gets, on a value with that attention's square."""


@dataclass
class LayerStatistics:
    """Sums over tokens of x xᵀ, each (heads, dim, dim) float64, and the number of tokens."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def mean(self, name: str, *, heads_per_latent: int = 1) -> Tensor:
        """The second moment E[x xᵀ] of one of `NAMES`, or of its counterpart in `GROUPED` for latents."""
        return self.sums[name if heads_per_latent == 1 else f"{name}_grouped"] / self.tokens

    @torch.no_grad()
    def update(
        self,
        attention: LatentAttention,
        x: Tensor,
        kwargs: dict[str, Any],
        *,
        heads_per_latent: int = 1,
        near: Near = ALL_FAR,
    ) -> None:
        """Add one batch, seen by an unreduced attention.

        Rotated keys count with the attention they get and are centered on each query's mean key: to second order, the
        KL between softmaxes is half the variance of the logit error under the attention. Beside a window only far
        attention counts, since there are no other errors, and keys are centered on the far part of the mean key.

        Args:
            attention: The layer's attention, all dims kept.
            x: Normalised inputs, (batch, seq, hidden).
            kwargs: The layer's other arguments: position embeddings and mask.
            heads_per_latent: KV heads that are reduced together.
            near: Tokens that the student will meet whole.
        """
        cos, sin = kwargs["position_embeddings"]
        q, k, v = (t.float() for t in attention.queries_keys_values(x, cos, sin, kwargs.get("position_ids")))
        keys, values = (side_by_side(t, heads_per_latent) for t in (k, v))
        both, mask = torch.cat((keys, values), dim=-1), kwargs.get("attention_mask")
        mean_key, out, received, squared, given = _attend(attention, q, k, both, mask=mask, near=near)
        k_centered = _centered(k, _own(mean_key, heads_per_latent, attention.group_size), received)
        q_unrotated, k_unrotated = (attention.turned_back(t, cos, sin) for t in (q, k))
        own_out = _own(out, heads_per_latent, attention.group_size)
        met = q * given[..., None] if near.window else q
        of_heads = moment(q, met), k_centered, moment(q_unrotated), moment(k_unrotated), moment(own_out)
        moments = dict(zip(NAMES, of_heads, strict=True))
        received, squared = (x.unflatten(1, (-1, heads_per_latent)).sum(2) for x in (received, squared))
        moments |= zip(SINGLE, (_with_one(keys, received), _with_one(values, squared)), strict=True)
        if heads_per_latent > 1:
            unrotated = side_by_side(k_unrotated, heads_per_latent)
            of_latents = _centered(keys, mean_key, received), moment(unrotated), moment(out)
            moments |= zip(GROUPED, of_latents, strict=True)
        for name, found in moments.items():
            self.sums[name] = self.sums.get(name, 0.0) + found.double()
        self.tokens += x.shape[0] * x.shape[1]


def _centered(k: Tensor, mean_key: Tensor, received: Tensor) -> Tensor:
    """Second moments of keys around each query's mean key, by the attention that they get; every query counts once.

    Args:
        k: Keys, (batch, heads, seq, dim).
        mean_key: Of each query, (batch, q_heads, seq, dim).
        received: Attention of all queries of a head to each key, (batch, heads, seq).
    """
    heads, q_heads = k.shape[1], mean_key.shape[1]
    of_means = moment(mean_key.unflatten(1, (heads, -1)).flatten(2, 3))
    return (moment(k, k * received[..., None]) - of_means) * heads / q_heads


def _with_one(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted second moments with a constant: (batch, heads, seq, dim) → (heads, dim + 1, dim + 1)."""
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    return moment(x, x * weights[..., None])


def _own(x: Tensor, heads_per_latent: int, group_size: int) -> Tensor:
    """Each query head's own part of heads side by side: (batch, q_heads, seq, m·dim) → (batch, q_heads, seq, dim)."""
    by_head = x.unflatten(1, (-1, heads_per_latent, group_size)).unflatten(-1, (heads_per_latent, -1))
    return by_head.diagonal(dim1=2, dim2=5).movedim(-1, 2).flatten(1, 3)


def _attend(
    attention: LatentAttention, q: Tensor, k: Tensor, both: Tensor, *, mask: Tensor | None, near: Near, rows: int = 128
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend causally, `rows` queries at a time, so that memory and time go to visible keys only.

    Args:
        attention: The layer's.
        q: Queries, (batch, q_heads, seq, head_dim).
        k: Keys, (batch, kv_heads, seq, head_dim).
        both: Keys and values that are averaged, (batch, latents, seq, 2·dim).
        mask: True where a query may look; None is at itself and all before.
        near: Tokens whose attention is left out.
        rows: Queries at a time.

    Returns:
        Mean key and mean value of each query, (batch, q_heads, seq, dim), the attention that each key receives from its
        group and the sum of its squares, (batch, kv_heads, seq), and what each query gives, (batch, q_heads, seq).
    """
    (batch, kv_heads, seq, _), latents, parts = k.shape, both.shape[1], []
    grouped = q.unflatten(1, (kv_heads, -1))
    received, squared, given = k.new_zeros(batch, kv_heads, seq), k.new_zeros(batch, kv_heads, seq), list[Tensor]()
    at = torch.arange(seq, device=k.device)
    for start in range(0, seq, rows):
        end = min(start + rows, seq)
        logits = (grouped[..., start:end, :].flatten(2, 3) @ k[:, :, :end].mT).mul_(attention.scale)
        if mask is None:
            visible = torch.ones(end - start, end, dtype=torch.bool, device=k.device).tril(start)[None, None]
        else:
            visible = mask[..., start:end, :end]
        probs = probabilities(attention, logits.unflatten(2, (-1, end - start)).flatten(1, 2), visible)
        if near.window:
            probs = probs * near.far(at[start:end], at[:end])
        given.append(probs.sum(-1))
        probs = probs.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        received[..., :end] += probs.sum(2)
        squared[..., :end] += probs.square().sum(2)
        parts.append((probs.reshape(batch, latents, -1, end) @ both[:, :, :end]).unflatten(2, (-1, end - start)))
    mean_key, out = torch.cat(parts, dim=3).flatten(1, 2).chunk(2, dim=-1)
    return mean_key, out, received, squared, torch.cat(given, dim=2)


Count = Annotated[int, Field(ge=1)]


class About(BaseModel):
    """What a statistics file says of itself, as far as it is read again; what else it holds is kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    text: list[str] = []
    tokens: Count | None = None
    fingerprints: list[str] = []
    near: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] = [0, 0]


@dataclass
class Statistics:
    """Calibration statistics of a model: what any preset and budget is derived from."""

    layers: list[LayerStatistics]
    about: dict[str, Any]
    """Model, sources, tokens and fingerprints of the text."""
    probes: Float[Tensor, "2 layers"] | None = None
    """From `budget.probe`: what narrow keys [0] or values [1] of one layer alone cost, in nats per token."""

    @property
    def first(self) -> LayerStatistics:
        """Of the first layer that has any: those of linear attention have none."""
        return next((layer for layer in self.layers if layer.sums), self.layers[0])

    @property
    def near(self) -> Near:
        """The tokens that students of these statistics meet whole."""
        return Near(*self.about.get("near", ()))

    @property
    def heads_per_latent(self) -> int:
        """KV heads that `GROUPED` are of; 1 without them."""
        sums = self.first.sums
        return sums.get("k_grouped", sums["k"]).shape[-1] // sums["k"].shape[-1]

    def save(self, path: Path) -> None:
        """Write one new safetensors file; `about` goes into its metadata."""
        tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.sums.items()}
        if self.probes is not None:
            tensors["probes"] = self.probes
        meta = {"about": json.dumps(self.about), "tokens": json.dumps([layer.tokens for layer in self.layers])}
        with new_file(path) as partial:
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, partial, metadata=meta)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing, cut off, damaged, or something else.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                meta, present = file.metadata() or {}, set(file.keys())
                about = About.model_validate_json(meta["about"]).model_dump(exclude_unset=True)
                tokens = TypeAdapter(list[Count]).validate_json(meta["tokens"], strict=True)
                own = {i for i in range(min(len(tokens), 9 * len(present))) if f"layers.{i}.{NAMES[0]}" in present}
                first = f"layers.{min(own, default=0)}"
                if own and f"{first}.{SINGLE[0]}" not in present:
                    raise UserError("it is of an earlier version and says nothing of single tokens; calibrate again")
                names = NAMES + SINGLE + (GROUPED if f"{first}.{GROUPED[0]}" in present else ())
                if present - {"probes"} != {f"layers.{i}.{name}" for i in own for name in names}:
                    raise UserError("its tensors are not those of so many layers")
                layers = [
                    LayerStatistics({name: file.get_tensor(f"layers.{i}.{name}") for name in names if i in own}, count)
                    for i, count in enumerate(tokens)
                ]
                loaded = cls(layers, about, file.get_tensor("probes") if "probes" in present else None)
            loaded.check()
        except ValidationError as error:
            raise UserError(f"{path} holds no calibration statistics of kvlatent: {first_error(error)}") from None
        except Exception as error:  # safetensors and what the metadata may be instead raise many kinds
            raise UserError(f"{path} holds no calibration statistics of kvlatent: {error}") from None
        return loaded

    def check(self) -> None:
        """Raise `UserError`, naming what is wrong, unless these are finite moments of alike layers of one model."""
        if not self.layers:
            raise UserError("it names no layers")
        if not (first := self.first.sums):
            raise UserError("no layer has any")
        (q_heads, head_dim, _), kv_heads = first["q"].shape, len(first["k"])
        m = self.heads_per_latent
        for index, layer in enumerate(self.layers):
            for name, x in layer.sums.items():
                of_latents = name in GROUPED + SINGLE
                heads = q_heads if name[0] in "qo" else kv_heads // m if of_latents else kv_heads
                width = (head_dim * m if of_latents else head_dim) + (name in SINGLE)
                if x.shape != (heads, width, width) or x.dtype != torch.float64:
                    raise UserError(f"layers.{index}.{name} has a wrong shape or dtype")
                if not bool(torch.isfinite(x).all()):
                    raise UserError(f"layers.{index}.{name} holds NaN or infinity")
        shape, probes = (2, len(self.layers)), self.probes
        if probes is not None and not (
            probes.shape == shape and probes.dtype == torch.float64 and bool(probes.isfinite().all())
        ):
            raise UserError("probes have a wrong shape or dtype, or hold NaN or infinity")

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both texts together, as if calibrated in one pass."""
        if len(self.layers) != len(other.layers):
            raise UserError(f"can't merge statistics of {len(self.layers)} and {len(other.layers)} layers")
        if self.heads_per_latent != other.heads_per_latent:
            raise UserError(
                f"can't merge statistics of {self.heads_per_latent} and {other.heads_per_latent} KV heads per latent"
            )
        if self.near != other.near:
            raise UserError(f"can't merge statistics for windows of {self.near.window} and {other.near.window} tokens")
        layers = [
            LayerStatistics({n: a.sums[n] + b.sums[n] for n in a.sums}, a.tokens + b.tokens)
            for a, b in zip(self.layers, other.layers, strict=True)
        ]
        probes = None
        if self.probes is not None and other.probes is not None:
            weight = other.layers[0].tokens / layers[0].tokens
            probes = torch.lerp(self.probes, other.probes, weight)
        both: dict[str, Any] = {
            key: sorted({*self.about[key], *other.about[key]})
            for key in ("text", "fingerprints")
            if key in self.about and key in other.about
        }
        return Statistics(layers, {**self.about, **both, "tokens": layers[0].tokens}, probes)


def check_far_tokens(near: Near, block_size: int) -> None:
    """Raise `UserError` if blocks of text hold no token that is met through latents."""
    if near.window and block_size <= sum(near):
        raise UserError(
            f"blocks of {block_size} tokens hold nothing beyond a window of {near.window} and {near.sinks} sinks; "
            "give longer ones (--block-size), or a shorter --window"
        )


def calibrate(
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    *,
    batch_size: int = 4,
    context: int | None = None,
    heads_per_latent: int | None = None,
    near: Near = ALL_FAR,
    about: dict[str, Any],
    offloaded: OffloadedLayers | None = None,
) -> Statistics:
    """Run the teacher once over `ids` and collect the statistics of every layer.

    Tokens stream through all layers, so memory is the model's and the statistics'. With `offloaded`, all tokens pass a
    layer before the next one comes in: memory is one layer's, the statistics' and one hidden state per token.

    Args:
        teacher: A stock model of a supported family.
        ids: Token blocks.
        batch_size: Blocks per forward.
        context: Positions that the blocks are spread over, if more than a block's.
        heads_per_latent: KV heads that may be reduced together; None is what `heads_per_latent_of` says.
        near: Tokens that students will meet whole: the statistics are then of far attention only.
        about: Stored with the statistics.
        offloaded: From `offload.open_offloaded`, with its teacher.

    Raises:
        UserError: Activations aren't finite, or the blocks hold nothing far.
    """
    check_far_tokens(near, ids.shape[1])
    model, grouped = graft(teacher, share=True), heads_per_latent_of(teacher.config, heads_per_latent)
    layers = model.model.layers
    statistics = [LayerStatistics() for _ in layers]
    starts = block_starts(len(ids), ids.shape[1], context).split(batch_size)

    def through(index: int, arguments: list[dict[str, Any]], hidden: Tensor) -> Tensor:
        layer, kwargs, moments = layers[index], arguments[index], statistics[index]
        if attention_of(layer) is None:
            moments.tokens += hidden.shape[0] * hidden.shape[1]
        else:
            x = attention_input(layer, hidden, kwargs)
            moments.update(layer.self_attn, x, kwargs, heads_per_latent=grouped, near=near)
        return layer(hidden, **kwargs)

    with torch.no_grad(), tqdm(total=ids.numel() * len(layers), unit="tok", unit_scale=True, desc="calibrate") as bar:
        states = (embedded(model, batch) for batch in ids.split(batch_size))
        if offloaded is None:
            for part, hidden in zip(starts, states, strict=True):
                arguments = layer_arguments(model, part, ids.shape[1])
                for index in range(len(layers)):
                    hidden = through(index, arguments, hidden)
                    bar.update(hidden.shape[0] * hidden.shape[1])
        else:
            waiting = [hidden.cpu() for hidden in states]
            of_batches = [layer_arguments(model, part, ids.shape[1]) for part in starts]
            for index, layer in enumerate(layers):
                with offloaded.visiting(layer, index):
                    for b, hidden in enumerate(waiting):
                        waiting[b] = through(index, of_batches[b], hidden.to(model.device)).cpu()
                        bar.update(hidden.shape[0] * hidden.shape[1])
    found = Statistics(statistics, {**about, "tokens": ids.numel(), **({"near": list(near)} if near.window else {})})
    try:
        found.check()
    except UserError as error:
        raise UserError(f"the teacher can't be calibrated: {error}; are its weights finite?") from None
    return found
