"""Nothing changes at full dims, the paper's preset is to the letter, known cases are exact, wrong requests refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import logits
from torch import Tensor
from transformers import PreTrainedModel
from windowless import convert

from kvlatent.compress.planning import Plan
from kvlatent.compress.statistics import calibrate
from kvlatent.errors import UserError
from kvlatent.model.graft import heads_per_latent_of, identity_spec, spec_of
from kvlatent.model.rope import frequency_aware_exponents, inverse_frequencies

PRESETS = ["best", "portable"]


def hidden_error(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """Squared error of the last hidden states over the teacher's squared norm."""
    with torch.no_grad():
        got, wanted = (model.model(ids).last_hidden_state for model in (student, teacher))
    return float((got - wanted).square().sum() / wanted.square().sum())


# --- identity


@pytest.mark.parametrize("how", ["text", "statistics"])
@pytest.mark.parametrize("preset", PRESETS)
def test_full_dims_give_the_teachers_logits(plain_teacher: PreTrainedModel, ids: Tensor, preset: str, how: str) -> None:
    source = {"ids": ids} if how == "text" else {"statistics": calibrate(plain_teacher, ids, about={})}
    student = convert(plain_teacher, preset=preset, d_qk=16, d_vo=16, **source)
    torch.testing.assert_close(logits(student, ids), logits(plain_teacher, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("preset", "qk"), [("portable", "fold"), ("paper", "stride")])
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "granite", "olmo2", "ministral3", "phi3-whole", "gemma2", "gpt_oss", "cohere"]
)
def test_families_that_rotate_all_layers_alike_take_every_preset(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, preset: str, qk: str
) -> None:
    teacher = tiny_teacher(name)
    whole = convert(teacher, preset=preset, qk=qk, d_qk=16, d_vo=16, ids=ids[:4])
    torch.testing.assert_close(logits(whole, ids), logits(teacher, ids), rtol=0, atol=1e-4)
    student = convert(teacher, preset=preset, qk=qk, d_qk=8, d_vo=4, ids=ids[:4])
    assert logits(student, ids).isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_full_dims_give_the_teachers_logits_on_text_not_calibrated_on(
    plain_teacher: PreTrainedModel, ids: Tensor, preset: str
) -> None:
    student = convert(plain_teacher, preset=preset, d_qk=16, d_vo=16, ids=ids[:4])
    torch.testing.assert_close(logits(student, ids[4:]), logits(plain_teacher, ids[4:]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("d_qk", "d_vo"), [(16, 4), (8, 16)])
def test_each_dim_is_reduced_alone(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, preset: str, d_qk: int, d_vo: int
) -> None:
    teacher = tiny_teacher("llama")
    student = convert(teacher, preset=preset, d_qk=d_qk, d_vo=d_vo, ids=ids)
    both = convert(teacher, preset=preset, d_qk=8, d_vo=4, ids=ids)
    assert spec_of(student).d_qk == (d_qk,) * 2 and spec_of(student).d_vo == (d_vo,) * 2
    assert hidden_error(student, teacher, ids) < hidden_error(both, teacher, ids)


# --- the paper's preset


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "llama-biases", "mistral", "qwen2"])
def test_paper_rows_are_the_original_rows(tiny_teacher: Callable[[str], PreTrainedModel], name: str) -> None:
    teacher = tiny_teacher(name)
    student = convert(teacher, preset="paper", d_qk=8, d_vo=4)
    for new, old in zip(student.model.layers, teacher.model.layers, strict=True):
        new, old = new.self_attn, old.self_attn
        for part, step in (("q_proj", 2), ("k_proj", 2), ("v_proj", 4)):
            for parameter_name, parameter in getattr(old, part).named_parameters():
                rows = parameter.unflatten(0, (-1, 16))[:, ::step].flatten(0, 1)
                assert torch.equal(getattr(getattr(new, part), parameter_name), rows)
        columns = old.o_proj.weight.unflatten(1, (-1, 16))[:, :, ::4].flatten(1, 2)
        assert torch.equal(new.o_proj.weight, columns)
        assert old.o_proj.bias is None or torch.equal(new.o_proj.bias, old.o_proj.bias)


