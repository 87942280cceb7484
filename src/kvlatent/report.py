"""Results → one HTML page, a plain-text summary, and a model card.

A run folder holds `results.json` and, where the run wrote them, `metrics.jsonl` and `record.json`. Every section of
them may be absent: what is there is shown, what is not there is left out, and no number is made up.
"""

import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kvlatent.errors import UserError
from kvlatent.files import replaced

_T = TypeVar("_T")

# --------------------------------------------------------------------------------------------------------------------
# What a run folder holds. Each section and each field may be absent; a wrong type is the user's error.


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data


class _Score(_Section):
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    bits_per_byte: float | None = None


class _Evaluate(_Section):
    text: list[str] | str = []
    tokens: int | None = None
    bytes: int | None = None
    models: dict[str, _Score] = {}


class _BenchRow(_Section):
    model: str
    context: int = 0
    batch: int = 1
    new_tokens: int = 0
    dtype: str = ""
    cache_bytes: float | None = None
    cache_bytes_predicted: float | None = None
    cache_bytes_per_token: float | None = None
    ttft_ms: float | None = None
    ttft_ms_range: tuple[float, float] | None = None
    tpot_ms: float | None = None
    tpot_ms_range: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: float | None = None

    @property
    def workload(self) -> tuple[int, int, int, str]:
        return (self.context, self.batch, self.new_tokens, self.dtype)


class _Bench(_Section):
    rows: list[_BenchRow] = []


class _Generation(_Section):
    prompt: str = ""
    teacher: str | None = None
    student: str | None = None


class _Results(_Section):
    title: str | None = None
    model: str | None = None
    base_model: str | None = None
    license: str | None = None
    record: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    evaluate: _Evaluate = _Evaluate()
    bench: _Bench = _Bench()
    generations: list[_Generation] = []
    spec: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []

    @property
    def student(self) -> str | None:
        """The evaluated model that the headline is about: this run's own preset, healed if it was healed."""
        names = [name for name in self.evaluate.models if name != "teacher"]
        preset = self.spec.get("preset") or self.recipe.get("preset")
        preferred = ("student", f"{preset}, healed", f"{preset}, no training", "best, healed", "best, no training")
        return next((name for name in preferred if name in names), names[-1] if names else None)

    @property
    def bench_pair(self) -> dict[str, _BenchRow]:
        """`teacher` and `student` rows of the largest workload measured on both, or on whichever was measured."""
        groups: dict[tuple[int, int, int, str], dict[str, _BenchRow]] = {}
        for row in self.bench.rows:
            if row.model in ("teacher", "student"):
                groups.setdefault(row.workload, {})[row.model] = row
        return max(groups.values(), key=lambda g: (len(g), *next(iter(g.values())).workload[:3]), default={})


class _Step(_Section):
    stage: int
    step: int
    tokens: int = 0
    loss: float | None = None
    layer_loss: list[float] | None = None
    held_out_perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Run:
    name: str
    results: _Results
    steps: list[_Step]


def _parse(data: Any, where: str) -> _Results:
    try:
        return _Results.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the top level"
        raise UserError(f"{where} is not a results file of kvlatent: {field}: {first['msg']}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}); run the step that writes it again") from error


def _read_steps(path: Path) -> list[_Step]:
    if not path.is_file():
        return []
    steps: dict[tuple[int, int], _Step] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step = _Step.model_validate(json.loads(line))
        except ValueError as error:
            if at == len(lines):  # an interrupted run leaves half a line at the end
                break
            raise UserError(f"{path} line {at} is not a metrics line with stage, step and loss") from error
        steps[step.stage, step.step] = step  # a resumed run logs some steps again: the later one counts
    return [steps[key] for key in sorted(steps)]


