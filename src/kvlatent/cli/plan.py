"""`kvlatent plan`: how a budget would be spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import longest_table, pairs, plan_cache_table
from kvlatent.compress.config import PlanConfig
from kvlatent.fields import Model

MUCH_WINDOW = 0.25
"""Share of a student's cache from which on a window is worth a word."""


@dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """Show how a budget would be spent over layers, keys and values, as table and plot. Converts nothing.

    Of a config.json without weights it shows the bytes alone.
    """

    model: Positional[Model]
    """The teacher, or its config.json."""
    out: Annotated[Path, arg(metavar="PLOT")] = Path("plan.png")
    """The plot to write: .png, .svg or .pdf."""
    asked: Annotated[PlanConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.preview import plan_checkpoint

        return plan_checkpoint(self.model, self.out, self.asked, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        weighed = "expected_loss" in result
        told = {key: result[key] for key in ("budget", "cache_bytes_per_token", "teacher_cache_bytes_per_token")}
        if result["window"]:
            told |= {key: result[key] for key in ("window", "sinks", "window_bits")}
        told |= {key: result[key] for key in ("context", "cache_bytes", "teacher_cache_bytes")}
        if weighed:
            others = {f"loss at the same bytes: {name}": loss for name, loss in result["alternatives"].items()}
            told |= {"expected_loss": result["expected_loss"]} | others | {"out": result["out"]}
        blocks = [_by_layer(result)] if weighed else []
        blocks += [pairs(told), plan_cache_table(result)]
        if "n_max" in result:
            blocks.append(longest_table(result))
        if (share := result["window_bytes"] / result["cache_bytes"]) > MUCH_WINDOW:
            blocks.append(
                f"The window and its sinks take {share:.0%} of these bytes. A shorter --window leaves more of them to "
                "far tokens: more far gain is kept, at the cost of average perplexity."
            )
        if layers := len(result["whole_layers"]):
            share = result["whole_layers_bytes"] / result["teacher_cache_bytes"]
            blocks.append(
                f"{layers} layers with a sliding window stay whole, since only the others grow with the context: "
                f"{share:.1%} of the teacher's cache of {result['context']:,} tokens"
            )
        if not weighed:
            blocks.append(
                "These are the bytes that the budget pays for at most. What is lost is measured on the weights: give "
                "MODEL as a hub id or a folder that holds them."
            )
        return "\n\n".join(blocks)


def _by_layer(result: dict[str, Any]) -> str:
    columns = [result[key] for key in ("d_qk", "k_bits", "d_vo", "v_bits", "qk_loss", "vo_loss")]
    lines = ["layer  d_qk  bits  d_vo  bits  loss of keys  loss of values  (each alone, nats per token)"]
    for layer, (d_qk, k_bits, d_vo, v_bits, qk, vo) in enumerate(zip(*columns, strict=True)):
        whole = "  whole" if layer in result["whole_layers"] else ""
        lines.append(f"{layer:5}  {d_qk:4}  {k_bits:4.1f}  {d_vo:4}  {v_bits:4.1f}  {qk:12.4f}  {vo:14.4f}{whole}")
    return "\n".join(lines)
