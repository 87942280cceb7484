"""Is what was said far back still known once the prompt has fewer tokens? DAC beside random tokens.

    python benchmarks/prompt_compression.py smollm2 --out prompts.jsonl

Every prompt is compressed to a share of its tokens, the question protected, and answered by the same model: `dynamic`
looks at what is left in several stages, `static` once, `spread` is dynamic and avoids dropping neighbours, `words` is
static and keeps words and numbers whole, `random` drops any tokens. Prompts are those of `eval --retrieval`, or
(`--test years`) passages of real text, with a question for the year that one of their sentences names; the question
alone tells what the model knows without them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kvlatent.compose.prompt import compress_prompt
from kvlatent.data.documents import read_documents
from kvlatent.evaluation.needle import score_answer
from kvlatent.evaluation.perplexity import standard_error
from kvlatent.evaluation.retrieval import NEEDLES, TOKENS_PER_PAIR, retrieval_questions
from kvlatent.model.checkpoints import load_model
from kvlatent.model.layers import evaluation_mode

SENTENCE, YEAR = re.compile(r"[A-Z][^.?!\n]{40,200}\."), re.compile(r"\b(?:1[5-9]\d\d|20[01]\d)\b")
Prompt = tuple[list[int], list[int], str]
"""Tokens of a prompt and of its answer, and the question that ends it."""


def codes(tokenizer: PreTrainedTokenizerBase, test: str, *, context: int, trials: int) -> Iterator[Prompt]:
    """Prompts of a retrieval test, with what is asked for in the first three quarters."""
    rng = random.Random(0)
    for trial in range(trials):
        pairs, depth = NEEDLES if test == "needles" else context // TOKENS_PER_PAIR, (trial + rng.random()) / trials
        ((ids, answer),) = retrieval_questions(tokenizer, pairs, context=context, depths=[0.75 * depth], rng=rng)
        text = tokenizer.decode(ids)
        yield ids, answer, text[text.rindex("The code of") :]


def years(tokenizer: PreTrainedTokenizerBase, source: str, *, context: int, trials: int) -> Iterator[Prompt]:
    """Passages of documents, each with a question for a year that it names once, in its first three quarters."""
    rng, made = random.Random(0), 0
    for document in read_documents(source):
        assert isinstance(document, str)
        named = [x for x in SENTENCE.finditer(document) if len(YEAR.findall(x[0])) == 1]
        before = int(4 * context * 0.75 * (made + rng.random()) / trials)  # characters, about four to a token
        named = [x for x in named if before <= x.start() < len(document) - 4 * context + before]
        if not named:
            continue
        sentence = rng.choice(named)
        year = YEAR.search(sentence[0])
        assert year is not None
        gap = f"{sentence[0][: year.start()]}____{sentence[0][year.end() :]}"
        question = f'\n\nQuestion: Which year belongs in the gap of "{gap}"?\nAnswer:'
        room = context - len(tokenizer(f"{question} {year[0]}")["input_ids"])
        passage = document[sentence.start() - before :]
        passage = tokenizer.decode(tokenizer(passage[: 8 * context])["input_ids"][:room])
        if sentence[0] in passage and passage.count(year[0]) == 1:
            ids, whole = (tokenizer(passage + question + end)["input_ids"] for end in ("", f" {year[0]}"))
            made += 1
            yield ids, whole[len(ids) :], question
        if made == trials:
            return


def main() -> None:
    """Measure, and append a line of JSON for every way and share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--test", choices=["needles", "key_value", "years"], default="needles")
    parser.add_argument("--text", default="package:wikipedia", help="the source of years")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--stages", type=int, default=4, help="of the dynamic ways")
    parser.add_argument("--ways", nargs="+", default=["dynamic", "static", "spread", "random"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()

    model, tokenizer = load_model(asked.model, dtype="float32")
    rng, sizes = random.Random(0), {"context": asked.context, "trials": asked.trials}
    made = years(tokenizer, asked.text, **sizes) if asked.test == "years" else codes(tokenizer, asked.test, **sizes)
    scores: dict[str, list[tuple[bool, float]]] = {}
    for ids, answer, question in tqdm(made, total=asked.trials, unit="prompts"):
        text, alone = tokenizer.decode(ids), tokenizer(question.lstrip())["input_ids"]
        with evaluation_mode(model), torch.no_grad():
            scores.setdefault("question alone", []).append(score_answer(model, alone, answer))
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
                            model, tokenizer, text, keep=keep, stages=1 if way in ("static", "words") else asked.stages,
                            protect=(question,), spread=way == "spread", words=way == "words",
                        ).kept  # fmt: skip
                    found = score_answer(model, [ids[token] for token in kept], answer)
                    scores.setdefault(f"{way} {keep:g}", []).append(found)
    for label, answers in scores.items():
        exact = torch.tensor([float(right) for right, _ in answers], dtype=torch.float64)
        nats = torch.tensor([log_probability for _, log_probability in answers], dtype=torch.float64)
        row = {"label": label, "test": asked.test, "context": asked.context, "trials": len(answers)}
        row |= {"exact_match": float(exact.mean()), "exact_match_stderr": standard_error(exact)}
        row |= {"log_probability": float(nats.mean()), "log_probability_stderr": standard_error(nats)}
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{label:14} {row['exact_match']:.2f} {row['log_probability']:.3f}", flush=True)


if __name__ == "__main__":
    main()
