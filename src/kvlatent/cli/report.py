"""`kvlatent report`: a page about run folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write one HTML page with tables and figures about run folders."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN…")]]
    """Folders that run has filled."""
    out: Annotated[Path | None, arg(metavar="PAGE", help_behavior_hint="(default: report.html in the first RUN)")] = (
        None
    )
    """The page to write; replaced if it is there."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import report_runs

        return report_runs(self.runs, self.out)