def _read_run(folder: Path) -> _Run:
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} has no results.json: give a run folder that `kvlatent run` or `eval` has filled")
    results = _parse(_read_json(path), str(path))
    if (folder / "record.json").is_file():
        record = _read_json(folder / "record.json")
        if not isinstance(record, dict):
            raise UserError(f"{folder / 'record.json'} is not a JSON object; expected versions, argv and hardware")
        results = results.model_copy(update={"record": {**record, **results.record}})
    return _Run(name=folder.resolve().name, results=results, steps=_read_steps(folder / "metrics.jsonl"))


# --------------------------------------------------------------------------------------------------------------------
# Numbers as text


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _fixed(value: float | None, decimals: int = 0) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:,.{decimals}f}"


def _perplexity(value: float | None) -> str:
    return _fixed(value, 2 if value is not None and value < 1000 else 0)


def _ratio(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{_fixed(value, 3 if value < 0.1 else 2 if value < 100 else 0)} ×"


def _milliseconds(value: float | None) -> str:
    return _fixed(value, 2 if value is not None and value < 10 else 1)


def _count(value: float | None) -> str:
    return _fixed(value, 0 if value is None or value == round(value, 0) else 1)


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{_fixed(value / 2**20, 2)} MiB"


def _divide(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


class _Cell(NamedTuple):
    """One number of a table: as measured, as printed, and its spread as printed."""

    value: float | None
    text: str
    spread: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.spread}".rstrip()


class _Metric(NamedTuple):
    """One row of the summary: the same quantity of teacher and student."""

    name: str
    unit: str
    condition: str
    lower_is_better: bool
    teacher: _Cell
    student: _Cell
    ratio: _Cell

    @property
    def better(self) -> str:
        return "lower is better" if self.lower_is_better else "higher is better"

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


def _perplexity_cell(score: _Score) -> _Cell:
    error = f"± {_perplexity(score.perplexity_stderr)}" if score.perplexity_stderr is not None else ""
    return _Cell(score.perplexity, _perplexity(score.perplexity), error)


def _bits_cell(score: _Score) -> _Cell:
    return _Cell(score.bits_per_byte, _fixed(score.bits_per_byte, 3))


def _score_ratio(score: _Score, teacher: _Score) -> _Cell:
    ratio, error = score.perplexity_ratio, score.perplexity_ratio_stderr
    if ratio is None:
        ratio, error = _divide(score.perplexity, teacher.perplexity), None
    return _Cell(ratio, _ratio(ratio), f"± {_fixed(error, 3 if error < 0.005 else 2)}" if error else "")


def _quotient(student: _Cell, teacher: _Cell) -> _Cell:
    ratio = _divide(student.value, teacher.value)
    return _Cell(ratio, _ratio(ratio))


def _bench_cell(row: _BenchRow | None, field: str, show: Callable[[float | None], str]) -> _Cell:
    value = getattr(row, field, None)
    low_high = getattr(row, f"{field}_range", None)
    return _Cell(value, show(value), f"({show(low_high[0])} to {show(low_high[1])})" if low_high else "")


def _summary(results: _Results) -> list[_Metric]:
    """Teacher and student side by side; only quantities that at least one of them has."""
    models = results.evaluate.models
    teacher, student = models.get("teacher", _Score()), models.get(results.student or "", _Score())
    perplexities = _perplexity_cell(teacher), _perplexity_cell(student)
    bits = _bits_cell(teacher), _bits_cell(student)
    rows = [
        _Metric("Perplexity", "", "held-out text", True, *perplexities, _score_ratio(student, teacher)),
        _Metric("Bits per byte", "", "held-out text", True, *bits, _quotient(bits[1], bits[0])),
    ]
    pair = results.bench_pair
    for field, name, unit, lower, show in (
        ("cache_bytes_per_token", "KV cache", "bytes per token", True, _count),
        ("ttft_ms", "TTFT", "ms", True, _milliseconds),
        ("tpot_ms", "TPOT", "ms", True, _milliseconds),
        ("tokens_per_s", "Throughput", "tokens/s", False, _milliseconds),
    ):
        cells = _bench_cell(pair.get("teacher"), field, show), _bench_cell(pair.get("student"), field, show)
        condition = ""
        if pair:
            row = next(iter(pair.values()))
            condition = row.dtype if field == "cache_bytes_per_token" else f"context {row.context:,}, batch {row.batch}"
        rows.append(_Metric(name, unit, condition, lower, *cells, _quotient(cells[1], cells[0])))
    return [row for row in rows if row.teacher.value is not None or row.student.value is not None]


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


def _headline(results: _Results) -> str:
    metrics = {metric.name: metric for metric in _summary(results)}
    parts = []
    cache, quality = metrics.get("KV cache"), metrics.get("Perplexity")
    if cache and cache.ratio.value is not None:
        parts.append(
            f"{_share_of_cache(cache.ratio.value)} ({cache.teacher.text} → {cache.student.text} bytes per token)"
        )
    if quality and quality.ratio.value is not None:
        untrained = ", before any training" if "no training" in (results.student or "") else ""
        parts.append(f"{'at ' if parts else 'At '}{quality.ratio.text} the teacher's perplexity{untrained}")
    return " ".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# Figures: matplotlib draws in stand-in colours, which become the page's CSS variables and so follow its scheme

_INK, _MUTED, _GRID, _TEACHER, _STUDENT, _OTHER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = dict(
    zip(
        (_INK, _MUTED, _GRID, _TEACHER, _STUDENT, _OTHER),
        ("ink", "muted", "line", "teacher", "student", "other"),
        strict=True,
    )
)
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvlatent",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "text.parse_math": False,
}


