"""`kvlatent plan`: how a budget would be spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import pairs
from kvlatent.compress.config import PlanConfig
from kvlatent.fields import Model


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Show how a budget would be spent over layers, keys and values, as table and plot. Converts nothing."""

    model: Positional[Model]
    """The teacher."""
    out: Annotated[Path, arg(metavar="PLOT")] = Path("plan.png")
    """The plot to write: .png, .svg or .pdf."""
    asked: Annotated[PlanConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.checkpoints import plan_checkpoint

        return plan_checkpoint(self.model, self.out, self.asked, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        columns = [result[key] for key in ("d_qk", "k_bits", "d_vo", "v_bits", "qk_loss", "vo_loss")]
        lines = ["layer  d_qk  bits  d_vo  bits  loss of keys  loss of values  (each alone, nats per token)"]
        for layer, (d_qk, k_bits, d_vo, v_bits, qk, vo) in enumerate(zip(*columns, strict=True)):
            lines.append(f"{layer:5}  {d_qk:4}  {k_bits:4.1f}  {d_vo:4}  {v_bits:4.1f}  {qk:12.4f}  {vo:14.4f}")
        keys = ["budget", "cache_bytes_per_token", "teacher_cache_bytes_per_token"]
        if result["window"]:
            keys += ["window", "sinks", "context", "cache_bytes", "teacher_cache_bytes"]
        others = {f"loss at the same bytes: {name}": loss for name, loss in result["alternatives"].items()}
        told = {key: result[key] for key in (*keys, "expected_loss")} | others | {"out": result["out"]}
        return "\n".join([*lines, "", pairs(told)])
