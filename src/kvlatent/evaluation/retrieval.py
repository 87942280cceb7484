"""Retrieval from far text: which code belongs to a name, of many that were given?

Two tests of one kind. `key_value` gives as many pairs of name and code as the context has room for at a fixed density;
`needles` hides a few in long filler. Both ask for one that is not among the newest tokens, by the beginning of its
sentence. A model that only knows that codes were given guesses among them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError
from kvlatent.evaluation.config import NEAR
from kvlatent.evaluation.needle import filled_prompts, score_answer, score_answers
from kvlatent.evaluation.perplexity import standard_error
from kvlatent.model.layers import check_positions, evaluation_mode

TOKENS_PER_PAIR = 32
"""`key_value` gives one pair for so many tokens of context; filler takes what they leave."""
NEEDLES = 4
"""Pairs that `needles` hides."""
QUESTIONS = 8
"""Pairs that a prompt is asked for, each as if it were the only one; fewer where there are fewer."""
RETRIEVAL_TESTS = ("key_value", "needles")
FIRST = (
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo",
    "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Tina", "Victor", "Wendy", "Albert", "Bruno",
    "Clara", "Diana", "Edward", "Felix", "George", "Hannah", "Ivan", "Julia", "Kevin",
)  # fmt: skip
LAST = (
    "Adams", "Baker", "Carter", "Dixon", "Ellis", "Foster", "Grant", "Hayes", "Irving", "Jones", "King",
    "Lopez", "Mason", "Nelson", "Owens", "Parker", "Quinn", "Reed", "Scott", "Turner", "Usher", "Vance",
    "Walker", "Young", "Zimmer", "Black", "Cook", "Drake", "Evans", "Ford", "Green", "Hill",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Answers of one model, prompt by prompt."""

    pairs: int
    """Pairs in each prompt."""
    questions: int
    """What is asked about each."""
    samples: dict[str, list[float]]
    """Means over each prompt's questions: `exact_match`, 1 where greedy decoding writes the right code, and its
    `log_probability` in nats."""
    kept: dict[str, float]
    """Of a prompt and its answer, with a policy, as `PolicyCache.kept` says."""

    def scores(self) -> dict[str, Any]:
        """Means and their standard errors, with prompts as samples; None for one prompt."""
        trials = len(self.samples["exact_match"])
        found: dict[str, Any] = {"pairs": self.pairs, "trials": trials, "questions": trials * self.questions}
        for metric, values in self.samples.items():
            samples = torch.tensor(values, dtype=torch.float64)
            found |= {metric: samples.mean().item(), f"{metric}_stderr": standard_error(samples)}
        return found | self.kept


@torch.no_grad()
def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: str,
    *,
    context: int,
    trials: int,
    seed: int,
    questions: int = QUESTIONS,
    policy: Policy | None = None,
) -> Retrieval:
    """Ask for the codes of names among several, scored as `needle` scores.

    A prompt is read once, and every question is asked of a copy of its cache.

    Args:
        model: On any device.
        tokenizer: The model's.
        test: One of `RETRIEVAL_TESTS`.
        context: Tokens of prompt and answer together; a few fewer are used.
        trials: Prompts.
        seed: Chooses names, codes and filler; the same seed gives two models the same prompts.
        questions: Names that each prompt is asked for, at most as many as it has; all that are asked for are spread
            evenly over all of the text but the newest `2 * NEAR` tokens.
        policy: Answer from what it keeps of the prompt. It knows what is asked, so each question reads its prompt anew.

    Raises:
        UserError: `context` is too short for far text or for the pairs, or too long for the model, or `trials` < 1.
    """
    prompts = retrieval_prompts(tokenizer, test, context=context, trials=trials, seed=seed, questions=questions)
    check_positions(model, context)
    cache = None if policy is None else policy.cache(model)
    samples: dict[str, list[float]] = {"exact_match": [], "log_probability": []}
    with evaluation_mode(model):
        for asked in tqdm(prompts, desc=f"{test} {context}", total=trials, unit="prompts"):
            if cache is None:
                answers = score_answers(model, asked)
            else:
                answers = [score_answer(model, prompt, answer, cache=cache) for prompt, answer in asked]
            for scores, values in zip(samples.values(), zip(*answers, strict=True), strict=True):
                scores.append(sum(values) / len(values))
    pairs, kept = _pairs(test, context), {} if cache is None else cache.kept()
    return Retrieval(pairs=pairs, questions=min(questions, pairs), samples=samples, kept=kept)


def retrievals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, contexts: Sequence[int], **how: Any
) -> dict[str, Retrieval]:
    """Every test at every context, with the other arguments of `retrieval`."""
    return {
        f"{test} {context}": retrieval(model, tokenizer, test, context=context, **how)
        for test, context in itertools.product(RETRIEVAL_TESTS, contexts)
    }


def retrieval_prompts(
    tokenizer: PreTrainedTokenizerBase,
    test: str,
    *,
    context: int,
    trials: int,
    seed: int,
    questions: int = QUESTIONS,
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Token ids of each prompt and of its answer, by text; the arguments are those of `retrieval`, checked at once.

    Raises:
        UserError: As there.
    """
    if trials < 1 or questions < 1:
        raise UserError(f"retrieval needs at least 1 trial and 1 question; got {trials} and {questions}")
    if context <= 2 * NEAR:
        raise UserError(f"retrieval from far text needs a context of over {2 * NEAR} tokens; got {context}")
    rng, pairs = random.Random(f"{test} {context} {seed}"), _pairs(test, context)
    questions = min(questions, pairs)

    def depths(trial: int) -> list[float]:
        """One from each of as many equal parts of the text."""
        first = (trial + rng.random()) / trials
        return [(part + first) / questions * (1 - 2 * NEAR / context) for part in range(questions)]

    return (
        retrieval_questions(tokenizer, pairs, context=context, depths=depths(trial), rng=rng) for trial in range(trials)
    )


def _pairs(test: str, context: int) -> int:
    return NEEDLES if test == "needles" else context // TOKENS_PER_PAIR


def retrieval_questions(
    tokenizer: PreTrainedTokenizerBase, pairs: int, *, context: int, depths: Sequence[float], rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts of one text and of their answers; each asks for the pair at a depth, a share of the text."""
    names = FIRST if pairs <= len(FIRST) else [" ".join(name) for name in itertools.product(FIRST, LAST)]
    if pairs > len(names):
        raise UserError(f"there are names for {len(names)} pairs; a context of {context} tokens takes {pairs}")
    chosen = rng.sample(names, pairs)
    codes = [f"{rng.randrange(10, 100)}" for _ in chosen]
    sentences = [f"The code of {name} is {code}." for name, code in zip(chosen, codes, strict=True)]
    places = sorted([*depths, *(rng.random() for _ in range(pairs - len(depths)))])
    asked = [places.index(depth) for depth in depths]

    def text(filler: list[str]) -> list[str]:
        """Every pair at its place among the filler."""
        parts: list[str] = []
        done = 0
        for place, sentence in zip(places, sentences, strict=True):
            until = round(place * len(filler))
            parts += [*filler[done:until], sentence]
            done = until
        return [*parts, *filler[done:]]

    questions = [(f"The code of {chosen[index]} is", codes[index]) for index in asked]
    return filled_prompts(tokenizer, text, questions, context=context, rng=rng)
