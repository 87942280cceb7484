"""Teacher and student side by side: numbers as text, the headline, and what to know before believing them."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kvlatent.evaluation.config import NEAR, NEAR_ONLY, SINKS, THRESHOLD
from kvlatent.evaluation.report.results import Answers, BenchRow, NeedleScore, Paired, Results, Score


def fixed(value: float | None, decimals: int = 0) -> str:
    """A number with thousands separators; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:,.{decimals}f}"


def _perplexity(value: float | None) -> str:
    return fixed(value, 2 if value is not None and value < 1000 else 0)


def times(value: float | None) -> str:
    """A ratio, as in `1.59 ×`."""
    if value is None or math.isnan(value):
        return "–"
    return f"{fixed(value, 3 if value < 0.1 else 2 if value < 100 else 0)} ×"


def milliseconds(value: float | None) -> str:
    """A time with its digits."""
    return fixed(value, 2 if value is not None and value < 10 else 1)


def count(value: float | None) -> str:
    """A whole number, where it is one."""
    return fixed(value, 0 if value is None or value == round(value, 0) else 1)


def mib(value: float | None) -> str:
    """Bytes as MiB."""
    return "–" if value is None else f"{fixed(value / 2**20, 2)} MiB"


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


class Cell(NamedTuple):
    """One number of a table: as measured, as printed, and its spread as printed."""

    value: float | None
    text: str
    spread: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


class Metric(NamedTuple):
    """One row of the summary: the same quantity of teacher and student."""

    name: str
    unit: str
    condition: str
    lower_is_better: bool
    teacher: Cell
    student: Cell
    ratio: Cell

    @property
    def better(self) -> str:
        """Which way is better."""
        return "lower is better" if self.lower_is_better else "higher is better"

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def perplexity_cell(score: Score) -> Cell:
    """Perplexity and its standard error."""
    error = f"± {_perplexity(score.perplexity_stderr)}" if score.perplexity_stderr is not None else ""
    return Cell(score.perplexity, _perplexity(score.perplexity), error)


def far_gain_cell(score: Score) -> Cell:
    """The share of far gain that is kept, and its standard error."""
    return share_cell(score.far_gain_kept, score.far_gain_kept_stderr)


def share_cell(share: float | None, error: float | None) -> Cell:
    """A share in percent, and its standard error."""
    if share is None:
        return Cell(None, "–")
    return Cell(share, f"{fixed(100 * share, 1)} %", "" if error is None else f"± {fixed(100 * error, 1)}")


def far_ratio_cell(score: Score) -> Cell:
    """Perplexity over the teacher's, of tokens that need far text."""
    return Cell(score.far_perplexity_ratio, times(score.far_perplexity_ratio))


def far_note(models: Mapping[str, Score]) -> str:
    """What far gain is and over how many tokens; empty where it wasn't measured."""
    score = next((score for score in models.values() if score.far_tokens is not None), None)
    if score is None:
        return ""
    return (
        f"Far gain is what the teacher gains from text beyond the newest {NEAR} tokens, over the tokens whose loss "
        f"that text lowers by {THRESHOLD:g} nats or more: {count(score.far_tokens)} of this text"
        + (f" ({100 * score.far_share:.1f} %)" if score.far_share is not None else "")
        + f". '{NEAR_ONLY}' sees the newest {NEAR} tokens and the first {SINKS}, and keeps none of it."
    )


def _bits_cell(score: Score) -> Cell:
    return Cell(score.bits_per_byte, fixed(score.bits_per_byte, 3))


def score_ratio(score: Score, teacher: Score) -> Cell:
    """Perplexity over the teacher's; the ratio of paired blocks where there is one."""
    ratio, error = score.perplexity_ratio, score.perplexity_ratio_stderr
    if ratio is None:
        ratio, error = _divide(score.perplexity, teacher.perplexity), None
    return Cell(ratio, times(ratio), f"± {fixed(error, 3 if error < 0.005 else 2)}" if error else "")


def _quotient(student: Cell, teacher: Cell) -> Cell:
    ratio = _divide(student.value, teacher.value)
    return Cell(ratio, times(ratio))


