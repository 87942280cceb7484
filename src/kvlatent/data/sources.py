"""Text for every verb: packages, files, hub ids, and what the teacher writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.data.blocks import TokenBlocks, token_blocks
from kvlatent.data.teacher_text import sample_from_teacher

TEACHER_TEXT = "teacher"
"""The text source that stands for text sampled from the teacher."""
SHORTEST_SAMPLE = 128
"""Where little text is sampled, blocks are packed from texts of at least this many tokens."""


def read_text(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    block_size: int,
    seed: int,
    vocab_size: int | None = None,
    teacher: Callable[[], PreTrainedModel] | None = None,
) -> TokenBlocks:
    """Token blocks of the sources in equal shares; `teacher` among them is text that `teacher()` writes.

    Named more than once, `teacher` has as many shares.

    Raises:
        UserError: As `data.token_blocks`.
    """
    others = [source for source in sources if source != TEACHER_TEXT]
    if teacher is None or len(others) == len(sources):
        return token_blocks(sources, tokenizer, block_size=block_size, tokens=tokens, seed=seed, vocab_size=vocab_size)
    shares = len(sources) - len(others)
    share = max(1, tokens * shares // len(sources) // block_size) * block_size
    length = block_size
    while length > SHORTEST_SAMPLE and length % 2 == 0 and share // length < 64:  # else few rows decode slowly
        length //= 2
    written = sample_from_teacher(teacher(), tokenizer, tokens=share, block_size=length, seed=seed)
    written = replace(written, ids=written.ids.view(-1, block_size))
    if not others:
        return written
    rest = tokens - written.ids.numel()
    read = token_blocks(others, tokenizer, block_size=block_size, tokens=rest, seed=seed, vocab_size=vocab_size)
    ids = torch.cat((written.ids, read.ids))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    answers = None
    if read.answers is not None:
        answers = torch.cat((torch.ones_like(written.ids, dtype=torch.bool), read.answers))[order]
    return TokenBlocks(
        ids=ids[order],
        answers=answers,
        bytes=written.bytes + read.bytes,
        sources=tuple(dict.fromkeys(sources)),
        fingerprints=written.fingerprints | read.fingerprints,
    )
