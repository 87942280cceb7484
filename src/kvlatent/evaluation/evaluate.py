"""How good a model is, beside another: perplexity on held-out text, far text, retrieval and lm-eval tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from kvlatent.compose.policies import policy_of
from kvlatent.compress.streamed import file_mark
from kvlatent.data.blocks import batch_size_for, check_held_out
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.config import NEAR_ONLY, EvalConfig
from kvlatent.evaluation.diagnose import Diagnosis, Material, diagnose, material_of, told
from kvlatent.evaluation.far import far_scores, near_only_perplexity
from kvlatent.evaluation.joined import JoinedText, Rolling, joined_scores, joined_text, rolling
from kvlatent.evaluation.needle import needle
from kvlatent.evaluation.perplexity import Perplexity, compare, perplexity
from kvlatent.evaluation.resume import Found, Measured, measured
from kvlatent.evaluation.retrieval import RETRIEVAL_TESTS, retrieval
from kvlatent.evaluation.tasks import lm_eval_tasks, paired
from kvlatent.model.checkpoints import load_model, locate, record_of
from kvlatent.model.folder import weight_files
from kvlatent.model.loading import load_config, load_tokenizer

NEEDLE_CONTEXTS, NEEDLE_TRIALS = (1024, 2048, 4096), 10


def evaluate(config: EvalConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Measure perplexity and bits per byte of a model on held-out text, far text, retrieval and lm-eval tasks.

    With another model, every metric of a task comes with a test on the samples that both answered, under `paired`: its
    difference (model less the other), the standard error of that, and the p-value, and for accuracies what guessing
    scores (`chance`) and the share of the other's score above it that is `kept`. With `far`, both and the other one
    without far text (`near_only`) have `far_gain_kept` and the perplexity ratio over the tokens that need far text.
    With a policy, the model answers from what it keeps of prompts, and text is the second half of each block.

    Raises:
        UserError: The text was used for calibration or training, or a model can't be used, or `out` exists, is being
            written, or was begun with other settings.
        KeyboardInterrupt: Interrupted; with `out` the same goes on where it was.
    """
    with measured(config.out) as kept:
        return kept.finish(_evaluate(config, kept, device=device, dtype=dtype, seed=seed))


