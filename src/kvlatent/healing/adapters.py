"""What of a student trains: attention in full, the FFN through LoRA, and nothing else unless asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from kvlatent.healing.config import HealConfig
from kvlatent.healing.ffn import FFN, keep_all, keep_little
from kvlatent.kernels.cpu_linear import is_gated
from kvlatent.model.attention import attentions

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "sinks")
"""Trained in full as `attention`."""
MAPS = ("q_map", "k_map", "v_map", "o_map")
"""Trained in full as `maps`."""


def with_adapters(student: PreTrainedModel, config: HealConfig) -> nn.Module:
    """Freeze all of `student` but what `config` trains, and put LoRA on its FFNs; experts have none and stay frozen.

    Frozen parameters get no gradient, so they take no memory for one.

    Returns:
        The student, inside peft's wrapper if there is LoRA.
    """
    student.requires_grad_(False)
    trained: nn.Module = student
    with_ffn = [(index, layer) for index, layer in enumerate(student.model.layers) if is_gated(layer.mlp)]
    if config.lora_rank and with_ffn:
        ffns = [f"layers.{index}.mlp.{name}" for index, _ in with_ffn for name in FFN]  # and no expert of that name
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=ffns, lora_dropout=0.0, bias="none"
        )
        trained = get_peft_model(student, lora)
        for index, layer in with_ffn:
            with torch.random.fork_rng(devices=[]):
                # Of its own seed for each layer, so that layers start alike in whatever order they are made.
                torch.manual_seed(config.seed * 100_003 + index)
                for module in lora_layers(layer):
                    module.reset_lora_parameters("default", init_lora_weights=True)
            keep_little(layer.mlp)
    names = {*(ATTENTION if "attention" in config.train else ()), *(MAPS if "maps" in config.train else ())}
    for attention in attentions(student):
        for name, parameter in attention.named_parameters():
            if name.split(".")[0] in names:
                parameter.requires_grad_(True)
    if "norms" in config.train:
        for module in student.modules():
            if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
                module.requires_grad_(True)
    return trained


def lora_layers(module: nn.Module) -> Iterator[LoraLayer]:
    """The LoRA layers inside a module."""
    return (child for child in module.modules() if isinstance(child, LoraLayer))


def finished(trained: nn.Module, how: str, folder: Path) -> PreTrainedModel:
    """The student without peft's wrapper.

    Args:
        trained: What `with_adapters` returned.
        how: `merge` puts LoRA into the FFN's weights, `keep` leaves it apart, `save` does both.
        folder: Where LoRA is written unless it is merged alone, for `peft.PeftModel.from_pretrained`.
    """
    if not isinstance(trained, PeftModel):
        assert isinstance(trained, PreTrainedModel)
        return trained
    for layer in trained.get_base_model().model.layers:
        keep_all(layer.mlp)
    if how != "merge":
        trained.save_pretrained(str(folder), save_embedding_layers=False)
    return trained.unload() if how == "keep" else trained.merge_and_unload()
