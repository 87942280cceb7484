"""Configs of converted models: the family's stock config plus the latent spec, registered with `AutoConfig`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from kvlatent.model.families import FAMILIES, PREFIX, Family

OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "auto_map")
"""Entries of a config that say which code it is for; a model of another class doesn't take them over."""


def _config_class(model_type: str, family: Family) -> type[PreTrainedConfig]:
    """Derive `KVLatent<Family>Config` from the stock config; its `latent` holds `LatentSpec.to_dict()`."""
    module = import_module(f"transformers.models.{model_type}.configuration_{model_type}")
    body: dict[str, Any] = {
        "__module__": __name__,
        "__annotations__": {"latent": dict[str, Any] | None},
        "latent": None,
        "model_type": PREFIX + model_type,
    }
    return type(f"KVLatent{family.name}Config", (getattr(module, f"{family.name}Config"),), body)


CONFIGS = {model_type: _config_class(model_type, family) for model_type, family in FAMILIES.items()}
"""Config class of converted models by the stock model_type."""

globals().update({config.__name__: config for config in CONFIGS.values()})  # importable by name, as pickle wants

for _config in CONFIGS.values():
    AutoConfig.register(_config.model_type, _config)
