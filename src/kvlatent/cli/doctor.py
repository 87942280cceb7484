"""`kvlatent doctor`: which engines run a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import text_of


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Say for each engine whether a model runs on it here, from which files, with what cache, and why not."""

    model: Positional[Annotated[str, arg(metavar="DIR")]]
    """The model. Its weights are not read."""

    def run(self) -> dict[str, Any]:
        from kvlatent.model.loading import load_config
        from kvlatent.serving.engines import diagnose

        return {"model": self.model, "engines": diagnose(load_config(self.model))}

    def table(self, result: dict[str, Any]) -> str:
        lines = []
        for row in result["engines"]:
            found = ", ".join(row["installed"]) or "not installed"
            lines.append(f"{row['engine']} ({found}), {row['reads']}: {'runs' if row['runs'] else 'does not run'}")
            cache = text_of(row["cache_bytes_per_token"]) if "cache_bytes_per_token" in row else None
            details = {"cache bytes per token": cache, "why not": row["why_not"], "note": row["note"]}
            lines += [f"  {name}: {value}" for name, value in details.items() if value]
        return "\n".join(lines)
