"""Text to token blocks: files, folders, packaged corpora or hub datasets.

A *source* is a string. `read_documents` turns it into documents; `token_blocks` mixes sources, shuffles, tokenises and
packs them. Every `TokenBlocks` carries fingerprints of its documents, so
`check_held_out` can refuse an evaluation on text that was used for calibration or training.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvlatent.data.chats import Chat, chat_text
from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError
from kvlatent.files import replaced

PIECE_CHARACTERS = 8_000
"""Longer documents are cut here, at the end of a paragraph where there is one, so that a block mix is diverse."""
TOKEN_CHARACTERS = 5
"""Of a token, generously: a document is not cut shorter than what a block may hold of it."""
SHUFFLE_PIECES = 8_192
"""Pieces held while shuffling: packaged corpora fit whole, streams are shuffled within this window."""
TOKENISE_PIECES = 16
"""Pieces tokenised at a time: enough for the fast tokenizer's threads, little work wasted at the end."""

# --- token blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Packed token ids and what is needed to account for them."""

    ids: Int[Tensor, "blocks block_size"]
    """int64 or, from a file, int32."""
    bytes: int
    """UTF-8 bytes of the text that `ids` cover; separators between documents count as none."""
    sources: tuple[str, ...]
    fingerprints: frozenset[str]
    """One per document of which at least a token is in `ids`."""
    answers: Bool[Tensor, "blocks block_size"] | None = None
    """The tokens of `ids` that are an assistant's answers; None where the text is no chat."""


@dataclass(frozen=True)
class _Piece:
    text: str | Chat
    fingerprint: str
    ids: list[int]
    answers: list[bool] | None
    """Which tokens of a chat are answers; None for plain text."""


def fingerprint(document: str) -> str:
    """The first 16 hex digits of the SHA-256 of the document with its whitespace normalised."""
    return hashlib.sha256(" ".join(document.split()).encode()).hexdigest()[:16]


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stood between documents in pretraining, and from which a model writes a new one.

    Chat models often have a turn marker as bos and eos (SmolLM2-Instruct: `<|im_start|>`, `<|im_end|>`), after which
    they write chats. Their pretraining separator is still in the vocabulary and is preferred.

    Raises:
        UserError: The tokenizer has none of the known separators, no eos and no bos.
    """
    vocabulary = tokenizer.get_vocab()
    for token in ("<|endoftext|>", "<|end_of_text|>", tokenizer.eos_token, tokenizer.bos_token):
        if token in vocabulary:
            return int(vocabulary[token])
    raise UserError("the tokenizer has neither <|endoftext|> nor an eos or bos token to separate documents with")


def token_blocks(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    tokens: int,
    seed: int,
    vocab_size: int | None = None,
) -> TokenBlocks:
    """Pack text into blocks, the sources mixed in equal shares of tokens.

    Long documents are cut into pieces, pieces are shuffled within their source and joined by the separator. The next
    piece always comes from the source that has given the fewest tokens, so shares differ by at most one piece until a
    source runs out. Text is tokenised only until there is enough.

    Args:
        sources: See `read_documents`.
        tokenizer: A fast tokenizer.
        block_size: Tokens per block.
        tokens: Tokens wanted; rounded down to whole blocks.
        seed: Equal seeds give equal blocks.
        vocab_size: Embeddings of the model that reads the blocks; None where there is none.

    Raises:
        UserError: A source can't be read, the text is too short, it has tokens beyond the embeddings, or fewer tokens
            than one block were asked for.
    """
    blocks = whole_blocks(tokens, block_size)
    if not sources:
        raise UserError("no text given; name at least one file, folder, package:NAME or hf:ID")
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; give a model with a tokenizer.json")
    separator, longest = separator_id(tokenizer), max(PIECE_CHARACTERS, TOKEN_CHARACTERS * block_size)
    streams = {
        index: _tokenised(_shuffled(_pieces(source, longest), random.Random(f"{seed}/{index}")), tokenizer)
        for index, source in enumerate(sources)
    }
    given = dict.fromkeys(streams, 0)
    stream = array("i")
    counted = bytearray()  # whether each is an answer, or no chat's
    chats = False
    covered = 0
    used: set[str] = set()
    while len(stream) < blocks * block_size:
        if not streams:
            raise UserError(
                f"the text is too short: {len(stream):,} tokens found, {blocks * block_size:,} asked for "
                f"({', '.join(sources)}); give more text or ask for fewer tokens"
            )
        index = min(streams, key=lambda index: given[index])
        piece = next(streams[index], None)
        if piece is None:
            del streams[index]
            continue
        room = blocks * block_size - len(stream)
        covered += _covered_bytes(piece, room, tokenizer)
        used.add(piece.fingerprint)
        stream.extend((*piece.ids, separator))
        counted.extend([True] * (len(piece.ids) + 1) if piece.answers is None else [*piece.answers, False])
        chats = chats or piece.answers is not None
        given[index] += len(piece.ids) + 1
    if vocab_size is not None:
        check_ids(stream, vocab_size)
    ids = torch.frombuffer(stream, dtype=torch.int32)[: blocks * block_size].view(blocks, block_size).long()
    answers = torch.frombuffer(counted, dtype=torch.bool)[: ids.numel()].view_as(ids) if chats else None
    return TokenBlocks(ids, covered, tuple(sources), frozenset(used), answers)


def check_ids(ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    """Return token ids if a model has embeddings of all of them.

    Raises:
        UserError: It hasn't: tokens were added to the tokenizer and none to the model.
    """
    if ids and max(ids) >= vocab_size:
        raise UserError(
            f"the tokenizer makes token {max(ids)} of the text, and the model has {vocab_size} embeddings; "
            "give it the tokenizer that it was trained with, or resize its embeddings"
        )
    return ids


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """Write token blocks and what is known of them as one safetensors file, four bytes a token."""
    about = {"bytes": blocks.bytes, "sources": blocks.sources, "fingerprints": sorted(blocks.fingerprints)}
    tensors = {"ids": blocks.ids.int()} | ({} if blocks.answers is None else {"answers": blocks.answers})
    with replaced(path) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})


def load_blocks(path: Path) -> TokenBlocks:
    """Read what `save_blocks` wrote: maps of the file, whose memory all processes of a machine share.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            ids: Int[Tensor, "blocks block_size"] = file.get_tensor("ids")
            answers = file.get_tensor("answers") if "answers" in file.keys() else None  # noqa: SIM118
        size, sources, marks = about["bytes"], tuple(about["sources"]), frozenset(about["fingerprints"])
        if (
            ids.ndim != 2
            or ids.dtype not in (torch.int32, torch.int64)
            or not ids.numel()
            or ids.min() < 0
            or type(size) is not int
        ):
            raise ValueError("not whole numbers in blocks")
        if not all(isinstance(text, str) for text in (*sources, *marks)):
            raise ValueError("sources or fingerprints that are no text")
        if answers is not None and (answers.shape != ids.shape or answers.dtype != torch.bool):
            raise ValueError("answers that don't fit the blocks")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as token blocks ({error}); remove it to make it again") from None
    return TokenBlocks(ids, size, sources, marks, answers)


