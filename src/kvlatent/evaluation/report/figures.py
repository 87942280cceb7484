"""Figures of a report."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from kvlatent.evaluation.report.drawing import (
    INK,
    MUTED,
    OTHER,
    STUDENT,
    TEACHER,
    Picture,
    colour_of,
    picture,
    plain_axis,
    short,
    thin,
    wide,
)
from kvlatent.evaluation.report.results import Results, Score, Step
from kvlatent.evaluation.report.summary import milliseconds, score_ratio, times
from kvlatent.model.card import per_layer


def perplexity_bars(results: Results) -> Iterator[Picture]:
    """Perplexity of every evaluated model over the teacher's."""
    teacher = results.evaluate.models.get("teacher", Score())
    ratios = {name: score_ratio(score, teacher).value for name, score in results.evaluate.models.items()}
    bars = {name: ratio for name, ratio in ratios.items() if ratio is not None and math.isfinite(ratio)}
    if len(bars) < 2:
        return
    log = wide(bars.values(), 20)

    def draw(ax: Axes) -> None:
        ax.barh(range(len(bars)), list(bars.values()), color=[colour_of(name) for name in bars], height=0.62)
        for y, ratio in enumerate(bars.values()):
            ax.annotate(times(ratio), (ratio, y), xytext=(4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(bars)), [short(name) for name in bars])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        if log:
            ax.set_xscale("log")
            ax.set_xlim(0.5, max(bars.values()) * 12)
            plain_axis(ax.xaxis)
        else:
            ax.set_xlim(0, max(bars.values()) * 1.25)
        ax.axvline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_xlabel(f"Perplexity, × the teacher's{' (log scale)' if log else ''}")

    yield picture("Perplexity of every model", "Lower is better; the dashed line is the teacher.", draw)


def loss_curve(steps: Sequence[Step], stage: int, what: str) -> Iterator[Picture]:
    """Training loss of one stage, step by step."""
    points = [(s.step, s.loss) for s in steps if s.stage == stage and s.loss is not None and math.isfinite(s.loss)]
    if not points:
        return

    def draw(ax: Axes) -> None:
        x, y = zip(*thin(points, 1000), strict=True)
        ax.plot(x, y, color=STUDENT, marker="o" if len(x) < 40 else None, markersize=2.5)
        if wide(y, 8):
            ax.set_yscale("log")
            plain_axis(ax.yaxis)
        ax.set_xlabel("Step")
        ax.set_ylabel(what)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    yield picture(f"Stage {stage} training loss", "Lower is better.", draw)


def layer_loss_map(steps: Sequence[Step]) -> Iterator[Picture]:
    """Stage 1 loss by layer and step."""
    rows = [(s.step, s.layer_loss) for s in steps if s.stage == 1 and s.layer_loss]
    rows = [(step, loss) for step, loss in rows if len(loss) == len(rows[-1][1])]
    if len(rows) < 2:
        return
    rows = thin(rows, 120)
    columns = [loss for _, loss in rows]
    positive = all(math.isfinite(value) and value > 0 for loss in columns for value in loss)

    def draw(ax: Axes) -> None:
        by_layer = [list(layer) for layer in zip(*columns, strict=True)]
        norm = LogNorm() if positive else None
        label = f"Loss{' (log scale)' if positive else ''}"
        bar = _layer_map(ax, [step for step, _ in rows], by_layer, label, cmap="viridis", norm=norm)
        if positive:
            plain_axis(bar.ax.yaxis)
        ax.set_xlabel("Step")

    yield picture("Stage 1 loss of every layer", "Darker is lower, and lower is better.", draw)


def _layer_map(ax: Axes, x: Sequence[int], by_layer: Sequence[Sequence[float]], label: str, **how: Any) -> Any:
    """Colours by layer and something else, and the bar beside them that says what they mean."""
    ax.grid(visible=False)
    mesh = ax.pcolormesh(x, range(len(by_layer)), by_layer, shading="nearest", rasterized=True, **how)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=ax, pad=0.02)
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]
    bar.set_label(label)
    bar.outline.set_visible(False)
    ax.set_ylabel("Layer")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return bar


