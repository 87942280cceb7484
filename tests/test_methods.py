"""Head reductions: lossless where that is exactly known, no worse than simpler ones elsewhere, and invariant."""

from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from windowless import convert

from kvlatent.compress.fill import fill
from kvlatent.compress.linear_algebra import complex_covariance, pair_scores
from kvlatent.compress.maps import (
    QKReduction,
    VOReduction,
    by_frequency,
    own_part,
    rescaled,
    select,
    stride_channels,
)
from kvlatent.compress.methods import METHODS, PRESETS
from kvlatent.compress.methods.fold import choose_groups, fold
from kvlatent.compress.methods.pairs import loudest_pairs
from kvlatent.compress.methods.partial import partial_rope
from kvlatent.compress.methods.project import project, project_tail
from kvlatent.compress.statistics import calibrate
from kvlatent.compress.values import value_output_svd, value_output_tail, value_stride
from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.rope import rotate
from kvlatent.model.spec import LatentSpec

KV_HEADS, GROUP, DIM = 2, 3, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(x: Tensor) -> Tensor:
    """E[x xᵀ] over samples: (heads, samples, dim) → (heads, dim, dim)."""
    return x.mT @ x / x.shape[1]


def logit_error(q_cov: Tensor, k_cov: Tensor, maps: QKReduction) -> float:
    """E|qᵀk − q'ᵀk'|² summed over heads, for independent queries and keys of these moments."""
    total = 0.0
    for h in range(len(q_cov)):
        g = h // (len(q_cov) // len(k_cov))
        lost = torch.eye(q_cov.shape[-1], dtype=torch.float64) - maps.q_map[h] @ maps.k_map[g].T
        total += float(torch.trace(lost.T @ q_cov[h] @ lost @ k_cov[g]))
    return total


def output_error(o_cov: Tensor, o_weight: Tensor, maps: VOReduction) -> float:
    """E‖(o − o·v_map·o_map)·W_O‖² summed over query heads."""
    total, group = 0.0, len(o_cov) // len(maps.v_map)
    for h, w in enumerate(o_weight.T.split(o_cov.shape[-1])):
        lost = (torch.eye(len(w), dtype=torch.float64) - maps.v_map[h // group] @ maps.o_map[h // group]) @ w
        total += float(torch.trace(lost.T @ o_cov[h] @ lost))
    return total


# --- stride


def test_stride_keeps_every_rth_channel_and_whole_rotary_pairs() -> None:
    assert stride_channels(16, 4, "d_qk").tolist() == [0, 4, 8, 12]
    assert stride_channels(16, 16, "d_qk").tolist() == list(range(16))
    for d in (2, 4, 8):
        kept = stride_channels(16, d, "d_qk").tolist()
        assert kept[d // 2 :] == [c + 8 for c in kept[: d // 2]]


def test_stride_refuses_what_does_not_divide() -> None:
    with pytest.raises(UserError, match="d_vo must divide head_dim 16; got 6"):
        stride_channels(16, 6, "d_vo")


def test_select_is_indexing() -> None:
    x = normal(2, 5, 6)
    channels = torch.tensor([[0, 3, 5], [2, 1, 4]])
    assert torch.equal(x @ select(channels, 6), torch.stack([x[h][:, channels[h]] for h in range(2)]))


# --- pairs


def test_loudest_pairs_takes_the_pairs_with_the_most_logit_energy() -> None:
    q_cov, k_cov = torch.zeros(KV_HEADS * GROUP, DIM, DIM), torch.zeros(KV_HEADS, DIM, DIM)
    q_energy = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * GROUP + [[4.0, 3.0, 2.0, 1.0]] * GROUP)
    q_cov.diagonal(dim1=1, dim2=2).copy_(torch.cat((q_energy, q_energy), dim=1))
    k_cov.diagonal(dim1=1, dim2=2).copy_(torch.tensor([[9.0, 1.0, 1.0, 1.0] * 2, [1.0, 1.0, 1.0, 9.0] * 2]))
    kept = loudest_pairs(q_cov, k_cov, 4)
    assert kept.freq_index is not None
    assert kept.freq_index.tolist() == [[0, 3], [0, 3]]  # scores 9 2 3 4 and 4 3 2 9
    assert kept.q_map.shape == (6, 8, 4) and kept.k_map.shape == (2, 8, 4)
    assert torch.equal(kept.k_map[0].argmax(0), torch.tensor([0, 3, 4, 7]))


@pytest.mark.parametrize("name", ["llama", "llama-llama3-rope", "mistral", "qwen2", "llama-mha-tied"])
def test_loudest_pairs_is_lossless_when_the_other_pairs_are_zero(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    teacher = tiny_teacher(name)
    kv_heads = teacher.config.num_key_value_heads
    alive = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(g))[:3] for g in range(kv_heads)])
    for layer in teacher.model.layers:
        for parameter in layer.self_attn.k_proj.parameters():
            by_pair = parameter.data.view(kv_heads, 2, 8, -1)
            for g in range(kv_heads):
                by_pair[g][:, [j for j in range(8) if j not in alive[g]]] = 0
    statistics = calibrate(teacher, ids, about={})
    student = graft(teacher)
    whole = [layer.self_attn for layer in student.model.layers]
    fields = spec_of(student).to_dict() | {"d_qk": [6, 6], "per_head_frequencies": True}
    set_spec(student, LatentSpec.from_dict(fields))
    identity = torch.eye(16, dtype=torch.float64).expand(kv_heads, -1, -1)
    for layer, old, stats in zip(student.model.layers, whole, statistics.layers, strict=True):
        kept = loudest_pairs(stats.mean("q"), stats.mean("k"), 6)
        assert torch.equal(kept.freq_index, alive.sort(-1).values)
        fill(layer.self_attn, old, kept, VOReduction(v_map=identity, o_map=identity))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=1e-4)


