"""The FFN that keeps little is peft's own, in values and gradients, alone and inside healing."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.healing.adapters import with_adapters
from kvlatent.healing.config import HealConfig
from kvlatent.healing.ffn import FFN, keep_all, keep_little


def trained(model: PreTrainedModel) -> nn.Module:
    """The first FFN of a model with LoRA that has learnt something."""
    with_adapters(model, HealConfig(lora_rank=4, lora_alpha=8))
    mlp = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return mlp


def results(mlp: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter that trains."""
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    out = mlp(x)
    (out.float() * weight).sum().backward()
    return [out, x.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast to bfloat16"])
def test_it_equals_pefts(tiny_student: Callable[..., PreTrainedModel], name: str, half: bool) -> None:
    little = trained(tiny_student(name))
    assert "forward" in vars(little)
    plain = copy.deepcopy(little)
    keep_all(plain)
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, 5, little.gate_proj.in_features, generator=generator) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        got, wanted = results(little, x, weight), results(plain, x, weight)
    assert len(got) == 8
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        tolerance = 0.05 * b.abs().max().item() if half else 1e-5 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_a_copy_computes_with_its_own_weights(tiny_student: Callable[..., PreTrainedModel]) -> None:
    mlp = trained(tiny_student("llama"))
    other = copy.deepcopy(mlp)
    x = torch.randn(1, 3, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        other.down_proj.base_layer.weight.zero_()
        other.down_proj.lora_B["default"].weight.zero_()
    assert other(x).abs().max() == 0
    assert mlp(x).abs().max() > 0


def test_it_keeps_less(tiny_student: Callable[..., PreTrainedModel]) -> None:
    little = trained(tiny_student("llama"))
    plain = copy.deepcopy(little)
    keep_all(plain)
    x = torch.randn(4, 64, little.gate_proj.in_features).requires_grad_()

    def kept(mlp: nn.Module) -> int:
        """Numbers kept for the backward pass, weights left out."""
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlp(x)
        weights = {p.data_ptr() for p in mlp.parameters()}
        return sum(size for at, size in seen.items() if at not in weights)

    assert kept(little) < 0.7 * kept(plain)


@pytest.mark.parametrize("change", ["DoRA", "a quantized weight"])
def test_other_layers_are_left_to_peft(tiny_student: Callable[..., PreTrainedModel], change: str) -> None:
    student = tiny_student("llama")
    mlp = student.model.layers[0].mlp
    if change == "DoRA":
        get_peft_model(student, LoraConfig(target_modules=list(FFN), use_dora=True))
    else:
        with_adapters(student, HealConfig(lora_rank=4, lora_alpha=8))
        keep_all(mlp)
        quantized = type("QuantizedLinear", (nn.Linear,), {})(64, 80, bias=False)
        mlp.up_proj.base_layer = quantized
    keep_little(mlp)
    assert "forward" not in vars(mlp)


def test_biases_are_left_to_peft(tiny_student: Callable[..., PreTrainedModel]) -> None:
    student = tiny_student("llama-biases")
    with_adapters(student, HealConfig(lora_rank=4, lora_alpha=8))
    assert all("forward" not in vars(layer.mlp) for layer in student.model.layers)