@pytest.mark.parametrize("d_qk", [16, 8, 4])
def test_paper_scale_and_frequencies(tiny_teacher: Callable[[str], PreTrainedModel], d_qk: int) -> None:
    student = convert(tiny_teacher("llama"), preset="paper", d_qk=d_qk, d_vo=16)
    spec = spec_of(student)
    assert spec.scale == student.model.layers[0].self_attn.scale == d_qk**-0.5
    assert spec.inv_freq == inverse_frequencies(frequency_aware_exponents(d_qk), d=d_qk, theta=10000.0)
    assert spec.layout == "portable"
    assert student.model.layers[0].self_attn.q_map is None


def test_paper_with_qk_norm_reduces_after_the_norm_and_selects_the_same_channels(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("qwen3")
    student = convert(teacher, preset="paper", d_qk=8, d_vo=4)
    assert spec_of(student).qk_map == "before_rope"
    attention, stock = student.model.layers[0].self_attn, teacher.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, stock.q_proj.weight)
    x = teacher.model.layers[0].input_layernorm(teacher.model.embed_tokens(ids[:2]))
    no_turn = torch.ones(1, 24, 4), torch.zeros(1, 24, 4)
    q, k, _ = attention.queries_keys_values(x, *no_turn)
    for got, part, heads in ((q, "q", 4), (k, "k", 2)):
        normed = getattr(stock, f"{part}_norm")(getattr(stock, f"{part}_proj")(x).unflatten(-1, (heads, 16)))
        torch.testing.assert_close(got, normed.transpose(1, 2)[..., ::2])


@pytest.mark.parametrize("preset", ["paper", "portable"])
def test_matched_rows_own_the_papers_list(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, preset: str
) -> None:
    teacher = tiny_teacher("llama")
    student = convert(teacher, preset=preset, qk="matched", d_qk=8, d_vo=4, ids=None if preset == "paper" else ids)
    wanted = inverse_frequencies(frequency_aware_exponents(8), d=8, theta=10000.0)
    assert spec_of(student).inv_freq == pytest.approx(wanted, rel=1e-6)
    assert spec_of(student).layout == "portable"
    if preset == "paper":
        old = teacher.model.layers[0].self_attn.k_proj.weight.view(2, 16, -1)
        pairs = [2, 4, 6, 7]  # exponents of 16 dims: the list of 8 has 2, 4, 6 and 7
        rows = old[:, [*pairs, *(j + 8 for j in pairs)]].flatten(0, 1)
        assert torch.equal(student.model.layers[0].self_attn.k_proj.weight, rows)


def test_stride_keeps_its_rows_own_frequencies(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("llama")
    aware, plain = (convert(teacher, preset="paper", qk=qk, d_qk=8, d_vo=4) for qk in ("aware", "stride"))
    assert spec_of(plain).inv_freq == identity_spec(teacher).inv_freq[::2]
    assert spec_of(plain).inv_freq == pytest.approx(inverse_frequencies([0, 2, 4, 6], d=8, theta=10000.0))
    for name, value in aware.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


# --- exactly known cases


@pytest.mark.parametrize("preset", PRESETS)
def test_values_of_low_rank_lose_nothing(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, preset: str
) -> None:
    teacher = tiny_teacher("llama")
    generator = torch.Generator().manual_seed(0)
    for layer in teacher.model.layers:
        by_head = layer.self_attn.v_proj.weight.data.view(2, 16, -1)
        mix = torch.randn(2, 16, 4, generator=generator) / 4
        by_head.copy_(mix @ by_head[:, :4].clone())
    student = convert(teacher, preset=preset, d_qk=16, d_vo=4, ids=ids)
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), rtol=0, atol=1e-3)


CALIBRATED = ["pairs-model", "pairs-layer", "pairs", "partial", "fold", "project"]


@pytest.mark.parametrize("how", ["text", "statistics"])
@pytest.mark.parametrize(
    ("name", "preset", "qk"),
    [
        *((name, preset, None) for name in ("mistral", "qwen2", "llama-yarn") for preset in PRESETS),
        *((name, "best", qk) for name in ("llama", "llama-mha-tied", "qwen3", "llama-biases") for qk in CALIBRATED),
    ],
)
def test_nothing_is_lost_when_only_a_few_rotary_pairs_are_alive(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, preset: str, qk: str | None, how: str
) -> None:
    teacher = tiny_teacher(name)
    for layer in teacher.model.layers:
        if hasattr(layer.self_attn, "k_norm"):
            layer.self_attn.k_norm.weight.data.view(2, 8)[:, 4:] = 0
        else:
            for parameter in layer.self_attn.k_proj.parameters():
                parameter.data.view(-1, 2, 8, parameter[0].numel())[:, :, 4:] = 0
    source = {"ids": ids} if how == "text" else {"statistics": calibrate(teacher, ids, about={})}
    student = convert(teacher, preset=preset, qk=qk, d_qk=8, d_vo=16, **source)
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), rtol=0, atol=2e-3)


