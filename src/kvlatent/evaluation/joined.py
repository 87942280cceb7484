"""Perplexity by the protocol of WikiText-2: a text whole and in its order, in windows that advance by a stride.

With windows that advance by their length this is lm-eval's rolling log-likelihood of the text as one document: every
token is predicted once, the first of a window from the last of the one before, the first of all from the tokenizer's
bos (or eos) token, and the last window, which is shorter, from as much text as a window holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.data.blocks import TokenBlocks, check_ids, fingerprint
from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError
from kvlatent.model.layers import check_positions, evaluation_mode, token_nll


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedText:
    """A whole text as tokens."""

    blocks: TokenBlocks
    """One block of all tokens, after the one that the first is predicted from."""
    words: int
    """As lm-eval counts them: one more than runs of white space."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rolling:
    """Negative log-likelihood of a whole text under one model."""

    window_nll: Float[Tensor, "windows"]
    """Sum over the tokens that each window predicts, in nats, float64."""
    window_tokens: Int[Tensor, "windows"]

    @property
    def nll(self) -> float:
        """Mean nats per token."""
        return float(self.window_nll.sum() / self.window_tokens.sum())


def joined_text(sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> JoinedText:
    """Read all documents of the sources, blank ones too, joined by empty lines.

    Args:
        sources: See `read_documents`; rows of a table are its documents.
        tokenizer: The models'.
        vocab_size: Embeddings of the models.

    Raises:
        UserError: A source can't be read or is a chat, or has tokens beyond the embeddings.
    """
    documents = [document for source in sources for document in read_documents(source, blank=True)]
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise UserError("--joined measures plain text; give text that is no chat")
    text = "\n\n".join(texts)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise UserError("--joined predicts the first token from the tokenizer's bos or eos token; it has neither")
    ids = check_ids([first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], vocab_size)
    marks = frozenset(fingerprint(each) for each in texts if each.strip())
    blocks = TokenBlocks(torch.tensor([list(ids)]), len(text.encode()), tuple(sources), marks)
    return JoinedText(blocks=blocks, words=len(re.split(r"\s+", text)))


@torch.no_grad()
def rolling(model: PreTrainedModel, text: JoinedText, *, length: int, stride: int) -> Rolling:
    """Predict every token of a text once.

    Args:
        model: On any device.
        text: From `joined_text`.
        length: Most tokens that one is predicted from.
        stride: Tokens that a window predicts, between 1 and `length`; but the first predicts all of its own.

    Raises:
        UserError: The length is more than the model's positions.
    """
    assert 1 <= stride <= length
    check_positions(model, length)
    ids, sums, counts = text.blocks.ids[0], list[float](), list[int]()
    tokens, start = len(ids) - 1, 0
    with evaluation_mode(model), tqdm(total=tokens, desc="joined text", unit="tokens", unit_scale=True) as progress:
        while start < tokens:
            end = min(tokens, start + (stride if start else length))
            window = ids[max(0, end - length) : end + 1].to(model.device)
            nll = token_nll(model, window[None])[0, start - end :].double()
            sums.append(float(nll.sum()))
            counts.append(end - start)
            progress.update(end - start)
            start = end
    return Rolling(window_nll=torch.tensor(sums, dtype=torch.float64), window_tokens=torch.tensor(counts))


def joined_scores(found: Rolling, text: JoinedText, teacher: Rolling | None = None) -> dict[str, Any]:
    """What results say of it: perplexity by token and by word, bits per byte, and the ratio to a teacher's.

    Standard errors take windows as samples; None for one window.
    """
    nats, tokens = float(found.window_nll.sum()), int(found.window_tokens.sum())
    told: dict[str, Any] = {
        "tokens": tokens,
        "perplexity": math.exp(found.nll),
        "perplexity_stderr": _times(math.exp(found.nll), found.window_nll, found.window_tokens),
        "word_perplexity": math.exp(nats / text.words),
        "bits_per_byte": nats / math.log(2) / text.blocks.bytes,
    }
    if teacher is not None:
        ratio = math.exp(found.nll - teacher.nll)
        error = _times(ratio, found.window_nll - teacher.window_nll, found.window_tokens)
        told |= {"perplexity_ratio": ratio, "perplexity_ratio_stderr": error}
    return told


def _times(value: float, sums: Tensor, counts: Tensor) -> float | None:
    """Standard error of exp(Σ sums / Σ counts), which is `value`: that of a ratio of sums, by the delta method."""
    if len(sums) < 2:
        return None
    rest = sums - sums.sum() / counts.sum() * counts
    return value * float(rest.std()) * math.sqrt(len(sums)) / int(counts.sum())
