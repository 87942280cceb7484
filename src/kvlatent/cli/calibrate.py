"""`kvlatent calibrate`: statistics of a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Context, HeadsPerLatent, Model, Number, Sources


@dataclass(frozen=True, kw_only=True)
class Calibrate(Command):
    """Run a teacher over text once and save the statistics that conversion needs."""

    model: Positional[Model]
    """The teacher."""
    out: Annotated[Path, arg(metavar="STATS")]
    """The file to write."""
    text: Sources = ()
    """Calibration text: files, folders, package:NAME, hf:ID[:CONFIG[:SPLIT]]; or teacher, for text that it writes."""
    merge: Annotated[tuple[Path, ...], arg(metavar="STATS…", help_behavior_hint="")] = ()
    """Statistics of other text to merge in, say of shards calibrated in parallel; then --text may be missing."""
    offload: bool = False
    """Load one layer at a time from the model's safetensors, for models larger than memory."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    heads_per_latent: HeadsPerLatent = None
    """KV heads that convert may reduce together."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import calibrate_file

        return calibrate_file(
            self.model, self.out, text=self.text, merge=self.merge, offload=self.offload, tokens=self.tokens,
            block_size=self.block_size, context=self.context, heads_per_latent=self.heads_per_latent,
            **self.common.place(),
        )  # fmt: skip