# --- what the presets promise


@pytest.mark.parametrize("preset", PRESETS)
def test_specs_of_our_presets(plain_teacher: PreTrainedModel, ids: Tensor, preset: str) -> None:
    spec = spec_of(convert(plain_teacher, preset=preset, d_qk=8, d_vo=4, ids=ids[:4]))
    assert (spec.preset, spec.head_dim, spec.d_qk, spec.d_vo) == (preset, 16, (8, 8), (4, 4))
    assert (together := spec.heads_per_latent) == plain_teacher.config.num_key_value_heads
    qwen3 = plain_teacher.config.model_type == "qwen3"
    if preset == "best":
        assert spec.qk_map == "after_rope" and spec.scale == 0.25 and len(spec.inv_freq) == 8
    else:
        assert spec.qk_map == ("before_rope" if qwen3 else "folded")
        assert spec.layout == ("best" if qwen3 else "portable") and len(spec.inv_freq) == 4 * together
        assert spec.scale == (8 * together) ** -0.5


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_best_starts_nearer_the_teacher_than_portable_and_paper(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    ids: Tensor,
    name: str,
) -> None:
    teacher = tiny_teacher(name)
    best, portable, paper = (
        hidden_error(tiny_student(name, preset), teacher, ids) for preset in ("best", "portable", "paper")
    )
    assert best < portable < paper


def test_refitting_in_order_comes_nearer_than_one_shot(plain_teacher: PreTrainedModel, ids: Tensor) -> None:
    statistics = calibrate(plain_teacher, ids, about={})
    one_shot = convert(plain_teacher, d_qk=8, d_vo=4, statistics=statistics)
    in_order = convert(plain_teacher, d_qk=8, d_vo=4, ids=ids)
    assert hidden_error(in_order, plain_teacher, ids) < hidden_error(one_shot, plain_teacher, ids)


@pytest.mark.parametrize(
    ("preset", "qk"), [("portable", "fold"), ("portable", "matched"), ("best", "pairs"), ("best", "project")]
)
def test_refitting_the_logits_comes_nearer(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, monkeypatch: pytest.MonkeyPatch, preset: str, qk: str
) -> None:
    teacher = tiny_teacher("llama")
    refitted = convert(teacher, preset=preset, qk=qk, d_qk=4, d_vo=16, ids=ids)
    monkeypatch.setattr(Plan, "refits_logits", False)
    plain = convert(teacher, preset=preset, qk=qk, d_qk=4, d_vo=16, ids=ids)
    assert hidden_error(refitted, teacher, ids) < hidden_error(plain, teacher, ids)


