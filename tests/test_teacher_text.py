"""Text the teacher writes: reproducible, without a trace, from its own distribution, and never cut short."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.data.blocks import TokenBlocks
from kvlatent.data.teacher_text import sample_from_teacher, weights_mark
from kvlatent.errors import UserError

BLOCK_SIZE = 64
END = 2


@pytest.fixture
def teacher(tiny_teacher: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    model = tiny_teacher("llama")
    model.generation_config.eos_token_id = END
    return model


@pytest.fixture
def sample(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., TokenBlocks]:
    def draw(model: PreTrainedModel, seed: int = 0, **changes: Any) -> TokenBlocks:
        options = {"tokens": 5 * BLOCK_SIZE, "block_size": BLOCK_SIZE, "batch_size": 2, **changes}
        return sample_from_teacher(model, byte_tokenizer, seed=seed, **options)

    return draw


def test_sampling_is_reproducible_and_leaves_no_trace(teacher: Any, sample: Any, byte_tokenizer: Any) -> None:
    teacher.train().generation_config.temperature = 0.3
    state, config = torch.get_rng_state(), teacher.generation_config.to_dict()
    first, again, other = sample(teacher, 1), sample(teacher, 1), sample(teacher, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training and teacher.generation_config.to_dict() == config
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    assert first.ids.shape == (5, BLOCK_SIZE) and first.ids.dtype == torch.int64
    assert first.sources == ("teacher",) and (first.ids[:, 0] == byte_tokenizer.eos_token_id).all()
    rows = [byte_tokenizer.decode(row, skip_special_tokens=True) for row in first.ids]
    assert first.bytes == sum(len(row.encode()) for row in rows)
    assert len({row[:10] for row in rows}) == 5  # every row has an opening of its own


def test_rows_of_unequal_openings_continue_as_alone(teacher: Any, sample: Any) -> None:
    # At a temperature near 0 sampling is greedy, so rows don't depend on the batch they are padded in.
    together, alone = (sample(teacher, temperature=1e-6, batch_size=size).ids for size in (5, 1))
    assert torch.equal(together, alone)


def test_teacher_goes_on_after_an_end_token(teacher: Any, sample: Any) -> None:
    with torch.no_grad():
        teacher.lm_head.weight.zero_()  # every token as likely as any other, the end included
    ids = sample(teacher, tokens=40 * BLOCK_SIZE, batch_size=40).ids
    assert ids.shape == (40, BLOCK_SIZE)
    ended = (ids == END)[:, :-1]
    assert ended.any() and (ids[:, 1:][ended] != 0).any()  # new text, not padding


def test_sampling_follows_the_model_distribution(teacher: Any, sample: Any) -> None:
    with torch.no_grad():
        teacher.model.embed_tokens.weight.fill_(1.0)
        teacher.lm_head.weight.zero_()
        teacher.lm_head.weight[7] = 0.2
        expected = (teacher(torch.zeros(1, 1, dtype=torch.int64)).logits[0, -1] / 0.5).softmax(-1)[7].item()
    last = sample(teacher, tokens=20_000, block_size=50, batch_size=400, temperature=0.5).ids[:, -5:]
    assert (last == 7).float().mean().item() == pytest.approx(expected, abs=0.04)


def test_temperature_must_be_positive(teacher: Any, sample: Any) -> None:
    with pytest.raises(UserError, match="temperature must be positive"):
        sample(teacher, temperature=0.0)


def test_the_mark_of_a_teacher_is_of_every_weight_and_no_dtype(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("llama").to(torch.bfloat16)
    mark = weights_mark(teacher)
    assert weights_mark(teacher.float()) == mark  # exact in both
    for name, weight in teacher.named_parameters():
        before = weight.flatten()[-1].clone()
        weight.view(-1)[-1] = before * 1.5
        assert weights_mark(teacher) != mark, name
        weight.view(-1)[-1] = before
    assert weights_mark(teacher) == mark