class _Picture(NamedTuple):
    title: str
    caption: str
    svg: Markup


def _picture(title: str, caption: str, draw: Callable[[Axes], None]) -> _Picture:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1, … would repeat within the page
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = (
        f'<svg {view[0]} role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
        + svg[svg.index(">") + 1 :]
    )
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    return _Picture(title, caption, Markup(svg))  # matplotlib has escaped the texts it drew


def _colour(model: str) -> str:
    return _TEACHER if model == "teacher" else _OTHER if model.startswith("paper") else _STUDENT


def _short(text: str, width: int = 26) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _thin(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _plain_axis(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _wide(values: Iterable[float], times: float) -> bool:
    values = list(values)
    return min(values) > 0 and max(values) / min(values) > times


def _perplexity_bars(results: _Results) -> Iterator[_Picture]:
    teacher = results.evaluate.models.get("teacher", _Score())
    ratios = {name: _score_ratio(score, teacher).value for name, score in results.evaluate.models.items()}
    bars = {name: ratio for name, ratio in ratios.items() if ratio is not None and math.isfinite(ratio)}
    if len(bars) < 2:
        return
    log = _wide(bars.values(), 20)

    def draw(ax: Axes) -> None:
        ax.barh(range(len(bars)), list(bars.values()), color=[_colour(name) for name in bars], height=0.62)
        for y, ratio in enumerate(bars.values()):
            ax.annotate(_ratio(ratio), (ratio, y), xytext=(4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(bars)), [_short(name) for name in bars])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        if log:
            ax.set_xscale("log")
            ax.set_xlim(0.5, max(bars.values()) * 12)
            _plain_axis(ax.xaxis)
        else:
            ax.set_xlim(0, max(bars.values()) * 1.25)
        ax.axvline(1, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_xlabel(f"Perplexity, × the teacher's{' (log scale)' if log else ''}")

    yield _picture("Perplexity of every model", "Lower is better; the dashed line is the teacher.", draw)


def _loss_curve(steps: Sequence[_Step], stage: int, what: str) -> Iterator[_Picture]:
    points = [(s.step, s.loss) for s in steps if s.stage == stage and s.loss is not None and math.isfinite(s.loss)]
    if not points:
        return

    def draw(ax: Axes) -> None:
        x, y = zip(*_thin(points, 1000), strict=True)
        ax.plot(x, y, color=_STUDENT, marker="o" if len(x) < 40 else None, markersize=2.5)
        if _wide(y, 8):
            ax.set_yscale("log")
            _plain_axis(ax.yaxis)
        ax.set_xlabel("Step")
        ax.set_ylabel(what)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    yield _picture(f"Stage {stage} training loss", "Lower is better.", draw)


def _layer_loss_map(steps: Sequence[_Step]) -> Iterator[_Picture]:
    rows = [(s.step, s.layer_loss) for s in steps if s.stage == 1 and s.layer_loss]
    rows = [(step, loss) for step, loss in rows if len(loss) == len(rows[-1][1])]
    if len(rows) < 2:
        return
    rows = _thin(rows, 120)
    columns = [loss for _, loss in rows]
    positive = all(math.isfinite(value) and value > 0 for loss in columns for value in loss)

    def draw(ax: Axes) -> None:
        ax.grid(visible=False)
        mesh = ax.pcolormesh(
            [step for step, _ in rows],
            range(len(columns[0])),
            [list(layer) for layer in zip(*columns, strict=True)],
            shading="nearest",
            cmap="viridis",
            norm=LogNorm() if positive else None,
            rasterized=True,
        )
        figure = ax.get_figure(root=True)
        assert figure is not None
        bar = figure.colorbar(mesh, ax=ax, pad=0.02)
        bar.solids.set_rasterized(True)  # type: ignore[union-attr]
        bar.set_label(f"Loss{' (log scale)' if positive else ''}")
        bar.outline.set_visible(False)
        if positive:
            _plain_axis(bar.ax.yaxis)
        ax.set_xlabel("Step")
        ax.set_ylabel("Layer")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))

    yield _picture("Stage 1 loss of every layer", "Darker is lower, and lower is better.", draw)


def _held_out_curve(steps: Sequence[_Step]) -> Iterator[_Picture]:
    first_stage = max((s.tokens for s in steps if s.stage == 1), default=0)
    second = [s.tokens for s in steps if s.stage == 2]
    offset = first_stage if second and min(second) < first_stage else 0  # tokens were counted anew in stage 2
    points = {
        stage: [
            (s.tokens + (offset if stage == 2 else 0), s.held_out_perplexity)
            for s in steps
            if s.stage == stage and s.held_out_perplexity is not None and math.isfinite(s.held_out_perplexity)
        ]
        for stage in (1, 2)
    }
    everything = points[1] + points[2]
    if not everything:
        return

    def draw(ax: Axes) -> None:
        for stage, colour in ((1, _OTHER), (2, _STUDENT)):
            if points[stage]:
                x, y = zip(*points[stage], strict=True)
                ax.plot(x, y, color=colour, marker="o", markersize=3, label=f"stage {stage}")
        if _wide((y for _, y in everything), 8):
            ax.set_yscale("log")
            _plain_axis(ax.yaxis)
        _plain_axis(ax.xaxis)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel("Healing tokens")
        ax.set_ylabel("Held-out perplexity")
        if points[1] and points[2]:
            ax.legend()

    yield _picture("Held-out perplexity while healing", "Lower is better.", draw)


def _cache_lines(results: _Results) -> Iterator[_Picture]:
    per_token = {name: row.cache_bytes_per_token for name, row in results.bench_pair.items()}
    lines = {name: per_token[name] for name in ("teacher", "student") if per_token.get(name)}
    if not lines:
        return
    longest = max(8192, 2 * max(row.context for row in results.bench.rows))

    def draw(ax: Axes) -> None:
        for name, size in lines.items():
            assert size is not None
            ax.plot([0, longest], [0, size * longest / 2**20], color=_colour(name))
            ax.annotate(name, (longest, size * longest / 2**20), xytext=(-4, 6), textcoords="offset points", ha="right")
        ax.set_xlim(0, longest)
        ax.set_ylim(0, max(size or 0 for size in lines.values()) * longest / 2**20 * 1.12)
        ax.set_xticks([longest * i // 4 for i in range(5)])
        _plain_axis(ax.xaxis)
        ax.set_xlabel("Context (tokens)")
        ax.set_ylabel("KV cache of one sequence (MiB)")

    dtype = next(iter(results.bench_pair.values())).dtype
    note = f"Computed from the bytes per token{f' in {dtype}' if dtype else ''}. Lower is better."
    yield _picture("KV cache against context", note, draw)


def _latency_bars(results: _Results, field: str, title: str) -> Iterator[_Picture]:
    rows = [row for row in results.bench.rows if _finite(getattr(row, field)) and row.model in ("teacher", "student")]
    if not rows:
        return
    workloads = sorted({row.workload for row in rows})

    def draw(ax: Axes) -> None:
        for side, model in ((-0.2, "teacher"), (0.2, "student")):
            for row in (row for row in rows if row.model == model):
                value, low_high = getattr(row, field), getattr(row, f"{field}_range")
                x = workloads.index(row.workload) + side
                ax.bar(x, value, width=0.36, color=_colour(model))
                if low_high:
                    ax.vlines(x, low_high[0], low_high[1], color=_INK, linewidth=0.9)
                ax.annotate(
                    _milliseconds(value),
                    (x, max(value, low_high[1] if low_high else 0)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8 if len(workloads) < 4 else 6.5,
                )
        for model in ("teacher", "student"):
            ax.bar(0, 0, color=_colour(model), label=model)
        ax.set_xticks(range(len(workloads)), [f"{c:,} × {b}" for c, b, *_ in workloads])
        ax.set_xlim(-0.75, len(workloads) - 0.25)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.14)
        ax.set_ylim(0, ax.get_ylim()[1])
        ax.set_xlabel("Context (tokens) × batch")
        ax.set_ylabel(f"{title} (ms)")
        _plain_axis(ax.yaxis)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    words = {"TTFT": "Time to first token", "TPOT": "Time per output token"}[title]
    note = (
        "Lower is better; vertical lines are the range over repeats."
        if any(getattr(row, f"{field}_range") for row in rows)
        else "Lower is better."
    )
    yield _picture(f"{words} ({title})", note, draw)


def _per_layer(spec: Mapping[str, Any], key: str) -> list[float]:
    dims = spec.get(key)
    return list(dims) if isinstance(dims, list | tuple) and all(isinstance(d, int | float) for d in dims) else []


def _dims_text(spec: Mapping[str, Any]) -> str:
    """`d_qk = 32, d_vo = 16 to 48`, with the mean where layers differ; empty if the spec gives no dims."""
    parts = []
    for key in ("d_qk", "d_vo"):
        dims = _per_layer(spec, key) or ([spec[key]] if isinstance(spec.get(key), int) else [])
        if dims:
            same = min(dims) == max(dims)
            spread = f"{min(dims):g}" if same else f"{min(dims):g} to {max(dims):g} (mean {sum(dims) / len(dims):.3g})"
            parts.append(f"{key} = {spread}")
    return ", ".join(parts)


def _dims_figure(spec: Mapping[str, Any]) -> Iterator[_Picture]:
    dims = {key: _per_layer(spec, key) for key in ("d_qk", "d_vo")}
    dims = {key: values for key, values in dims.items() if values}
    if all(min(values) == max(values) for values in dims.values()):
        return  # one sentence says it better

    def draw(ax: Axes) -> None:
        for (key, values), colour in zip(dims.items(), (_STUDENT, _OTHER), strict=False):
            ax.step(range(len(values)), values, where="mid", color=colour, label=key)
        head_dim = spec.get("head_dim")
        if isinstance(head_dim, int):
            ax.axhline(head_dim, color=_TEACHER, linestyle=(0, (4, 3)), label="head_dim (teacher)")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
        ax.set_xlabel("Layer")
        ax.set_ylabel("Dims per head")
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    yield _picture("Dims kept in every layer", "Fewer dims, smaller cache.", draw)


def _error_figures(layers: Sequence[Mapping[str, Any]]) -> Iterator[_Picture]:
    keys = sorted({key for row in layers for key, value in row.items() if key.endswith("error") and _is_number(value)})
    for key in keys:
        points = [(row.get("layer", at), row[key]) for at, row in enumerate(layers) if _is_number(row.get(key))]

        def draw(ax: Axes, points: list[tuple[int, float]] = points, key: str = key) -> None:
            ax.bar([layer for layer, _ in points], [error for _, error in points], color=_STUDENT, width=0.72)
            ax.grid(visible=False, axis="x")
            ax.set_xlabel("Layer")
            ax.set_ylabel(key.replace("_", " ").capitalize())
            ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))

        words = key.replace("_", " ").capitalize()
        yield _picture(f"{words} of every layer", "Lower is better.", draw)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --------------------------------------------------------------------------------------------------------------------
# How it was measured


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key == "argv" and isinstance(value, list):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            listed = isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)
            text = ", ".join(map(str, value)) if listed else value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text


