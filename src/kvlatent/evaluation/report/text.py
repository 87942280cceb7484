"""The same for a terminal and for a model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvlatent.evaluation.report.results import Paired, Score, parse_results
from kvlatent.evaluation.report.summary import (
    far_gain_cell,
    far_note,
    far_ratio_cell,
    fixed,
    headline_of,
    mib,
    milliseconds,
    notes_on,
    p_value_text,
    perplexity_cell,
    score_ratio,
    share_cell,
    summary_of,
)
from kvlatent.model.card import card, code, escaped, flatten


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the report's summary as aligned plain text for a terminal.

    Args:
        results: The content of `results.json`; sections may be absent.

    Returns:
        Headline, teacher against student, and the perplexity of every model; without a final newline.

    Raises:
        UserError: A section has the wrong type.
    """
    parsed = parse_results(results, "the given object")
    blocks = [headline] if (headline := headline_of(parsed)) else []
    if metrics := summary_of(parsed):
        blocks.append(
            aligned(
                ["", "teacher", "student", "ratio", ""],
                [[m.label, m.teacher.text, m.student.text, m.ratio.text, m.better] for m in metrics],
            )
        )
    if len(parsed.evaluate.models) > 2:
        blocks.append(_models_table(parsed.evaluate.models))
    blocks.append(paired_text({**parsed.retrieval.paired, **parsed.tasks.paired}))
    return "\n\n".join(filter(None, blocks)) or "no measurements yet"


def models_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what each of several models scored on the same text as aligned plain text, the teacher's name `teacher`.

    Raises:
        UserError: A score has the wrong type.
    """
    return _models_table(parse_results({"evaluate": {"models": models}}, "the given object").evaluate.models)


def _models_table(models: Mapping[str, Score]) -> str:
    teacher, far = models.get("teacher", Score()), far_note(models)
    header = ["", "perplexity", "ratio", "bits per byte", *(["far gain kept", "far ratio"] if far else [])]
    rows = []
    for name, score in models.items():
        cells = [str(perplexity_cell(score)), str(score_ratio(score, teacher)), fixed(score.bits_per_byte, 3)]
        rows.append([name, *cells, *([str(far_gain_cell(score)), str(far_ratio_cell(score))] if far else [])])
    return "\n".join([aligned(header, rows), *([far] if far else [])])


def paired_text(tests: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line per metric of `evaluation.tasks.paired`, empty where there are none."""
    lines = []
    for name, metrics in tests.items():
        for metric, found in metrics.items():
            test = Paired.model_validate(found)
            line = f"{name} {metric}: {test.difference:+.4f} ± {test.stderr:.4f}, p = {p_value_text(test)}"
            if test.chance is not None:
                kept = share_cell(test.kept, test.kept_stderr)
                line += f"; kept of the score above chance ({test.chance:.3g}): {kept}"
            lines.append(line)
    return "\n".join(("on the same samples:", *lines)) if lines else ""


def bench_table(bench: Mapping[str, Any]) -> str:
    """Return the rows of `kvlatent bench` as aligned plain text, and the longest contexts where they were asked for."""
    header = ["model", "dtype", "batch", "context", "cache MiB", "TTFT ms", "TPOT ms", "range", "tokens/s", "roofline"]
    rows = [
        [
            row["model"],
            row["dtype"],
            str(row["batch"]),
            f"{row['context']:,}",
            mib(row["cache_bytes"]),
            milliseconds(row["ttft_ms"]),
            milliseconds(row["tpot_ms"]),
            " – ".join(map(milliseconds, row["tpot_ms_range"])),
            f"{row['tokens_per_s']:.1f}",
            f"{row['roofline_share']:.0%}",
        ]
        for row in bench["rows"]
    ]
    blocks = [aligned(header, rows)]
    if "n_max" in bench:
        found = [[x["model"], x["dtype"], str(x["batch"]), longest_text(x["context"])] for x in bench["n_max"]]
        head = ["model", "dtype", "batch", f"longest context in {bench['memory_gib']:g} GiB"]
        blocks.append(aligned(head, found))
    return "\n\n".join(blocks)


def longest_text(tokens: int | None) -> str:
    """The longest context that fits; None is one without an end, where all layers have a sliding window."""
    return "any" if tokens is None else f"{tokens:,}"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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

    Raises:
        UserError: A section of `results` has the wrong type.
    """
    parsed = parse_results(results, "the given object")
    table = []
    for m in summary_of(parsed):
        label = ", ".join(filter(None, (m.label, m.condition)))
        table.append((label, str(m.teacher), str(m.student), str(m.ratio), m.better))
    measured = [escaped(note) for note in notes_on(parsed)]
    measured += [f"{key}: `{code(value)}`" for key, value in flatten(parsed.record)]
    measured += [f"{step}: {fixed(seconds, 1)} s" for step, seconds in parsed.seconds.items()]
    return card(
        spec, model=parsed.model, base_model=parsed.base_model, license=parsed.license, title=parsed.title,
        headline=headline_of(parsed), table=table, notes=measured, recipe=parsed.recipe,
    )  # fmt: skip
