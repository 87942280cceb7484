"""Prompts with fewer tokens, chosen by surprisal and received attention, some at a time (DAC, arXiv:2507.11942).

A cache that is narrower and a prompt that is shorter multiply. Which tokens matter changes once others are gone, so
every stage runs the compressor anew on what is left.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compose.config import PromptConfig
from kvlatent.compose.received import Signals, signals
from kvlatent.data.blocks import check_ids
from kvlatent.data.chats import Chat, chat_text
from kvlatent.errors import UserError
from kvlatent.files import check_regular
from kvlatent.model.checkpoints import load_model

ATTENTION, SURPRISAL = 0.8, 0.2
"""Weights of the two signals, each scaled to 0 … 1 first."""
TOKENS_PER_STAGE, MOST_STAGES = 100, 15
"""Stages by default: one per so many tokens, at most so many."""
MARK = "kvlatent-message-{}-"
"""Stands for a message's content while its place in the template is found."""
LARGEST = 2**26
"""Bytes of the largest prompt that is read."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A prompt with fewer tokens."""

    text: str
    kept: list[int]
    """Which of its tokens were kept, in order."""
    tokens: int
    """Tokens that it had."""


def compress_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    keep: float = 0.5,
    stages: int | None = None,
    protect: tuple[str, ...] = (),
    spread: bool = False,
    words: bool = False,
) -> Compressed:
    """Drop the tokens of a text that a causal LM predicts well and hardly attends to.

    Args:
        model: The compressor, a stock model.
        tokenizer: The model's.
        text: The prompt.
        keep: Share of its tokens that stay; met exactly, rounded to whole tokens. The first always does.
        stages: As in `PromptConfig`.
        protect: Passages that stay whole wherever they occur.
        spread: As in `PromptConfig`.
        words: As in `PromptConfig`.

    Raises:
        UserError: The prompt is too short, longer than the model's positions or more protected than `keep` allows, or a
            passage doesn't occur in it.
    """
    spans = _occurrences(text, protect)
    return _compress(model, tokenizer, text, spans, keep=keep, stages=stages, spread=spread, words=words)[0]


def compress_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Chat,
    *,
    keep: float = 0.5,
    stages: int | None = None,
    protect: tuple[str, ...] = (),
    spread: bool = False,
    words: bool = False,
) -> tuple[Chat, Compressed]:
    """`compress_prompt` for a conversation: all that the template writes around the contents stays.

    Returns:
        The messages with shorter contents, and the whole text that they were compressed as.

    Raises:
        UserError: As `compress_prompt`; also if the template changes contents, so that they can't be told from it.
    """
    marks = [MARK.format(i) for i in range(len(messages))]
    marked = [m | {"content": mark} for m, mark in zip(messages, marks, strict=True)]
    written, any_mark = chat_text(tokenizer, marked, add_generation_prompt=True), "|".join(marks)
    if re.findall(any_mark, written) != marks:
        raise UserError(
            "the chat template doesn't write every message once, in order; compress the conversation as text"
        )
    around = re.split(any_mark, written)
    text, contents = around[0], []
    for message, after in zip(messages, around[1:], strict=True):
        contents.append((len(text), len(text) + len(message["content"])))
        text += message["content"] + after
    edges = [0, *(edge for content in contents for edge in content), len(text)]
    spans = list(zip(edges[::2], edges[1::2], strict=True)) + _occurrences(text, protect)
    found, stays = _compress(model, tokenizer, text, spans, keep=keep, stages=stages, spread=spread, words=words)
    shorter = ["".join(compress(text[a:b], stays[a:b])) for a, b in contents]
    return [dict(m, content=content) for m, content in zip(messages, shorter, strict=True)], found


