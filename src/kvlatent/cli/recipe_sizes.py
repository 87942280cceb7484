"""What a recipe asks for, checked before its first step: what doesn't fit is said before hours of work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kvlatent.cli.recipe_file import Kept, Recipe, healing_settings
from kvlatent.compose.evicting import check_combination
from kvlatent.compress.checkpoints import Target
from kvlatent.compress.statistics import check_far_tokens
from kvlatent.data.blocks import check_ids, whole_blocks
from kvlatent.errors import UserError
from kvlatent.evaluation.needle import needle_prompts
from kvlatent.evaluation.retrieval import RETRIEVAL_TESTS, retrieval_prompts
from kvlatent.evaluation.tasks import find_tasks
from kvlatent.model.loading import bare_model
from kvlatent.model.sizes import predicted_cache_bytes


def check_sizes(
    recipe: Recipe,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    targets: Mapping[str, Target],
    *,
    memory: int,
    element_size: int,
) -> None:
    """Check the sizes of all steps of a recipe.

    Args:
        recipe: The recipe.
        config: The teacher's.
        tokenizer: Likewise.
        targets: How each student is converted, by its name.
        memory: Bytes of the device.
        element_size: Bytes per number in evaluation and benchmark.

    Raises:
        UserError: Healing's settings can't be, or text, the benchmark or a continuation doesn't fit into the model's
            positions, the student's window or the memory, or a task of lm-eval is unknown.
    """
    _check_positions(recipe, config, tokenizer)
    _check_questions(recipe, tokenizer)
    for name, text in (("calibration", recipe.calibration), ("held_out", recipe.held_out)):
        with named(name):
            whole_blocks(text.tokens, text.block_size or recipe.block_size)
    for name, student in recipe.by_name.items():
        if student.heal is not None:
            assert recipe.training is not None
            with named(name):
                healing_settings(recipe, student, config, coded=targets[name].coded)
                check_far_tokens(targets[name].request.near, recipe.training.block_size or recipe.block_size)
    weights, bench = bare_model(config, recipe.model).num_parameters(), recipe.bench
    sizes = {"batch": bench.batch, "tokens": bench.context + bench.new_tokens, "element_size": element_size}
    cache = predicted_cache_bytes(config, **sizes)
    needed = {  # beside what comes and goes
        "convert: the teacher's float32 weights": 4 * weights,
        "bench: the teacher's cache and the weights of two models": cache + 2 * weights * element_size,
    }
    for what, size in needed.items():
        if size > memory:
            raise UserError(f"{what} take {size / 1e9:,.1f} GB, which exceeds the memory of {memory / 1e9:,.1f} GB")


def check_policies(recipe: Recipe, config: PreTrainedConfig, targets: Mapping[str, Target]) -> None:
    """Check the policies of a recipe against its students.

    Args:
        recipe: The recipe.
        config: The teacher's.
        targets: How each student is converted, the first one first.

    Raises:
        UserError: A policy can't be combined with a student that it is asked for.
    """
    students = list(targets.items())
    for entry, asked in recipe:
        policy = asked.asked_policy if isinstance(asked, Kept) else None
        for name, target in students if entry == "held_out" else students[:1]:
            with named(f"{entry}: {name}"):
                if policy is not None:
                    check_combination(policy, config, after_rope=target.request.method.takes_window)


def _check_positions(recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = {"calibration": recipe.calibration, "training": recipe.training, "held_out": recipe.held_out}
    lengths = {f"{name}: blocks": x.block_size or recipe.block_size for name, x in texts.items() if x is not None}
    lengths["bench"] = recipe.bench.context + recipe.bench.new_tokens
    for prompt in recipe.generate.prompts:
        tokens = len(check_ids(tokenizer(prompt)["input_ids"], config.vocab_size))
        if not tokens:
            raise UserError(f"generate: the prompt {prompt!r} has no tokens")
        lengths[f"generate: {prompt[:20]!r}"] = tokens + recipe.generate.max_new_tokens
    if recipe.joined is not None:
        lengths["joined: windows"] = recipe.joined.length
    for name, asked in (("needle", recipe.needle), ("retrieval", recipe.retrieval)):
        if asked is not None:
            lengths[f"{name}: contexts"] = max(asked.contexts)
    positions = config.max_position_embeddings
    for what, length in lengths.items():
        if length > positions:
            raise UserError(f"{what}: {length:,} tokens exceed the {positions:,} positions of {recipe.model}")


def _check_questions(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that what is asked for has room for its first prompt, and that tasks are known."""
    if recipe.needle is not None:
        with named("needle"):
            for context in recipe.needle.contexts:
                next(needle_prompts(tokenizer, context=context, trials=1, seed=recipe.seed))
    if recipe.retrieval is not None:
        with named("retrieval"):
            for test, context in itertools.product(RETRIEVAL_TESTS, recipe.retrieval.contexts):
                next(retrieval_prompts(tokenizer, test, context=context, trials=1, seed=recipe.seed))
    if recipe.tasks is not None:
        with named("tasks"):
            find_tasks(recipe.tasks.names)


@contextmanager
def named(entry: str) -> Iterator[None]:
    """Let what is refused in the body begin with the recipe's entry or student."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{entry}: {error}") from None
