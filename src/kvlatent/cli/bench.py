"""`kvlatent bench`: what a model costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.cli.options import Command
from kvlatent.cli.tables import kept_text, side_by_side
from kvlatent.evaluation.config import BenchConfig


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure what a model costs: cache bytes, TTFT, TPOT, tokens per second, peak memory."""

    config: Annotated[BenchConfig, arg(name="")]

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.bench import bench

        return bench(self.config, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        if len(result["rows"]) <= 2:
            keys = ("ttft_ms", "tpot_ms", "tokens_per_s", "roofline_share", "peak_memory_bytes")
            window = ["window_bytes"] if any(row["window_bytes"] for row in result["rows"]) else []
            table = side_by_side(result, ("cache_bytes", "cache_bytes_per_token", *window, *keys))
        else:
            from kvlatent.evaluation.report.text import bench_table

            table = bench_table(result)
        sizes = {f"{row['model']}, {row['batch']} × {row['context']:,}": row for row in result["rows"]}
        return "\n\n".join(filter(None, (table, kept_text(sizes))))
