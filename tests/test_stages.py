"""Only what counts is trained on, and documents in a block can be kept from seeing each other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.evaluation.perplexity import perplexity
from kvlatent.healing.config import HealConfig
from kvlatent.healing.losses import kl_loss, ntp_loss
from kvlatent.healing.stages import Stage, Text, in_layer_losses

SEPARATOR = 5


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    ids = torch.randint(6, 260, (4, 16), generator=torch.Generator().manual_seed(3))
    ids[0, 6] = ids[1, 0] = ids[1, 11] = SEPARATOR
    return ids


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_separate_documents_are_read_as_if_alone(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    name: str,
) -> None:
    student, teacher = tiny_student(name), tiny_teacher(name)
    batch = Text(ids=blocks, separator=SEPARATOR).batch(0, 1, slice(0, 1))
    alone = blocks[:1, :6], blocks[:1, 6:]
    with torch.no_grad():
        for model in (student, teacher):
            together = model.model(batch.ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
            apart = torch.cat([model.model(part).last_hidden_state for part in alone], 1)
            torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        got = in_layer_losses(student, teacher, batch.ids, relative=True, position_ids=batch.position_ids)
        first, second = (in_layer_losses(student, teacher, part, relative=True) for part in alone)
    torch.testing.assert_close(got, (6 * first + 10 * second) / 16, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
@torch.no_grad()
def test_losses_are_of_the_logits_that_a_model_gives(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    name: str,
) -> None:
    student, teacher = tiny_student(name), tiny_teacher(name)
    ours, theirs = (model(blocks).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in (student, teacher))
    labels = blocks[:, 1:].flatten()
    stage = Stage(student, student, teacher, HealConfig(loss="ntp"))
    for number in (0, 2):
        stage.stage = number
        loss, _ = stage(blocks, float(blocks.numel()))
        torch.testing.assert_close(loss, F.nll_loss(ours, labels), rtol=1e-4, atol=1e-5)
    measured = perplexity(teacher, blocks, text_bytes=1, batch_size=2).token_nll.mean().float()
    torch.testing.assert_close(measured, F.nll_loss(theirs, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "ntp", "mix"])
def test_stage_2_counts_the_positions_before_answers(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    loss: str,
) -> None:
    answers = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    student, teacher = tiny_student("llama"), tiny_teacher("llama")
    stage = Stage(student, student, teacher, HealConfig(loss=loss, kl_weight=0.3))
    stage.stage = 2
    text = Text(ids=blocks, answers=answers)
    whole = slice(0, 4)
    with torch.no_grad():
        found = sum(stage(**text.batch(at, 2, whole).to(torch.device("cpu")))[0] for at in (0, 2)) / 2
        before = answers[:, 1:]
        hidden, wanted = (m.model(blocks).last_hidden_state[:, :-1][before] for m in (student, teacher))
        kl = kl_loss(hidden, student.lm_head.weight, wanted, teacher.lm_head.weight)
        ntp = ntp_loss(hidden, student.lm_head.weight, blocks[:, 1:][before])
    expected = {"kl": kl, "ntp": ntp, "mix": 0.3 * kl + 0.7 * ntp}[loss]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_stage_1_counts_the_same_positions(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], blocks: Tensor
) -> None:
    student, teacher = tiny_student("llama"), tiny_teacher("llama")
    counted = torch.zeros(4, 16, dtype=torch.bool)
    counted[:, :9] = True  # what comes before doesn't see what comes later, so cutting the blocks is the same
    with torch.no_grad():
        found = in_layer_losses(student, teacher, blocks, relative=False, counted=counted)
        expected = in_layer_losses(student, teacher, blocks[:, :9], relative=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    none = in_layer_losses(student, teacher, blocks, relative=True, counted=torch.zeros_like(counted))
    assert not none.any()


def test_frozen_parameters_get_no_gradient(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], blocks: Tensor
) -> None:
    from kvlatent.healing.adapters import with_adapters

    student = tiny_student("llama")
    config = HealConfig(lora_rank=4, train=("attention",))
    stage = Stage(with_adapters(student, config), student, tiny_teacher("llama"), config)
    for number in (1, 2):
        stage.stage = number
        stage(blocks, float(blocks.numel()))[0].backward()
    for name, parameter in stage.named_parameters():
        trains = any(part in name for part in ("lora_", "q_proj", "k_proj", "v_proj", "o_proj"))
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
