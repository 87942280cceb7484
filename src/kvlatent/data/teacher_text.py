"""Text the teacher writes itself, for calibration and healing without a corpus."""

from __future__ import annotations

import hashlib
import random
from importlib import resources
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvlatent.data.blocks import TokenBlocks, check_ids, fingerprint, separator_id, whole_blocks
from kvlatent.errors import UserError

TEMPERATURE = 0.8
"""At 1 a small model's text falls apart after a few sentences, and students calibrated on it are worse."""


class _Ticks(BaseStreamer):
    """Counts the tokens that `generate` emits on a progress bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    def put(self, value: Tensor) -> None:
        self.bar.update(value.numel())

    def end(self) -> None:
        pass


def sample_from_teacher(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    block_size: int,
    seed: int,
    temperature: float = TEMPERATURE,
    batch_size: int = 128,
) -> TokenBlocks:
    """Let the teacher write the text, one row per block: the document separator, an opening of ours, then its own.

    The openings (`openings.txt`, in an order drawn from the seed, repeated as needed) make the text as diverse as what
    the teacher knows; without them a small chat model mostly writes lessons and stories. Rows never stop early: after
    an end token the teacher goes on with a new document. The caller's random state, the teacher's mode and its
    generation config are left as they were.

    Args:
        teacher: The model to sample from, on its own device.
        tokenizer: Its tokenizer, for the separator, the openings and the byte count.
        tokens: Tokens wanted, separators and openings included; rounded down to whole blocks.
        block_size: Tokens per row.
        seed: Equal seeds (with equal batch sizes) give equal text.
        temperature: 1 samples the teacher's own distribution; lower is more coherent and less diverse.
        batch_size: Rows sampled at a time.

    Raises:
        UserError: Fewer tokens than one block, or a temperature that is not positive.
    """
    blocks = whole_blocks(tokens, block_size)
    if temperature <= 0:
        raise UserError(f"temperature must be positive; got {temperature}")
    starts = _starts(tokenizer, blocks, block_size, seed)
    check_ids([token for start in starts for token in start], teacher.config.vocab_size)
    ids = _sample(teacher, starts, block_size, seed, temperature, batch_size)
    rows = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return TokenBlocks(ids, sum(len(row.encode()) for row in rows), ("teacher",), frozenset(map(fingerprint, rows)))


def weights_mark(model: PreTrainedModel) -> str:
    """A hash that tells models apart, of every weight in float32: sums of the bits of rows, exact on any device."""
    marks = hashlib.sha256()
    for name, weight in model.named_parameters():
        marks.update(name.encode())
        for rows in weight.detach().split(4096):
            marks.update(rows.float().view(torch.int32).sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return marks.hexdigest()[:16]


def _starts(tokenizer: PreTrainedTokenizerBase, rows: int, block_size: int, seed: int) -> list[list[int]]:
    """The first tokens of every row: separator and opening, leaving the teacher at least one token to write."""
    openings = resources.files("kvlatent.data").joinpath("openings.txt").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(openings)
    separator = separator_id(tokenizer)
    written = [[separator, *tokenizer(opening, add_special_tokens=False)["input_ids"]] for opening in openings]
    return [start[: block_size - 1] for start in islice(cycle(written), rows)]


def _sample(
    teacher: PreTrainedModel,
    starts: list[list[int]],
    block_size: int,
    seed: int,
    temperature: float,
    batch_size: int,
) -> Int64[Tensor, "blocks block_size"]:
    pad = starts[0][0]
    # no eos_token_id, so nothing stops a row; generate() fills unset fields from the model's own config, so replace it
    plain = GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, pad_token_id=pad)
    device, config, training = teacher.device, teacher.generation_config, teacher.training
    rows: list[Tensor] = []
    bar = tqdm(total=len(starts) * block_size, desc="teacher writes", unit="tok", unit_scale=True)
    with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            teacher.generation_config = plain
            teacher.eval()
            for first in range(0, len(starts), batch_size):
                batch = starts[first : first + batch_size]
                longest, shortest = max(map(len, batch)), min(map(len, batch))
                prompt = torch.tensor([[pad] * (longest - len(start)) + start for start in batch], device=device)
                mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in batch], device=device)
                out = teacher.generate(
                    prompt, attention_mask=mask, max_new_tokens=block_size - shortest, streamer=_Ticks(bar)
                )
                for row, start in zip(out.cpu(), batch, strict=True):
                    rows.append(row[longest - len(start) :][:block_size])
        finally:
            teacher.generation_config = config
            teacher.train(training)
    return torch.stack(rows)
