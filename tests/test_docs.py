"""README and docs: links lead somewhere, and commands name what exists."""

import ast
import importlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvlatent.model.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CURRENT = [page for page in PAGES if page.name not in ("log.md", "cli.md")]  # the log quotes commands of its day
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def anchors(page: Path) -> set[str]:
    """As GitHub names headings: lower case, no punctuation, hyphens for spaces, numbered where they repeat."""
    seen = Counter[str]()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every shell command in bash blocks and in inline code, without what shells read themselves."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page)))
    for line in (*text.splitlines(), *inline):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # inline code that is no command
            continue
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words


def flags(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_anchors_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in (target for target in targets if not re.match(r"\w+:", target)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_table_of_families_is_complete() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page.split("## Families\n")[1].split("\n## ")[0], re.M)[1:] == list(FAMILIES)


def test_results_are_at_most_150_lines() -> None:
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= 150


def with_siblings(script: Path) -> str:
    """A script, and those in its folder that it imports, which may give it options."""
    text = script.read_text(encoding="utf-8")
    siblings = (script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE))
    return text + "".join(path.read_text(encoding="utf-8") for path in siblings if path.exists())


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_commands_name_what_exists(page: Path) -> None:
    # docs/cli.md is the command line's own help, which `make lint` checks.
    reference = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", reference, re.MULTILINE | re.DOTALL))
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = " ".join(rules).split()
    for words in commands(page):
        if words[0] == "kvlatent" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in verbs, words
            missing = {flag for flag in flags(words) if not re.search(rf"{flag}(?![\w-])", verbs[words[1]])}
            assert not missing, words
        elif words[0] == "python" and len(words) > 1:
            script = with_siblings(ROOT / words[1])
            assert not {flag for flag in flags(words) if f'"{flag}"' not in script}, words
        elif words[0] == "make" and len(words) == 2:
            assert words[1] in targets, words
        for word in words:
            if re.match(r"(recipes|benchmarks|examples|tests)/[\w-]+\.\w+$", word):
                assert (ROOT / word).exists(), words


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_python_blocks_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvlatent":
                module = importlib.import_module(node.module or "")
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], block
