"""Settings of calibration, planning and conversion: options of the commands, arguments of functions, entry of records.

Light to import: the command line reads its help from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from kvlatent.fields import Context, Fit, HeadsPerLatent, Number, Sources
from kvlatent.model.spec import Preset

Dims = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Stats = Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration text and the groups of heads, which all three commands take alike."""

    text: Sources = ()
    """Calibration text: files, folders, package:NAME, hf:ID[:CONFIG[:SPLIT]]; or teacher, for text that the teacher
    writes."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 1024
    """Tokens per block."""
    heads_per_latent: HeadsPerLatent = None
    """KV heads whose keys and values are reduced together and cached as one latent, for the same bytes; 1 reduces every
    head on its own. Above 1 with methods project and fold only."""

    window: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 128 if it can)")] = None
    """Newest tokens that a query meets with the teacher's own keys and values, through latents only beyond; best with
    method project can. 0 reduces all tokens, as vLLM needs it."""
    sinks: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 4 beside a window)")] = None
    """First tokens of a sequence that are met so too."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for records."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(Calibration):
    """Settings of calibration."""

    merge: Annotated[tuple[Path, ...], arg(metavar="STATS…", help_behavior_hint="")] = ()
    """Statistics of other text to merge in, say of shards calibrated in parallel; then --text may be missing."""
    offload: bool = False
    """Load one layer at a time from the model's safetensors, for models larger than memory."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""


Bits = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a mix beside a window, else 16)")]


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Calibration):
    """Settings of planning; convert plans alike for the same text, statistics and budget."""

    budget: Annotated[float, arg(metavar="SHARE")]
    """The share of the bytes of a 16-bit cache to keep, tokens met whole included."""
    bits: Bits = None
    """Bits of every number of a far token: 16 leaves them as they are and spends the budget on dims alone, 8, 4, 2 and
    1 make them codes; without, every dim has as many as pay."""
    stats: Stats = None
    """Statistics from calibrate; without them, they are taken on text."""
    text: Sources = ("teacher",)
    """Calibration text, as for calibrate."""
    fit: Annotated[Fit, arg(name="")] = field(default_factory=Fit)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Calibration):
    """Settings of conversion."""

    d_qk: Dims = None
    """Query/key dims per head; even. Goes with --d-vo."""
    d_vo: Dims = None
    """Value/output dims per head. Goes with --d-qk."""
    budget: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.5)")] = None
    """Instead of dims: the share of the bytes of a 16-bit cache to keep; best spends it layer by layer, as plan
    shows."""
    bits: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: a mix with a budget, else 16)")] = None
    """Bits of every number of a far token: 16 leaves them as they are, 8, 4, 2 and 1 make them codes, which need a
    window; without, a budget is spent on dims and bits together where there is a window."""
    preset: Preset = "best"
    """best: what measures best; portable: the same dims and frequencies everywhere; paper: KV-Latent's own recipe."""
    qk: Annotated[str | None, arg(metavar="METHOD", help_behavior_hint="(default: the preset's)")] = None
    """How queries and keys are reduced: a method of docs/methods.md. By default project for best, fold for portable,
    aware for paper."""
    stats: Stats = None
    """Statistics from calibrate, instead of text; with text, only the budget is spent by them."""
    text: Sources = ()
    """Calibration text, as for calibrate; better than statistics, since layers are refitted. Not for paper."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    offload: bool = False
    """Load and write one layer at a time, for models larger than memory; killed, the same command goes on."""
