"""What the commands share: their base class, the options that all of them take, and annotated types of arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from kvlatent.cli.tables import pairs

Model = Annotated[str, arg(metavar="MODEL")]
Number = Annotated[int, arg(metavar="N")]
Numbers = Annotated[tuple[int, ...], arg(metavar="N…")]
Context = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's positions)")]
HeadsPerLatent = Annotated[
    int | None, arg(metavar="N", help_behavior_hint="(default: as many as have 256 dims together)")
]
Folder = Annotated[Path, arg(metavar="DIR")]
Sources = Annotated[tuple[str, ...], arg(metavar="F…", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """MODEL is a hub id, a folder, a .gguf file, or smollm2 (the packaged default)."""

    json: bool = False
    """Print one JSON object on stdout; progress goes to stderr in any case."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0, or the recipe's)")] = None
    """Of everything random."""
    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    """Torch device; auto takes the first accelerator, or the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights used or, for convert and heal, written; auto fits the device or the model read."""

    def place(self) -> dict[str, Any]:
        """Seed, device and dtype, as the verbs' functions take them."""
        return {"seed": self.seed or 0, "device": self.device, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A verb's arguments."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _at_home(value))

    def run(self) -> dict[str, Any]:
        """Do it, and return what --json prints."""
        raise NotImplementedError

    def table(self, result: dict[str, Any]) -> str:
        """What is printed without --json."""
        return pairs(result)

    def how_to_resume(self) -> str:
        """What to tell who interrupted it."""
        return "nothing was written"


def _at_home(value: Any) -> Any:
    """A path, or each of several, with `~` replaced: no shell does so in `--out=~/x`."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value
