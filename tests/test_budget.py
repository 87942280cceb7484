"""Budgets are met to the byte, spent where brute force would spend them, and never make a plan worse by growing."""

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from windowless import convert

from kvlatent.compress import budget
from kvlatent.compress.statistics import Statistics, calibrate
from kvlatent.errors import UserError
from kvlatent.model.graft import spec_of
from kvlatent.model.window import ALL_FAR, Near


def falling(items: int, options: int, seed: int) -> Tensor:
    """Random curves that fall, not all of them convex."""
    drops = torch.rand(items, options, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drops.flip(1).cumsum(1).flip(1)


def probed(teacher: PreTrainedModel, ids: Tensor, near: Near = ALL_FAR) -> Statistics:
    statistics = calibrate(teacher, ids, near=near, about={})
    statistics.probes = budget.probe(teacher, statistics, ids[:2])
    return statistics


# --- allocate


@settings(max_examples=30)
@given(items=st.integers(1, 4), options=st.integers(2, 5), floor=st.integers(0, 1), data=st.data())
def test_allocation_is_exact_and_no_other_is_better(items: int, options: int, floor: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(items * floor, items * (options - 1)))
    curves = falling(items, options, data.draw(st.integers(0, 99)))
    spent = budget.allocate(curves, total, floor=floor)
    assert sum(spent) == total and min(spent) >= floor

    def loss(units: tuple[int, ...]) -> float:
        return float(sum(curve[n] for curve, n in zip(curves, units, strict=True)))

    every = (u for u in itertools.product(range(floor, options), repeat=items) if sum(u) == total)
    assert loss(tuple(spent)) == pytest.approx(min(map(loss, every)))


def test_what_costs_nothing_gets_only_its_floor() -> None:
    curves = torch.stack((torch.zeros(9), torch.linspace(1, 0, 9)))
    assert budget.allocate(curves, 9, floor=1) == [1, 8]


def test_totals_that_do_not_fit_are_refused() -> None:
    for total in (1, 9):
        with pytest.raises(UserError, match="2 items of 1 to 4 units"):
            budget.allocate(falling(2, 5, 0), total, floor=1)


# --- plan


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.75, 1.0])
def test_a_planned_student_has_exactly_the_bytes_of_its_budget(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, share: float
) -> None:
    teacher = tiny_teacher("qwen2")
    statistics = probed(teacher, ids)
    allocation = budget.plan(teacher, statistics, share)
    total = int(share * 64) // 2 * 2  # two layers of 16 + 16 dims, in steps of 2
    assert sum(allocation.d_qk) + sum(allocation.d_vo) == total == budget.total_dims(teacher.config, share)
    assert all(d % 2 == 0 and 2 <= d <= 16 for d in allocation.d_qk + allocation.d_vo)
    student = convert(teacher, d_qk=allocation.d_qk, d_vo=allocation.d_vo, ids=ids)
    with torch.no_grad():
        cache = student(ids[:1], use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kept == ids.shape[1] * teacher.config.num_key_value_heads * total
    assert spec_of(student).cache_bytes_per_token(2, 4) * ids.shape[1] == kept * 4


def test_a_larger_budget_never_expects_more_loss_and_a_plan_no_more_than_uniform_dims(
    any_teacher: PreTrainedModel, ids: Tensor
) -> None:
    statistics = probed(any_teacher, ids)
    plans = [budget.plan(any_teacher, statistics, share) for share in (0.15, 0.25, 0.375, 0.5, 0.75, 1.0)]
    expected = [plan.expected_loss for plan in plans]
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == pytest.approx(0, abs=1e-12)
    if plans[0].whole_layers:  # an odd number of steps can't be shared evenly by the keys and values of one layer
        plans = [plan for plan in plans if (sum(plan.d_qk) + sum(plan.d_vo)) % 4 == 0]
    assert plans and all(plan.expected_loss <= min(plan.alternatives.values()) + 1e-12 for plan in plans)


def test_a_layer_whose_values_do_not_matter_pays_for_the_others(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("llama")
    teacher.model.layers[0].self_attn.o_proj.weight.data.mul_(1e-4)
    allocation = budget.plan(teacher, probed(teacher, ids), 0.5)
    assert allocation.d_qk[0] == allocation.d_vo[0] == 2
    assert allocation.d_qk[1] + allocation.d_vo[1] == 28


def test_values_of_half_rank_need_no_more_than_half_the_dims(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("llama")
    teacher.model.layers[0].self_attn.v_proj.weight.data.unflatten(0, (-1, 16))[:, 8:] = 0
    statistics = probed(teacher, ids)
    curves = budget.loss_curves(teacher, statistics)
    assert bool(curves.isfinite().all()) and float(curves[1, 0, 8:].abs().max()) < 1e-6
    assert budget.plan(teacher, statistics, 0.75).d_vo[0] <= 8


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-yarn", "mistral-mha"])
def test_probes_are_the_kl_of_models_with_one_narrow_part(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "PROBE_POSITIONS", 5)  # of twelve
    teacher = tiny_teacher(name)
    statistics = calibrate(teacher, ids, about={})
    probes = budget.probe(teacher, statistics, ids[:2])
    assert probes.shape == (2, 2)
    for side, layer in itertools.product(range(2), range(2)):
        dims = [[16, 16], [16, 16]]
        dims[side][layer] = 8
        measured, (d_qk, d_vo) = probes[side, layer], dims
        student = convert(teacher, d_qk=d_qk, d_vo=d_vo, statistics=statistics)
        with torch.no_grad():
            wanted, got = (model(ids[:2]).logits.double().log_softmax(-1) for model in (teacher, student))
        kl = (wanted.exp() * (wanted - got)).sum(-1).flip(1)[:, :: budget.PROBE_STRIDE].mean()
        assert float(measured) == pytest.approx(float(kl), rel=1e-3, abs=1e-6)


def test_probing_holds_one_hidden_state_for_each_probe(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    config = tiny_teacher("llama").config
    config.num_hidden_layers = 6
    teacher, text = LlamaForCausalLM(config).eval(), ids[:2].repeat(40, 1)  # a shape that nothing else has
    statistics, shape, held = calibrate(teacher, ids, about={}), (*text.shape, config.hidden_size), list[int]()

    def count(module: torch.nn.Module, *_: object) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            seen = {x.data_ptr() for x in gc.get_objects() if type(x) is Tensor and x.shape == shape}
            held.append(len(seen))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        budget.probe(teacher, statistics, text)
    finally:
        hook.remove()
    # Twelve, beside the teacher's, what becomes of it and of one of them, and what a layer makes.
    assert len(held) == sum(2 * layer + 3 for layer in range(6)) and 12 < max(held) < 18, held


def test_curves_pass_through_the_probes_and_end_at_zero(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("llama")
    statistics = probed(teacher, ids)
    curves = budget.loss_curves(teacher, statistics)
    assert curves.shape == (2, 2, 17)
    torch.testing.assert_close(curves[..., 8], statistics.probes)
    assert float(curves[..., 16].abs().max()) == 0
    assert bool((curves.diff(dim=-1) <= 0).all())


# --- refused


@pytest.mark.parametrize(
    ("share", "message"), [(0, "above 0 and at most 1; got 0"), (1.5, "got 1.5"), (0.06, "give at least 0.125")]
)
def test_budgets_that_can_not_be_are_refused(
    tiny_teacher: Callable[[str], PreTrainedModel], share: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        budget.total_dims(tiny_teacher("llama").config, share)


def test_statistics_without_probes_are_refused(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("llama")
    with pytest.raises(UserError, match="calibrate again"):
        budget.plan(teacher, calibrate(teacher, ids, about={}), 0.5)


@pytest.mark.parametrize("preset", ["portable", "paper"])
def test_dims_by_layer_need_the_best_preset(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, preset: str
) -> None:
    with pytest.raises(UserError, match="different ones need preset best"):
        convert(tiny_teacher("llama"), preset=preset, d_qk=(8, 4), d_vo=(8, 8), ids=ids)
