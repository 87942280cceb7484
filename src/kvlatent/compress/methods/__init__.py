"""Reductions of queries and keys, a file each, and which of them the presets take.

A new method is a new file and a row in `METHODS`; what it allows, decides and does stands in its file.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlatent.compress.method import Method
from kvlatent.compress.methods.aware import AWARE
from kvlatent.compress.methods.fold import FOLD
from kvlatent.compress.methods.matched import MATCHED
from kvlatent.compress.methods.pairs import PAIRS, PAIRS_LAYER, PAIRS_MODEL
from kvlatent.compress.methods.partial import PARTIAL
from kvlatent.compress.methods.project import PROJECT
from kvlatent.compress.methods.stride import STRIDE
from kvlatent.model.spec import Preset

METHODS: dict[str, Method] = {
    method.name: method for method in (STRIDE, AWARE, MATCHED, PAIRS_MODEL, PAIRS_LAYER, PAIRS, PARTIAL, FOLD, PROJECT)
}
"""Methods by name, in the order shown to users."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset promises, and how it reduces queries and keys unless asked otherwise."""

    default: Method
    calibrated: bool = True
    """Whether text decides; otherwise it is the paper's recipe to the letter: values by stride, its own logit scale."""
    uniform: bool = False
    """Whether all layers have the same dims and rotate by one list, as stock engines need it."""

    @property
    def methods(self) -> dict[str, Method]:
        """The methods that keep the promise."""
        return {
            name: method
            for name, method in METHODS.items()
            if (self.calibrated or not method.calibrated) and (not self.uniform or method.one_frequency_list)
        }


PRESETS: dict[Preset, Recipe] = {
    "best": Recipe(default=PROJECT),
    "portable": Recipe(default=FOLD, uniform=True),
    "paper": Recipe(default=AWARE, uniform=True, calibrated=False),
}
"""What the presets are: our measured best, what stock engines read, and KV-Latent's own recipe."""
