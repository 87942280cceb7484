"""Conversion beside a window: short contexts stay the teacher's, far attention decides, budgets pay whole tokens."""

from collections.abc import Callable

import pytest
import torch
from reference import logits
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compress.budget import far_share, total_dims
from kvlatent.compress.convert import convert
from kvlatent.compress.statistics import LayerStatistics, calibrate
from kvlatent.errors import UserError
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.layers import layer_arguments
from kvlatent.model.window import Near

NEAR = Near(window=5, sinks=2)


def test_up_to_window_and_sinks_a_converted_student_is_its_teacher(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    student = convert(any_teacher, d_qk=8, d_vo=4, ids=ids, window=NEAR.window, sinks=NEAR.sinks)
    spec = spec_of(student)
    assert spec is not None and (spec.window, spec.sinks) == NEAR
    short = ids[:, : sum(NEAR)]
    torch.testing.assert_close(logits(student, short), logits(any_teacher, short), rtol=0, atol=1e-4)


def test_full_dims_give_the_teachers_logits_beyond_the_window(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    student = convert(any_teacher, d_qk=16, d_vo=16, ids=ids, window=NEAR.window, sinks=NEAR.sinks)
    torch.testing.assert_close(logits(student, ids), logits(any_teacher, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["smollm3", "olmo3"])
@pytest.mark.parametrize("asked", [{"preset": "portable"}, {"preset": "paper"}, {"qk": "pairs"}, {"qk": "partial"}])
def test_only_maps_after_rope_follow_layers_that_rotate_in_several_ways(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str, asked: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=r"don't rotate all dims of all layers .* take preset best with project"):
        convert(tiny_teacher(name), d_qk=8, d_vo=8, ids=ids, window=0, **asked)


def test_statistics_are_of_far_attention_only(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("llama")
    model, seq = graft(teacher), ids.shape[1]
    layer = model.model.layers[0]
    found = LayerStatistics()
    with torch.no_grad():
        x = layer.input_layernorm(teacher.model.embed_tokens(ids[:1]))
        arguments = layer_arguments(model, torch.zeros(1, dtype=torch.long), seq)[0]
        found.update(layer.self_attn, x, arguments, near=NEAR)
        q, k, v = (t.double() for t in layer.self_attn.queries_keys_values(x, *arguments["position_embeddings"]))
    read = torch.zeros(4, seq, 16, dtype=torch.float64)
    given = torch.zeros(4, seq, dtype=torch.float64)
    for head in range(4):
        for t in range(seq):
            p = (q[0, head, t] @ k[0, head // 2, : t + 1].T * 16**-0.5).softmax(0)
            for s in range(t + 1):
                if t - s >= NEAR.window and s >= NEAR.sinks:
                    read[head, t] += p[s] * v[0, head // 2, s]
                    given[head, t] += p[s]
    torch.testing.assert_close(found.sums["o"], read.mT @ read, rtol=1e-4, atol=1e-5)
    wanted = (q[0] * given[..., None]).mT @ q[0]
    torch.testing.assert_close(found.sums["q"], wanted, rtol=1e-4, atol=1e-4)


def test_statistics_for_another_window_are_refused(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("llama")
    statistics = calibrate(teacher, ids, near=NEAR, about={})
    spec = spec_of(convert(teacher, d_qk=8, d_vo=4, statistics=statistics))
    assert spec is not None and (spec.window, spec.sinks) == NEAR
    for asked in ({"window": 0}, {"window": 6}, {"sinks": 1}):
        with pytest.raises(UserError, match="statistics are for a window of 5 tokens and 2 sinks"):
            convert(teacher, d_qk=8, d_vo=4, statistics=statistics, **asked)
    with pytest.raises(UserError, match="blocks of 24 tokens hold nothing beyond a window of 128 and 4 sinks"):
        convert(teacher, d_qk=8, d_vo=4, ids=ids)
    with pytest.raises(UserError, match="hold nothing beyond a window of 30"):
        calibrate(teacher, ids, near=Near(30, 0), about={})


@pytest.mark.parametrize("asked", [{"preset": "portable"}, {"preset": "paper"}, {"qk": "pairs"}])
def test_only_project_under_best_has_a_window(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, asked: dict[str, str]
) -> None:
    with pytest.raises(UserError, match="no window of whole tokens"):
        convert(tiny_teacher("llama"), d_qk=8, d_vo=8, ids=ids, window=4, **asked)


def test_a_budget_pays_for_whole_tokens_at_the_models_context(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    config = tiny_teacher("llama").config  # 256 positions
    share = far_share(config, 0.5, Near(12, 4))
    assert share * (256 - 16) + 16 == pytest.approx(0.5 * 256)
    assert total_dims(config, 0.5, Near(12, 4)) == int(share * 2 * 16 * 2) // 2 * 2 < total_dims(config, 0.5)
    with pytest.raises(UserError, match=r"alone takes 0\.5 of the cache of 256 tokens"):
        total_dims(config, 0.4, Near(128, 0))
