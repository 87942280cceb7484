"""Teach transformers' Auto classes the configs and models of converted checkpoints."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from kvlatent.model.config import CONFIGS
from kvlatent.model.models import MODELS


def register() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` load converted checkpoints; doing it again changes nothing."""
    for family, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, MODELS[family], exist_ok=True)