def _texts(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every `text` field within the recipe (`text`, `train_text`, …), with the path that leads to it."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif (key == "text" or key.endswith("_text")) and value:
            yield f"{prefix}{key}", [value] if isinstance(value, str) else list(map(str, value))


def _notes(results: _Results) -> list[str]:
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
    for row in results.bench.rows:
        if row.cache_bytes_predicted is not None and row.cache_bytes != row.cache_bytes_predicted:
            notes.append(
                f"Caution: the {row.model}'s cache measured {_count(row.cache_bytes)} bytes at context "
                f"{row.context:,}, predicted {_count(row.cache_bytes_predicted)}."
            )
    return notes


def _run_context(run: _Run) -> dict[str, Any]:
    results = run.results
    teacher = results.evaluate.models.get("teacher", _Score())
    total = sum(results.seconds.values())
    return {
        "name": run.name,
        "title": results.title or f"Run {run.name}",
        "model": results.model,
        "headline": _headline(results),
        "student": results.student,
        "summary": _summary(results),
        "dims": _dims_text(results.spec),
        "models": [
            (name, _perplexity_cell(score), _score_ratio(score, teacher), score.bits_per_byte)
            for name, score in results.evaluate.models.items()
        ],
        "bench": results.bench.rows,
        "quality": [*_perplexity_bars(results)],
        "healing": [
            *_loss_curve(run.steps, 1, "Loss (mean over layers)"),
            *_layer_loss_map(run.steps),
            *_loss_curve(run.steps, 2, "Loss"),
            *_held_out_curve(run.steps),
        ],
        "speed": [
            *_cache_lines(results),
            *_latency_bars(results, "ttft_ms", "TTFT"),
            *_latency_bars(results, "tpot_ms", "TPOT"),
        ],
        "layers": [*_dims_figure(results.spec), *_error_figures(results.layers)],
        "generations": results.generations,
        "record": list(_flatten(results.record)),
        "recipe": json.dumps(results.recipe, indent=2, ensure_ascii=False) if results.recipe else "",
        "spec": json.dumps(results.spec, ensure_ascii=False) if results.spec else "",
        "seconds": list(results.seconds.items()),
        "total_seconds": total,
        "notes": _notes(results),
    }


# --------------------------------------------------------------------------------------------------------------------
# Public


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about one or several runs.

    The page holds its styles and figures inline, loads nothing, runs no script, and is the same bytes for the same
    input. It appears at `out` whole or not at all.

    Args:
        runs: Run folders, each with `results.json`; `metrics.jsonl` and `record.json` are used where they exist.
        out: Where the page goes; an existing file is replaced.

    Returns:
        `out`.

    Raises:
        UserError: `runs` is empty, a folder has no readable `results.json`, or `out` can't be written.
    """
    if not runs:
        raise UserError("no run folder given; expected at least one folder with results.json")
    contexts = [_run_context(_read_run(Path(folder))) for folder in runs]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(fixed=_fixed, count=_count, mib=_mib, ms=_milliseconds)
    template = environment.from_string((files("kvlatent") / "report.html.j2").read_text(encoding="utf-8"))
    metrics = list({metric.name: metric for context in contexts for metric in context["summary"]}.values())
    page = template.render(
        title=contexts[0]["title"] if len(contexts) == 1 else f"Comparison of {len(contexts)} runs",
        runs=contexts,
        metrics=metrics,
    )
    out = Path(out)
    try:
        with replaced(out) as partial:
            partial.write_bytes(page.encode("utf-8", errors="replace"))  # generations may hold lone surrogates
    except OSError as error:
        raise UserError(f"can't write the report to {out}: {error.strerror}") from error
    return out


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the report's summary as aligned plain text for a terminal.

    Args:
        results: The content of `results.json`; sections may be absent.

    Returns:
        Headline, teacher against student, and the perplexity of every model; without a final newline.

    Raises:
        UserError: A section has the wrong type.
    """
    parsed = _parse(results, "the given object")
    blocks = [headline] if (headline := _headline(parsed)) else []
    if metrics := _summary(parsed):
        blocks.append(
            _aligned(
                ["", "teacher", "student", "ratio", ""],
                [[m.label, m.teacher.text, m.student.text, m.ratio.text, m.better] for m in metrics],
            )
        )
    if len(parsed.evaluate.models) > 2:
        teacher = parsed.evaluate.models.get("teacher", _Score())
        rows = [
            [name, str(_perplexity_cell(score)), str(_score_ratio(score, teacher)), _fixed(score.bits_per_byte, 3)]
            for name, score in parsed.evaluate.models.items()
        ]
        blocks.append(_aligned(["", "perplexity", "ratio", "bits per byte"], rows))
    return "\n\n".join(blocks) or "no measurements yet"


def bench_table(bench: Mapping[str, Any]) -> str:
    """Return the rows of `kvlatent bench` as aligned plain text, and the longest contexts where they were asked for."""
    header = ["model", "dtype", "batch", "context", "cache MiB", "TTFT ms", "TPOT ms", "range", "tokens/s", "roofline"]
    rows = [
        [
            row["model"],
            row["dtype"],
            str(row["batch"]),
            f"{row['context']:,}",
            _mib(row["cache_bytes"]),
            _milliseconds(row["ttft_ms"]),
            _milliseconds(row["tpot_ms"]),
            " – ".join(map(_milliseconds, row["tpot_ms_range"])),
            f"{row['tokens_per_s']:.1f}",
            f"{row['roofline_share']:.0%}",
        ]
        for row in bench["rows"]
    ]
    blocks = [_aligned(header, rows)]
    if "n_max" in bench:
        found = [[x["model"], x["dtype"], str(x["batch"]), f"{x['context']:,}"] for x in bench["n_max"]]
        head = ["model", "dtype", "batch", f"longest context in {bench['memory_gib']:g} GiB"]
        blocks.append(_aligned(head, found))
    return "\n\n".join(blocks)


def bench_page(bench: Mapping[str, Any]) -> str:
    """Return an HTML page with the rows of `kvlatent bench` and TPOT against context, a figure per batch and dtype."""
    pictures = []
    for batch, dtype in dict.fromkeys((row["batch"], row["dtype"]) for row in bench["rows"]):
        rows = [row for row in bench["rows"] if (row["batch"], row["dtype"]) == (batch, dtype)]
        if len({row["context"] for row in rows}) > 1:
            pictures.append(_tpot_lines(rows, f"TPOT, batch {batch}, {dtype}"))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_BENCH_PAGE)
    variables = {name: stand_in for stand_in, name in _VARIABLES.items()}
    return template.render(table=bench_table(bench), pictures=pictures, variables=variables)


