"""What policies keep of far text, what that takes in bytes, and how fast it is.

    python benchmarks/policies.py smollm2 STUDENT --out policies.jsonl

Every prompt of `eval --retrieval` is prefilled, a policy takes tokens out, and the answer is read from what is left:
`asked` with the question in the prompt, as `kvlatent eval` does it, `unasked` with the question after the policy has
chosen. What that costs is measured as `kvlatent bench` does it; `--trials 0` measures nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvlatent.compose.policies import POLICIES
from kvlatent.compose.policy import Policy
from kvlatent.evaluation.bench import benchmark
from kvlatent.evaluation.config import NEAR
from kvlatent.evaluation.needle import score_answer
from kvlatent.evaluation.retrieval import NEEDLES, RETRIEVAL_TESTS, TOKENS_PER_PAIR, retrieval_questions
from kvlatent.model.checkpoints import load_model
from kvlatent.model.layers import evaluation_mode

Prompt = tuple[list[int], list[int], int]
"""Tokens of a prompt and of its answer, and how many come before the question."""


def prompts(tokenizer: PreTrainedTokenizerBase, test: str, *, context: int, trials: int) -> list[Prompt]:
    """Prompts of a retrieval test, what is asked for spread evenly over all but the newest tokens."""
    rng, found = random.Random(f"{test} {context}"), list[Prompt]()
    pairs = NEEDLES if test == "needles" else context // TOKENS_PER_PAIR
    for trial in range(trials):
        depth = (trial + rng.random()) / trials * (1 - 2 * NEAR / context)
        ((prompt, answer),) = retrieval_questions(tokenizer, pairs, context=context, depths=[depth], rng=rng)
        text = tokenizer.decode(prompt)
        facts = text[: text.rindex("The code of")].rstrip()
        found.append((prompt, answer, len(tokenizer(facts)["input_ids"])))
    return found


def main() -> None:
    """Measure every policy and share on every model, and append a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--policies", nargs="+", choices=["none", *POLICIES], default=["none", *POLICIES])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()

    chosen: list[Policy | None] = [
        policy
        for name in asked.policies
        for policy in ([None] if name == "none" else [POLICIES[name](keep=keep) for keep in asked.keep])
    ]
    for name in asked.models:
        model, tokenizer = load_model(name, dtype=asked.dtype)
        tests = {test: prompts(tokenizer, test, context=asked.context, trials=asked.trials) for test in RETRIEVAL_TESTS}
        for policy in chosen:
            row: dict[str, Any] = {
                "model": name,
                "policy": str(policy),
                "context": asked.context,
                "trials": asked.trials,
            }
            cache = None if policy is None else policy.cache(model)
            with evaluation_mode(model), torch.no_grad():
                for test, asked_for in tests.items():
                    for way in ("asked", "unasked"):
                        scores = [
                            score_answer(model, prompt, answer, cache=cache, before=None if way == "asked" else before)
                            for prompt, answer, before in asked_for
                            if policy is not None or way == "asked"
                        ]
                        if scores:
                            row[f"{test}_{way}"] = sum(nats for _, nats in scores) / len(scores)
                            row[f"{test}_{way}_right"] = sum(right for right, _ in scores) / len(scores)
            (cost,) = benchmark(
                {name: model}, context=asked.context, batch=1, new_tokens=asked.new_tokens, repeats=asked.repeats,
                seed=0, policies={} if policy is None else {name: policy},
            )  # fmt: skip
            told = ("cache_bytes", "ttft_ms", "tpot_ms", "tokens_per_s", "peak_memory_bytes")
            row |= {key: value for key, value in cost.items() if key in told or key.startswith("kept")}
            with asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
