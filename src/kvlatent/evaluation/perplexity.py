"""Perplexity on packed text, and two models' perplexities compared block by block."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError
from kvlatent.model.compatibility import CACHE
from kvlatent.model.layers import check_positions, evaluation_mode, token_nll

SHORT = 512  # tokens of a short context
MOST_NATS = 700.0
"""What a token may cost: of more, or of what is no number, no perplexity is finite."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Perplexity:
    """Negative log-likelihood of packed text under one model."""

    token_nll: Float[Tensor, "blocks block_size-1"]
    """In nats, of every predicted token; float64, on the CPU. The first of a block has nothing to be predicted from."""
    bytes: int
    """UTF-8 bytes of the text behind all tokens, the first of each block included."""
    first: int = 1
    """Place in a block of the first predicted token; what is before it is neither predicted nor counted."""
    kept: dict[str, float] | None = None
    """What a policy left of what is before it, as `PolicyCache.kept` says."""

    def of_second_half(self) -> "Perplexity":
        """What `perplexity` measures with a policy: the same without the first half of each block."""
        block_size = self.token_nll.shape[1] + 1
        half = block_size // 2
        return Perplexity(
            token_nll=self.token_nll[:, half:], bytes=_share(self.bytes, block_size - half, block_size), first=half + 1
        )

    @property
    def nll(self) -> float:
        """Total over all predicted tokens, in nats."""
        return float(self.block_nll.sum()) * self.token_nll.shape[1]

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.token_nll.numel()

    @property
    def block_nll(self) -> Float[Tensor, "blocks"]:
        """Mean over the predicted tokens of each block, in nats."""
        return self.token_nll.mean(dim=1)

    @property
    def position_nll(self) -> Float[Tensor, "block_size-1"]:
        """Mean over blocks of each predicted position, in nats."""
        return self.token_nll.mean(dim=0)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean nats per predicted token."""
        return math.exp(self.nll / self.tokens)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of `perplexity` with blocks as the independent samples; None for one block."""
        error = standard_error(self.block_nll)
        return None if error is None else self.perplexity * error

    @property
    def by_position(self) -> dict[str, float]:
        """Perplexity of the first `SHORT` tokens of blocks, of the next as many, of the next twice as many, and so on.

        A student may be good at the start of a context and bad far into it, which a mean over short blocks can't show.
        """
        bounds, block_size = [0, SHORT], len(self.position_nll) + self.first
        while bounds[-1] < block_size:
            bounds.append(2 * bounds[-1])
        bounds[-1] = block_size
        return {  # the first token is not predicted
            f"{start}-{end}": math.exp(self.position_nll[max(0, start - self.first) : end - self.first].mean())
            for start, end in itertools.pairwise(bounds)
            if end > self.first
        }

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per predicted token, times the tokens per byte of the whole text.

        The byte length of the unpredicted first tokens is not known here, so each of them is charged the mean of the
        predicted ones; numerator and denominator then cover the same text.
        """
        tokens_per_byte = (self.tokens + len(self.block_nll)) / self.bytes
        return self.nll / self.tokens / math.log(2) * tokens_per_byte


class PerplexityRatio(NamedTuple):
    """Student perplexity over teacher perplexity; 1.0 is no loss."""

    perplexity_ratio: float
    stderr: float | None
    """Standard error of the ratio; None for one block."""


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    *,
    text_bytes: int,
    batch_size: int,
    visible: Bool[Tensor, "1 1 block_size block_size"] | dict[str, Tensor] | None = None,
    policy: Policy | None = None,
) -> Perplexity:
    """Measure how well a model predicts packed text.

    Tokens see only their own block. Log-probabilities are float32 whatever the model's dtype, sums are float64, and
    logits exist for a few positions at a time.

    Args:
        model: On any device; left in the mode (training or not) it came in.
        ids: Packed text, on any device.
        text_bytes: UTF-8 bytes of the text that all of `ids` stands for.
        batch_size: Blocks per forward pass; changes speed and memory, not the result.
        visible: Which tokens of its block each token sees, in all layers or by type of layer; None is all up to itself.
        policy: Predict the second half of each block from what it keeps of the first half.

    Raises:
        UserError: No text, blocks too short or longer than the model's positions, ids outside its vocabulary, or
            probabilities of 0 or that are no numbers.
    """
    _check_blocks(model, ids, text_bytes=text_bytes, batch_size=batch_size)
    kwargs: dict[str, Any] = {}
    if isinstance(visible, dict):
        kwargs["attention_mask"] = {kind: _written(mask, model) for kind, mask in visible.items()}
    elif visible is not None:
        kwargs["attention_mask"] = _written(visible, model)
    half, kept, parts = 0, None, list[Tensor]()
    if policy is not None:
        half, cache = ids.shape[1] // 2, policy.cache(model)
        kwargs |= {"use_cache": True, CACHE: cache}
    progress = tqdm(total=ids.numel(), desc="perplexity", unit="tokens", unit_scale=True)
    with evaluation_mode(model), progress:
        for batch in ids.split(batch_size):
            if policy is not None:
                cache.reset()
                model.get_decoder()(input_ids=batch[:, :half].to(model.device), **kwargs)
                kept = cache.kept()
            parts.append(token_nll(model, batch[:, half:].to(model.device), **kwargs).cpu().double())
            if not bool((parts[-1] <= MOST_NATS).all()):
                raise UserError(
                    f"a token of the text costs {parts[-1].max():.4g} nats, and beyond {MOST_NATS:.0f} a perplexity "
                    "means nothing: the model's weights are damaged, or too large for its dtype"
                )
            progress.set_postfix(perplexity=f"{torch.cat(parts).mean().exp():.2f}", refresh=False)
            progress.update(batch.numel())
    text_bytes = _share(text_bytes, ids.shape[1] - half, ids.shape[1])
    return Perplexity(token_nll=torch.cat(parts), bytes=text_bytes, first=half + 1, kept=kept)


def compare(teacher: Perplexity, student: Perplexity) -> PerplexityRatio:
    """Return the student's perplexity relative to the teacher's on the same blocks.

    The log ratio is the mean over blocks of the difference of the two models' mean nll. Pairing cancels how hard each
    block is for both, so its standard error, from the spread of these differences, is far smaller than that of either
    perplexity. It assumes independent blocks and a normal mean, and becomes the ratio's by the delta method:
    `stderr = ratio * stderr(log ratio)`.

    Raises:
        UserError: The two were not measured on the same blocks.
    """
    if (teacher.tokens, teacher.bytes) != (student.tokens, student.bytes) or len(teacher.block_nll) != len(
        student.block_nll
    ):
        raise UserError(
            "perplexities are compared block by block, so both need the same text and block size; "
            f"got {len(teacher.block_nll)} and {len(student.block_nll)} blocks "
            f"of {teacher.tokens} and {student.tokens} predicted tokens"
        )
    log_ratios = student.block_nll - teacher.block_nll
    ratio = math.exp(log_ratios.mean().item())
    error = standard_error(log_ratios)
    return PerplexityRatio(ratio, None if error is None else ratio * error)


def _share(text_bytes: int, tokens: int, of: int) -> int:
    """The bytes of so many tokens of so many."""
    return max(1, round(text_bytes * tokens / of))


def _check_blocks(model: PreTrainedModel, ids: Tensor, *, text_bytes: int, batch_size: int) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(f"perplexity needs at least 1 block of at least 2 tokens; got shape {tuple(ids.shape)}")
    if text_bytes < 1:
        raise UserError(f"the text behind the tokens must have at least 1 byte; got {text_bytes}")
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1; got {batch_size}")
    if int(ids.max()) >= model.config.vocab_size or int(ids.min()) < 0:
        raise UserError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
            f"{model.config.vocab_size}: tokenize with the model's own tokenizer"
        )
    check_positions(model, ids.shape[1])


def _written(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """A boolean mask as a model's attention takes it: eager attention adds it to its logits."""
    mask = mask.to(model.device)
    if model.config._attn_implementation != "eager":
        return mask
    return mask.new_zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)


def standard_error(samples: Float[Tensor, "samples"]) -> float | None:
    """Return the standard error of the mean, or None where one sample can't tell it."""
    return None if len(samples) < 2 else samples.std(unbiased=True).item() / math.sqrt(len(samples))
