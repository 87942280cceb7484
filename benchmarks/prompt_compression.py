"""Is a code that was given far back still found once the prompt has fewer tokens? DAC beside random tokens.

    python benchmarks/prompt_compression.py smollm2 --out prompts.jsonl

Every prompt of `eval --retrieval` is compressed to a share of its tokens, the question protected, and answered by the
same model: `dynamic` looks at what is left in several stages, `static` once, `spread` is dynamic and avoids dropping
neighbours, `random` drops any tokens. Passes of the compressor are counted in tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from tqdm import trange

from kvlatent.compose.prompt import compress_prompt
from kvlatent.evaluation.needle import score_answer
from kvlatent.evaluation.perplexity import standard_error
from kvlatent.evaluation.retrieval import NEEDLES, TOKENS_PER_PAIR, retrieval_prompt
from kvlatent.model.checkpoints import load_model
from kvlatent.model.layers import evaluation_mode


def main() -> None:
    """Measure, and append a line of JSON for every way and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--test", choices=["needles", "key_value"], default="needles")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--stages", type=int, default=4, help="of the dynamic ways")
    parser.add_argument("--ways", nargs="+", default=["dynamic", "static", "spread", "random"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()

    model, tokenizer = load_model(asked.model, dtype="float32")
    pairs = NEEDLES if asked.test == "needles" else asked.context // TOKENS_PER_PAIR
    rng = random.Random(0)
    scores: dict[str, list[tuple[bool, float]]] = {}
    for trial in trange(asked.trials, unit="prompts"):
        depth = (trial + rng.random()) / asked.trials * 0.75
        ids, answer = retrieval_prompt(tokenizer, pairs, context=asked.context, depth=depth, rng=rng)
        text = tokenizer.decode(ids)
        question = text[text.rindex("The code of") :]
        with evaluation_mode(model), torch.no_grad():
            scores.setdefault("whole 1", []).append(score_answer(model, ids, answer))
            for keep in asked.keep:
                for way in asked.ways:
                    if way == "random":
                        tail = len(tokenizer(question)["input_ids"])
                        free = range(1, len(ids) - tail)
                        stays = {
                            0,
                            *rng.sample(free, round(keep * len(ids)) - tail - 1),
                            *range(len(ids) - tail, len(ids)),
                        }
                        kept = sorted(stays)
                    else:
                        kept = compress_prompt(
                            model, tokenizer, text, keep=keep, stages=1 if way == "static" else asked.stages,
                            protect=(question,), spread=way == "spread",
                        ).kept  # fmt: skip
                    found = score_answer(model, [ids[token] for token in kept], answer)
                    scores.setdefault(f"{way} {keep:g}", []).append(found)
    for label, answers in scores.items():
        exact = torch.tensor([float(right) for right, _ in answers], dtype=torch.float64)
        nats = torch.tensor([log_probability for _, log_probability in answers], dtype=torch.float64)
        row = {"label": label, "test": asked.test, "context": asked.context, "trials": asked.trials}
        row |= {"exact_match": float(exact.mean()), "exact_match_stderr": standard_error(exact)}
        row |= {"log_probability": float(nats.mean()), "log_probability_stderr": standard_error(nats)}
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{label:14} {row['exact_match']:.2f} {row['log_probability']:.3f}", flush=True)


if __name__ == "__main__":
    main()
