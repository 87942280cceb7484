"""`kvlatent info`: what a model is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from kvlatent.cli.options import Command
from kvlatent.cli.tables import pairs, span
from kvlatent.fields import Model


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Show what a model is: family, dims, layout, engines, cache bytes per token. Reads no weights."""

    model: Positional[Model]
    """The model."""

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.info import describe

        return describe(self.model)

    def table(self, result: dict[str, Any]) -> str:
        by_layer = ("d_qk", "d_vo", "k_bits", "v_bits")
        return pairs({key: span(value) if key in by_layer else value for key, value in result.items()})
