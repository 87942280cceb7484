"""The plugin that vLLM loads (entry-point group `vllm.general_plugins`): converted checkpoints are served as they are.

The model classes are in `vllm_model`, imported when such a model is loaded; how heads fit the cache, in `export.vllm`.
"""

from __future__ import annotations

from kvlatent.model.families import FAMILIES


def register() -> None:
    """Teach vLLM, and transformers in its process, the classes of converted models; vLLM calls it in every process."""
    from vllm import ModelRegistry

    from kvlatent.model import registration

    registration.register()
    for family in (family for family in FAMILIES.values() if family.on_engines):
        name = f"KVLatent{family.name}ForCausalLM"
        ModelRegistry.register_model(name, f"kvlatent.serving.vllm_model:{name}")