def _bench_cell(row: BenchRow | None, field: str, show: Callable[[float | None], str]) -> Cell:
    value = getattr(row, field, None)
    low_high = getattr(row, f"{field}_range", None)
    return Cell(value, show(value), f"({show(low_high[0])} to {show(low_high[1])})" if low_high else "")


def summary_of(results: Results) -> list[Metric]:
    """Teacher and student side by side; only quantities that at least one of them has."""
    models = results.evaluate.models
    teacher, student = models.get("teacher", Score()), models.get(results.student or "", Score())
    perplexities = perplexity_cell(teacher), perplexity_cell(student)
    bits = _bits_cell(teacher), _bits_cell(student)
    far = far_gain_cell(teacher), far_gain_cell(student)
    rows = [
        Metric("Perplexity", "", "held-out text", True, *perplexities, score_ratio(student, teacher)),
        Metric("Bits per byte", "", "held-out text", True, *bits, _quotient(bits[1], bits[0])),
        Metric("Far gain kept", "", "tokens that need far text", False, *far, _quotient(far[1], far[0])),
    ]
    pair = results.bench_pair
    window = any(row.window_bytes for row in pair.values())
    grows_evenly = not window and not any(row.policy for row in pair.values())
    for field, name, unit, lower, show in (
        ("cache_bytes_per_token", "KV cache", f"bytes per token{' beyond the window' if window else ''}", True, count),
        *([] if grows_evenly else [("cache_bytes", "KV cache in use", "bytes", True, count)]),
        ("ttft_ms", "TTFT", "ms", True, milliseconds),
        ("tpot_ms", "TPOT", "ms", True, milliseconds),
        ("tokens_per_s", "Throughput", "tokens/s", False, milliseconds),
    ):
        cells = _bench_cell(pair.get("teacher"), field, show), _bench_cell(pair.get("student"), field, show)
        condition = ""
        if pair:
            row = next(iter(pair.values()))
            condition = row.dtype if field == "cache_bytes_per_token" else f"context {row.context:,}, batch {row.batch}"
            if field == "cache_bytes":
                condition += f", {row.new_tokens} new tokens, {row.dtype}"
        rows.append(Metric(name, unit, condition, lower, *cells, _quotient(cells[1], cells[0])))
    return [row for row in rows if row.teacher.value is not None or row.student.value is not None]


class Answer(NamedTuple):
    """One metric of a test, of teacher and student."""

    test: str
    teacher: Cell
    student: Cell
    p_value: str
    kept: Cell
    chance: str


def answers_of(answers: Answers) -> list[Answer]:
    """The metrics of every test that both models took."""
    return [
        Answer(
            f"{test} {metric}".replace("_", " "),
            _answered(answers, "teacher", test, metric),
            _answered(answers, "student", test, metric),
            p_value_text(tested),
            share_cell(tested.kept, tested.kept_stderr),
            fixed(tested.chance, 3),
        )
        for test, metrics in answers.paired.items()
        for metric, tested in metrics.items()
    ]


def _answered(answers: Answers, model: str, test: str, metric: str) -> Cell:
    scores = answers.models.get(model, {}).get(test, {})
    value, error = scores.get(metric), scores.get(f"{metric}_stderr")
    return Cell(value, fixed(value, 3), "" if error is None else f"± {fixed(error, 3)}")


def p_value_text(tested: Paired) -> str:
    """A p-value with its digits."""
    return f"{tested.p_value:.3g}"


def needle_cells(score: NeedleScore) -> list[Cell]:
    """How often the needle is found, and how likely the model holds it."""
    log_probability = score.code_log_probability
    return [share_cell(score.exact_match, None), Cell(log_probability, fixed(log_probability, 2))]


def _share_of_cache(ratio: float) -> str:
    words = {
        1 / 4: "A quarter of",
        1 / 3: "A third of",
        1 / 2: "Half",
        2 / 3: "Two thirds of",
        3 / 4: "Three quarters of",
    }
    near = next((word for share, word in words.items() if abs(ratio - share) < 0.004), None)
    return f"{near or f'{100 * ratio:.0f} % of'} the KV cache"


