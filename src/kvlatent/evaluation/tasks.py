"""Tasks of lm-eval on a model in memory, and whether two models differ on the same samples."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.errors import UserError, needs
from kvlatent.evaluation.perplexity import standard_error


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
    with needs("eval"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    files = {task: Path(task) for task in tasks if task.endswith(".yaml")}
    names = [_task_name(files[task]) if task in files else task for task in tasks]
    folders = dict.fromkeys(str(path.parent.resolve()) for path in files.values())
    # Reading the thousands of tasks that come with lm-eval takes many seconds.
    manager = TaskManager(include_path=list(folders), include_defaults=len(files) < len(tasks))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}: name one it lists, or a .yaml task file")

    try:
        outcome = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype=torch.float32),
            tasks=names,
            task_manager=manager,
            limit=limit,
        )
    except (ConnectionError, FileNotFoundError) as error:  # what datasets raises offline or for a wrong data_files
        raise UserError(f"the data of {', '.join(names)} can't be loaded: {str(error).splitlines()[0]}") from error
    return {
        name: TaskScore(metrics=_metrics(result), samples=_sample_metrics(outcome["samples"].get(name, [])))
        for name, result in outcome["results"].items()
    }


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


def _sample_metrics(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    if not samples:
        return {}
    one_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    ordered = sorted(one_filter, key=lambda sample: int(sample["doc_id"]))
    return {
        metric: [float(sample[metric]) for sample in ordered]
        for metric in ordered[0]["metrics"]
        if isinstance(ordered[0][metric], int | float)
    }