def held_out_curve(steps: Sequence[Step]) -> Iterator[Picture]:
    """Held-out perplexity against healing tokens, both stages on one axis."""
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
        for stage, colour in ((1, OTHER), (2, STUDENT)):
            if points[stage]:
                x, y = zip(*points[stage], strict=True)
                ax.plot(x, y, color=colour, marker="o", markersize=3, label=f"stage {stage}")
        if wide((y for _, y in everything), 8):
            ax.set_yscale("log")
            plain_axis(ax.yaxis)
        plain_axis(ax.xaxis)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel("Healing tokens")
        ax.set_ylabel("Held-out perplexity")
        if points[1] and points[2]:
            ax.legend()

    yield picture("Held-out perplexity while healing", "Lower is better.", draw)


def entropy_figures(results: Results) -> Iterator[Picture]:
    """Entropy of attention by layer, teacher and student, and how far the student's differs by head."""
    maps = {name: found.entropy_by_head for name, found in results.diagnose.items() if found.entropy_by_head}
    if not maps:
        return

    def draw(ax: Axes) -> None:
        for name, layers in maps.items():
            ax.plot([fmean(heads) for heads in layers], color=colour_of(name), marker="o", markersize=2.5, label=name)
        ax.set_xlabel("Layer")
        ax.set_ylabel("Entropy of attention (nats)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.legend()

    yield picture("Entropy of attention", "Mean over heads and queries; the teacher's is what to meet.", draw)
    pairs = list(zip(maps.get("student", []), maps.get("teacher", []), strict=False))
    change = [[mine - theirs for mine, theirs in zip(*heads, strict=False)] for heads in pairs]
    if not change:
        return
    most = max(abs(x) for heads in change for x in heads) or 1.0

    def draw_change(ax: Axes) -> None:
        how = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
        _layer_map(ax, range(len(change[0])), change, "Student less teacher (nats)", **how)
        ax.set_xlabel("Query head")

    note = "Red heads look at more tokens alike than the teacher's, blue ones at fewer; white is no change."
    yield picture("Change of entropy by head", note, draw_change)


def needle_maps(results: Results) -> Iterator[Picture]:
    """How often each model finds the needle, by length of the text and depth in it."""
    for model, by_length in results.needle.items():
        found = [score.by_depth for score in by_length.values()]
        depths = [cell.depth for cell in found[0]] if found else []
        if depths and all([cell.depth for cell in cells] == depths for cells in found):
            shares = [[cell.exact_match or 0.0 for cell in cells] for cells in zip(*found, strict=True)]
            trials = {cell.trials for cells in found for cell in cells}
            yield _needle_map(model, [*by_length], depths, shares, trials)


def _needle_map(
    model: str,
    lengths: Sequence[int],
    depths: Sequence[tuple[float, float]],
    shares: Sequence[Sequence[float]],
    trials: Collection[int],
) -> Picture:
    """The map of one model; a row of `shares` for each depth."""

    def draw(ax: Axes) -> None:
        ax.grid(visible=False)
        ax.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        size = 8 if len(lengths) < 9 and len(depths) < 13 else 5
        for row, across in enumerate(shares):
            for column, share in enumerate(across):
                colour = "#000000" if share > 0.6 else "#ffffff"  # on yellow and on blue
                ax.text(column, row, f"{100 * share:.0f} %", ha="center", va="center", color=colour, fontsize=size)
        ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in depths])
        ax.set_xlabel("Length (tokens)")
        ax.set_ylabel("Depth in the text")

    fewest, most = min(trials), max(trials)
    prompts = f"{most} prompt{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} prompts"
    return picture(f"Needle found, {model}", f"Share of {prompts} a cell. Higher is better.", draw)