def headline_of(results: Results) -> str:
    """What the run achieved, in one line; empty if it measured nothing."""
    metrics = {metric.name: metric for metric in summary_of(results)}
    parts = []
    cache, in_use, quality = (metrics.get(name) for name in ("KV cache", "KV cache in use", "Perplexity"))
    if cache and cache.ratio.value is not None:
        per_token = f"{cache.teacher.text} → {cache.student.text} bytes per token"
        if in_use and in_use.ratio.value is not None:
            context = next(iter(results.bench_pair.values())).context
            whole = f" beyond {results.whole_tokens} whole ones" if results.whole_tokens else ""
            per_token = f"at context {context:,}; {per_token}{whole}"
            cache = in_use
        assert cache.ratio.value is not None
        parts.append(f"{_share_of_cache(cache.ratio.value)} ({per_token})")
    if quality and quality.ratio.value is not None:
        untrained = ", before any training" if "no training" in (results.student or "") else ""
        gain = metrics.get("Far gain kept")
        far = f" and {gain.student.text} of its far gain" if gain and gain.student.value is not None else ""
        parts.append(f"{'at ' if parts else 'At '}{quality.ratio.text} the teacher's perplexity{far}{untrained}")
    return " ".join(parts)


def _texts(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every `text` field within the recipe (`text`, `train_text`, …), with the path that leads to it."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif (key == "text" or key.endswith("_text")) and value:
            yield f"{prefix}{key}", [value] if isinstance(value, str) else list(map(str, value))


POLICY_NOTES = {
    "held_out": "judged on the second half of each block, from what {} has left of the first; teachers from all of it",
    "bench": "benchmarked with a cache that keeps to {}",
    "generate": "continuing prompts from what {} has left of them",
}
"""What a policy in an entry of a recipe means for students."""


def _policies(recipe: Mapping[str, Any]) -> Iterator[str]:
    for entry, note in POLICY_NOTES.items():
        asked = recipe.get(entry)
        if isinstance(asked, Mapping) and asked.get("policy"):
            yield f"Students are {note.format(' '.join(str(asked[x]) for x in ('policy', 'keep') if x in asked))}."


def notes_on(results: Results) -> list[str]:
    """What a reader should know before believing the numbers; only what the results say."""
    notes = []
    evaluate = results.evaluate
    held_out = [evaluate.text] if isinstance(evaluate.text, str) else evaluate.text
    trained = {where: sources for where, sources in _texts(results.recipe) if not re.match(r"(held_out|eval)", where)}
    for where, sources in trained.items():
        notes.append(f"Text named by the recipe under {where}: {', '.join(sources)}.")
    if held_out:
        size = ", ".join(
            f"{count:,} {unit}" for count, unit in ((evaluate.tokens, "tokens"), (evaluate.bytes, "bytes")) if count
        )
        size = f" ({size})" if size else ""
        notes.append(f"Perplexity and bits per byte on held-out text: {', '.join(held_out)}{size}.")
        used = {source for sources in trained.values() for source in sources}
        if shared := sorted(used.intersection(held_out)):
            notes.append(f"Caution: {', '.join(shared)} is both held-out text and calibration or training text.")
        elif used:
            notes.append("No held-out source is among the calibration and training sources.")
    if any(score.perplexity_stderr is not None for score in evaluate.models.values()):
        notes.append("± is the standard error of the perplexity, with blocks of held-out text as the samples.")
    if far := far_note(evaluate.models):
        notes.append(far)
    notes += _policies(results.recipe)
    if any(row.window_bytes for row in results.bench.rows):
        notes.append(
            f"The student holds {results.whole_tokens} tokens of a sequence whole, in as many bytes as the teacher; "
            "its bytes per token are those of all others."
        )
    for row in results.bench.rows:
        if row.cache_bytes_predicted is not None and row.cache_bytes != row.cache_bytes_predicted:
            notes.append(
                f"Caution: the {row.model}'s cache measured {count(row.cache_bytes)} bytes at context "
                f"{row.context:,}, predicted {count(row.cache_bytes_predicted)}."
            )
    return notes
