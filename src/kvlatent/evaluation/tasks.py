"""Tasks of lm-eval on a model in memory, and whether two models differ on the same samples."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.errors import UserError, needs
from kvlatent.evaluation.perplexity import standard_error

ACCURACIES = ("acc", "acc_norm", "exact_match")
"""Metrics of lm-eval that are the share of right answers."""


class PairedTest(NamedTuple):
    """Two models on the same samples."""

    difference: float
    """Mean of `b - a`."""
    stderr: float
    p_value: float
    """Two-sided, for the hypothesis that neither model is better."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One lm-eval task under one model."""

    metrics: dict[str, float]
    """Every metric and its standard error: `acc`, `acc_stderr`, ..."""
    samples: dict[str, list[float]]
    """Each metric of each sample, in document order; `paired_test` takes two such lists."""
    chance: dict[str, float] = field(default_factory=dict)
    """What guessing scores, for each metric that is an accuracy."""


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
) -> dict[str, TaskScore]:
    """Run lm-eval tasks on a model in memory.

    lm-eval loads the task data; set `HF_HUB_OFFLINE=1` and `HF_DATASETS_OFFLINE=1` to keep it to local files.

    Args:
        model: On any device.
        tokenizer: The model's.
        tasks: Names of tasks or groups, or paths of task files ending in `.yaml`.
        limit: Samples per task, from the first; None for all.

    Raises:
        UserError: lm-eval isn't installed, a task is unknown, or its data can't be loaded.
    """
    names, manager = find_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        outcome = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype=torch.float32),
            tasks=names,
            task_manager=manager,
            limit=limit,
        )
    except (ConnectionError, FileNotFoundError) as error:  # what datasets raises offline or for a wrong data_files
        raise UserError(f"the data of {', '.join(names)} can't be loaded: {str(error).splitlines()[0]}") from error
    scores = {}
    for name, result in outcome["results"].items():
        answered = _one_filter(outcome["samples"].get(name, []))
        choice = outcome["configs"].get(name, {}).get("output_type") == "multiple_choice"
        scores[name] = TaskScore(
            metrics=_metrics(result), samples=_sample_metrics(answered), chance=_chance(answered, choice=choice)
        )
    return scores


def find_tasks(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Names of lm-eval tasks, and the `TaskManager` that knows them.

    Args:
        tasks: As for `lm_eval_tasks`.

    Raises:
        UserError: lm-eval isn't installed, or a task is unknown.
    """
    with needs("eval"):
        from lm_eval.tasks import TaskManager

    files = {task: Path(task) for task in tasks if task.endswith(".yaml")}
    names = [_task_name(files[task]) if task in files else task for task in tasks]
    folders = dict.fromkeys(str(path.parent.resolve()) for path in files.values())
    # Reading the thousands of tasks that come with lm-eval takes many seconds.
    manager = TaskManager(include_path=list(folders), include_defaults=len(files) < len(tasks))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}: name one it lists, or a .yaml task file")
    return names, manager


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Test whether two models differ on the same samples.

    For right-or-wrong samples (0 or 1) this is McNemar's exact test, a sign test on the samples where they disagree;
    for other values it is a normal approximation on the paired differences.

    Raises:
        UserError: The sequences differ in length or have fewer than 2 samples.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"a paired test needs the same 2 or more samples of both models; got {len(a)} and {len(b)}")
    differences = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    difference = differences.mean().item()
    error = standard_error(differences)
    assert error is not None
    if {*a, *b} <= {0.0, 1.0}:
        losses, wins = int((differences < 0).sum()), int((differences > 0).sum())
        tail = sum(math.comb(losses + wins, k) for k in range(min(losses, wins) + 1))
        p_value = min(1.0, 2 * tail / 2 ** (losses + wins))
    elif error == 0:
        p_value = 1.0 if difference == 0 else 0.0
    else:
        p_value = math.erfc(abs(difference) / error / math.sqrt(2))
    return PairedTest(difference, error, p_value)


def kept_above_chance(
    teacher: Sequence[float], student: Sequence[float], chance: float
) -> tuple[float | None, float | None]:
    """How much of what a teacher scores above chance its student keeps, and the standard error of that share.

    Args:
        teacher: Its score on every sample.
        student: Its own on the same samples.
        chance: What guessing scores.

    Returns:
        (student - chance) / (teacher - chance) of the means, 1 being all, and its error with the samples paired, to
        first order. Both are None where the teacher is less than two standard errors above chance: there is nothing to
        keep.
    """
    mine, theirs = (torch.tensor(x, dtype=torch.float64) - chance for x in (student, teacher))
    above, error = theirs.mean().item(), standard_error(theirs)
    if error is None or above <= 2 * error:
        return None, None
    kept = mine.mean().item() / above
    spread = standard_error(mine - kept * theirs)
    return kept, None if spread is None else spread / above


Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""What one model scored, by test or task and by metric."""


def paired(
    student: Samples, teacher: Samples, chances: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Test two models on the samples that both answered.

    Args:
        student: The one whose gain is a positive difference.
        teacher: The other one.
        chances: What guessing scores on a task, by metric.

    Returns:
        By test and metric the fields of `PairedTest`, and where a chance is known it as `chance`, with
        `kept_above_chance` as `kept` and `kept_stderr`.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for test, metrics in student.items():
        found[test] = {}
        for metric, mine in metrics.items():
            if metric not in teacher[test] or len(mine) < 2:
                continue
            theirs = teacher[test][metric]
            found[test][metric] = dict(paired_test(theirs, mine)._asdict())
            if (chance := (chances or {}).get(test, {}).get(metric)) is not None:
                kept, error = kept_above_chance(theirs, mine, chance)
                found[test][metric] |= {"chance": chance, "kept": kept, "kept_stderr": error}
    return found


def _task_name(path: Path) -> str:
    """Return the `task` a file defines, without resolving its own tags such as `!function`."""
    if not path.is_file():
        raise UserError(f"no task file {path}")
    found = re.search(r"^task:[ \t]*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise UserError(f"{path} is no lm-eval task file: it has no line `task: NAME`")
    return found[1]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of lm-eval's `metric,filter` entries; its default filter, `none`, is not worth a name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }


def _one_filter(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of a task's first filter, in document order."""
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return sorted(kept, key=lambda sample: int(sample["doc_id"]))


def _sample_metrics(samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {
        metric: [float(sample[metric]) for sample in samples]
        for metric in (samples[0]["metrics"] if samples else ())
        if isinstance(samples[0][metric], int | float)
    }


def _chance(samples: Sequence[dict[str, Any]], *, choice: bool) -> dict[str, float]:
    """What guessing scores by metric: right answers over choices, or none where the answer is written freely."""
    found = {
        metric: values
        for metric, values in _sample_metrics(samples).items()
        if metric in ACCURACIES and {*values} <= {0.0, 1.0}
    }
    if not choice:
        return dict.fromkeys(found, 0.0)
    asked = 2 if samples and "acc_mutual_info" in samples[0]["metrics"] else 1  # that one asks twice for every choice
    right = [len(sample["target"]) if isinstance(sample["target"], list) else 1 for sample in samples]
    shares = [n * asked / len(sample["filtered_resps"]) for n, sample in zip(right, samples, strict=True)]
    return dict.fromkeys(found, sum(shares) / len(shares)) if shares else {}
