"""`kvlatent explore`: the cache explorer, a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command


@dataclass(frozen=True, kw_only=True)
class Explore(Command):
    """Write the cache explorer: one HTML page that counts a cache's bytes for any model, dims, bits and memory."""

    out: Annotated[Path, arg(metavar="PAGE")] = Path("explorer.html")
    """The page to write."""

    def run(self) -> dict[str, Any]:
        from importlib.resources import files

        from kvlatent.files import new_file

        with new_file(self.out) as partial:
            partial.write_bytes((files("kvlatent.evaluation.report") / "explorer.html").read_bytes())
        return {"out": str(self.out)}

    def table(self, result: dict[str, Any]) -> str:
        return str(result["out"])
