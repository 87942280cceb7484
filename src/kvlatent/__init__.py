"""kvlatent: a smaller KV cache for pretrained decoder LLMs, by smaller per-head key and value dims.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know converted checkpoints, which imports transformers and
torch. Only kvlatent's own programs, `kvlatent` and `python -m kvlatent…`, leave that to the moment when they load a
model, so that their help answers at once.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

__version__ = version("kvlatent")

PUBLIC = {"register": "kvlatent.model.registration"}
"""The public API: the module that each name is imported from when it is first used."""
__all__ = sorted(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])


def _in_own_program() -> bool:
    """Whether Python was started to run a program of this package; while `-m` looks for one, `argv[0]` is `-m`."""
    started = sys.argv[0] if sys.argv else ""
    return started == "-m" or PurePath(started).stem == "kvlatent"


if not _in_own_program():
    import_module("kvlatent.model.registration").register()