def test_shared_pairs_are_those_with_the_largest_sum_of_scores() -> None:
    q_cov = torch.eye(DIM).expand(KV_HEADS * GROUP, -1, -1)
    k_cov = torch.stack([torch.diag(torch.tensor(x * 2)) for x in ([9.0, 5.0, 6.0, 1.0], [1.0, 5.0, 6.0, 9.0])])
    assert loudest_pairs(q_cov, k_cov, 4).freq_index.tolist() == [[0, 2], [2, 3]]
    shared = loudest_pairs(q_cov, k_cov, 2, whole_layer=True)
    assert shared.freq_index.tolist() == [[2]] * 2  # 12 against 10


# --- partial


def turned_logits(q: Tensor, k: Tensor, inv_freqs: Tensor, distance: int) -> Tensor:
    """qᵀ R(distance) k for every sample; inv_freqs is (heads, pairs)."""
    angle = distance * inv_freqs[:, None]
    return (rotate(q, angle.cos(), angle.sin()) * k).sum(-1)


def test_partial_rope_is_lossless_when_the_others_stand_still_and_have_low_rank() -> None:
    inv_freq = torch.tensor([1.0, 0.4, 0.0, 0.0], dtype=torch.float64)
    q, k = normal(KV_HEADS * GROUP, 60, DIM), normal(KV_HEADS, 60, DIM, seed=1)
    slow = torch.tensor([2, 3, 6, 7])
    mix = normal(KV_HEADS, 4, 2, seed=2) @ normal(KV_HEADS, 2, 4, seed=3)
    k[..., slow] = k[..., slow] @ mix
    q_cov, k_cov = moment(q), moment(k)
    maps = partial_rope(q_cov, k_cov, pair_scores(q_cov, k_cov), inv_freq, 6, torch.arange(1.0, 64))
    assert maps.freq_index is not None
    assert [sorted(row) for row in maps.freq_index.tolist()] == [[0, 1, 4]] * KV_HEADS
    inv_freqs = torch.cat((inv_freq, torch.zeros(1, dtype=torch.float64)))
    k, k_map, index = (x.repeat_interleave(GROUP, dim=0) for x in (k, maps.k_map, maps.freq_index))
    for distance in (0, 1, 7, 100):
        wanted = turned_logits(q, k, inv_freq.expand(len(q), -1), distance)
        got = turned_logits(q @ maps.q_map, k @ k_map, inv_freqs[index], distance)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


