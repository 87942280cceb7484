"""kvlatent: a smaller KV cache for pretrained decoder LLMs, by smaller per-head key and value dims.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know converted checkpoints, which imports transformers and
torch. Only kvlatent's own programs, `kvlatent` and `python -m kvlatent…`, leave that to the moment when they load a
model, so that their help answers at once.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from kvlatent.errors import needs

if TYPE_CHECKING:
    from kvlatent.compose.policies import policy as policy
    from kvlatent.compose.prompt import compress_chat as compress_chat
    from kvlatent.compose.prompt import compress_prompt as compress_prompt
    from kvlatent.compress.budget import plan as plan
    from kvlatent.compress.budget import probe as probe
    from kvlatent.compress.convert import convert as convert
    from kvlatent.compress.statistics import calibrate as calibrate
    from kvlatent.data.sources import read_text as read_text
    from kvlatent.errors import UserError as UserError
    from kvlatent.evaluation.bench import bench as bench
    from kvlatent.evaluation.config import BenchConfig as BenchConfig
    from kvlatent.evaluation.config import EvalConfig as EvalConfig
    from kvlatent.evaluation.config import GenerateConfig as GenerateConfig
    from kvlatent.evaluation.evaluate import evaluate as evaluate
    from kvlatent.evaluation.generate import generate as generate
    from kvlatent.evaluation.needle import needle as needle
    from kvlatent.evaluation.perplexity import compare as compare
    from kvlatent.evaluation.perplexity import perplexity as perplexity
    from kvlatent.evaluation.report.page import write_report as write_report
    from kvlatent.healing.config import HealConfig as HealConfig
    from kvlatent.healing.heal import heal as heal
    from kvlatent.model.checkpoints import load_model as load_model
    from kvlatent.model.checkpoints import save_checkpoint as save_checkpoint
    from kvlatent.model.loading import load_tokenizer as load_tokenizer
    from kvlatent.model.registration import register as register
    from kvlatent.model.spec import LatentSpec as LatentSpec
    from kvlatent.serving.config import ExportConfig as ExportConfig
    from kvlatent.serving.export.checkpoint import export as export

__version__ = version("kvlatent")

PUBLIC = {
    "load_model": "kvlatent.model.checkpoints",
    "load_tokenizer": "kvlatent.model.loading",
    "read_text": "kvlatent.data.sources",
    "calibrate": "kvlatent.compress.statistics",
    "probe": "kvlatent.compress.budget",
    "plan": "kvlatent.compress.budget",
    "convert": "kvlatent.compress.convert",
    "HealConfig": "kvlatent.healing.config",
    "heal": "kvlatent.healing.heal",
    "save_checkpoint": "kvlatent.model.checkpoints",
    "perplexity": "kvlatent.evaluation.perplexity",
    "compare": "kvlatent.evaluation.perplexity",
    "needle": "kvlatent.evaluation.needle",
    "EvalConfig": "kvlatent.evaluation.config",
    "evaluate": "kvlatent.evaluation.evaluate",
    "BenchConfig": "kvlatent.evaluation.config",
    "bench": "kvlatent.evaluation.bench",
    "GenerateConfig": "kvlatent.evaluation.config",
    "generate": "kvlatent.evaluation.generate",
    "policy": "kvlatent.compose.policies",
    "compress_prompt": "kvlatent.compose.prompt",
    "compress_chat": "kvlatent.compose.prompt",
    "ExportConfig": "kvlatent.serving.config",
    "export": "kvlatent.serving.export.checkpoint",
    "write_report": "kvlatent.evaluation.report.page",
    "LatentSpec": "kvlatent.model.spec",
    "UserError": "kvlatent.errors",
    "register": "kvlatent.model.registration",
}
"""The public API, in the order of the work: the module that each name is imported from when it is first used."""
EXTRAS = {"heal": "heal", "write_report": "report"}
"""What has to be installed beside the base for some of them."""
__all__ = [
    "BenchConfig",
    "EvalConfig",
    "ExportConfig",
    "GenerateConfig",
    "HealConfig",
    "LatentSpec",
    "UserError",
    "bench",
    "calibrate",
    "compare",
    "compress_chat",
    "compress_prompt",
    "convert",
    "evaluate",
    "export",
    "generate",
    "heal",
    "load_model",
    "load_tokenizer",
    "needle",
    "perplexity",
    "plan",
    "policy",
    "probe",
    "read_text",
    "register",
    "save_checkpoint",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs(EXTRAS.get(name, "all")):
        return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])


def _in_own_program() -> bool:
    """Whether Python was started to run a program of this package; while `-m` looks for one, `argv[0]` is `-m`."""
    started = sys.argv[0] if sys.argv else ""
    return started == "-m" or PurePath(started).stem == "kvlatent"


if not _in_own_program():
    import_module("kvlatent.model.registration").register()
