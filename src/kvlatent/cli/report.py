"""`kvlatent report`: a page about run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.errors import needs


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write one HTML page with tables and figures about run folders."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN…")]]
    """Folders that run has filled."""
    out: Annotated[Path | None, arg(metavar="PAGE", help_behavior_hint="(default: report.html in the first RUN)")] = (
        None
    )
    """The page to write; replaced if it is there."""

    def run(self) -> dict[str, Any]:
        with needs("report"):
            from kvlatent.evaluation.report.page import write_report

        return {"out": str(write_report(self.runs, self.out)), "runs": list(map(str, self.runs))}
