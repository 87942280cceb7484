"""A needle in a haystack: is a code that was mentioned once in long filler text known at its end?"""

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compose.evicting import PolicyCache
from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError
from kvlatent.model.compatibility import CACHE
from kvlatent.model.layers import check_positions, evaluation_mode

DEPTH_BINS = 5


@torch.no_grad()
def needle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    trials: int,
    seed: int,
    depths: int = DEPTH_BINS,
    policy: Policy | None = None,
) -> dict[str, Any]:
    """Ask for a 5-digit code that was mentioned once at a random depth of filler text.

    One forward pass over prompt and right answer gives both scores: greedy decoding would write the code exactly when
    every token of it is the most likely one after the right tokens before it. The log-probability is of the whole code,
    in nats, and informs about models too small to answer: guessing digits gives `5 * ln(1 / 10) = -11.5`.

    Args:
        model: On any device.
        tokenizer: The model's.
        context: Tokens of the prompt and answer together; a few fewer are used, since filler comes in sentences.
        trials: Prompts to try, spread evenly over the bins of depth.
        seed: Chooses codes, depths and filler; the same seed gives two models the same prompts.
        depths: Bins of depth, of equal size.
        policy: Answer from what it keeps of the prompt.

    Returns:
        `context`, `trials`, `exact_match` (a fraction), `code_log_probability` (mean), and `by_depth`: per bin its
        `depth` as `[from, to]` (0 is the start of the prompt), `trials`, `exact_match`, `code_log_probability`. With a
        policy also what it kept of a prompt and its answer, as `PolicyCache.kept` says.

    Raises:
        UserError: `context` is too short for needle and question or too long for the model, or `trials` < 1, or
            `depths` < 1.
    """
    prompts = needle_prompts(tokenizer, context=context, trials=trials, seed=seed, depths=depths)
    check_positions(model, context)
    cache = None if policy is None else policy.cache(model)
    scores: list[list[tuple[bool, float]]] = [[] for _ in range(depths)]
    with evaluation_mode(model):
        for trial, (prompt, answer) in enumerate(tqdm(prompts, desc="needle", total=trials, unit="prompts")):
            scores[trial % depths].append(score_answer(model, prompt, answer, cache=cache))
    by_depth = [
        {"depth": [index / depths, (index + 1) / depths], "trials": len(of_bin), **_mean_scores(of_bin)}
        for index, of_bin in enumerate(scores)
        if of_bin
    ]
    everything = [score for of_bin in scores for score in of_bin]
    kept = {} if cache is None else cache.kept()
    return {"context": context, "trials": trials, **_mean_scores(everything), **kept, "by_depth": by_depth}


def needles(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, contexts: Sequence[int], **how: Any
) -> dict[str, dict[str, Any]]:
    """The needle at every context, with the other arguments of `needle`."""
    return {str(context): needle(model, tokenizer, context=context, **how) for context in contexts}


