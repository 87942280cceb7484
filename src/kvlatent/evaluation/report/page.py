"""Run folders, or a bench, on one HTML page that needs nothing else.

What is there is shown, what is not there is left out, and no number is made up.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from kvlatent.errors import UserError
from kvlatent.evaluation.report import figures
from kvlatent.evaluation.report.drawing import PALETTES
from kvlatent.evaluation.report.results import Run, Score, read_run
from kvlatent.evaluation.report.summary import (
    answers_of,
    count,
    far_gain_cell,
    far_note,
    far_ratio_cell,
    fixed,
    headline_of,
    mib,
    milliseconds,
    needle_cells,
    notes_on,
    perplexity_cell,
    score_ratio,
    summary_of,
)
from kvlatent.evaluation.report.text import bench_table
from kvlatent.files import replaced
from kvlatent.model.card import dims_text, flatten


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about one or several runs.

    The page holds its styles and figures inline, loads nothing, runs no script, and is the same bytes for the same
    input. It appears at `out` whole or not at all.

    Args:
        runs: Run folders, each with `results.json`; `metrics.jsonl` and `record.json` are used where they exist.
        out: Where the page goes; an existing file is replaced. None is `report.html` in the first of `runs`.

    Returns:
        Where the page is.

    Raises:
        UserError: `runs` is empty, a folder has no readable `results.json`, or `out` can't be written.
    """
    if not runs:
        raise UserError("no run folder given; expected at least one folder with results.json")
    contexts = [_run_context(read_run(Path(folder))) for folder in runs]
    metrics = list({metric.name: metric for context in contexts for metric in context["summary"]}.values())
    page = _template("run").render(
        title=contexts[0]["title"] if len(contexts) == 1 else f"Comparison of {len(contexts)} runs",
        runs=contexts,
        metrics=metrics,
    )
    out = Path(runs[0], "report.html") if out is None else Path(out)
    with replaced(out) as partial:
        partial.write_bytes(page.encode("utf-8", errors="replace"))  # generations may hold lone surrogates
    return out


def _run_context(run: Run) -> dict[str, Any]:
    results = run.results
    teacher = results.evaluate.models.get("teacher", Score())
    total = sum(results.seconds.values())
    return {
        "name": run.name,
        "title": results.title or f"Run {run.name}",
        "model": results.model,
        "headline": headline_of(results),
        "student": results.student,
        "summary": summary_of(results),
        "dims": dims_text(results.spec),
        "models": [
            (
                name,
                [perplexity_cell(score), score_ratio(score, teacher)],
                score.bits_per_byte,
                [far_gain_cell(score), far_ratio_cell(score)],
            )
            for name, score in results.evaluate.models.items()
        ],
        "far": far_note(results.evaluate.models),
        "bench": results.bench.rows,
        "quality": [*figures.perplexity_bars(results)],
        "diagnose": results.diagnose,
        "entropy": [*figures.entropy_figures(results)],
        "joined": results.joined,
        "joined_cells": {
            name: [perplexity_cell(score), score_ratio(score, results.joined.models.get("teacher", Score()))]
            for name, score in results.joined.models.items()
        },
        "needle": [
            (f"{length:,}", [needle_cells(results.needle[model][length]) for model in ("teacher", "student")])
            for length in results.needle.get("student", {})
            if length in results.needle.get("teacher", {})
        ],
        "needle_maps": [*figures.needle_maps(results)],
        "retrieval": answers_of(results.retrieval),
        "tasks": answers_of(results.tasks),
        "healing": [
            *figures.loss_curve(run.steps, 1, "Loss (mean over layers)"),
            *figures.layer_loss_map(run.steps),
            *figures.loss_curve(run.steps, 2, "Loss"),
            *figures.held_out_curve(run.steps),
        ],
        "speed": [
            *figures.cache_lines(results),
            *figures.latency_bars(results, "ttft_ms", "TTFT"),
            *figures.latency_bars(results, "tpot_ms", "TPOT"),
        ],
        "layers": [*figures.dims_figure(results.spec)],
        "generations": results.generations,
        "record": list(flatten(results.record)),
        "recipe": json.dumps(results.recipe, indent=2, ensure_ascii=False) if results.recipe else "",
        "spec": json.dumps(results.spec, ensure_ascii=False) if results.spec else "",
        "seconds": list(results.seconds.items()),
        "total_seconds": total,
        "notes": notes_on(results),
    }


def bench_page(bench: Mapping[str, Any]) -> str:
    """Return an HTML page with the rows of `kvlatent bench` and TPOT against context, a figure per batch and dtype."""
    pictures = []
    for batch, dtype in dict.fromkeys((row["batch"], row["dtype"]) for row in bench["rows"]):
        rows = [row for row in bench["rows"] if (row["batch"], row["dtype"]) == (batch, dtype)]
        if len({row["context"] for row in rows}) > 1:
            pictures.append(figures.tpot_lines(rows, f"TPOT, batch {batch}, {dtype}"))
    return _template("bench").render(table=bench_table(bench), pictures=pictures)


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvlatent.evaluation.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["palettes"] = PALETTES
    environment.filters.update(fixed=fixed, count=count, mib=mib, ms=milliseconds)
    return environment.get_template(f"{name}.html.j2")
