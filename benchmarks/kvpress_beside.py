"""kvpress beside our policies: the same prompts, as many tokens kept, each library in an environment of its own.

    python -m venv kvpress && kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5
    python benchmarks/kvpress_beside.py smollm2 --kvpress kvpress/bin/python --out beside.jsonl

Every prompt of `eval --retrieval` is prefilled but for its last token, tokens are taken out, and the answer is read
from what is left. kvpress's SnapKV runs with its own settings (64 queries, means over 5 tokens) and with ours (32, over
7; we take maxima). `mib` is the cache after the prefill, `nats` the mean log-probability of the answers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

OURS = ("streaming", "snapkv", "tova", "expected-attention")
THEIRS = ("streaming", "snapkv", "snapkv as ours", "tova", "expected-attention")


def prefilled(model: PreTrainedModel, ids: torch.Tensor, by: str, name: str, kept: int) -> Any:
    """The cache of a prompt, from which all but so many tokens were taken."""
    if by == "kvlatent":
        from kvlatent import policy

        cache: Any = policy(name, keep=kept / ids.shape[1]).cache(model)
        model(ids, past_key_values=cache, logits_to_keep=1)
        return cache
    from kvpress import ExpectedAttentionPress, SnapKVPress, StreamingLLMPress, TOVAPress

    less, cache = 1 - (kept + 0.5) / ids.shape[1], DynamicCache(config=model.config)  # it rounds down
    snap = {"window_size": 32, "kernel_size": 7} if name.endswith("as ours") else {}
    presses = {"streaming": StreamingLLMPress, "tova": TOVAPress, "expected-attention": ExpectedAttentionPress}
    press = presses.get(name, SnapKVPress)(less, **snap)
    with press(model):
        model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def measure(folder: str, prompts: dict[str, Any], keeps: list[float], by: str, out: Path) -> None:
    """Append a row for every policy, share and test."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for keep, name in ((keep, name) for keep in keeps for name in (OURS if by == "kvlatent" else THEIRS)):
        for test, pairs in prompts.items():
            nats, mib, seconds = 0.0, 0.0, 0.0
            for prompt, answer in pairs:
                ids, before = torch.tensor([prompt + answer]), len(prompt) - 1
                began = time.perf_counter()
                cache = prefilled(model, ids[:, :before], by, name, round(keep * before))
                seconds += (time.perf_counter() - began) / len(pairs)
                mib += sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) / 2**20 / len(pairs)
                places = torch.arange(before, ids.shape[1])[None]
                logits = model(ids[:, before:], past_key_values=cache, position_ids=places).logits[0, :-1]
                nats -= (
                    float(torch.nn.functional.cross_entropy(logits, ids[0, before + 1 :])) * len(answer) / len(pairs)
                )
            row = {"by": by, "policy": name, "keep": keep, "test": test, "nats": nats, "mib": mib, "seconds": seconds}
            with out.open("a") as file:
                print(json.dumps(row), file=file)


def main() -> None:
    """Make prompts, and measure ours here and kvpress in its environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kvpress", help="the Python that has it")
    parser.add_argument("--prompts", type=Path, help="made by this script, for the Python that has kvpress")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.prompts is not None:
        return measure(asked.model, json.loads(asked.prompts.read_text()), asked.keep, "kvpress", asked.out)

    from kvlatent.evaluation.retrieval import NEEDLES, TOKENS_PER_PAIR, retrieval_questions
    from kvlatent.model.checkpoints import locate
    from kvlatent.model.loading import load_tokenizer

    tokenizer, rng, folder, prompts = load_tokenizer(asked.model), random.Random(0), locate(asked.model), {}
    for context in asked.context:
        for test, pairs in (("key_value", context // TOKENS_PER_PAIR), ("needles", NEEDLES)):
            depths = ((trial + 0.5) / asked.trials * (1 - 256 / context) for trial in range(asked.trials))
            found = [
                question
                for depth in depths
                for question in retrieval_questions(tokenizer, pairs, context=context, depths=[depth], rng=rng)
            ]
            prompts[f"{test} {context}"] = found
    measure(folder, prompts, asked.keep, "kvlatent", asked.out)
    (file := asked.out.with_suffix(".prompts.json")).write_text(json.dumps(prompts))
    again = [asked.kvpress, __file__, folder, "--prompts", file, "--keep", *map(str, asked.keep), "--out", asked.out]
    subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
