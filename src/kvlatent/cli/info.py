"""`kvlatent info`: what a model is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import cache_table, longest_table, pairs, span
from kvlatent.fields import Fit, Model


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Show what a model is, and the bytes of its cache; a config.json is enough. Reads no weights."""

    model: Positional[Model]
    """The model, or its config.json."""
    fit: Annotated[Fit, arg(name="")] = field(default_factory=Fit)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.info import describe

        return describe(self.model, self.fit, dtype=self.common.dtype)

    def table(self, result: dict[str, Any]) -> str:
        by_layer, tables = ("d_qk", "d_vo", "k_bits", "v_bits"), ("cache", "n_max", "memory_gib")
        told = {key: span(value) if key in by_layer else value for key, value in result.items() if key not in tables}
        blocks = [pairs(told), cache_table(result["cache"])]
        return "\n\n".join(blocks + ([longest_table(result)] if "n_max" in result else []))
