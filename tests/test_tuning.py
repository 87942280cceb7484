"""Pairs made by rules and tuning by TRL, as `benchmarks/tuning.py` uses them."""

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("trl")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import tuning
from instruct import FORMS, follows

PASSAGE = " ".join(
    f"The keeper of lighthouse number {n} counts every ship that passes in the fog of a long night."
    for n in ("one", "two", "three", "four", "five")
)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chosen_answers_keep_their_form_and_rejected_ones_do_not() -> None:
    tasks = tuning.tasks_of(PASSAGE, random.Random(0))
    assert len(tasks) == len(FORMS)
    for task, (form, keeps) in zip(tasks, FORMS.values(), strict=True):
        assert task.prompt.startswith(form.format("the text below")) and task.prompt.endswith(PASSAGE)
        assert keeps(task.chosen) and not keeps(task.rejected)
    assert follows([task.chosen for task in tasks], "<eos>")["all forms"] == 1
    assert follows([task.rejected for task in tasks], "<eos>")["all forms"] == 0
    assert tuning.tasks_of("Too short. Far too short.", random.Random(0)) == []


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_tuning_moves_a_model_towards_chosen_answers(
    kind: str,
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(tuning, "multiplies_bfloat16", lambda _: False)
    monkeypatch.setattr(tuning, "SFT_RATE", 1e-2)
    monkeypatch.setattr(tuning, "DPO_RATE", 1e-2)
    model = (tiny_teacher("llama") if kind == "teacher" else tiny_student("llama", "windowed")).requires_grad_(True)
    tasks = [tuning.Task(f"who keeps light {n}?", "the keeper", "a stone") for n in range(4)]

    def chosen(model: PreTrainedModel) -> float:
        return tuning.log_probability(model, tokenizer, tasks[0].answered("the keeper"))

    before = chosen(model)
    tuning.sft(model, tokenizer, tasks)
    assert chosen(model) > before
    taught = tuning.preference(model, tokenizer, tasks)["margin"]
    tuning.dpo(model, tokenizer, tasks)
    after = tuning.preference(model, tokenizer, tasks)
    assert after["margin"] > taught
    assert 0 <= after["accuracy"] <= 1 and torch.isfinite(torch.tensor(after["margin_stderr"]))