def test_activations_that_do_not_fit_are_computed_again(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = convert(tiny_teacher("llama"), d_qk=8, d_vo=4, ids=ids)
    monkeypatch.setattr("kvlatent.compress.in_order.KEEP_BYTES", 0)
    again = convert(tiny_teacher("llama"), d_qk=8, d_vo=4, ids=ids)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_conversion_does_not_depend_on_the_batch_size(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("mistral")
    one, other = (convert(teacher, d_qk=8, d_vo=4, ids=ids, batch_size=size) for size in (5, 12))
    torch.testing.assert_close(logits(one, ids), logits(other, ids), rtol=0, atol=2e-3)


def test_only_attention_and_down_projections_change(plain_teacher: PreTrainedModel, ids: Tensor) -> None:
    before = {name: value.clone() for name, value in plain_teacher.state_dict().items()}
    student = convert(plain_teacher, d_qk=8, d_vo=4, ids=ids).state_dict()
    for name, value in before.items():
        if "self_attn" not in name and "down_proj.weight" not in name:
            assert torch.equal(student[name], value), name
        assert torch.equal(plain_teacher.state_dict()[name], value), f"the teacher's {name}"
    assert not torch.equal(
        student["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"]
    )


# --- heads that share a latent


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama-mha-tied", "qwen2-mha-tied", "qwen3-mha-tied", "mistral-mha"])
def test_the_more_heads_share_a_latent_the_nearer_a_student_starts(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, preset: str
) -> None:
    teacher = tiny_teacher(name)
    errors = []
    for together in (1, 2, 4):
        statistics = calibrate(teacher, ids, heads_per_latent=together, about={})
        student = convert(teacher, preset=preset, d_qk=8, d_vo=8, statistics=statistics)
        assert spec_of(student).heads_per_latent == together
        errors.append(hidden_error(student, teacher, ids))
    assert errors[2] < errors[1] < errors[0]


def test_heads_can_be_kept_apart(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    """By text as by statistics of heads that share latents, which hold those of each head as well."""
    teacher = tiny_teacher("llama")
    plain = convert(teacher, d_qk=8, d_vo=4, statistics=calibrate(teacher, ids, heads_per_latent=1, about={}))
    statistics = calibrate(teacher, ids, about={})
    apart = convert(teacher, d_qk=8, d_vo=4, heads_per_latent=1, statistics=statistics)
    torch.testing.assert_close(logits(apart, ids), logits(plain, ids), rtol=0, atol=1e-4)
    assert spec_of(convert(teacher, d_qk=8, d_vo=4, heads_per_latent=1, ids=ids)).heads_per_latent == 1
    with pytest.raises(UserError, match="of 1 KV heads per latent, not of 2"):
        convert(teacher, d_qk=8, d_vo=4, heads_per_latent=2,
                statistics=calibrate(teacher, ids, heads_per_latent=1, about={}))  # fmt: skip


def test_latents_are_as_wide_as_kernels_take(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    config = tiny_teacher("llama-mha-tied").config
    widths = {16: 4, 64: 4, 100: 2, 128: 2, 256: 1, 512: 1}
    for head_dim, together in widths.items():
        config.head_dim = head_dim
        assert heads_per_latent_of(config) == together


# --- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_qk": 7}, "d_qk must be even"),
        ({"d_qk": 18}, "d_qk must be at most the model's head_dim 16; got 18"),
        ({"d_vo": 17}, "d_vo must be between 1 and the model's head_dim 16; got 17"),
        ({"d_vo": 0}, "d_vo must be between 1"),
        ({"preset": "paper", "d_qk": 12}, "d_qk must divide head_dim 16; got 12"),
        ({"preset": "paper", "d_vo": 6}, "d_vo must divide head_dim 16; got 6"),
        ({"preset": "paper", "d_qk": 2}, "multiple of 4; got 2"),
        ({"preset": "portable", "qk": "project"}, "preset portable can't reduce queries and keys by project"),
        ({"preset": "paper", "qk": "pairs"}, "stride, aware, matched can"),
        ({"qk": "fold", "d_qk": (8, 4), "d_vo": (8, 8)}, "fold has one frequency list"),
        ({"qk": "matched", "d_qk": 16}, "unless 2·d_qk divides head_dim 16"),
        ({"heads_per_latent": 3}, "heads per latent must divide the model's 2 KV heads; got 3"),
        ({"heads_per_latent": 0}, "heads per latent must divide"),
        ({"qk": "pairs", "heads_per_latent": 2}, "pairs reduces every head on its own"),
        ({"preset": "portable", "qk": "matched", "heads_per_latent": 2}, "matched reduces every head on its own"),
        ({"d_qk": (8, 8, 8), "d_vo": (8, 8, 8)}, "every one of 2 layers; got 3"),
        ({"preset": "best", "ids": None}, "preset best is calibrated: give text"),
        ({"preset": "portable", "ids": None}, "preset portable is calibrated: give text"),
    ],
)
def test_impossible_requests_are_refused(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        convert(tiny_teacher("llama"), **{"d_qk": 8, "d_vo": 4, "ids": ids} | options)


@pytest.mark.parametrize("preset", ["best", "portable", "paper"])
def test_students_are_not_converted_again(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, preset: str
) -> None:
    with pytest.raises(UserError, match="converted already"):
        convert(tiny_student("llama"), preset=preset, d_qk=4, d_vo=4, ids=ids)


def test_paper_list_follows_the_teachers_rope_scaling(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("llama-llama3-rope")
    inv_freq = identity_spec(teacher).inv_freq
    d_qk = len(inv_freq)  # half of head_dim: exponent e stands at place e
    spec = spec_of(convert(teacher, preset="paper", d_qk=d_qk, d_vo=d_qk))
    assert spec is not None
    assert spec.inv_freq == tuple(inv_freq[e] for e in frequency_aware_exponents(d_qk))
    with pytest.raises(UserError, match="llama3 RoPE scaling"):
        convert(teacher, preset="paper", d_qk=2 * len(inv_freq), d_vo=d_qk)