def _evaluate(config: EvalConfig, kept: Measured, *, device: str, dtype: str, seed: int) -> dict[str, Any]:
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
    material: Material | None = None
    if config.diagnose and blocks is not None:
        material = material_of(
            config.text, tokenizer, blocks, seed=seed, vocab_size=min(shape.vocab_size for shape in shapes)
        )
        material.check_held_out(*names)
    diagnoses: list[Diagnosis] = []
    whole: JoinedText | None = None
    if config.joined:
        whole = joined_text(config.text, tokenizer, vocab_size=min(shape.vocab_size for shape in shapes))
        for name in names:
            check_held_out(record_of(name).get("fingerprints", ()), whole.blocks)
    kept.begin(
        asdict(config) | {"out": None, "seed": seed, "device": device, "dtype": dtype}
        | {"weights": [sorted(map(file_mark, {*weight_files(locate(name)).values()})) for name in names]}
        | {"documents": [] if blocks is None else sorted(blocks.fingerprints)}
    )  # fmt: skip
    rolled: list[Rolling] = []
    positions = min(shape.max_position_embeddings for shape in shapes)
    scores: list[Perplexity] = []
    samples: list[dict[str, dict[str, list[float]]]] = []  # of each model, by task and metric
    chances: dict[str, dict[str, float]] = {}  # the same for both models
    entries: list[dict[str, Any]] = []
    near_only, asked = None, policy_of(config.policy, config.keep)
    for index, name in enumerate(names):
        model = _Model(name, index, kept, {"device": device, "dtype": dtype})
        entry: dict[str, Any] = {"model": name}
        policy = asked if index == 0 else None
        if policy is not None:
            entry |= {"policy": policy.name, "keep": policy.keep}
        samples.append({})
        if blocks is not None:
            sizes: dict[str, Any] = {"text_bytes": blocks.bytes, "batch_size": batch_size_for(config.block_size)}
            found = [model.measure("perplexity", perplexity, blocks.ids, **sizes, policy=policy)]
            if config.far and index == 1:
                found.append(model.measure("near only", near_only_perplexity, blocks.ids, **sizes))
            if asked is not None and policy is None:
                found = [score.of_second_half() for score in found]
            scores.append(found[0])
            near_only = found[1] if len(found) > 1 else None
        if material is not None:
            diagnoses.append(model.measure("diagnose", diagnose, material))
            samples[-1]["word_order"] = diagnoses[-1].word_order
        if whole is not None:
            length = config.block_size
            steps = {"length": length, "stride": length if config.stride is None else config.stride}
            rolled.append(model.measure("joined", rolling, whole, **steps))
        if config.needle:
            settings = {"trials": NEEDLE_TRIALS, "seed": seed, "policy": policy}
            entry["needle"] = {
                str(context): model.measure(f"needle {context}", needle, tokenizer, context=context, **settings)
                for context in _within(positions, NEEDLE_CONTEXTS)
            }
        if config.retrieval:
            settings = {"trials": config.trials, "seed": seed, "policy": policy}
            if asked is not None:  # which reads a prompt anew for each question
                settings["questions"] = 1
            answered = {
                (what := f"{test} {context}"): model.measure(
                    what, retrieval, tokenizer, test, context=context, **settings
                )
                for test, context in itertools.product(RETRIEVAL_TESTS, _within(positions, config.retrieval_contexts))
            }
            entry["retrieval"] = {test: each.scores() for test, each in answered.items()}
            samples[-1] |= {test: each.samples for test, each in answered.items()}
        if config.tasks:
            tasks = model.measure("tasks", lm_eval_tasks, tokenizer, config.tasks, limit=config.limit)
            entry["tasks"] = {task: score.metrics for task, score in tasks.items()}
            samples[-1] |= {task: score.samples for task, score in tasks.items()}
            chances = {task: score.chance for task, score in tasks.items()}
        entries.append(entry)
        del model  # whose memory the next one needs
    teacher = scores[1] if len(scores) > 1 else None
    for entry, score in zip(entries, scores, strict=False):
        entry |= scores_of(score, teacher, near_only)
    for entry, diagnosis in zip(entries, diagnoses, strict=False):
        entry["diagnose"] = told(diagnosis, None if diagnosis is diagnoses[-1] else diagnoses[-1])
    for entry, rolls in zip(entries, rolled, strict=False):
        assert whole is not None
        entry["joined"] = joined_scores(rolls, whole, rolled[-1] if len(rolled) > 1 else None)
    result = entries[0]
    if blocks is not None:
        result |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "bytes": blocks.bytes}
    if config.against is not None:
        result["against"] = entries[1]
        if near_only is not None:
            result["near_only"] = {"model": NEAR_ONLY, **scores_of(near_only, teacher, near_only)}
        if config.retrieval or config.tasks or config.diagnose:
            result["paired"] = paired(samples[0], samples[1], chances)
    return result


@dataclass(frozen=True)
class _Model:
    """A model of an evaluation, loaded once there is something to measure."""

    name: str
    index: int
    kept: Measured
    place: dict[str, str]

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The model."""
        return load_model(self.name, **self.place)[0]

    def measure(self, what: str, function: Callable[..., Found], *given: Any, **settings: Any) -> Found:
        """What a function gives of the model and what else it is given, or gave before a kill."""
        return self.kept.once(f"{self.index} {what}", lambda: function(self.loaded, *given, **settings))


def _within(positions: int, contexts: Sequence[int]) -> Sequence[int]:
    """The contexts that a model has positions for, or all of its positions."""
    return [context for context in contexts if context <= positions] or [positions]


def scores_of(
    score: Perplexity, teacher: Perplexity | None = None, near_only: Perplexity | None = None
) -> dict[str, Any]:
    """What results say of a perplexity, beside a teacher's and, by far gain, that of the teacher without far text."""
    told: dict[str, Any] = {
        "perplexity": score.perplexity,
        "perplexity_stderr": score.perplexity_stderr,
        "bits_per_byte": score.bits_per_byte,
    }
    told |= score.kept or {}
    if len(score.by_position) > 1:
        told["perplexity_at"] = score.by_position
    if teacher is not None:
        ratio = compare(teacher, score)
        told |= {"perplexity_ratio": ratio.perplexity_ratio, "perplexity_ratio_stderr": ratio.stderr}
        if near_only is not None:
            told |= far_scores(teacher, near_only, score)
    return told