# --- rescaled


def test_rescaling_changes_no_logit_at_any_distance() -> None:
    maps = QKReduction(q_map=normal(KV_HEADS * GROUP, DIM, 4), k_map=normal(KV_HEADS, DIM, 4, seed=1))
    even = rescaled(maps)
    q, k = normal(KV_HEADS * GROUP, 5, DIM, seed=2), normal(KV_HEADS, 5, DIM, seed=3).repeat_interleave(GROUP, dim=0)
    inv_freqs = torch.tensor([1.0, 0.1], dtype=torch.float64).expand(len(q), -1)
    for distance in (0, 3, 50):
        before, after = (
            turned_logits(q @ x.q_map, k @ x.k_map.repeat_interleave(GROUP, dim=0), inv_freqs, distance)
            for x in (maps, even)
        )
        torch.testing.assert_close(after, before)
    pairs = even.k_map.square().sum(1).unflatten(-1, (2, -1)).mean(1)
    torch.testing.assert_close(pairs, torch.ones_like(pairs))


# --- project


@pytest.mark.parametrize("low", ["queries", "keys"])
def test_project_is_lossless_when_rotated_queries_or_keys_have_low_rank(low: str) -> None:
    q, k = normal(KV_HEADS * GROUP, 50, DIM), normal(KV_HEADS, 50, DIM, seed=1)
    if low == "queries":  # of a whole group
        q = q @ (normal(KV_HEADS, DIM, 4, seed=2) @ normal(KV_HEADS, 4, DIM, seed=3)).repeat_interleave(GROUP, dim=0)
    else:
        k = k @ normal(KV_HEADS, DIM, 4, seed=2) @ normal(KV_HEADS, 4, DIM, seed=3)
    maps = project(moment(q), moment(k), 4)
    k, k_map = (x.repeat_interleave(GROUP, dim=0) for x in (k, maps.k_map))
    torch.testing.assert_close((q @ maps.q_map) @ (k @ k_map).mT, q @ k.mT, rtol=0, atol=1e-6)


def test_project_at_full_dims_is_lossless() -> None:
    q_cov, k_cov = moment(normal(KV_HEADS * GROUP, 50, DIM)), moment(normal(KV_HEADS, 50, DIM, seed=1))
    assert logit_error(q_cov, k_cov, project(q_cov, k_cov, DIM)) < 1e-9


@settings(max_examples=25)
@given(d_qk=st.sampled_from([2, 4, 6]), seed=st.integers(0, 99))
def test_project_loses_no_more_than_pairs_stride_or_chance(d_qk: int, seed: int) -> None:
    colour = normal(KV_HEADS * GROUP, DIM, DIM, seed=seed + 1)
    q_cov = moment(normal(KV_HEADS * GROUP, 50, DIM, seed=seed) @ colour)
    k_cov = moment(normal(KV_HEADS, 50, DIM, seed=seed + 2) @ colour[::GROUP])
    least = logit_error(q_cov, k_cov, project(q_cov, k_cov, d_qk))
    pooled = q_cov.view(KV_HEADS, GROUP, DIM, DIM).sum(1)
    eigenvalues = torch.linalg.eigvals(pooled @ k_cov).real.clamp_min(0).sort(-1, descending=True).values
    assert least == pytest.approx(float(eigenvalues[:, d_qk:].sum()), rel=1e-6)  # Eckart-Young
    assert least <= logit_error(q_cov, k_cov, loudest_pairs(q_cov, k_cov, d_qk))
    random_map = torch.linalg.qr(normal(KV_HEADS, DIM, d_qk, seed=seed)).Q
    chance = QKReduction(q_map=random_map.repeat_interleave(GROUP, dim=0), k_map=random_map)
    assert least <= logit_error(q_cov, k_cov, chance)


