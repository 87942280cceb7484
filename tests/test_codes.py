"""Codes of latents: what rows say against plain loops, what bits cost, and students whose far tokens are codes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import test_budget
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvlatent.compress import budget
from kvlatent.compress.bits import chunk_of, full_axes, share_bits, total_bits
from kvlatent.compress.codes import Axes, LayerAxes
from kvlatent.compress.convert import convert
from kvlatent.compress.statistics import calibrate
from kvlatent.errors import UserError
from kvlatent.healing.checkpoint import settings_for
from kvlatent.healing.config import HealChanges
from kvlatent.kernels import attention, cpu_decode
from kvlatent.kernels.attention import segment_attention
from kvlatent.kernels.codes import Codes, WholeCodes
from kvlatent.kernels.cpu_codes import LANES, WORDS, vectors_of
from kvlatent.kernels.layout import BITS, DISTORTION, LEAST_SIZE, STEP, Groups
from kvlatent.model import window
from kvlatent.model.attention import attentions
from kvlatent.model.cache import LatentCache, cache_bytes
from kvlatent.model.graft import spec_of
from kvlatent.model.spec import LatentSpec
from kvlatent.model.window import Near
from kvlatent.serving.engines import routes

GROUPS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(BITS)), min_size=1, max_size=4).map(tuple)


probed = partial(test_budget.probed, near=Near(5, 2))


@settings(max_examples=40)
@given(groups=GROUPS, seed=st.integers(0, 99))
def test_rows_say_what_a_loop_over_intervals_says(groups: Groups, seed: int) -> None:
    codes = Codes(groups)
    x = torch.randn(2, 1, 3, codes.width, generator=torch.Generator().manual_seed(seed)) * 3
    rows = codes.encode(x)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 1, 3, codes.row_bytes)
    assert codes.row_bytes == 1 + sum(math.ceil(n * bits / 8) for n, bits in groups)
    got = codes.decode(rows, torch.float64)
    for at in itertools.product(range(2), range(1), range(3)):
        size = float(x[at].square().mean().sqrt())
        eighth = 2.0 ** math.floor(math.log2(size)) / 8
        if abs(size / eighth % 1 - 0.5) < 0.01:  # between two, and float16 rounds before
            continue
        size = eighth * round(size / eighth)
        dims = [bits for n, bits in groups for _ in range(n)]
        for dim, bits in enumerate(dims):
            step = STEP[bits] * size
            interval = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, math.floor(float(x[at][dim]) / step)))
            near_edge = abs(float(x[at][dim]) / step - round(float(x[at][dim]) / step)) < 1e-4
            assert near_edge or abs(float(got[at][dim]) - (interval + 0.5) * step) < 1e-5 * size


@pytest.mark.parametrize("bits", BITS)
def test_errors_of_gaussians_are_those_that_budgets_count_with(bits: int) -> None:
    x = torch.randn(1, 1, 400, 512, generator=torch.Generator().manual_seed(0))
    codes = Codes(((512, bits),))
    error = (codes.decode(codes.encode(x), torch.float32) - x).square().mean()
    assert error == pytest.approx(DISTORTION[bits], rel=0.1)


def test_a_single_row_of_odd_bytes_is_read() -> None:
    codes, x = Codes(((5, 8),)), torch.linspace(-1, 1, 5).view(1, 1, 1, 5)
    assert codes.row_bytes == 6
    torch.testing.assert_close(codes.decode(codes.encode(x), torch.float32), x, rtol=0, atol=0.02)


def test_silence_and_huge_numbers_give_numbers() -> None:
    codes = Codes(((4, 4), (4, 2)))
    x = torch.stack((torch.zeros(8), torch.full((8,), 1e30)))[None, None]
    assert codes.decode(codes.encode(x), torch.float32).isfinite().all()
    assert codes.decode(codes.encode(x), torch.float32)[0, 0, 0].abs().max() < LEAST_SIZE


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e2])
def test_outliers_of_whole_rows_are_not_cut_off(size: float) -> None:
    codes = WholeCodes(64)
    x = torch.randn(2, 3, 50, 64) * torch.linspace(0.1, 9, 64) ** 2 * size
    x[..., 5] *= 100
    peaks = x.abs().amax(-1, keepdim=True)
    with patch.object(cpu_decode, "available", lambda: False):
        wanted = codes.encode(x)
    rows = codes.encode(x)
    assert torch.equal(rows, wanted) and rows.shape[-1] == 65
    placed, elsewhere = rows.clone(), (torch.arange(50) - 3.5).abs() > 1
    codes.write(x[:, :, 7:8], placed, 3)
    codes.write(x[:, :, 9:10].bfloat16(), placed, 4)
    assert torch.equal(placed[:, :, 3], rows[:, :, 7]) and torch.equal(placed[:, :, elsewhere], rows[:, :, elsewhere])
    assert torch.equal(placed[:, :, 4], codes.encode(x[:, :, 9].bfloat16()))
    bound = peaks / 255 * 1.13 + LEAST_SIZE  # half a step, of sizes that are at most an eighth too large
    assert bool(((codes.decode(rows, torch.float32) - x).abs() <= bound).all())


@pytest.mark.skipif(not cpu_decode.available(), reason="needs llvmlite and GNU's OpenMP")
@settings(max_examples=40)
@given(groups=GROUPS, size=st.sampled_from([0.0, 1e-9, 1.0, 1e30]), seed=st.integers(0, 99))
def test_the_kernel_writes_the_same_bytes(groups: Groups, size: float, seed: int) -> None:
    codes = Codes(groups)
    x = torch.randn(2, 70, 2, codes.width, generator=torch.Generator().manual_seed(seed)).mul(size)[:, :, 1:]
    with patch.object(cpu_decode, "available", lambda: False):
        wanted = codes.encode(x)
    assert torch.equal(codes.encode(x), wanted)
    assert torch.equal(codes.encode(x.bfloat16()), codes.encode(x.bfloat16().float()))


@given(groups=GROUPS)
def test_vectors_of_a_row_hold_every_dim_once_and_stay_inside(groups: Groups) -> None:
    """Decoded by the tables that kernels go by, byte by byte."""
    codes = Codes(groups)
    row = codes.encode(torch.randn(1, 1, 1, codes.width))
    found = vectors_of(codes)
    assert len(set(found.slots.tolist())) == codes.width
    exponent, mantissa = divmod(int(row.flatten()[0]), 8)
    assert exponent > 0
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 15)
    for dim, slot in enumerate(found.slots.tolist()):
        vector, lane = divmod(slot, LANES)
        word = next(word for word, end in zip(WORDS, found.ends, strict=True) if vector < end)
        begin = int(found.bytes[vector])
        assert 0 <= begin <= codes.row_bytes - word
        code = int(row[0, 0, 0, begin + lane % word]) & int(found.masks[vector, lane])
        assert code * int(found.lifts[vector, lane]) < 512
        number = size * (code * int(found.lifts[vector, lane]) + float(found.least[dim])) * float(found.scales[dim])
        assert number == pytest.approx(float(codes.decode(row, torch.float64)[0, 0, 0, dim]), rel=1e-5, abs=1e-6)


@pytest.mark.skipif(not cpu_decode.available(), reason="needs llvmlite and GNU's OpenMP")
def test_all_layouts_share_a_kernel() -> None:
    from kvlatent.kernels import cpu_codes_kernel

    built = cpu_codes_kernel.build_attention.cache_info
    counts = []
    for groups in (((16, 8), (32, 2)), ((48, 4),), ((5, 1), (64, 8))):
        codes = Codes(groups), Codes(groups[::-1])
        k, v = (x.encode(torch.randn(1, 1, 9, x.width)) for x in codes)
        segment_attention(torch.randn(1, 3, 1, codes[0].width), k, v, scale=1.0, mask=None, codes=codes)
        counts.append(built().misses)
    assert counts[0] == counts[-1]


def test_gradients_go_straight_through() -> None:
    x = torch.randn(1, 2, 3, 6, requires_grad=True)
    codes, weight = Codes(((6, 2),)), torch.randn(1, 2, 3, 6)
    (codes.straight_through(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    torch.testing.assert_close(codes.straight_through(x), codes.decode(codes.encode(x), x.dtype))


def test_bits_are_shared_for_the_least_loss() -> None:
    """Against every way to share, on two layers of two chunks."""
    generator = torch.Generator().manual_seed(1)

    def side() -> Axes:
        size = torch.rand(16, generator=generator, dtype=torch.float64).sort(descending=True).values
        eye = torch.eye(16, dtype=torch.float64)[None]
        return Axes(to=eye, back=eye, mean=eye[:, :1], dropped=size, spread=size[None])

    found, weights = [LayerAxes(side(), side()) for _ in range(2)], torch.tensor([[1.0, 3.0], [0.5, 2.0]])
    assert chunk_of(16) == 8
    for total in (64, 128, 192, 320):
        groups, losses = share_bits(found, weights, total)
        spent = sum(n * bits for layer in groups for side in layer for n, bits in side)
        assert spent <= total

        def cost(bits: tuple[int, ...]) -> float:
            loss = 0.0
            for at, b in enumerate(bits):
                layer, part, piece = at // 4, at // 2 % 2, at % 2
                energy = float(found[layer][part].dropped[8 * piece : 8 * piece + 8].sum())
                loss += float(weights[part, layer]) * energy * (DISTORTION[b] if b else 1.0)
            return loss

        ways = (w for w in itertools.product((0, *BITS), repeat=8) if 8 * sum(w) <= spent and all(w[::2]))
        assert float(losses.sum()) <= 1.0001 * min(map(cost, ways))


def as_integers(q: Tensor, codes: Codes) -> Tensor:
    """Queries as the CPU kernel takes them: times the steps of codes, 32,767 steps of the largest, and back."""
    scales = vectors_of(codes).scales
    in_steps = q * scales
    up = 32767 / in_steps.abs().amax(-1, keepdim=True)
    return (in_steps * up).round().double() / up / scales


@pytest.mark.skipif(not cpu_decode.available(), reason="needs llvmlite and GNU's OpenMP")
@settings(max_examples=15)
@given(
    k_groups=GROUPS, v_groups=GROUPS, length=st.sampled_from([1, 15, 700]), group=st.sampled_from([1, 3, 9, 13]),
    masked=st.booleans(), cap=st.sampled_from([None, 0.8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_reads_codes_as_they_are(
    k_groups: Groups, v_groups: Groups, length: int, group: int, masked: bool, cap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    codes = Codes(k_groups), Codes(v_groups)
    k, v = (x.encode(torch.randn(2, 2, length + 3, x.width))[:, :, :length] for x in codes)
    q = torch.randn(2, 2 * group, 1, codes[0].width)
    mask = torch.rand(2, 1, 1, length) < 0.7 if masked else None
    scale = codes[0].width ** -0.5
    means = torch.randn(2, 1, codes[0].width), torch.randn(2, 1, codes[1].width)
    got = segment_attention(q, k, v, scale=scale, mask=mask, cap=cap, codes=codes, means=means)
    keys, values = (x.decode(rows, torch.float64) for x, rows in zip(codes, (k, v), strict=True))
    wanted = exact = segment_attention(q.double(), keys + means[0], values + means[1], scale=scale, mask=mask, cap=cap)
    if cap is None:
        in_logits = scale * math.log2(math.e)  # to base 2, as logits are told
        rounded = as_integers(q * in_logits, codes[0]) / in_logits
        output, top, total = segment_attention(rounded, keys, values + means[1], scale=scale, mask=mask)
        with_mean = q.double().unflatten(1, (2, -1)).mul(means[0][:, None]).sum(-1).view_as(top) * in_logits
        exact = output, top + with_mean, total
    seen = torch.ones(2, dtype=torch.bool) if mask is None else mask.any(-1)[:, 0, 0]
    for x, y, z in zip(got, exact, wanted, strict=True):
        torch.testing.assert_close(x[seen].double(), y[seen], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x[seen].double(), z[seen], rtol=1e-3, atol=5e-4)
    with patch.object(cpu_decode, "available", lambda: False), patch.object(attention, "READ_AT_ONCE", 256):
        again = segment_attention(q, k, v, scale=scale, mask=mask, cap=cap, codes=codes, means=means)
    torch.testing.assert_close(again[0][seen].double(), wanted[0][seen], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not cpu_decode.available(), reason="needs llvmlite and GNU's OpenMP")
def test_the_kernel_does_without_what_a_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlatent.kernels import cpu_code, cpu_codes_kernel

    torch.manual_seed(0)
    codes = Codes(((16, 8), (40, 4), (24, 1))), Codes(((20, 4), (24, 2)))
    k, v = (x.encode(torch.randn(2, 1, 75, x.width)) for x in codes)
    q = torch.randn(2, 9, 1, codes[0].width)
    found = []
    for has in (cpu_code.has, lambda feature: False):
        monkeypatch.setattr(cpu_code, "has", has)
        cpu_codes_kernel.build_attention.cache_clear()
        found.append(segment_attention(q, k, v, scale=0.2, mask=None, codes=codes))
    cpu_codes_kernel.build_attention.cache_clear()
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_widths_that_fill_no_chunk_lose_nothing() -> None:
    eye, size = torch.eye(20, dtype=torch.float64)[None], torch.linspace(2, 1, 20, dtype=torch.float64)
    side = Axes(to=eye, back=eye, mean=eye[:, :1], dropped=size, spread=size[None])
    groups, losses = share_bits([LayerAxes(side, side)], torch.ones(2, 1), 2 * 20 * 8)
    assert groups == [(((20, 8),), ((20, 8),))] and float(losses.sum()) < 0.01


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-mha"])
def test_axes_undo_each_other_and_their_energy_is_the_tail_of_dims(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    teacher = tiny_teacher(name)
    statistics = probed(teacher, ids)
    for layer, stats in zip(full_axes(teacher, statistics), statistics.layers, strict=True):
        for side in layer:
            eye = torch.eye(side.to.shape[-1], dtype=torch.float64)
            torch.testing.assert_close(side.to @ side.back.mT, eye.expand_as(side.to), rtol=0, atol=1e-6)
            assert (side.dropped.diff() <= 1e-9 * side.dropped[0]).all() and (side.spread >= 0).all()
        curve = budget.project_tail(stats.mean("q"), stats.mean("k", heads_per_latent=statistics.heads_per_latent))
        torch.testing.assert_close(layer.keys.dropped.sum(), curve[0], rtol=1e-6, atol=1e-12)


def test_eight_bits_of_all_dims_are_nearly_the_teacher(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    statistics = probed(any_teacher, ids)
    width = statistics.heads_per_latent * 16
    codes = [((width, 8),)] * any_teacher.config.num_hidden_layers
    student = convert(any_teacher, d_qk=16, d_vo=16, k_codes=codes, v_codes=codes, statistics=statistics)
    exact, coarse = logits(any_teacher, ids), logits(student, ids)
    assert (coarse - exact).norm() < 0.06 * exact.norm()  # experts are chosen anew where two are nearly alike
    assert not torch.equal(coarse, exact)
    few = convert(any_teacher, d_qk=16, d_vo=16, statistics=statistics, k_codes=[((width, 2),)] * 2, v_codes=codes)
    assert (logits(few, ids) - exact).norm() > 2 * (coarse - exact).norm()


@pytest.mark.parametrize(("share", "bits"), [(0.1, 8), (0.2, 16), (0.45, 16)])  # of which a window takes 0.27 to 0.06
def test_a_planned_student_keeps_within_its_budget(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, share: float, bits: int
) -> None:
    teacher = tiny_teacher("llama")
    statistics = probed(teacher, ids)
    plan = budget.plan(teacher, statistics, share)
    assert plan.k_codes and plan.expected_loss <= min(plan.alternatives.values())
    student = convert(teacher, **plan.reduction, statistics=statistics)
    spec, context = spec_of(student), teacher.config.max_position_embeddings
    assert spec is not None
    assert spec.window_bits == plan.window_bits == bits
    whole = 2 * 2 * 16 * 2 * 2 * context  # 2 layers, 2 KV heads of 16 dims, keys and values of 2 bytes
    assert spec.cache_bytes(2, 2, context) <= share * whole * 1.0001
    with torch.no_grad():
        cache = LatentCache(student.config)
        student(ids[:3], past_key_values=cache)
    assert cache_bytes(cache) == 3 * spec.cache_bytes(2, 4, ids.shape[1])
    assert sum(map(sum, plan.token_bytes(2, spec.heads_per_latent, 2))) == spec.cache_bytes_per_token(2, 2)
    assert routes(student.config)[0].cache_bytes_per_token(2, 4) == spec.cache_bytes_per_token(2, 2)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor of floats has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
        self.numbers = max([self.numbers, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_no_buffer_of_the_contexts_length_holds_numbers(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, new: int, padded: bool
) -> None:
    teacher = tiny_teacher("llama")
    codes = [((32, 2),)] * 2
    student = convert(teacher, d_qk=16, d_vo=16, k_codes=codes, v_codes=codes, statistics=probed(teacher, ids))
    tokens, cache = 2000, LatentCache(student.config)
    mask = torch.ones(1, tokens + new, dtype=torch.long)
    mask[:, : 7 * padded] = 0
    text = ids.flatten().repeat(8)[None, : tokens + new]
    with torch.no_grad(), patch.multiple(attention, READ_AT_ONCE=128), patch.multiple(window, READ_AT_ONCE=128):
        student(text[:, :tokens], attention_mask=mask[:, :tokens], past_key_values=cache)
        with Largest() as largest:
            student(text[:, tokens:], attention_mask=mask, past_key_values=cache)
    weights = student.config.vocab_size * student.config.hidden_size  # the largest, of which views are made
    assert largest.numbers <= weights < 32 * tokens / 3


def test_numbers_pay_for_no_sizes(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    config = tiny_teacher("llama").config  # 2 layers of 2 KV heads of 16 dims
    assert total_bits(config, 2, 0.5, (16,)) == 2 * 2 * 0.5 * 16 * 32
    assert total_bits(config, 2, 0.5, (4, 8)) == 2 * 2 * (0.5 * 16 * 32 - 8)


@pytest.mark.parametrize(("share", "bits"), [(0.12, 8), (0.2, 16)])
def test_in_order_and_back_from_disk(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, share: float, bits: int
) -> None:
    teacher = tiny_teacher("qwen3")
    plan = budget.plan(teacher, probed(teacher, ids), share)
    student = convert(teacher, **plan.reduction, window=5, sinks=2, ids=ids)
    assert all(attention.far_bias.abs().min() > 0 for attention in attentions(student))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(student, ids))
    spec = spec_of(again)
    assert spec is not None and spec == spec_of(student) and spec.window_bits == bits


def test_students_of_codes_heal_at_a_lower_rate(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    config = tiny_teacher("llama").config
    rates = [
        settings_for(
            "best",
            HealChanges(learning_rate=asked, lora_rank=4, stage2_tokens=64),
            config,
            coded=coded,
            context=None,
            seed=0,
        ).learning_rate
        for coded, asked in ((True, None), (False, None), (True, 1e-3))
    ]
    assert rates == [2e-5, 1e-4, 1e-3]


def test_what_can_not_be_is_refused(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("llama")
    statistics = probed(teacher, ids)
    with pytest.raises(UserError, match="is too little for all layers"):
        budget.plan(teacher, statistics, 0.04)
    with pytest.raises(UserError, match="bits are 16, 8, 4, 2, 1; got 3"):
        budget.plan(teacher, statistics, 0.5, bits=3)
    with pytest.raises(UserError, match="beside a window"):
        budget.plan(teacher, calibrate(teacher, ids, about={}), 0.5, bits=4)
    spec = spec_of(convert(teacher, d_qk=16, d_vo=16, statistics=statistics))
    assert spec is not None
    fields = spec.to_dict()
    for wrong, what in (
        ([[[8, 3]]] * 2, "with 1, 2, 4, 8 bits"),
        ([[[64, 4]]] * 2, "at most the 32 dims"),
        ([], "every layer"),
    ):
        with pytest.raises(UserError, match=what):
            LatentSpec.from_dict(fields | {"k_codes": wrong, "v_codes": [[[8, 4]]] * 2})
    for bits, codes in ((8, []), (4, [[[8, 4]]] * 2)):
        with pytest.raises(UserError, match=f"a window has 16 bits or, beside codes, 8; got {bits}"):
            LatentSpec.from_dict(fields | {"window_bits": bits, "k_codes": codes, "v_codes": codes})


def test_layers_without_far_tokens_become_codes_of_nothing(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    """One slides over less than the window; its codes are never read."""
    teacher = tiny_teacher("gemma3_text")
    groups = (((16, 4),),) * 2
    student = convert(teacher, d_qk=8, d_vo=8, window=8, k_codes=groups, v_codes=groups, ids=ids)
    assert teacher.config.sliding_window < 8
    assert all(bool(x.isfinite().all()) for x in (*student.parameters(), *student.buffers()))
    assert bool(logits(student, ids[:2]).isfinite().all())
