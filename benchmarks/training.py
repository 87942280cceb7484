"""Stage 2 against a straightforward transformers Trainer: tokens per second and peak memory, same student, same KL.

    python benchmarks/training.py [--model FOLDER] [--batch 4] [--block 512] [--steps 4] [--rounds 2]

Each case runs in a process of its own, in turns, on the same random tokens (speed doesn't depend on them), with the
same parameters trained (attention in full, LoRA of rank 32 on the FFN) by AdamW in the same precision:

- `trainer`: transformers' Trainer with `compute_loss` = forward KL over full logits of both models
- `heal`: `kvlatent.healing.heal.heal`
- `heal, plain loss`: the same with the whole batch's logits in one chunk
- `heal, plain FFN`: the same with peft's own LoRA layers, which the Trainer has too
- `heal, plain allocator`: the same with glibc's defaults
- `heal, cached teacher`: the same with the teacher's 64 likeliest tokens from disk (made before, not timed)

The first step is not timed. Peak memory is the process's anonymous memory, the student's weights, gradients and moments
included; the teacher's weights are a mapped file in all cases and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from streaming import watched

CASES = (
    "trainer", "heal", "heal, cached teacher", "heal, plain loss", "heal, plain FFN", "heal, plain allocator",
)  # fmt: skip


def models(folder: str) -> tuple[Any, Any]:
    """Teacher and student, with half the cache."""
    import torch

    from kvlatent.compress.convert import convert
    from kvlatent.model.checkpoints import load_model

    teacher = load_model(folder, device="cpu", dtype="float32")[0]
    head_dim = teacher.config.hidden_size // teacher.config.num_attention_heads
    torch.manual_seed(0)
    student = convert(teacher, preset="paper", d_qk=head_dim // 2, d_vo=head_dim // 2)
    return student, teacher


def with_trainer(student: Any, teacher: Any, ids: Any, steps: int, batch: int) -> list[float]:
    """Seconds of each step of a Trainer whose loss is the KL of full logits."""
    import torch
    import torch.nn.functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kvlatent.healing.adapters import with_adapters
    from kvlatent.healing.config import HealConfig
    from kvlatent.healing.ffn import keep_all

    trained = with_adapters(student, HealConfig())
    for layer in student.model.layers:
        keep_all(layer.mlp)
    teacher.requires_grad_(False)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            times.append(time.monotonic())

    class Distillation(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_kwargs: Any) -> Any:
            logits = model(**inputs).logits
            with torch.no_grad():
                wanted = teacher(**inputs).logits
            loss = F.kl_div(
                logits.float().log_softmax(-1).flatten(0, 1), wanted.float().log_softmax(-1).flatten(0, 1),
                log_target=True, reduction="batchmean",
            )  # fmt: skip
            return (loss, {}) if return_outputs else loss

    with tempfile.TemporaryDirectory() as folder:
        Distillation(
            model=trained,
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, learning_rate=5e-4,
                use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                remove_unused_columns=False, dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": row} for row in ids],
            callbacks=[Clock()],
        ).train()  # fmt: skip
    return [b - a for a, b in pairwise(times)]


def with_heal(student: Any, teacher: Any, ids: Any, batch: int, case: str) -> list[float]:
    """Seconds of each step of `heal`."""
    from kvlatent.healing import adapters, losses
    from kvlatent.healing.config import HealConfig
    from kvlatent.healing.heal import heal
    from kvlatent.healing.teacher_cache import TeacherCache

    if case == "heal, plain loss":
        losses.CHUNK = ids.numel()
    if case == "heal, plain FFN":
        vars(adapters)["keep_little"] = lambda mlp: None
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder, "cache"), 64) if case == "heal, cached teacher" else None
        work = Path(folder, "work")
        heal(student, teacher, ids, work, HealConfig(stage2_tokens=ids.numel(), batch_size=batch), cache=cache)
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [batch * ids.shape[1] / line["tokens_per_s"] for line in lines][1:]


def one(case: str, arguments: argparse.Namespace) -> None:
    """Run a case and print what it took."""
    import torch

    student, teacher = models(arguments.model)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.steps * arguments.batch, arguments.block)
    ids = torch.randint(teacher.config.vocab_size, shape, generator=generator)
    with watched() as memory:
        if case == "trainer":
            seconds = with_trainer(student, teacher, ids, arguments.steps, arguments.batch)
        else:
            seconds = with_heal(student, teacher, ids, arguments.batch, case)
    print(json.dumps({"seconds": seconds, "before_mb": memory[0] / 1e6, "peak_mb": memory[1] / 1e6}))


def main() -> None:
    """Run the cases in turns and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments)
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in arguments.cases}
    for _ in range(arguments.rounds):
        for case in arguments.cases:
            # Setting any of glibc's variables keeps heal from choosing; this one is its default.
            environment = plain | ({"MALLOC_PERTURB_": "0"} if case == "heal, plain allocator" else {})
            command = [sys.executable, __file__, *sys.argv[1:], "--one", case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(case, runs[case][-1], file=sys.stderr, flush=True)
    tokens = arguments.batch * arguments.block
    speed = {case: tokens / statistics.median(s for run in done for s in run["seconds"]) for case, done in runs.items()}
    peak = {case: max(run["peak_mb"] for run in done) for case, done in runs.items()}
    first = arguments.cases[0]
    print(f"| | tokens/s | against {first} | peak MB | against {first} |\n|---|--:|--:|--:|--:|")
    for case in arguments.cases:
        print(
            f"| {case} | {speed[case]:.0f} | {speed[case] / speed[first]:.2f} | {peak[case]:.0f} "
            f"| {peak[case] / peak[first]:.2f} |"
        )


if __name__ == "__main__":
    main()