def needle_prompts(
    tokenizer: PreTrainedTokenizerBase, *, context: int, trials: int, seed: int, depths: int = DEPTH_BINS
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its answer; the arguments are those of `needle`, checked at once.

    Raises:
        UserError: As there.
    """
    if trials < 1 or depths < 1:
        raise UserError(f"the needle test needs at least 1 trial and 1 depth; got {trials} and {depths}")
    rng = random.Random(seed)
    places = ((trial % depths + rng.random()) / depths for trial in range(trials))
    return (_needle_prompt(tokenizer, context=context, depth=place, rng=rng) for place in places)


def _filler(rng: random.Random) -> str:
    """Return one plain sentence without digits."""
    who = rng.choice(["The gardener", "My neighbour", "A young teacher", "The baker", "Our captain", "An old friend"])
    did = rng.choice(["carried", "painted", "repaired", "borrowed", "counted", "looked after", "forgot about"])
    what = rng.choice(["the wooden boats", "a blue bicycle", "two lamps", "the kitchen chairs", "some apple trees"])
    where = rng.choice(["near the harbour", "behind the school", "in the valley", "at the market", "by the river"])
    when = rng.choice(["before breakfast", "on a rainy day", "late in autumn", "after the concert", "every week"])
    return f"{who} {did} {what} {where} {when}."


def _needle_prompt(
    tokenizer: PreTrainedTokenizerBase, *, context: int, depth: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the answer that should follow it, together at most `context`."""
    code = f"{rng.randrange(10_000, 100_000)}"
    sentence = f"Please remember that the secret code is {code}."
    question = "Now you are asked for the secret code that was mentioned above. The secret code is"

    def text(filler: list[str]) -> list[str]:
        before = round(depth * len(filler))
        return [*filler[:before], sentence, *filler[before:]]

    (asked,) = filled_prompts(tokenizer, text, [(question, code)], context=context, rng=rng)
    return asked


def filled_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text: Callable[[list[str]], list[str]],
    questions: Sequence[tuple[str, str]],
    *,
    context: int,
    rng: random.Random,
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of a prompt and of its answer for each question, with as much filler as there is room for.

    Args:
        tokenizer: The model's.
        text: Sentences before the question, around the sentences of filler it is given; the same for all questions.
        questions: The prompt's end, and what should follow.
        context: Most tokens of prompt and answer together.
        rng: Chooses the filler.

    Raises:
        UserError: They don't fit without any filler.
    """

    def encode(filler: list[str]) -> list[tuple[list[int], list[int]]]:
        facts, found = text(filler), []
        for question, answer in questions:
            prompt = " ".join([*facts, question])
            # Tokenized as one text, then cut where the prompt alone ends, so the answer is spelt as the model knows it.
            alone, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
            cut = next((i for i, (x, y) in enumerate(zip(alone, whole, strict=False)) if x != y), len(alone))
            found.append((whole[:cut], whole[cut:]))
        return found

    def longest(asked: list[tuple[list[int], list[int]]]) -> int:
        return max(len(prompt) + len(answer) for prompt, answer in asked)

    bare = longest(encode([]))
    if bare > context:
        raise UserError(f"facts and question alone need {bare} tokens; got a context of {context}")
    filler: list[str] = []
    room = context - bare
    while room > 0:
        filler.append(_filler(rng))
        room -= len(tokenizer(" " + filler[-1], add_special_tokens=False)["input_ids"])
    ids = encode(filler)
    while longest(ids) > context:  # the last sentence, as a rule
        filler.pop()
        ids = encode(filler)
    return ids


def score_answer(
    model: PreTrainedModel,
    prompt: list[int],
    answer: list[int],
    *,
    cache: PolicyCache | None = None,
    before: int | None = None,
) -> tuple[bool, float]:
    """Return whether greedy decoding gives the answer, and the answer's log-probability in nats.

    Args:
        model: On any device.
        prompt: Tokens.
        answer: Those that should follow.
        cache: Answer from what its policy keeps of the prompt; what it holds is forgotten first.
        before: How many of the prompt's tokens there are when the policy chooses; all but the last by default, so that
            it knows the question.
    """
    if cache is None:
        return _score(model, prompt, answer, use_cache=False)
    cache.reset()
    before = len(prompt) - 1 if before is None else before
    ids = torch.tensor([prompt[:before]], device=model.device)
    model(input_ids=ids, logits_to_keep=1, use_cache=True, **{CACHE: cache})
    return _score(model, prompt[before:], answer, use_cache=True, **{CACHE: cache})


def score_answers(model: PreTrainedModel, asked: Sequence[tuple[list[int], list[int]]]) -> list[tuple[bool, float]]:
    """`score_answer` for prompts and answers of which the prompts begin alike; that beginning is read only once."""
    if len(asked) == 1:
        return [score_answer(model, *asked[0])]
    prompts = [prompt for prompt, _ in asked]
    least = min(map(len, prompts)) - 1
    before = next((i for i, tokens in enumerate(zip(*prompts, strict=False)) if len({*tokens}) > 1), least)
    ids = torch.tensor([prompts[0][:before]], device=model.device)
    cache = model(input_ids=ids, logits_to_keep=1, use_cache=True)[CACHE]
    return [
        _score(model, prompt[before:], answer, use_cache=True, **{CACHE: deepcopy(cache)}) for prompt, answer in asked
    ]


def _score(model: PreTrainedModel, prompt: list[int], answer: list[int], **kwargs: Any) -> tuple[bool, float]:
    ids = torch.tensor([prompt + answer], device=model.device)
    # One row more than the answer has tokens: each row predicts the next token, and the last row has none to predict.
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, **kwargs).logits[0, :-1].float()
    targets = ids[0, -len(answer) :]
    log_probability = -F.cross_entropy(logits, targets, reduction="sum").item()
    return bool((logits.argmax(dim=-1) == targets).all()), log_probability


def _mean_scores(scores: list[tuple[bool, float]]) -> dict[str, float]:
    return {
        "exact_match": sum(exact for exact, _ in scores) / len(scores),
        "code_log_probability": sum(log_probability for _, log_probability in scores) / len(scores),
    }