def compress_file(config: PromptConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Compress what a file holds.

    Raises:
        UserError: The model or the file can't be used, or as `compress_prompt`.
    """
    del seed  # nothing is random
    held = _read(config.prompt)
    model, tokenizer = load_model(config.model, device=device, dtype=dtype)
    asked: dict[str, Any] = {name: getattr(config, name) for name in ("keep", "stages", "protect", "spread", "words")}
    result: dict[str, Any] = {}
    if isinstance(held, str):
        found = compress_prompt(model, tokenizer, held, **asked)
    else:
        result["messages"], found = compress_chat(model, tokenizer, held, **asked)
    return asdict(config) | result | {"text": found.text, "tokens": found.tokens, "kept_tokens": len(found.kept)}


def _read(name: str) -> str | Chat:
    """A prompt, or the messages of a conversation."""
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(LARGEST + 1)
        else:
            check_regular(Path(name))
            with Path(name).open("rb") as file:
                raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"the prompt is larger than {LARGEST:,} bytes")
        text = raw.decode()
        if not name.endswith(".json"):
            return text
        messages = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name} can't be read as a prompt: {error}") from None
    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not fine or not messages:
        raise UserError(f"{name} must be a list of messages, each with a role and a content that are text")
    return messages


def _occurrences(text: str, passages: tuple[str, ...]) -> list[tuple[int, int]]:
    spans = []
    for passage in passages:
        at = text.find(passage)
        if at < 0:
            raise UserError(f"the prompt doesn't hold the passage to protect: {passage[:80]!r}")
        while at >= 0:
            spans.append((at, at + len(passage)))
            at = text.find(passage, at + len(passage))
    return spans


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and the characters that each stands for; what a tokenizer leaves out goes to the next token."""
    if not tokenizer.is_fast:
        raise UserError("prompts are compressed by tokens' places in the text, which only fast tokenizers tell")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, before = [], 0
    for start, end in found["offset_mapping"]:
        spans.append((min(start, before), max(end, before)))
        before = spans[-1][1]
    return found["input_ids"], spans


def _characters(spans: list[tuple[int, int]], kept: list[int], length: int) -> list[bool]:
    """Which characters of a text stay: all that a kept token stands for, if only in part."""
    stays = [False] * length
    for token in kept:
        start, end = spans[token]
        stays[start:end] = [True] * (end - start)
    return stays


def _compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    whole: list[tuple[int, int]],
    *,
    keep: float,
    stages: int | None,
    spread: bool,
    words: bool,
) -> tuple[Compressed, list[bool]]:
    """What is left of a text whose spans `whole` stay, and which of its characters that are."""
    tokens, spans = _encoded(tokenizer, text)
    ids = torch.tensor(check_ids(tokens, model.config.vocab_size))
    if len(ids) < 2:
        raise UserError(f"a prompt needs at least 2 tokens to be compressed; got {len(ids)}")
    stays = torch.tensor([any(start < b and a < end for a, b in whole) for start, end in spans])
    stays[0] = True
    wanted, least = round(keep * len(ids)), int(stays.sum())
    if wanted < least:
        raise UserError(
            f"{wanted} of {len(ids)} tokens can't be kept: {least} are protected, so --keep must be at least "
            f"{least / len(ids):.3f}"
        )
    kept, word_of = torch.arange(len(ids)), _words(text, spans)
    stages = min(max(1, len(ids) // TOKENS_PER_STAGE), MOST_STAGES) if stages is None else stages
    if wanted < len(ids):
        free = len(ids) - least
        for stage in trange(1, stages + 1, desc="compress", unit="stage"):
            left = least + round(free * ((wanted - least) / free) ** (stage / stages))
            if left == len(kept):
                continue
            scores = importance(signals(model, ids[kept]))
            if words:
                scores = by_word(scores, word_of[kept])
            kept = kept[chosen(scores, stays[kept], left, spread=spread)]
    stay = _characters(spans, kept.tolist(), len(text))
    return Compressed(text="".join(compress(text, stay)), kept=kept.tolist(), tokens=len(ids)), stay


def _words(text: str, spans: list[tuple[int, int]]) -> Int[Tensor, "seq"]:
    """Which word each token belongs to: runs of letters and digits are one, all other tokens stand alone."""
    within = [start > 0 and text[start - 1 : start + 1].isalnum() for start, _ in spans]
    return (~torch.tensor(within)).cumsum(dim=0)


def by_word(scores: Float[Tensor, "seq"], words: Int[Tensor, "seq"]) -> Float[Tensor, "seq"]:
    """The highest score of every token's word, so that its tokens stay or go together; of the last one some may."""
    most = torch.full((int(words.max()) + 1,), -torch.inf, dtype=scores.dtype)
    return most.scatter_reduce(0, words, scores, "amax")[words]


def importance(found: Signals) -> Float[Tensor, "seq"]:
    """`ATTENTION` times received attention plus `SURPRISAL` times surprisal, each scaled to 0 … 1.

    The first token stays in any case, and what it receives, as the sink of all attention, would make all others alike:
    it is left out of the scales.
    """

    def scaled(x: Tensor) -> Tensor:
        low, high = x[1:].aminmax()
        return (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny)

    return (ATTENTION * scaled(found.received) + SURPRISAL * scaled(found.surprisal)).cpu()


def chosen(
    scores: Float[Tensor, "seq"], protected: Bool[Tensor, "seq"], count: int, *, spread: bool
) -> Int[Tensor, "count"]:
    """The tokens that stay, in order: the protected ones, and the best of the others.

    Args:
        scores: Of every token.
        protected: Which stay in any case.
        count: How many stay.
        spread: Drop tokens whose neighbours stay first, and others only where too few of those are left.
    """
    worst = scores.masked_fill(protected, torch.inf).argsort(stable=True).tolist()[: len(scores) - int(protected.sum())]
    to_drop = len(scores) - count
    if spread:
        apart: set[int] = set()
        for token in worst:
            if len(apart) < to_drop and token - 1 not in apart and token + 1 not in apart:
                apart.add(token)
        worst = sorted(worst, key=lambda token: token not in apart)  # a stable sort: the worst first among equals
    stays = torch.ones(len(scores), dtype=torch.bool)
    stays[worst[:to_drop]] = False
    return stays.nonzero()[:, 0]
