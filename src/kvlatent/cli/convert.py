"""`kvlatent convert`: a student from a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Context, Folder, HeadsPerLatent, Model, Number, Sources
from kvlatent.cli.tables import pairs, span
from kvlatent.model.spec import QK, Preset


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Make a student with fewer dims per head from a teacher."""

    model: Positional[Model]
    """The teacher."""
    out: Folder
    """The new folder."""
    d_qk: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Query/key dims per head; even. Goes with --d-vo."""
    d_vo: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Value/output dims per head. Goes with --d-qk."""
    budget: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.5)")] = None
    """Instead of dims: the share of the cache bytes to keep; best spends it layer by layer, as plan shows."""
    preset: Preset = "best"
    """best: what measures best; portable: the same dims and frequencies everywhere; paper: KV-Latent's own recipe."""
    qk: Annotated[QK | None, arg(metavar="METHOD", help_behavior_hint="(default: the preset's)")] = None
    """How queries and keys are reduced: stride, aware, matched, pairs-model, pairs-layer, pairs, partial, fold or
    project (docs/methods.md). The presets take project, fold and aware."""
    heads_per_latent: HeadsPerLatent = None
    """KV heads whose keys and values are reduced together and cached as one latent, for the same bytes; 1 keeps heads
    apart. With project and fold only."""
    stats: Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")] = None
    """Statistics from calibrate, instead of text; with text, only the budget is spent by them."""
    text: Sources = ()
    """Calibration text, as for calibrate; better than statistics, since layers are refitted. Not for paper."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import convert_folder

        budget = 0.5 if self.d_qk is None and self.d_vo is None and self.budget is None else self.budget
        return convert_folder(
            self.model, self.out, preset=self.preset, qk=self.qk, d_qk=self.d_qk, d_vo=self.d_vo, budget=budget,
            heads_per_latent=self.heads_per_latent, stats=self.stats, text=self.text, tokens=self.tokens,
            block_size=self.block_size, context=self.context, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        return pairs({key: span(value) if isinstance(value, list) else value for key, value in result.items()})
