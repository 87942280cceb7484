"""How a student fails, where it does: attention that spreads or collapses, words out of order, text that it forgot."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compose.attended import grouped_logits
from kvlatent.data.blocks import TokenBlocks, batch_size_for, check_held_out
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.perplexity import Perplexity, compare, perplexity, standard_error
from kvlatent.kernels.segment import ROWS
from kvlatent.model.attention import LatentAttention, attentions
from kvlatent.model.checkpoints import record_of
from kvlatent.model.families import linear_layers
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.layers import evaluation_mode, hooks, token_nll

SPANS = 64
"""Spans whose order is judged."""
WORDS = 5
"""Words of a span."""
PREFIX = 256
"""Most tokens of true text before a span: what lies further back says little about order."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A few words of a text in two orders, as token ids."""

    prefix: list[int]
    true: list[int]
    permuted: list[int]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The text that models are diagnosed on."""

    blocks: TokenBlocks
    spans: list[Span]
    by_source: dict[str, TokenBlocks]

    def check_held_out(self, *models: str) -> None:
        """Raise `UserError` if a model was calibrated or trained on any of it."""
        for name in models:
            for part in (self.blocks, *self.by_source.values()):
                check_held_out(record_of(name).get("fingerprints", ()), part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What was measured of one model."""

    entropy: Float[Tensor, "layers q_heads"]
    """Of attention, in nats, mean over all queries of the text."""
    word_order: dict[str, list[float]]
    """By span: `true_preferred`, 1 where the true order is likelier, and the `margin` of its log-probability, nats."""
    by_source: dict[str, Perplexity]
    layers: Sequence[int]
    """Those of `entropy`: all but linear attention's."""