def test_project_does_not_depend_on_the_basis_of_queries_and_keys() -> None:
    q_cov, k_cov = moment(normal(KV_HEADS * GROUP, 50, DIM)), moment(normal(KV_HEADS, 50, DIM, seed=1))
    basis = normal(DIM, DIM, seed=2) + 3 * torch.eye(DIM)
    inverse = torch.linalg.inv(basis)  # logits don't change under q → Bᵀq, k → B⁻¹k
    other_q, other_k = basis.T @ q_cov @ basis, inverse @ k_cov @ inverse.T
    first, second = project(q_cov, k_cov, 4), project(other_q, other_k, 4)
    assert logit_error(other_q, other_k, second) == pytest.approx(logit_error(q_cov, k_cov, first), rel=1e-6)
    for h in range(KV_HEADS * GROUP):
        kept = first.q_map[h] @ first.k_map[h // GROUP].T
        torch.testing.assert_close(basis @ second.q_map[h] @ second.k_map[h // GROUP].T @ inverse, kept)


def test_project_survives_directions_without_energy() -> None:
    q_cov, k_cov = moment(normal(KV_HEADS * GROUP, 50, DIM)), torch.zeros(KV_HEADS, DIM, DIM, dtype=torch.float64)
    maps = project(q_cov, k_cov, 4)
    assert maps.q_map.isfinite().all() and maps.k_map.isfinite().all()


# --- fold


def rotated_logits(q: Tensor, k: Tensor, inv_freq: list[float]) -> Tensor:
    """qᵢᵀkⱼ of one head after RoPE, rows standing at their index."""
    q, k = (torch.stack([reference.rotated(row, at, inv_freq) for at, row in enumerate(x)]) for x in (q, k))
    return q @ k.T


def complex_rank(x: Tensor, pairs: list[int], rank: int, seed: int) -> Tensor:
    """`x` (samples, dim) with the complex numbers of these pairs confined to `rank` complex directions."""
    z = torch.complex(*x.chunk(2, dim=-1))
    mix = torch.complex(normal(len(pairs), rank, seed=seed), normal(len(pairs), rank, seed=seed + 1))
    z[:, pairs] = z[:, pairs[:rank]] @ mix.T
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("low", ["queries", "keys"])
def test_fold_is_lossless_when_a_groups_frequencies_coincide_and_its_complex_rank_is_low(low: str) -> None:
    inv_freq, groups = [0.9, 0.9, 0.9, 0.2, 0.2, 0.01], [(0, 3, 2), (3, 2, 1), (5, 1, 1)]
    q, k = normal(2 * GROUP, 30, 12), normal(2, 30, 12, seed=1)
    for first, size, rank in groups:
        pairs = list(range(first, first + size))
        for g in range(2):
            if low == "keys":
                k[g] = complex_rank(k[g], pairs, rank, seed=10 * first + g)
            else:
                for h in range(g * GROUP, (g + 1) * GROUP):
                    q[h] = complex_rank(q[h], pairs, rank, seed=10 * first + g)
    maps = fold(moment(q), moment(k), groups)
    assert maps.q_map.shape == (2 * GROUP, 12, 8)
    slots = [inv_freq[first] for first, _, rank in groups for _ in range(rank)]
    for h in range(2 * GROUP):
        got = rotated_logits(q[h] @ maps.q_map[h], k[h // GROUP] @ maps.k_map[h // GROUP], slots)
        torch.testing.assert_close(got, rotated_logits(q[h], k[h // GROUP], inv_freq), rtol=0, atol=1e-6)


def test_fold_of_single_pairs_changes_no_logit() -> None:
    q, k = normal(1, 20, 8), normal(1, 20, 8, seed=1)
    maps = fold(moment(q), moment(k), [(j, 1, 1) for j in range(4)])
    inv_freq = [1.0, 0.3, 0.1, 0.03]
    got = rotated_logits(q[0] @ maps.q_map[0], k[0] @ maps.k_map[0], inv_freq)
    torch.testing.assert_close(got, rotated_logits(q[0], k[0], inv_freq), rtol=0, atol=1e-8)


def test_complex_covariance_is_that_of_the_pairs_as_complex_numbers() -> None:
    x = normal(2, 40, 6)
    z = torch.complex(*x.chunk(2, dim=-1))
    wanted = torch.stack([sum(torch.outer(row, row.conj()) for row in z[h]) / 40 for h in range(2)])
    torch.testing.assert_close(complex_covariance(moment(x)), wanted)


def test_choose_groups_keeps_every_pair_when_there_are_slots_for_all() -> None:
    q_cov, k_cov = moment(normal(4, 40, 16)), moment(normal(2, 40, 16, seed=1))
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    groups, frequencies = choose_groups([q_cov], [k_cov], inv_freq, 8, torch.arange(1, 300))
    assert groups == [(j, 1, 1) for j in range(8)]
    torch.testing.assert_close(torch.tensor(frequencies), inv_freq)


def test_choose_groups_finds_the_split_that_costs_nothing() -> None:
    k = normal(2, 40, 16)
    for g in range(2):
        for pairs in ([0, 1], [2, 3, 4], [6, 7]):
            k[g] = complex_rank(k[g], pairs, 1, seed=pairs[0])
    inv_freq = torch.tensor([1.0, 1.0, 0.4, 0.4, 0.4, 0.1, 0.02, 0.02])
    groups, frequencies = choose_groups(
        [moment(normal(4, 40, 16, seed=1))], [moment(k)], inv_freq, 4, torch.arange(1, 300)
    )
    assert groups == [(0, 2, 1), (2, 3, 1), (5, 1, 1), (6, 2, 1)]
    assert frequencies == pytest.approx([1.0, 0.4, 0.1, 0.02])


@settings(max_examples=10)
@given(slots=st.integers(1, 7), seed=st.integers(0, 99))
def test_choose_groups_uses_every_slot_on_neighbours_in_order(slots: int, seed: int) -> None:
    q_covs = [moment(normal(4, 40, 16, seed=seed + i)) for i in range(2)]
    k_covs = [moment(normal(2, 40, 16, seed=seed + 5 + i)) for i in range(2)]
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    groups, frequencies = choose_groups(q_covs, k_covs, inv_freq, slots, torch.arange(1, 100))
    assert sum(rank for _, _, rank in groups) == slots == len(frequencies)
    assert all(1 <= rank <= size for _, size, rank in groups)
    ends = [0] + [first + size for first, size, _ in groups]
    assert all(first >= end for (first, _, _), end in zip(groups, ends, strict=False)) and ends[-1] <= 8
    assert list(frequencies) == sorted(frequencies, reverse=True)


def test_choose_groups_fills_its_slots_even_when_too_few_pairs_are_alive() -> None:
    q, k = normal(4, 40, 16), normal(2, 40, 16, seed=1)
    k.view(2, 40, 2, 8)[..., 2:] = 0
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    groups, frequencies = choose_groups([moment(q)], [moment(k)], inv_freq, 4, torch.arange(1, 100))
    assert groups[:2] == [(0, 1, 1), (1, 1, 1)] and sum(rank for _, _, rank in groups) == 4
    assert all(inv_freq[-1] <= frequency <= inv_freq[0] for frequency in frequencies)
    maps = fold(moment(q), moment(k), groups)
    assert maps.q_map.isfinite().all() and maps.k_map.isfinite().all()


# --- values and outputs


def test_value_output_svd_is_lossless_for_low_rank_value_weights() -> None:
    inputs, o_weight = normal(200, 20), normal(10, KV_HEADS * GROUP * DIM, seed=1)
    v_weight = normal(KV_HEADS, DIM, 3, seed=2) @ normal(KV_HEADS, 3, 20, seed=3)
    values = (inputs @ v_weight.mT).repeat_interleave(GROUP, dim=0)  # attention only mixes tokens
    maps = value_output_svd(moment(values), o_weight, 3, kv_heads=KV_HEADS)
    for h, w in enumerate(o_weight.T.split(DIM)):
        kept = values[h] @ maps.v_map[h // GROUP] @ maps.o_map[h // GROUP]
        torch.testing.assert_close(kept @ w, values[h] @ w, rtol=0, atol=1e-6)


def test_value_output_svd_is_lossless_for_low_rank_output_weights() -> None:
    o_cov = moment(normal(KV_HEADS * GROUP, 50, DIM))
    shared = normal(KV_HEADS, DIM, 3, seed=1).repeat_interleave(GROUP, dim=0)
    o_weight = (shared @ normal(KV_HEADS * GROUP, 3, 10, seed=2)).flatten(0, 1).T
    assert output_error(o_cov, o_weight, value_output_svd(o_cov, o_weight, 3, kv_heads=KV_HEADS)) < 1e-12


@settings(max_examples=25)
@given(d_vo=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99))
def test_value_output_svd_loses_no_more_than_stride_or_chance(d_vo: int, seed: int) -> None:
    values = normal(KV_HEADS, 50, DIM, seed=seed) @ normal(KV_HEADS, DIM, DIM, seed=seed + 1)
    o_cov = moment(values).repeat_interleave(GROUP, dim=0)
    o_weight = normal(10, KV_HEADS * GROUP * DIM, seed=seed + 2)
    maps = value_output_svd(o_cov, o_weight, d_vo, kv_heads=KV_HEADS)
    assert maps.v_map.shape == (KV_HEADS, DIM, d_vo) and maps.o_map.shape == (KV_HEADS, d_vo, DIM)
    least = output_error(o_cov, o_weight, maps)
    assert least <= output_error(o_cov, o_weight, value_stride(DIM, d_vo, kv_heads=KV_HEADS)) + 1e-6
    basis = torch.linalg.qr(normal(KV_HEADS, DIM, d_vo, seed=seed)).Q
    assert least <= output_error(o_cov, o_weight, VOReduction(v_map=basis, o_map=basis.mT)) + 1e-6


def test_value_output_svd_does_not_depend_on_the_basis_of_values() -> None:
    o_cov = moment(normal(KV_HEADS * GROUP, 50, DIM))
    o_weight = normal(10, KV_HEADS * GROUP * DIM, seed=1)
    basis = normal(DIM, DIM, seed=2) + 3 * torch.eye(DIM)  # o → o·B, W_O → B⁻¹·W_O
    other_weight = torch.cat([torch.linalg.inv(basis) @ w for w in o_weight.T.split(DIM)]).T
    other_cov = basis.T @ o_cov @ basis
    first = output_error(o_cov, o_weight, value_output_svd(o_cov, o_weight, 3, kv_heads=KV_HEADS))
    second = output_error(other_cov, other_weight, value_output_svd(other_cov, other_weight, 3, kv_heads=KV_HEADS))
    assert second == pytest.approx(first, rel=1e-6)


# --- fill


def test_fill_with_identity_maps_copies_the_attention(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("llama-biases")
    student = graft(teacher)
    whole, spec = student.model.layers[0].self_attn, spec_of(student)
    reduced = LatentAttention(student.config, 0, whole, spec)
    every = torch.eye(16, dtype=torch.float64)
    qk = QKReduction(q_map=every.expand(4, -1, -1), k_map=every.expand(2, -1, -1))
    fill(reduced, whole, qk, VOReduction(v_map=every.expand(2, -1, -1), o_map=every.expand(2, -1, -1)))
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(reduced.named_parameters())[name], parameter), name


# --- heads that share a latent


def of_one_source(seed: int) -> Tensor:
    """Keys or values of all heads, side by side, that are mixtures of the same DIM numbers: (1, samples, heads·DIM)."""
    return normal(1, 50, DIM, seed=seed) @ normal(1, DIM, KV_HEADS * DIM, seed=seed + 1)


def test_heads_of_one_source_are_projected_together_without_loss() -> None:
    """Apart, every head would need all of its DIM dims; together they need as many in all."""
    q, k = normal(KV_HEADS * GROUP, 50, DIM), of_one_source(1)
    maps = project(moment(q), moment(k), DIM)
    apart = k.view(50, KV_HEADS, DIM).transpose(0, 1).repeat_interleave(GROUP, dim=0)
    torch.testing.assert_close((q @ maps.q_map) @ (k @ maps.k_map).mT, q @ apart.mT, rtol=0, atol=1e-6)
    tail = project_tail(moment(q), moment(k))  # by dims per head, of which a latent has KV_HEADS times as many
    assert tail.shape == (DIM + 1,) and tail[DIM // 2] < 1e-9 * tail[0] < tail[DIM // 2 - 1]


@settings(max_examples=25)
@given(d_qk=st.sampled_from([2, 4, 6]), seed=st.integers(0, 99))
def test_projecting_heads_together_loses_no_more_than_apart(d_qk: int, seed: int) -> None:
    q_cov = moment(normal(KV_HEADS * GROUP, 50, DIM, seed=seed))
    together = moment(normal(1, 50, KV_HEADS * DIM, seed=seed + 1) @ normal(KV_HEADS * DIM, KV_HEADS * DIM, seed=seed))
    blocks = together[0].unflatten(0, (KV_HEADS, DIM)).unflatten(2, (KV_HEADS, DIM))
    apart = torch.stack([blocks[g, :, g] for g in range(KV_HEADS)])
    tails = project_tail(q_cov, together), project_tail(q_cov, apart)
    assert tails[0][0] == pytest.approx(float(tails[1][0]))
    assert tails[0][d_qk] <= tails[1][d_qk] * (1 + 1e-9)


def test_values_of_one_source_are_reduced_together_without_loss() -> None:
    o, o_weight = of_one_source(0).expand(KV_HEADS * GROUP, -1, -1), normal(20, KV_HEADS * GROUP * DIM, seed=3)
    maps = value_output_svd(moment(o), o_weight, DIM, kv_heads=KV_HEADS)
    part = own_part(KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    for h, w in enumerate(o_weight.T.split(DIM)):
        own = slice(int(part[h]) * DIM, (int(part[h]) + 1) * DIM)
        torch.testing.assert_close((o[h] @ maps.v_map[0] @ maps.o_map[0])[:, own] @ w, o[h, :, own] @ w)
    tail = value_output_tail(moment(o), o_weight, kv_heads=KV_HEADS)
    assert tail.shape == (DIM + 1,) and tail[DIM // 2] < 1e-9 * tail[0] < tail[DIM // 2 - 1]


def test_channels_by_frequency_are_those_of_one_head() -> None:
    assert by_frequency(4, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # of heads (0, 1 | 2, 3) and (4, 5 | 6, 7)
    assert by_frequency(8, 1).tolist() == list(range(8))


def test_pairs_of_one_frequency_are_folded_across_heads_without_loss_at_any_distance() -> None:
    """Each head's pair is a complex multiple of the other's, so of every frequency one slot is enough for both."""
    inv_freq = [1.0, 0.7, 0.2, 0.01]
    source = torch.complex(normal(20, DIM // 2, seed=1), normal(20, DIM // 2, seed=2))
    factors = torch.complex(normal(KV_HEADS, 1, DIM // 2, seed=3), normal(KV_HEADS, 1, DIM // 2, seed=4))
    z = source * factors
    k, q = torch.cat((z.real, z.imag), dim=-1), normal(KV_HEADS * GROUP, 20, DIM)
    together = torch.cat(list(k), dim=-1)[None]
    covariances = moment(q), moment(together)
    groups, frequencies = choose_groups(
        *([x] for x in covariances), torch.tensor(inv_freq), DIM // 2, torch.arange(1, 65)
    )
    assert groups == [(KV_HEADS * j, KV_HEADS, 1) for j in range(DIM // 2)]
    assert frequencies == pytest.approx(inv_freq)
    maps = fold(*covariances, groups)
    for h in range(KV_HEADS * GROUP):
        found = rotated_logits(q[h] @ maps.q_map[h], together[0] @ maps.k_map[0], inv_freq)
        torch.testing.assert_close(found, rotated_logits(q[h], k[h // GROUP], inv_freq), rtol=0, atol=1e-6)


# --- all of them


def test_every_method_has_its_page_and_presets_take_what_keeps_their_promise() -> None:
    headings = [line for line in Path("docs/methods.md").read_text().splitlines() if line.startswith("##")]
    assert all(any(f"`{name}`" in line for line in headings) for name in METHODS)
    assert {name: (recipe.default.name, list(recipe.methods)) for name, recipe in PRESETS.items()} == {
        "best": ("project", list(METHODS)),
        "portable": ("fold", ["stride", "aware", "matched", "pairs-model", "fold"]),
        "paper": ("aware", ["stride", "aware", "matched"]),
    }


KEEPING = [name for name in METHODS if name not in ("aware", "matched")]
"""Methods that at full dims have nothing to do; the paper's list replaces frequencies even there, or isn't defined."""


def relative_error(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        got, wanted = student(ids).logits, teacher(ids).logits
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("preset, qk", [("portable", None), *(("best", qk) for qk in KEEPING)])
def test_full_dims_are_the_teacher_whatever_the_text(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, preset: str, qk: str | None
) -> None:
    teacher = tiny_teacher(name)
    for text in (ids[:2, :8], torch.full((4, 24), 7)):  # fewer tokens than dims; one token again and again
        student = convert(teacher, preset=preset, qk=qk, d_qk=16, d_vo=16, ids=text)
        assert relative_error(student, teacher, ids[6:]) < 1e-3


SILENT = {
    "keys and values of a head": ("self_attn.k_proj", "self_attn.v_proj"),
    "a query head": ("self_attn.q_proj",),
    "queries": ("self_attn.q_proj",),
    "values": ("self_attn.v_proj",),
    "a layer, as LLaMA-Pro adds them": ("self_attn.o_proj", "mlp.down_proj"),
    "the gate": ("mlp.gate_proj",),
    "channels of the FFN": ("mlp.up_proj",),
}
"""Matrices of layer 0 that are zero, in their first 16 rows where only a part is meant."""


@pytest.mark.parametrize("what", SILENT)
@pytest.mark.parametrize("name, preset", [("llama-mha-tied", "best"), ("llama", "portable"), ("qwen3", "best")])
def test_silent_weights_are_converted_and_keep_what_there_is(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, preset: str, what: str
) -> None:
    teacher = tiny_teacher(name)
    for path in SILENT[what]:
        rows = slice(16) if what.startswith(("a query", "keys", "channels")) else slice(None)
        teacher.model.layers[0].get_submodule(path).weight[rows] = 0
    assert relative_error(convert(teacher, preset=preset, d_qk=16, d_vo=16, ids=ids), teacher, ids[6:]) < 1e-3
    half = convert(teacher, preset=preset, d_qk=8, d_vo=8, ids=ids)
    assert all(bool(parameter.isfinite().all()) for parameter in half.parameters())
    assert bool(half(ids).logits.isfinite().all())


@pytest.mark.parametrize("qk", [name for name, method in METHODS.items() if method.calibrated])
def test_every_method_converts_a_silent_head(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, qk: str
) -> None:
    teacher = tiny_teacher("llama")
    for layer in teacher.model.layers:
        layer.self_attn.q_proj.weight[:32] = 0  # both queries of a KV head
        layer.self_attn.k_proj.weight[:16] = 0
    for d in (8, 16):
        student = convert(teacher, qk=qk, d_qk=d, d_vo=d, ids=ids)
        assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
    assert relative_error(student, teacher, ids[6:]) < 1e-3


def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("llama")
    teacher.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    for source in ({"preset": "paper"}, {"ids": ids}):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
            convert(teacher, d_qk=8, d_vo=8, **source)
    teacher.model.layers[0].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"layers\.0\.\w+ holds NaN or infinity"):
        calibrate(teacher, ids, about={})
