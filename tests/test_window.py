"""Near tokens whole, far ones through latents: equal to plain loops, cached as uncached, in every way of generating."""

from unittest.mock import patch

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import logits
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.kernels import segment
from kvlatent.model import window as window_module
from kvlatent.model.attention import attentions
from kvlatent.model.cache import LatentCache, cache_bytes
from kvlatent.model.families import linear_layers
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.graft import graft, identity_spec, spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.spec import LatentSpec
from kvlatent.model.window import Far, Whole, sinks_of, windowed_attention

WINDOW, SINKS = 5, 2


def windowed(
    teacher: PreTrainedModel,
    window: int = WINDOW,
    sinks: int = SINKS,
    latents: int = 1,
    *,
    codes: bool = False,
    window_bits: int = 16,
) -> PreTrainedModel:
    """A student with a window and random maps, otherwise its teacher."""
    config = teacher.config
    if codes and getattr(config, "num_experts_per_tok", None):
        pytest.skip("experts don't multiply in float64")
    dims = {"d_qk": (8,) * config.num_hidden_layers, "d_vo": (4,) * config.num_hidden_layers}
    fields = dims | {"qk_map": "after_rope", "window": window, "sinks": sinks, "window_bits": window_bits}
    if codes:
        groups = ((4, 8), (9, 4), (3, 2)), ((5, 4), (3, 2))
        fields |= {name: [x] * config.num_hidden_layers for name, x in zip(("k_codes", "v_codes"), groups, strict=True)}
    spec = LatentSpec.from_dict(
        identity_spec(teacher).to_dict() | fields | {"heads_per_latent": config.num_key_value_heads // latents}
    )
    student = graft(teacher)
    weights = student.state_dict()
    set_spec(student, spec)
    torch.manual_seed(3)
    missing = student.load_state_dict(weights, strict=False).missing_keys
    assert missing and all(name.endswith(("_map", "_mean", "far_bias")) for name in missing)
    for attention in attentions(student):
        for name in ("k_mean", "v_mean", "far_bias") if codes else ():
            torch.nn.init.normal_(getattr(attention, name))
        for name in ("q_map", "k_map", "v_map", "o_map"):
            torch.nn.init.normal_(getattr(attention, name), std=0.4)
    student = student.double() if codes else student  # float32 rounds differently step by step, and codes jump
    return student.eval().requires_grad_(False)


def random_maps(q_heads: int, kv_heads: int, latents: int, dim: int = 6) -> FarMaps:
    joined = kv_heads // latents * dim
    shapes = (q_heads, dim, 4), (latents, joined, 4), (latents, joined, 3), (q_heads, 3, dim)
    maps = FarMaps(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    return maps._replace(bias=torch.randn(q_heads, 1, dtype=torch.float64))


@settings(max_examples=25)
@given(
    latents=st.integers(1, 2), each=st.integers(1, 2), group=st.integers(1, 2), seq=st.integers(1, 17),
    window=st.integers(1, 20), sinks=st.integers(0, 3), padding=st.integers(0, 4),
    kind=st.sampled_from(["plain", "padded", "sliding", "packed"]), unabsorbed=st.booleans(),
    flash=st.booleans(), rows=st.sampled_from([3, 128]), cap=st.sampled_from([None, 0.5]),
    sunk=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_windowed_attention_and_its_gradients_match_the_loops(
    latents: int, each: int, group: int, seq: int, window: int, sinks: int, padding: int, kind: str,
    unabsorbed: bool, flash: bool, rows: int, cap: float | None, sunk: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kv_heads = latents * each
    q, k, v = (torch.randn(2, h, seq, 6, dtype=torch.float64) for h in (kv_heads * group, kv_heads, kv_heads))
    maps = random_maps(kv_heads * group, kv_heads, latents)
    visible = torch.ones(2, seq, seq, dtype=torch.bool).tril()
    rank = torch.arange(seq).expand(2, -1).clone()
    if kind == "padded":
        visible[1, :, :padding] = False
        rank[1] -= padding
    elif kind == "sliding":
        visible &= torch.ones(seq, seq, dtype=torch.bool).triu(-max(sinks, 4))
    elif kind == "packed":
        half = seq // 2
        visible[:, half:, :half] = False
        rank[:, half:] -= half
    sink = (rank >= 0) & (rank < sinks)
    tensors = [x.requires_grad_() for x in (q, k, v, *maps[:4])]
    assert maps.bias is not None
    tensors.append(maps.bias.requires_grad_())
    learned = torch.randn(kv_heads * group, dtype=torch.float64).requires_grad_() if sunk else None
    if learned is not None:
        tensors.append(learned)
    wanted = reference.windowed_attention(
        q, k, v, maps[:4], window=window, scale=0.3, cap=cap, visible=visible, sink=sink, far_bias=maps.bias,
        learned_sinks=learned,
    )  # fmt: skip
    mask = None if kind == "plain" else visible[:, None]
    sink_k, sink_v, columns = sinks_of(k, v, mask, sinks)
    first = mask is None
    whole = Whole(k=k, v=v, start=0, sink_k=sink_k, sink_v=sink_v, sink_columns=columns, sinks_first=first)
    far_k, far_v = maps.reduced(*(x[:, :, : max(0, seq - window)] for x in (k, v)))
    far = Far(k=far_k, v=far_v, start=0)
    paths = {"FLASH_DEVICES": {"cpu"} if flash else set(), "ROWS": rows}
    with patch.multiple(segment, **paths), patch.object(window_module, "ROWS", rows):
        got = windowed_attention(
            q, whole, far, maps, window=window, scale=0.3, cap=cap, learned_sinks=learned, mask=mask,
            unabsorbed=unabsorbed,
        )  # fmt: skip
    seen = visible.any(-1)[:, None, :, None]  # padding gives numbers, but no meaning
    torch.testing.assert_close(got * seen, wanted * seen, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(got) * seen
    mine, its = (torch.autograd.grad((x * weight).sum(), tensors, allow_unused=True) for x in (got, wanted))
    for a, b, x in zip(mine, its, tensors, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-4, atol=1e-5)


def test_up_to_window_and_sinks_the_student_is_the_teacher(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    student = windowed(any_teacher)
    short = ids[:, : WINDOW + SINKS]
    torch.testing.assert_close(logits(student, short), logits(any_teacher, short), rtol=0, atol=1e-4)
    assert (logits(student, ids) - logits(any_teacher, ids)).abs().max() > 1e-2


def test_whole_tokens_of_8_bits_are_nearly_the_teachers(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    student, short = windowed(any_teacher, codes=True, window_bits=8), ids[:, : WINDOW + SINKS]
    change = logits(student, short).float() - (wanted := logits(any_teacher, short))
    assert 0 < change.norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize(("codes", "bits"), [(False, 16), (True, 16), (True, 8)])
@pytest.mark.parametrize("steps", [[1] * 24, [3, 1, 1, 6, 1, 1, 1, 7, 3], [20, 1, 1, 1, 1], [1, 23]])
def test_cached_equals_uncached(
    any_teacher: PreTrainedModel, ids: Tensor, steps: list[int], codes: bool, bits: int
) -> None:
    student = windowed(any_teacher, codes=codes, window_bits=bits)
    cache, at, parts = LatentCache(student.config), 0, []
    linear = [student.model.layers[index] for index in linear_layers(student.config)]
    given: list[list[Tensor]] = [[] for _ in linear]
    noting = [
        layer.register_forward_hook(lambda _module, _args, out, to=to: to.append(out))
        for layer, to in zip(linear, given, strict=True)
    ]
    for step in steps:
        parts.append(logits(student, ids[:, at : at + step], past_key_values=cache, use_cache=True))
        at += step
    for hook in noting:
        hook.remove()
    for layer, states in zip(linear, given, strict=True):  # whose state, in float32, rounds by the piece
        layer.register_forward_hook(lambda _module, _args, _out, states=states: torch.cat(states, dim=1))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(student, ids), rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize(("codes", "bits"), [(False, 16), (True, 16), (True, 8)])
def test_bytes_are_latents_far_and_whole_near(
    any_teacher: PreTrainedModel, ids: Tensor, codes: bool, bits: int
) -> None:
    student = windowed(any_teacher, codes=codes, window_bits=bits)
    spec = spec_of(student)
    assert spec is not None
    kv_heads = student.config.num_key_value_heads
    sliding = getattr(student.config, "sliding_window", None)
    for tokens in (3, 7, 8, 20):
        cache = LatentCache(student.config)
        logits(student, ids[:, :tokens], past_key_values=cache, use_cache=True)
        if sliding is None:
            assert cache_bytes(cache) == 12 * spec.cache_bytes(kv_heads, 8 if codes else 4, tokens)


@pytest.mark.parametrize("split", [None, 9])
def test_left_padding_changes_nothing(any_teacher: PreTrainedModel, ids: Tensor, split: int | None) -> None:
    student = windowed(any_teacher)
    alone = logits(student, ids[:2])
    pads = torch.tensor([0, 6])
    padded = torch.zeros(2, 30, dtype=torch.long)
    mask = torch.zeros(2, 30, dtype=torch.long)
    for row, text in enumerate(ids[:2]):
        padded[row, pads[row] : pads[row] + 24], mask[row, pads[row] : pads[row] + 24] = text, 1
    padded, mask = padded[:, : 24 + 0], mask[:, :24]  # the second row ends early
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if split is None:
        got = logits(student, padded, attention_mask=mask, position_ids=positions)
    else:
        cache, parts = LatentCache(student.config), []
        for start, end in [(0, split), *((i, i + 1) for i in range(split, 20)), (20, 24)]:
            parts.append(
                logits(
                    student, padded[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                    past_key_values=cache, use_cache=True,
                )
            )  # fmt: skip
        got = torch.cat(parts, dim=1)
    atol = 3e-3 if linear_layers(any_teacher.config) else 1e-4  # whose state, in float32, rounds by the piece
    torch.testing.assert_close(got[0], alone[0], rtol=2e-5, atol=atol)
    torch.testing.assert_close(got[1, 6:], alone[1, :18], rtol=2e-5, atol=atol)
