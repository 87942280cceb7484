"""`kvlatent bench`: what a model costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Model, Number, Numbers
from kvlatent.cli.tables import side_by_side


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure what a model costs: cache bytes, TTFT, TPOT, tokens per second, peak memory."""

    model: Positional[Model]
    """The model."""
    against: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Another one, say its teacher, measured in turns with it."""
    context: Numbers = (1024,)
    """Tokens of the prompt; several make a grid."""
    batch: Numbers = (1,)
    """Sequences; several make a grid."""
    dtypes: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], arg(metavar="T…")] = ()
    """Dtypes of the grid; without them, --dtype."""
    new_tokens: Number = 32
    """Tokens to decode."""
    repeats: Number = 5
    """Rounds, after one that isn't counted."""
    synthetic: bool = False
    """Fill the cache with random numbers instead of a prefill, which takes long; there is no TTFT then."""
    own: bool = False
    """Measure the model of --against on our own cache and attention too."""
    memory: Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")] = None
    """Also tell the longest context that fits in so much memory, for every batch and dtype, and allocate it."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A new folder for bench.json and bench.html with plots."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import benchmark_models

        place = self.common.place()
        dtypes = self.dtypes or (place.pop("dtype"),)
        return benchmark_models(
            self.model, against=self.against, contexts=self.context, batches=self.batch, dtypes=dtypes,
            new_tokens=self.new_tokens, repeats=self.repeats, synthetic=self.synthetic, own=self.own,
            memory=self.memory, out=self.out, seed=place["seed"], device=place["device"],
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        if len(result["rows"]) <= 2:
            keys = ("cache_bytes", "cache_bytes_per_token", "ttft_ms", "tpot_ms", "tokens_per_s", "roofline_share")
            return side_by_side(result, (*keys, "peak_memory_bytes"))
        from kvlatent.evaluation.report.text import bench_table

        return bench_table(result)