def material_of(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, blocks: TokenBlocks, *, seed: int, vocab_size: int
) -> Material:
    """Make spans of held-out blocks, and read every source alone, with its share of their tokens.

    Args:
        sources: Those of `blocks`.
        tokenizer: The models'.
        blocks: Held-out text.
        seed: Of the spans and of the order of text.
        vocab_size: The models'.

    Raises:
        UserError: The text has no words, or a source can't be read.
    """
    size = blocks.ids.shape[1]
    tokens = max(size, blocks.ids.numel() // len(sources))
    settings: dict[str, Any] = {"tokens": tokens, "block_size": size, "seed": seed, "vocab_size": vocab_size}
    several = len({*sources}) > 1
    by_source = {source: read_text((source,), tokenizer, **settings) if several else blocks for source in sources}
    return Material(blocks=blocks, spans=spans_of(tokenizer, blocks.ids, seed=seed), by_source=by_source)


def spans_of(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "blocks block_size"], *, seed: int) -> list[Span]:
    """Words in their order and in another one, from places all over a text.

    Raises:
        UserError: No block has so many words.
    """
    rng, found = random.Random(seed), []
    texts = [text for row in ids if len((text := _text(tokenizer, row)).split()) > WORDS]
    if not texts:
        raise UserError(f"--diagnose judges the order of words; no block of the text has more than {WORDS}")
    for number in range(SPANS):
        text = texts[number % len(texts)]
        words = list(re.finditer(r"\S+", text))
        first = rng.randrange(1, len(words) - WORDS + 1)
        true = [word[0] for word in words[first : first + WORDS]]
        permuted = rng.sample(true, WORDS)
        if permuted == true:
            permuted = true[1:] + true[:1]
        prefix = _ids(tokenizer, text[: words[first - 1].end()])[-min(PREFIX, ids.shape[1] // 2) :]
        both = (_ids(tokenizer, " " + " ".join(order)) for order in (true, permuted))
        found.append(Span(prefix=prefix, **dict(zip(("true", "permuted"), both, strict=True))))
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def diagnose(model: PreTrainedModel, material: Material) -> Diagnosis:
    """Measure a model, stock or a student.

    Args:
        model: On any device.
        material: From `material_of`.

    Raises:
        UserError: The architecture is not supported.
    """
    blocks, size = material.blocks, batch_size_for(material.blocks.ids.shape[1])
    return Diagnosis(
        entropy=attention_entropy(model, blocks.ids),
        word_order=word_order(model, material.spans),
        by_source={
            source: perplexity(model, part.ids, text_bytes=part.bytes, batch_size=size)
            for source, part in material.by_source.items()
        },
        layers=[i for i in range(model.config.num_hidden_layers) if i not in linear_layers(model.config)],
    )


@torch.no_grad()
def attention_entropy(model: PreTrainedModel, ids: Int[Tensor, "blocks block_size"]) -> Float[Tensor, "layers q_heads"]:
    """Entropy of each head's attention, -Σ p ln p in nats: 0 looks at one token, ln n at n tokens alike.

    A stock model is grafted for this, on its own weights, so that both kinds are measured by the same code.

    Args:
        model: On any device.
        ids: Blocks of text.

    Returns:
        Means over all queries, float64 on the CPU, of the layers that attend.
    """
    student = model if spec_of(model) is not None else graft(model, share=True)
    modules = attentions(student)
    sums = torch.zeros(len(modules), modules[0].q_heads, dtype=torch.float64)

    def note(index: int) -> Callable[..., None]:
        def measure(module: LatentAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for logits in attention_logits(module, *args, **kwargs):
                sums[index] += torch.special.entr(logits.softmax(-1)).sum((0, 2, 3)).double().cpu()

        return measure

    handles = (module.register_forward_pre_hook(note(i), with_kwargs=True) for i, module in enumerate(modules))
    with evaluation_mode(student), hooks(handles):
        for block in tqdm(ids.split(1), desc="attention entropy", unit="blocks"):
            student.get_decoder()(input_ids=block.to(student.device), use_cache=False)
    return sums / ids.numel()


def attention_logits(
    module: LatentAttention, *args: Any, **kwargs: Any
) -> Iterator[Float[Tensor, "b q_heads rows seq"]]:
    """The logits of a module for what it is called with, in float32, some rows at a time; -inf is not seen.

    A learned sink's comes last.
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    hidden, (cos, sin), mask = given["hidden_states"], given["position_embeddings"], given.get("attention_mask")
    q, k, v = module.queries_keys_values(hidden, cos, sin, given.get("position_ids"))
    maps = module.far_maps().of(k.dtype) if module.window else None
    if maps is not None:
        k, v = (maps.held_and_met(x)[1] for x in (k, v))
    far = None if maps is None else (q @ maps.q, maps.seen(k, v)[0])
    at = torch.arange(hidden.shape[1], device=hidden.device)
    for rows in at.split(ROWS):
        logits = grouped_logits(module, q[:, :, rows], k)
        if far is not None:
            assert maps is not None
            beyond = grouped_logits(module, far[0][:, :, rows], far[1])
            if maps.bias is not None:
                beyond = beyond + maps.bias.float()[:, None]
            logits = torch.where(module.near.far(rows, at), beyond, logits)
        seen = rows[:, None] >= at
        if mask is not None:
            seen = mask[:, :, rows] if mask.dtype == torch.bool else mask[:, :, rows] == 0
        logits = logits.masked_fill(~seen, -torch.inf)
        if module.sinks is not None:
            learned = module.sinks.float()[:, None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat((logits, learned), dim=-1)
        yield logits


@torch.no_grad()
def word_order(model: PreTrainedModel, spans: Sequence[Span]) -> dict[str, list[float]]:
    """Whether a model finds the words of spans likelier in their true order, after the true text before them.

    Returns:
        As `Diagnosis.word_order`.
    """
    margins = []
    with evaluation_mode(model):
        for span in tqdm(spans, desc="word order", unit="spans"):
            true, permuted = (_log_probability(model, span.prefix, words) for words in (span.true, span.permuted))
            margins.append(true - permuted)
    return {"true_preferred": [float(margin > 0) for margin in margins], "margin": margins}


def _log_probability(model: PreTrainedModel, prefix: list[int], words: list[int]) -> float:
    ids = torch.tensor([[*prefix, *words]], device=model.device)
    return -float(token_nll(model, ids)[0, -len(words) :].double().sum())


def told(found: Diagnosis, teacher: Diagnosis | None = None) -> dict[str, Any]:
    """What results say of a diagnosis, beside a teacher's."""
    order: dict[str, Any] = {"spans": len(found.word_order["margin"])}
    for key, values in found.word_order.items():
        samples = torch.tensor(values, dtype=torch.float64)
        order |= {key: samples.mean().item(), f"{key}_stderr": standard_error(samples)}
    about: dict[str, Any] = {
        "entropy": found.entropy.mean().item(),
        "entropy_by_head": found.entropy.tolist(),
        "word_order": order,
        "perplexity_by_source": {source: score.perplexity for source, score in found.by_source.items()},
    }
    if teacher is not None:
        change = found.entropy - teacher.entropy
        layer, head = divmod(int(change.abs().argmax()), change.shape[1])
        largest = {"change": change[layer, head].item(), "layer": found.layers[layer], "head": head}
        ratios = {source: compare(teacher.by_source[source], score) for source, score in found.by_source.items()}
        about |= {
            "entropy_change": {"mean_size": change.abs().mean().item(), "largest": largest},
            "ratio_by_source": {source: ratio._asdict() for source, ratio in ratios.items()},
        }
    return about


def beside(found: Mapping[str, Diagnosis]) -> dict[str, Any]:
    """Results of `teacher` and `student`."""
    return {name: told(each, found["teacher"] if name != "teacher" else None) for name, each in found.items()}
