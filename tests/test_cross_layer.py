"""Pairs of layers that share keys and values, as `benchmarks/cross_layer.py` compares them with students."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent import UserError
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.model.cache import cache_bytes
from kvlatent.model.compatibility import CACHE
from kvlatent.model.graft import graft
from kvlatent.model.window import Near

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cross_layer

FAMILIES = ["llama", "llama-biases", "qwen2", "qwen3"]


def with_equal_layers(teacher: PreTrainedModel) -> PreTrainedModel:
    """A first layer that adds nothing to the stream, so that a second one with its norm, W_K and W_V has the same."""
    first, second = (copy.deepcopy(layer) for layer in teacher.model.layers)
    for part in (first.self_attn.o_proj, first.mlp.down_proj):
        for parameter in part.parameters():
            parameter.zero_()
    second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
    for name in ("k_proj", "v_proj", "k_norm"):
        if hasattr(second.self_attn, name):
            getattr(second.self_attn, name).load_state_dict(getattr(first.self_attn, name).state_dict())
    teacher.model.layers[0], teacher.model.layers[1] = first, second
    return teacher


def read(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def close(got: torch.Tensor, wanted: torch.Tensor, error: float) -> bool:
    return bool((got - wanted).abs().max() <= error * wanted.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_layers_that_share_what_is_the_same_give_the_teachers_logits(
    name: str, tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    teacher = with_equal_layers(tiny_teacher(name))
    wanted = read(teacher, ids)
    assert close(read(cross_layer.paired(teacher), ids), wanted, 1e-5)
    for near in (Near(), Near(5, 2)):  # what is left is the ridge's
        assert close(read(cross_layer.fitted(teacher, ids, near), ids), wanted, 2e-2)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_maps_come_nearer_than_layers_as_they_are(
    name: str, tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    teacher = tiny_teacher(name)
    made = cross_layer.paired(teacher), cross_layer.fitted(teacher, ids), cross_layer.fitted(teacher, ids, Near(5, 2))
    as_it_was, fitted, window = ((read(student, ids) - read(teacher, ids)).norm().item() for student in made)
    assert window < as_it_was and fitted < as_it_was


@pytest.mark.parametrize("fitted", [False, True])
@torch.no_grad()
def test_decoding_is_reading_and_the_cache_takes_half(
    fitted: bool, tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    teacher = tiny_teacher("llama")
    student: Any = cross_layer.fitted(teacher, ids) if fitted else cross_layer.paired(teacher)
    whole, output = read(student, ids), student(ids[:, :-3], use_cache=True)
    parts = [output.logits]
    for token in ids[:, -3:].split(1, dim=1):
        output = student(token, use_cache=True, **{CACHE: output[CACHE]})
        parts.append(output.logits)
    assert close(torch.cat(parts, dim=1), whole, 1e-5)
    unpaired = graft(teacher)(ids, use_cache=True)[CACHE]
    assert 2 * cache_bytes(output[CACHE]) == cache_bytes(unpaired)


@torch.no_grad()
def test_a_window_reads_its_own_tokens_whole_and_takes_no_cache(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor
) -> None:
    teacher = tiny_teacher("llama")
    student = cross_layer.fitted(teacher, ids, Near(20, 2))
    assert close(read(student, ids[:, :20]), read(teacher, ids[:, :20]), 1e-5)
    with pytest.raises(ValueError, match="without a cache"):
        student(ids, use_cache=True)


@pytest.mark.parametrize("kind", ["paired", "fitted", "window"])
def test_pairs_heal(
    kind: str, tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor, tmp_path: Path
) -> None:
    teacher = tiny_teacher("llama")
    near = Near(5, 2) if kind == "window" else Near()
    start = cross_layer.paired(teacher) if kind == "paired" else cross_layer.fitted(teacher, ids, near)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    assert cross_layer.step_flops(copy.deepcopy(start), teacher, ids[:1], HealConfig()) > 0
    healed = heal(start, teacher, ids, tmp_path / "work", HealConfig(stage2_tokens=48, batch_size=1))
    changed = {name for name, value in healed.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"model.layers.{i}.self_attn.{part}.weight" for i in (0, 1) for part in ("q_proj", "o_proj")} <= changed
    assert "model.layers.0.self_attn.k_proj.weight" in changed
    assert ("model.layers.1.self_attn.q_map" in changed) == (kind != "paired")


def test_what_cant_be_paired_is_refused(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="pairs are of an even number of layers"):
        cross_layer.paired(tiny_teacher("mistral"))
    with pytest.raises(UserError, match="pairs are of an even number of layers"):
        cross_layer.paired(tiny_teacher("gemma2"))
