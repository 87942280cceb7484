"""How good a model is, beside another: perplexity on held-out text, a needle test and lm-eval tasks."""

from __future__ import annotations

from typing import Any

from kvlatent.data.blocks import batch_size_for, check_held_out
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.config import EvalConfig
from kvlatent.evaluation.needle import needle
from kvlatent.evaluation.perplexity import Perplexity, compare, perplexity
from kvlatent.evaluation.tasks import TaskScore, lm_eval_tasks, paired_test
from kvlatent.model.checkpoints import load_model, record_of
from kvlatent.model.loading import load_config, load_tokenizer

NEEDLE_CONTEXTS, NEEDLE_TRIALS = (1024, 2048, 4096), 10


def evaluate(config: EvalConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Measure perplexity and bits per byte of a model on held-out text, a needle test and lm-eval tasks.

    With another model, every metric of a task comes with a test on the samples that both answered, under `paired`: its
    difference (model less the other), the standard error of that, and the p-value.

    Raises:
        UserError: The text was used for calibration or training, or a model can't be used.
    """
    names = [config.model, *([] if config.against is None else [config.against])]
    shapes = [load_config(name) for name in names]
    tokenizer = load_tokenizer(names[0])
    if any(load_tokenizer(name).get_vocab() != tokenizer.get_vocab() for name in names[1:]):
        raise UserError(f"{' and '.join(names)} have different tokenizers; perplexities can't be compared")
    blocks = None
    if config.text:
        blocks = read_text(
            config.text, tokenizer, tokens=config.tokens, block_size=config.block_size, seed=seed,
            vocab_size=min(shape.vocab_size for shape in shapes),
        )  # fmt: skip
        for name in names:
            check_held_out(record_of(name).get("fingerprints", ()), blocks)
    positions = min(shape.max_position_embeddings for shape in shapes)
    contexts = [context for context in NEEDLE_CONTEXTS if context <= positions] or [positions]
    scores: list[Perplexity] = []
    answers: list[dict[str, TaskScore]] = []
    entries: list[dict[str, Any]] = []
    for name in names:
        loaded, _ = load_model(name, device=device, dtype=dtype)
        entry: dict[str, Any] = {"model": name}
        if blocks is not None:
            size = batch_size_for(config.block_size)
            scores.append(perplexity(loaded, blocks.ids, text_bytes=blocks.bytes, batch_size=size))
            entry |= scores_of(scores[-1])
        if config.needle:
            entry["needle"] = {
                str(context): needle(loaded, tokenizer, context=context, trials=NEEDLE_TRIALS, seed=seed)
                for context in contexts
            }
        if config.tasks:
            answers.append(lm_eval_tasks(loaded, tokenizer, config.tasks, limit=config.limit))
            entry["tasks"] = {task: score.metrics for task, score in answers[-1].items()}
        entries.append(entry)
        del loaded
    result = entries[0]
    if blocks is not None:
        result |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "bytes": blocks.bytes}
    if config.against is not None:
        result["against"] = entries[1]
        if scores:
            ratio = compare(scores[1], scores[0])
            result |= {"perplexity_ratio": ratio.perplexity_ratio, "perplexity_ratio_stderr": ratio.stderr}
        if answers:
            mine, theirs = answers
            result["paired"] = {
                task: {
                    metric: paired_test(theirs[task].samples[metric], samples)._asdict()
                    for metric, samples in score.samples.items()
                    if metric in theirs[task].samples and len(samples) > 1
                }
                for task, score in mine.items()
            }
    return result


def scores_of(score: Perplexity) -> dict[str, Any]:
    """What results say of a perplexity."""
    return {
        "perplexity": score.perplexity,
        "perplexity_stderr": score.perplexity_stderr,
        "bits_per_byte": score.bits_per_byte,
        **({"perplexity_at": score.by_position} if len(score.by_position) > 1 else {}),
    }
