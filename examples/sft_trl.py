"""Tune a converted checkpoint with TRL: SFT on chats, then DPO on preferences.

    python examples/sft_trl.py STUDENT OUT [--sft CHATS.jsonl] [--dpo PREFERENCES.jsonl]

A converted checkpoint is an ordinary `transformers` model once `kvlatent` is imported, so TRL's trainers take it as it
is; what they save loads and converts no differently from what `kvlatent heal` writes. CHATS has lines of
{"messages": [{"role": …, "content": …}, …]}, PREFERENCES lines of {"prompt": …, "chosen": …, "rejected": …} with lists
of messages. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import kvlatent  # noqa: F401  teaches the Auto classes converted checkpoints


def main(argv: list[str] | None = None) -> None:
    """Tune and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sft", type=Path, help="chats, as jsonl")
    parser.add_argument("--dpo", type=Path, help="preferences, as jsonl")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=1024)
    arguments = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(arguments.student, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(arguments.student)
    common = {
        "output_dir": str(arguments.out),
        "max_steps": arguments.steps,
        "max_length": arguments.max_length,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,  # follows the hardware otherwise
    }
    if arguments.sft:
        chats = load_dataset("json", data_files=str(arguments.sft), split="train")
        settings = SFTConfig(learning_rate=1e-5, **common)
        SFTTrainer(model=model, args=settings, train_dataset=chats, processing_class=tokenizer).train()
    if arguments.dpo:
        preferences = load_dataset("json", data_files=str(arguments.dpo), split="train")
        settings = DPOConfig(learning_rate=1e-6, **common)
        DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model),  # TRL would load the student again, untuned, and knows stock classes only
            args=settings,
            train_dataset=preferences,
            processing_class=tokenizer,
        ).train()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
