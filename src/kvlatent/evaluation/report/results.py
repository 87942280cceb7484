"""What a run folder holds: `results.json` and, where the run wrote them, `metrics.jsonl` and `record.json`.

Each section and each field may be absent; a wrong type is the user's error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kvlatent.errors import UserError
from kvlatent.evaluation.config import NEAR_ONLY
from kvlatent.files import check_regular


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data


class Score(_Section):
    """Quality of one model on the held-out text."""

    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    bits_per_byte: float | None = None
    far_gain_kept: float | None = None
    far_gain_kept_stderr: float | None = None
    far_perplexity_ratio: float | None = None
    far_tokens: int | None = None
    far_share: float | None = None


class JoinedScore(Score):
    """Quality of one model on a whole text."""

    tokens: int | None = None
    word_perplexity: float | None = None


class _Evaluate(_Section):
    text: list[str] | str = []
    tokens: int | None = None
    bytes: int | None = None
    models: dict[str, Score] = {}


class BenchRow(_Section):
    """One model at one workload; times in milliseconds."""

    model: str
    context: int = 0
    batch: int = 1
    new_tokens: int = 0
    dtype: str = ""
    cache_bytes: float | None = None
    cache_bytes_predicted: float | None = None
    cache_bytes_per_token: float | None = None
    window_bytes: float = 0
    ttft_ms: float | None = None
    ttft_ms_range: tuple[float, float] | None = None
    tpot_ms: float | None = None
    tpot_ms_range: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: float | None = None
    policy: str | None = None

    @property
    def workload(self) -> tuple[int, int, int, str]:
        """What has to be equal for two rows to be compared."""
        return (self.context, self.batch, self.new_tokens, self.dtype)


class _Bench(_Section):
    rows: list[BenchRow] = []


class _WordOrder(_Section):
    spans: int = 0
    true_preferred: float | None = None
    true_preferred_stderr: float | None = None
    margin: float | None = None
    margin_stderr: float | None = None


class _Ratio(_Section):
    perplexity_ratio: float | None = None
    stderr: float | None = None


class Diagnosis(_Section):
    """Where one model fails; a student's beside its teacher's."""

    entropy: float | None = None
    entropy_by_head: list[list[float]] = []
    word_order: _WordOrder = _WordOrder()
    ratio_by_source: dict[str, _Ratio] = {}


class _Joined(_Section):
    """Perplexity of a whole text in windows of `length` tokens that advance by `stride`."""

    text: list[str] = []
    length: int | None = None
    stride: int | None = None
    models: dict[str, JoinedScore] = {}


class _AtDepth(_Section):
    depth: tuple[float, float]
    trials: int = 0
    exact_match: float | None = None


class NeedleScore(_Section):
    """How one model finds the needle at one length."""

    trials: int = 0
    exact_match: float | None = None
    code_log_probability: float | None = None
    by_depth: list[_AtDepth] = []


class Paired(_Section):
    """One metric of a test that both models took: student less teacher, and what is kept of the score above chance."""

    difference: float
    stderr: float
    p_value: float
    chance: float | None = None
    kept: float | None = None
    kept_stderr: float | None = None


class Answers(_Section):
    """What teacher and student answered, by test and metric."""

    models: dict[str, dict[str, dict[str, float | None]]] = {}
    paired: dict[str, dict[str, Paired]] = {}


class _Generation(_Section):
    prompt: str = ""
    teacher: str | None = None
    student: str | None = None


class Results(_Section):
    """The content of `results.json`."""

    title: str | None = None
    model: str | None = None
    base_model: str | None = None
    license: str | None = None
    record: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    evaluate: _Evaluate = _Evaluate()
    diagnose: dict[str, Diagnosis] = {}
    joined: _Joined = _Joined()
    needle: dict[str, dict[int, NeedleScore]] = {}
    """By model and length."""
    retrieval: Answers = Answers()
    tasks: Answers = Answers()
    bench: _Bench = _Bench()
    generations: list[_Generation] = []
    spec: dict[str, Any] = {}

    @property
    def student(self) -> str | None:
        """The evaluated model that the headline is about: the recipe's first student, healed if it was healed."""
        names = [name for name in self.evaluate.models if name not in ("teacher", NEAR_ONLY)]
        students = self.recipe.get("students")
        first = students[0].get("name") if isinstance(students, list) and students else self.spec.get("preset")
        preferred = ("student", f"{first}, healed", f"{first}, no training", "best, healed", "best, no training")
        return next((name for name in preferred if name in names), names[-1] if names else None)

    @property
    def whole_tokens(self) -> int:
        """Tokens of a sequence that the student holds whole, window and sinks."""
        return int(self.spec.get("window") or 0) + int(self.spec.get("sinks") or 0)

    @property
    def bench_pair(self) -> dict[str, BenchRow]:
        """`teacher` and `student` rows of the largest workload measured on both, or on whichever was measured."""
        groups: dict[tuple[int, int, int, str], dict[str, BenchRow]] = {}
        for row in self.bench.rows:
            if row.model in ("teacher", "student"):
                groups.setdefault(row.workload, {})[row.model] = row
        return max(groups.values(), key=lambda g: (len(g), *next(iter(g.values())).workload[:3]), default={})


class Step(_Section):
    """One line of `metrics.jsonl`."""

    stage: int
    step: int
    tokens: int = 0
    loss: float | None = None
    layer_loss: list[float] | None = None
    held_out_perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run folder holds."""

    name: str
    results: Results
    steps: list[Step]


def parse_results(data: Any, where: str) -> Results:
    """Check the types of what `where` holds.

    Raises:
        UserError: One of them is wrong.
    """
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the top level"
        raise UserError(f"{where} is not a results file of kvlatent: {field}: {first['msg']}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); run the step that writes it again") from error


def _read_steps(path: Path) -> list[Step]:
    if not path.is_file():
        return []
    steps: dict[tuple[int, int], Step] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step = Step.model_validate(json.loads(line))
        except ValueError as error:
            if at == len(lines):  # an interrupted run leaves half a line at the end
                break
            raise UserError(f"{path} line {at} is not a metrics line with stage, step and loss") from error
        steps[step.stage, step.step] = step  # a resumed run logs some steps again: the later one counts
    return [steps[key] for key in sorted(steps)]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: It has no `results.json`, or a file in it can't be read.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} has no results.json: give a run folder that `kvlatent run` or `eval` has filled")
    check_regular(folder)
    results = parse_results(_read_json(path), str(path))
    if (folder / "record.json").is_file():
        record = _read_json(folder / "record.json")
        if not isinstance(record, dict):
            raise UserError(f"{folder / 'record.json'} is not a JSON object; expected versions, argv and hardware")
        results = results.model_copy(update={"record": {**record, **results.record}})
    return Run(name=folder.resolve().name, results=results, steps=_read_steps(folder / "metrics.jsonl"))
