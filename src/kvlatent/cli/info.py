"""`kvlatent info`: what a model is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tyro.conf import OmitArgPrefixes, Positional

from kvlatent.cli.options import Command, Common, Model
from kvlatent.cli.tables import pairs, span


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Show what a model is: family, dims, layout, engines, cache bytes per token. Reads no weights."""

    model: Positional[Model]
    """The model."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.info import describe

        return describe(self.model)

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: span(value) if key in ("d_qk", "d_vo") else value for key, value in result.items()})