def cache_lines(results: Results) -> Iterator[Picture]:
    """Cache of one sequence against its length, from the measured bytes per token."""
    longest = max(8192, 2 * max((row.context for row in results.bench.rows), default=0))
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for name, row in sorted(results.bench_pair.items(), reverse=True):
        if row.cache_bytes_per_token:  # steeper while tokens are held whole
            bend = results.whole_tokens if row.window_bytes else 0
            end = row.window_bytes + row.cache_bytes_per_token * (longest - bend)
            lines[name] = [0, bend, longest], [0, row.window_bytes / 2**20, end / 2**20]
    if not lines:
        return

    def draw(ax: Axes) -> None:
        for name, (tokens, size) in lines.items():
            ax.plot(tokens, size, color=colour_of(name))
            ax.annotate(name, (longest, size[-1]), xytext=(-4, 6), textcoords="offset points", ha="right")
        ax.set_xlim(0, longest)
        ax.set_ylim(0, max(size[-1] for _, size in lines.values()) * 1.12)
        ax.set_xticks([longest * i // 4 for i in range(5)])
        plain_axis(ax.xaxis)
        ax.set_xlabel("Context (tokens)")
        ax.set_ylabel("KV cache of one sequence (MiB)")

    dtype = next(iter(results.bench_pair.values())).dtype
    window = any(row.window_bytes for row in results.bench_pair.values())
    whole = f", the student's first {results.whole_tokens} tokens whole" if window else ""
    note = f"Computed from the bytes per token{f' in {dtype}' if dtype else ''}{whole}. Lower is better."
    yield picture("KV cache against context", note, draw)


def latency_bars(results: Results, field: str, title: str) -> Iterator[Picture]:
    """TTFT or TPOT of teacher and student, a pair of bars per workload."""
    rows = [row for row in results.bench.rows if _finite(getattr(row, field)) and row.model in ("teacher", "student")]
    if not rows:
        return
    workloads = sorted({row.workload for row in rows})

    def draw(ax: Axes) -> None:
        for side, model in ((-0.2, "teacher"), (0.2, "student")):
            for row in (row for row in rows if row.model == model):
                value, low_high = getattr(row, field), getattr(row, f"{field}_range")
                x = workloads.index(row.workload) + side
                ax.bar(x, value, width=0.36, color=colour_of(model))
                if low_high:
                    ax.vlines(x, low_high[0], low_high[1], color=INK, linewidth=0.9)
                ax.annotate(
                    milliseconds(value),
                    (x, max(value, low_high[1] if low_high else 0)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8 if len(workloads) < 4 else 6.5,
                )
        for model in ("teacher", "student"):
            ax.bar(0, 0, color=colour_of(model), label=model)
        ax.set_xticks(range(len(workloads)), [f"{c:,} × {b}" for c, b, *_ in workloads])
        ax.set_xlim(-0.75, len(workloads) - 0.25)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.14)
        ax.set_ylim(0, ax.get_ylim()[1])
        ax.set_xlabel("Context (tokens) × batch")
        ax.set_ylabel(f"{title} (ms)")
        plain_axis(ax.yaxis)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    words = {"TTFT": "Time to first token", "TPOT": "Time per output token"}[title]
    note = (
        "Lower is better; vertical lines are the range over repeats."
        if any(getattr(row, f"{field}_range") for row in rows)
        else "Lower is better."
    )
    yield picture(f"{words} ({title})", note, draw)


def dims_figure(spec: Mapping[str, Any]) -> Iterator[Picture]:
    """Dims by layer; nothing where all layers have the same."""
    dims = {key: per_layer(spec, key) for key in ("d_qk", "d_vo")}
    dims = {key: values for key, values in dims.items() if values}
    if all(min(values) == max(values) for values in dims.values()):
        return  # one sentence says it better

    def draw(ax: Axes) -> None:
        for (key, values), colour in zip(dims.items(), (STUDENT, OTHER), strict=False):
            ax.step(range(len(values)), values, where="mid", color=colour, label=key)
        head_dim = spec.get("head_dim")
        if isinstance(head_dim, int):
            ax.axhline(head_dim, color=TEACHER, linestyle=(0, (4, 3)), label="head_dim (teacher)")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
        ax.set_xlabel("Layer")
        ax.set_ylabel("Dims per head")
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    yield picture("Dims kept in every layer", "Fewer dims, smaller cache.", draw)


def tpot_lines(rows: Sequence[Mapping[str, Any]], title: str) -> Picture:
    """TPOT against context: measured points with their range, and the time the bytes take at copy bandwidth, dashed."""

    def draw(ax: Axes) -> None:
        for model, colour in zip(dict.fromkeys(row["model"] for row in rows), (STUDENT, TEACHER, OTHER), strict=False):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["context"])
            contexts = [row["context"] for row in own]
            ax.plot(contexts, [row["tpot_ms"] for row in own], "o-", color=colour, markersize=3, label=short(model))
            ax.vlines(contexts, *zip(*(row["tpot_ms_range"] for row in own), strict=True), color=colour, linewidth=0.9)
            ax.plot(contexts, [row["roofline_ms"] for row in own], "--", color=colour, linewidth=0.8)
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("Context (tokens)")
        ax.set_ylabel("TPOT (ms)")
        ax.legend(loc="upper left", fontsize=7)
        plain_axis(ax.xaxis)

    return picture(title, "Dashed: the time that weights and cache take at the bandwidth of a copy.", draw)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