_BENCH_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>kvlatent bench</title>
<style>:root { {% for name, colour in variables.items() %}--{{ name }}: {{ colour }}; {% endfor %} }
body { font-family: system-ui, sans-serif; margin: 2rem; } figure { display: inline-block; width: 30rem; margin: 1rem }
pre { overflow-x: auto }</style>
<h1>Cost of decoding</h1><pre>{{ table }}</pre>
{% for picture in pictures %}<figure><figcaption><b>{{ picture.title }}</b><br>{{ picture.caption }}</figcaption>
{{ picture.svg }}</figure>{% endfor %}</html>
"""


def _tpot_lines(rows: Sequence[Mapping[str, Any]], title: str) -> _Picture:
    """TPOT against context: measured points with their range, and the time the bytes take at copy bandwidth, dashed."""

    def draw(ax: Axes) -> None:
        for model, colour in zip(
            dict.fromkeys(row["model"] for row in rows), (_STUDENT, _TEACHER, _OTHER), strict=False
        ):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["context"])
            contexts = [row["context"] for row in own]
            ax.plot(contexts, [row["tpot_ms"] for row in own], "o-", color=colour, markersize=3, label=_short(model))
            ax.vlines(contexts, *zip(*(row["tpot_ms_range"] for row in own), strict=True), color=colour, linewidth=0.9)
            ax.plot(contexts, [row["roofline_ms"] for row in own], "--", color=colour, linewidth=0.8)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Context (tokens)")
        ax.set_ylabel("TPOT (ms)")
        ax.legend(loc="upper left", fontsize=7)
        _plain_axis(ax.xaxis)

    return _picture(title, "Dashed: the time that weights and cache take at the bandwidth of a copy.", draw)


def _aligned(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text: words to the left, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    words = {0} | {column for column, name in enumerate(header) if not name}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def model_card(results: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """Return a Hugging Face `README.md` for a student; it states only numbers that `results` holds.

    Args:
        results: The content of `results.json`; sections may be absent. `base_model`, where given, names the teacher on
            the hub; otherwise `model` does, if it looks like `owner/name`. `license` is passed on.
        spec: The LatentSpec as stored in `config.json`.

    Returns:
        YAML front matter and Markdown.

    Raises:
        UserError: A section of `results` has the wrong type.
    """
    parsed = _parse(results, "the given object")
    hub_id = parsed.base_model or (parsed.model if re.fullmatch(r"[\w-]+/[\w.-]+", parsed.model or "") else None)
    if hub_id and hub_id.endswith(".gguf"):
        hub_id = None
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- kvlatent", "- kv-cache"]
    if hub_id:
        front.append(f"base_model: {json.dumps(hub_id, ensure_ascii=False)}")
    if parsed.license:
        front.append(f"license: {json.dumps(parsed.license, ensure_ascii=False)}")
    teacher = hub_id or parsed.model
    dims = _dims_text(spec)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {_markdown(parsed.title or 'A student with a smaller KV cache')}",
        "",
        f"{_headline(parsed)}." if _headline(parsed) else "No measurements came with this model.",
        "",
        f"This decoder language model was made{f' from `{_code(teacher)}`' if teacher else ''} with kvlatent: its "
        "attention keeps fewer key and value dims per head than its teacher, so that its KV cache takes fewer "
        "bytes per token"
        f"{f' ({dims})' if dims else ''}. The method starts from KV-Latent (arXiv:2507.11273).",
        "",
        "## How to load it",
        "",
        "```python",
        "import kvlatent  # registers the model with transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'ids = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
    ]
    if metrics := _summary(parsed):
        lines += ["", "## Measured", "", "| | teacher | this model | ratio | |", "|---|--:|--:|--:|---|"]
        for m in metrics:
            name = ", ".join(filter(None, (m.label, m.condition)))
            lines.append(f"| {_markdown(name)} | {m.teacher} | {m.student} | {m.ratio} | {m.better} |")
    measured = [_markdown(note) for note in _notes(parsed)]
    measured += [f"{key}: `{_code(value)}`" for key, value in _flatten(parsed.record)]
    measured += [f"{step}: {_fixed(seconds, 1)} s" for step, seconds in parsed.seconds.items()]
    if measured:
        lines += ["", "## How the numbers were obtained", "", *(f"- {item}" for item in measured)]
    if parsed.recipe:
        lines += ["", "The recipe:", "", "```json", json.dumps(parsed.recipe, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