def check_held_out(used: Iterable[str], held_out: TokenBlocks) -> None:
    """Refuse held-out text that shares a document with the text already used.

    Args:
        used: Fingerprints of the documents that calibration and training have seen.
        held_out: What is to be evaluated on.

    Raises:
        UserError: They share at least one document.
    """
    shared = held_out.fingerprints.intersection(used)
    if shared:
        raise UserError(
            f"{len(shared)} of {len(held_out.fingerprints)} held-out documents ({', '.join(held_out.sources)}) "
            "were used for calibration or training; evaluate on other text"
        )


def whole_blocks(tokens: int, block_size: int) -> int:
    """How many whole blocks that many tokens fill.

    Raises:
        UserError: Blocks too short to predict anything in, or fewer tokens than one block.
    """
    if block_size < 2:
        raise UserError(f"block_size must be at least 2; got {block_size}")
    if tokens < block_size:
        raise UserError(f"tokens must be at least one block of {block_size}; got {tokens}")
    return tokens // block_size


def _pieces(source: str, longest: int) -> Iterator[tuple[str | Chat, str]]:
    """Yield (piece of at most so many characters, fingerprint of its whole document)."""
    for document in read_documents(source):
        if isinstance(document, list):
            yield document, fingerprint("\n".join(message["content"] for message in document))
        else:
            mark = fingerprint(document)
            yield from ((piece, mark) for piece in cut(document, longest))


def cut(document: str, limit: int) -> Iterator[str]:
    """Cut a document into pieces of at most `limit` characters, best at a paragraph's end, then a line's, …"""
    start = 0
    while start < len(document):
        end = len(document)
        if end - start > limit:
            ends = (document.rfind(mark, start + limit // 2, start + limit) for mark in ("\n\n", "\n", ". ", " "))
            end = next((end + 1 for end in ends if end >= 0), start + limit)
        piece = document[start:end].strip()
        start = end
        if piece:
            yield piece


def _shuffled(pieces: Iterator[tuple[str | Chat, str]], rng: random.Random) -> Iterator[tuple[str | Chat, str]]:
    held = list(islice(pieces, SHUFFLE_PIECES))
    rng.shuffle(held)
    for piece in pieces:
        at = rng.randrange(len(held))
        held[at], piece = piece, held[at]
        yield piece
    yield from held


def _tokenised(pieces: Iterator[tuple[str | Chat, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Piece]:
    while batch := list(islice(pieces, TOKENISE_PIECES)):
        texts = [text for text, _ in batch if isinstance(text, str)]
        encoded = iter(_encode(tokenizer, texts)["input_ids"] if texts else ())
        for text, mark in batch:
            if isinstance(text, str):
                yield _Piece(text, mark, next(encoded), None)
            else:
                yield _Piece(text, mark, *encode_chat(tokenizer, text))


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation in the tokenizer's own template, and which of them are the assistant's answers.

    An answer is what the template writes after its generation prompt, the end of turn included.

    Raises:
        UserError: There is no template, or it doesn't write conversations turn by turn.
    """
    text = chat_text(tokenizer, chat)
    spans = []
    for index, message in enumerate(chat):
        if index and message["role"] == "assistant":
            before = chat_text(tokenizer, chat[:index], add_generation_prompt=True)
            after = chat_text(tokenizer, chat[: index + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError("the chat template changes earlier turns, so answers can't be told apart")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [any(first <= start < end for first, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], answers


def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **kwargs: Any) -> Any:
    # split_special_tokens: a document that mentions "<|endoftext|>" must not end there
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **kwargs)


def _covered_bytes(piece: _Piece, room: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the part of a piece that fits into `room` tokens."""
    if not isinstance(piece.text, str):
        return len(tokenizer.decode(piece.ids[:room]).encode())
    return len((piece.text if len(piece.ids) <= room else _covered(piece.text, room, tokenizer)).encode())


def _covered(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole characters that the first tokens of a text cover."""
    offsets = _encode(tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
    return text[: min(offsets[tokens - 1][1], max(offsets[tokens][0], offsets[tokens - 1][0]))]


def batch_size_for(block_size: int) -> int:
    """Blocks per forward where nothing is trained: 2,048 tokens, and at most four blocks."""
    return max(1, min(4, 2048 // block_size))
