"""`kvlatent plan`: how a budget would be spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, HeadsPerLatent, Model, Number, Sources
from kvlatent.cli.tables import pairs


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Show how a budget would be spent over layers, keys and values, as table and plot. Converts nothing."""

    model: Positional[Model]
    """The teacher."""
    budget: Annotated[float, arg(metavar="SHARE")]
    """The share of the cache bytes to keep."""
    out: Annotated[Path, arg(metavar="PLOT")] = Path("plan.png")
    """The plot to write: .png, .svg or .pdf."""
    stats: Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")] = None
    """Statistics from calibrate; without them, they are taken on text."""
    heads_per_latent: HeadsPerLatent = None
    """KV heads that are reduced together, as for convert."""
    text: Sources = ("teacher",)
    """Calibration text, as for calibrate."""
    tokens: Number = 4096
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import plan_model

        return plan_model(
            self.model, self.budget, self.out, heads_per_latent=self.heads_per_latent, stats=self.stats,
            text=self.text, tokens=self.tokens, block_size=self.block_size, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        columns = [result[key] for key in ("d_qk", "d_vo", "qk_loss", "vo_loss")]
        lines = ["layer  d_qk  d_vo  loss of keys  loss of values  (each alone, nats per token)"]
        for layer, (d_qk, d_vo, qk, vo) in enumerate(zip(*columns, strict=True)):
            lines.append(f"{layer:5}  {d_qk:4}  {d_vo:4}  {qk:12.4f}  {vo:14.4f}")
        keys = ("budget", "cache_bytes_per_token", "teacher_cache_bytes_per_token", "expected_loss", "uniform_loss")
        return "\n".join([*lines, "", pairs({key: result[key] for key in (*keys, "out")})])
