"""kvlatent: a smaller KV cache for pretrained decoder LLMs, by smaller per-head key and value dims.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know converted checkpoints. Nothing heavy is imported here:
the registration waits until transformers' Auto modules are loaded.
"""

from importlib import import_module
from importlib.metadata import version

from wrapt import register_post_import_hook

__version__ = version("kvlatent")

register_post_import_hook(lambda _: import_module("kvlatent.config"), "transformers.models.auto.configuration_auto")
register_post_import_hook(lambda _: import_module("kvlatent.modeling"), "transformers.models.auto.modeling_auto")
