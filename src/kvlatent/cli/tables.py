"""What the commands print without --json: plain text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def pairs(values: Mapping[str, Any]) -> str:
    """One line per entry: name, value."""
    rows = [(key.replace("_", " "), text_of(value)) for key, value in values.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def side_by_side(result: Mapping[str, Any], keys: Sequence[str]) -> str:
    """One line per quantity: its name, MODEL's value, --against's, and the ratio."""
    from kvlatent.evaluation.report.text import aligned

    models = [result, *([result["against"]] if "against" in result else [])]
    header = ["", *map(_title, models), *(["ratio"] if len(models) > 1 else [])]
    rows = []
    for name, values in _numbers([{key: model[key] for key in keys if key in model} for model in models]).items():
        ratio = [f"{values[0] / values[1]:.4g}"] if len(values) > 1 and values[1] else [""] * (len(values) - 1)
        rows.append([name, *map(text_of, values), *ratio])
    return aligned(header, rows)


def _title(model: Mapping[str, Any]) -> str:
    """A model's name, with the policy that its cache keeps to."""
    name = str(model["model"])
    policy = f"{model['policy']} {model['keep']:g}" if "policy" in model else ""
    return f"{name} ({policy})" if policy not in name else name


def kept_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What a policy kept, a line for each result that says so, by what it was measured on."""
    lines = []
    for name, result in found.items():
        if "kept_share" in result:
            lines.append(f"{name}: {result['kept_share']:.1%} of all tokens kept")
        if "kept_far_share" in result:
            far, tokens = result["kept_far_share"], result["kept_far_tokens"]
            lines[-1] += f", {far:.1%} of those beyond the window, {tokens:,.0f} in a layer"
    return "\n".join(lines)


def cache_table(rows: Sequence[Mapping[str, int]]) -> str:
    """Bytes of caches by context, and where they are; a column that is zero throughout is left out."""
    from kvlatent.evaluation.report.text import aligned

    names = {
        "context": "tokens", "bytes": "bytes of a sequence", "keys": "keys", "values": "values",
        "global_layers": "global layers", "sliding_layers": "layers with a sliding window",
        "whole": "tokens met whole",
    }  # fmt: skip
    shown = [key for key in names if any(row[key] for row in rows)]
    if "sliding_layers" not in shown:
        shown.remove("global_layers")
    return aligned([names[key] for key in shown], [[f"{row[key]:,}" for key in shown] for row in rows])


def longest_table(result: Mapping[str, Any]) -> str:
    """The longest contexts that fit in so much memory beside the weights, by batch."""
    from kvlatent.evaluation.report.text import aligned, longest_text

    rows = [[str(row["batch"]), longest_text(row["context"])] for row in result["n_max"]]
    header = ["batch", f"longest context in {result['memory_gib']:g} GiB beside the weights"]
    if "teacher_context" in result["n_max"][0]:
        header.append("of the teacher")
        for row, found in zip(rows, result["n_max"], strict=True):
            row.append(longest_text(found["teacher_context"]))
    return aligned(header, rows)


def diagnosis_text(found: Mapping[str, Any]) -> str:
    """How a student's diagnosis differs from its teacher's: entropy of attention, and perplexity by source."""
    change = found["entropy_change"]
    most = change["largest"]
    lines = [
        f"entropy of attention differs by {change['mean_size']:.3g} nats a head, most by {most['change']:+.3g} in "
        f"layer {most['layer']}, head {most['head']}"
    ]
    for source, ratio in found["ratio_by_source"].items():
        error = "" if ratio["stderr"] is None else f" ± {ratio['stderr']:.4f}"
        lines.append(f"perplexity ratio on {source}: {ratio['perplexity_ratio']:.4f}{error}")
    return "\n".join(lines)


def plan_cache_table(plan: Mapping[str, Any]) -> str:
    """Bytes of a planned student's cache by context, beside the teacher's, and where they are."""
    from kvlatent.evaluation.report.text import aligned

    names = {
        "whole": "tokens met whole", "keys": "keys", "values": "values", "global_layers": "global layers",
        "sliding_layers": "layers with a sliding window",
    }  # fmt: skip
    shown = [key for key in names if any(row.get(key) for row in plan["cache"])]
    if "sliding_layers" not in shown:
        shown.remove("global_layers")
    rows = []
    for student, teacher in zip(plan["cache"], plan["teacher_cache"], strict=True):
        cells = [student["context"], teacher["bytes"], student["bytes"]]
        share = f"{student['bytes'] / teacher['bytes']:.3f}"
        rows.append([*(f"{x:,}" for x in cells), share, *(f"{student[key]:,}" for key in shown)])
    return aligned(["tokens", "teacher's bytes", "student's bytes", "share", *(names[key] for key in shown)], rows)


def _numbers(models: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, list[float]]:
    """Every number that all models have, by its path."""
    found: dict[str, list[float]] = {}
    for key, first in models[0].items():
        values = [model.get(key) for model in models]
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(first, Mapping):
            inner = [value for value in values if isinstance(value, Mapping)]
            found |= _numbers(inner, f"{name} ") if len(inner) == len(values) else {}
        elif all(isinstance(value, int | float) for value in values):
            found[name] = [float(value) if isinstance(value, float) else value for value in values if value is not None]
    return found


def text_of(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{text_of(item)} ({key})" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def span(values: Sequence[int]) -> str:
    """Dims of the layers: one number where all are the same."""
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))
