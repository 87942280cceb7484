"""What the commands share: their base class, and the options that all of them take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from kvlatent.cli.tables import pairs
from kvlatent.errors import UserError
from kvlatent.fields import LARGEST_SEED
from kvlatent.files import at_home


@dataclass(frozen=True, kw_only=True)
class Common:
    """MODEL is a hub id, a folder, a .gguf file, or smollm2 (the packaged default)."""

    json: bool = False
    """Print one JSON object on stdout; progress goes to stderr in any case."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0, or the recipe's)")] = None
    """Random seed."""
    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    """Torch device; auto takes the first accelerator, or the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in use or, for convert, heal and export, written; auto fits the device or the model read."""

    def check(self) -> None:
        """Raise `UserError` for a seed out of range; not in `__post_init__`, around whose errors tyro draws a box."""
        if self.seed is not None and not 0 <= self.seed <= LARGEST_SEED:
            raise UserError(f"seed must be between 0 and {LARGEST_SEED}; got {self.seed}")

    def place(self) -> dict[str, Any]:
        """Seed, device and dtype, as the functions behind the commands take them."""
        return {"seed": self.seed or 0, "device": self.device, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Command:
    """The arguments of a command, and what it does."""

    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _paths_at_home(value))

    def run(self) -> dict[str, Any]:
        """Do it, and return what --json prints."""
        raise NotImplementedError

    def table(self, result: dict[str, Any]) -> str:
        """What is printed without --json."""
        return pairs(result)

    def how_to_resume(self) -> str:
        """What to tell who interrupted it."""
        return "nothing was written"

    @property
    def spares_memory(self) -> bool:
        """Whether memory counts more than time, so that what is freed goes back to the system at once."""
        return False


def _paths_at_home(value: Any) -> Any:
    """A path, or each in a tuple or a config, with `~` replaced: no shell does so in `--out=~/x`."""
    if isinstance(value, tuple):
        return tuple(map(_paths_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _paths_at_home(getattr(value, each.name)) for each in fields(value)})
    return at_home(value) if isinstance(value, Path) else value
