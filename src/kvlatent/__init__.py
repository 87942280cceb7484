"""kvlatent: a smaller KV cache for pretrained decoder LLMs, by smaller per-head key and value dims.

Importing it makes `AutoConfig` and `AutoModelForCausalLM` know converted checkpoints. Nothing heavy is imported here:
their classes are loaded when one is first asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from wrapt import register_post_import_hook

__version__ = version("kvlatent")


class _RegisteredConfigs(dict[str, Any]):
    """What `AutoConfig.register` fills, except that asking for one of our model types registers ours first.

    Registering at import would be simpler, but transformers imports its Auto classes in the middle of importing its
    models, where the stock classes that ours derive from don't exist yet.
    """

    def __contains__(self, model_type: object) -> bool:
        if str(model_type).startswith("kvlatent_"):
            import_module("kvlatent.model.graft")
        return super().__contains__(model_type)


def _teach(configuration_auto: Any) -> None:
    configs = configuration_auto.CONFIG_MAPPING
    configs._extra_content = _RegisteredConfigs(configs._extra_content)


register_post_import_hook(_teach, "transformers.models.auto.configuration_auto")
