"""Blocks of text spread over a longer context: where they begin, and that conversion then holds there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from windowless import convert

from kvlatent.compress.statistics import calibrate
from kvlatent.data.positions import block_starts, positions_in_blocks, positions_in_documents
from kvlatent.healing.stages import Text
from kvlatent.model.layers import layer_arguments

SEPARATOR = 5


def test_every_other_block_begins_at_the_start_and_the_others_all_over_the_context() -> None:
    starts = block_starts(9, 16, 100)
    assert starts[::2].tolist() == [0] * 5
    assert sorted(starts[1::2].tolist()) == [21, 42, 63, 84]  # the last of them ends with the context
    assert starts[1::2].tolist() != [21, 42, 63, 84]
    assert torch.equal(starts, block_starts(9, 16, 100))


@pytest.mark.parametrize("context", [None, 3, 16])
def test_blocks_as_long_as_the_context_all_begin_at_the_start(context: int | None) -> None:
    assert block_starts(4, 16, context).tolist() == [0] * 4


def test_one_block_begins_at_the_start() -> None:
    assert block_starts(1, 16, 100).tolist() == [0]


def test_positions_start_anew_at_every_separator() -> None:
    ids = torch.randint(6, 260, (3, 16), generator=torch.Generator().manual_seed(3))
    ids[0, 6] = ids[1, 0] = ids[1, 11] = SEPARATOR
    found = positions_in_documents(ids, SEPARATOR)
    assert found[0].tolist() == [*range(6), *range(10)]
    assert found[1].tolist() == [*range(11), *range(5)]
    assert found[2].tolist() == [*range(16)]


def test_training_batches_know_where_their_blocks_begin(ids: Tensor) -> None:
    text = Text(ids=ids, starts=block_starts(len(ids), ids.shape[1], 100))
    batch = text.batch(2, 3, slice(2, 5))
    assert text.starts is not None and batch.position_ids is not None
    assert torch.equal(batch.position_ids, positions_in_blocks(text.starts[2:5], ids.shape[1]))
    assert Text(ids=ids).batch(2, 3, slice(2, 5)).position_ids is None


def test_separate_documents_begin_where_their_block_does() -> None:
    ids = torch.tensor([[7, 8, SEPARATOR, 9], [7, 8, SEPARATOR, 9]])
    batch = Text(ids=ids, separator=SEPARATOR, starts=torch.tensor([0, 30])).batch(0, 2, slice(0, 2))
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [30, 31, 30, 31]]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "llama-yarn"])
def test_a_teacher_computes_the_same_wherever_a_block_begins(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    teacher = tiny_teacher(name)
    positions = positions_in_blocks(torch.tensor([0, 90]), ids.shape[1])
    with torch.no_grad():
        moved = teacher(ids[:2], position_ids=positions).logits
        torch.testing.assert_close(moved, teacher(ids[:2]).logits, rtol=0, atol=1e-3)
    here, there = (layer_arguments(teacher, starts, 16)[0] for starts in (torch.tensor([0]), torch.tensor([90])))
    assert not torch.equal(here["position_embeddings"][0], there["position_embeddings"][0])


def test_statistics_before_rope_do_not_depend_on_the_context(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    at_start, spread = (calibrate(tiny_teacher("llama"), ids, context=context, about={}) for context in (None, 100))
    for one, other in zip(at_start.layers, spread.layers, strict=True):
        for name in ("q_unrotated", "o"):
            torch.testing.assert_close(one.mean(name), other.mean(name), rtol=1e-3, atol=1e-5)
        assert (one.mean("k") - other.mean("k")).norm() > 0.01 * one.mean("k").norm()


@pytest.mark.parametrize("preset", ["best", "portable"])
def test_conversion_holds_where_its_text_was(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, preset: str
) -> None:
    """Maps behind RoPE are better at late positions when fitted there; a portable student is the same in any case."""
    teacher = tiny_teacher("llama")
    late = positions_in_blocks(torch.full((len(ids),), 100 - ids.shape[1]), ids.shape[1])
    error = []
    for context in (None, 100):
        student = convert(teacher, preset=preset, d_qk=8, d_vo=16, ids=ids, context=context)
        with torch.no_grad():
            got, wanted = (model.model(ids, position_ids=late).last_hidden_state for model in (student, teacher))
        error.append(float((got - wanted).square().mean()))
    if preset == "best":
        assert error[1] < 0.97 * error[0]
    else:
        assert error[1] == pytest.approx(error[0], rel=0.02)
