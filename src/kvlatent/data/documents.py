"""Documents of a source: files, folders, packaged corpora or hub datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvlatent.data.chats import Chat
from kvlatent.data.corpora import read_corpus
from kvlatent.errors import UserError, needs
from kvlatent.files import at_home

LONGEST = 2**31
"""Bytes of a text file, or characters of a line of .jsonl, that are still read."""


def read_documents(source: str, *, blank: bool = False) -> Iterator[str | Chat]:
    """Yield the documents of one source, in its own order.

    Args:
        source: A file (`.txt`, `.md`, `.rst`: one document; `.jsonl`, `.parquet`: one per row, its `messages` if it is
            a chat, else its `text`), a folder of such files, `package:NAME` for a corpus inside a pip package (see
            `corpora.CORPORA`), or `hf:ID[:CONFIG[:SPLIT]]` for a hub dataset, streamed; its split is train by default.
        blank: Whether rows without text count as documents.

    Raises:
        UserError: The source is missing, empty, unreadable, unknown, or its package is not installed.
    """
    documents: Iterator[str | Chat]
    if source.startswith("package:"):
        documents = read_corpus(source.removeprefix("package:"))
    elif source.startswith("hf:"):
        documents = _read_hub(source.removeprefix("hf:"))
    else:
        documents = _read_path(at_home(source))
    empty = True
    for document in documents:
        if isinstance(document, list):
            empty = False
            yield [{key: _clean(value) for key, value in message.items()} for message in document]
        elif blank or document.strip():
            empty = empty and not document.strip()
            yield _clean(document)
    if empty:
        raise UserError(f"{source} holds no text")


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates


def _read_path(path: Path) -> Iterator[str | Chat]:
    """Read a file or, in sorted order, every file of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FILE_READERS and file.is_file())
        if not files:
            raise UserError(f"folder {path} holds no {', '.join(FILE_READERS)} file")
        for file in files:
            yield from FILE_READERS[file.suffix.lower()](file)
    elif not path.exists():
        raise UserError(f"text {path} does not exist; give a file, a folder, package:NAME or hf:ID")
    elif path.suffix.lower() not in FILE_READERS:
        raise UserError(f"can't read {path}: text files end in {', '.join(FILE_READERS)}")
    elif not path.is_file():  # a pipe is read once and text several times; a device may never end
        raise UserError(f"can't read {path}: it is no regular file")
    else:
        yield from FILE_READERS[path.suffix.lower()](path)


def _read_text(path: Path) -> Iterator[str]:
    try:
        if path.stat().st_size > LONGEST:
            raise UserError(f"{path} is one document of more than {LONGEST / 1e9:.0f} GB; split it, or give .jsonl")
        yield path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} as UTF-8 text: {error}") from error


def _document(row: Any) -> str | Chat | None:
    """A row's conversation or text, "" if that is empty or null; None if it has neither."""
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if messages is None or messages == []:
        text = row.get("text")
        return text or "" if ("text" in row or "messages" in row) and isinstance(text, str | None) else None
    try:
        chat = [{"role": message["role"], "content": _joined(message["content"])} for message in messages]
    except (KeyError, TypeError):
        return None
    return chat if chat and all(isinstance(x, str) for message in chat for x in message.values()) else None


def _joined(content: Any) -> Any:
    """The text of a message that is a list of parts; of a string, itself."""
    if not isinstance(content, list):
        return content
    if any(part["type"] != "text" for part in content):
        raise TypeError("not only text")
    return "".join(part["text"] for part in content)


def _read_jsonl(path: Path) -> Iterator[str | Chat]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST), ""), 1):
                if line.strip():
                    try:
                        document = _document(json.loads(line))
                    except (ValueError, RecursionError):
                        document = None
                    if document is None:
                        raise UserError(
                            f'{path} line {number} is not a JSON object with a string field "text" '
                            'or a list "messages" of role and content'
                        )
                    yield document
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} as UTF-8 text: {error}") from error


def _read_parquet(path: Path) -> Iterator[str | Chat]:
    yield from _read_dataset(str(path), "parquet", data_files=str(path))


def _read_hub(name: str) -> Iterator[str | Chat]:
    dataset, config, split, *_ = [*name.split(":"), "", ""]
    yield from _read_dataset(f"hf:{name}", dataset, config or None, split=split or "train")


def _read_dataset(label: str, *args: Any, split: str = "train", **kwargs: Any) -> Iterator[str | Chat]:
    with needs("text"):
        from datasets import load_dataset  # imports for a second; most sources don't need it

    try:
        for row in load_dataset(*args, **kwargs, split=split, streaming=True):
            document = _document(row)
            if document is None:
                raise UserError(
                    f'{label} has no string column "text" nor chats in "messages"; its columns are {", ".join(row)}'
                )
            yield document
    except UserError:
        raise
    except Exception as error:  # the hub, pyarrow and fsspec each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"can't read {label}: {reason[0]}") from error


FILE_READERS: dict[str, Callable[[Path], Iterator[str | Chat]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
