"""What a recipe measures of its first student beside the teacher, apart from perplexity: one function per entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.cli.recipe_file import Kept, Recipe
from kvlatent.data.blocks import TokenBlocks, check_held_out
from kvlatent.evaluation.bench import benchmark
from kvlatent.evaluation.diagnose import beside, diagnose, material_of
from kvlatent.evaluation.generate import complete
from kvlatent.evaluation.joined import joined_scores, joined_text, rolling
from kvlatent.evaluation.needle import needles
from kvlatent.evaluation.retrieval import retrievals
from kvlatent.evaluation.tasks import Samples, lm_eval_tasks, paired
from kvlatent.model.checkpoints import record_of


class Pair(NamedTuple):
    """Teacher and student, and what they are measured on."""

    recipe: Recipe
    models: Mapping[str, PreTrainedModel]
    """`teacher` and `student`."""
    tokenizer: PreTrainedTokenizerBase
    held_out: TokenBlocks
    folder: str
    """Where the student lies."""


def _diagnose(pair: Pair) -> Any:
    vocab_size = pair.models["teacher"].config.vocab_size
    material = material_of(
        pair.recipe.held_out.text, pair.tokenizer, pair.held_out, seed=pair.recipe.seed, vocab_size=vocab_size
    )
    material.check_held_out(pair.folder)
    return beside({name: diagnose(model, material) for name, model in pair.models.items()})


def _joined(pair: Pair) -> Any:
    asked = pair.recipe.joined
    assert asked is not None
    text = joined_text(asked.text, pair.tokenizer, vocab_size=pair.models["teacher"].config.vocab_size)
    check_held_out(record_of(pair.folder).get("fingerprints", ()), text.blocks)
    stride = asked.length if asked.stride is None else asked.stride
    rolled = {name: rolling(model, text, length=asked.length, stride=stride) for name, model in pair.models.items()}
    scores = {name: joined_scores(found, text, rolled["teacher"]) for name, found in rolled.items()}
    return {"text": asked.text, "length": asked.length, "stride": stride, "models": scores}


def _needle(pair: Pair) -> Any:
    assert pair.recipe.needle is not None
    return _asked(pair, needles, pair.recipe.needle)


def _retrieval(pair: Pair) -> Any:
    assert pair.recipe.retrieval is not None
    answered = _asked(pair, retrievals, pair.recipe.retrieval)
    return _in_pairs(
        {name: {test: each.scores() for test, each in found.items()} for name, found in answered.items()},
        {name: {test: each.samples for test, each in found.items()} for name, found in answered.items()},
    )


def _tasks(pair: Pair) -> Any:
    asked = pair.recipe.tasks
    assert asked is not None
    answered = {
        name: lm_eval_tasks(model, pair.tokenizer, asked.names, limit=asked.limit)
        for name, model in pair.models.items()
    }
    return _in_pairs(
        {name: {task: each.metrics for task, each in found.items()} for name, found in answered.items()},
        {name: {task: each.samples for task, each in found.items()} for name, found in answered.items()},
        {task: each.chance for task, each in answered["teacher"].items()},
    )


def _asked(pair: Pair, ask: Callable[..., Any], asked: Kept) -> dict[str, Any]:
    """What both models answer, the student from what the recipe's policy keeps."""
    how = asked.model_dump(exclude={"policy", "keep"}) | {"seed": pair.recipe.seed}
    policies = {"student": asked.asked_policy}
    return {name: ask(model, pair.tokenizer, **how, policy=policies.get(name)) for name, model in pair.models.items()}


def _in_pairs(
    scores: Mapping[str, Any], samples: Mapping[str, Samples], chances: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """Scores of both models, and tests on the samples that both answered."""
    return {"models": dict(scores), "paired": paired(samples["student"], samples["teacher"], chances)}


def _bench(pair: Pair) -> Any:
    wanted = pair.recipe.bench
    policies = {} if wanted.asked_policy is None else {"student": wanted.asked_policy}
    sizes = wanted.model_dump(exclude={"policy", "keep"})
    return benchmark(dict(pair.models), **sizes, seed=pair.recipe.seed, policies=policies)


def _generate(pair: Pair) -> Any:
    wanted = pair.recipe.generate
    policy = wanted.asked_policy

    def said(name: str, prompt: str) -> str:
        model = pair.models[name]
        cache = None if policy is None or name == "teacher" else policy.cache(model)
        return complete(model, pair.tokenizer, prompt, wanted.max_new_tokens, cache=cache)[0]

    return [{"prompt": p} | {name: said(name, p) for name in pair.models} for p in wanted.prompts]


class Measure(NamedTuple):
    """One of them."""

    act: Callable[[Pair], Any]
    file: str
    """Where the run folder keeps what it found."""
    kind: Any
    """The type of that."""


MEASURES: dict[str, Measure] = {
    "diagnose": Measure(_diagnose, "diagnose.json", dict[str, Any]),
    "joined": Measure(_joined, "joined.json", dict[str, Any]),
    "needle": Measure(_needle, "needle.json", dict[str, Any]),
    "retrieval": Measure(_retrieval, "retrieval.json", dict[str, Any]),
    "tasks": Measure(_tasks, "tasks.json", dict[str, Any]),
    "bench": Measure(_bench, "bench.json", list[dict[str, Any]]),
    "generate": Measure(_generate, "generations.json", list[dict[str, str]]),
}
"""By the recipe's entry that asks for it, in the order of their steps."""
