"""Students of a sweep side by side: quality against bytes, and which of them none other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kvlatent.model.card import escaped


def front(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether no other row has at most the bytes and is at least as good, and better in one of these.

    Args:
        rows: Each with `share` and `perplexity_ratio`, and `far_gain_kept` where it was measured.
    """
    costs = [(row["share"], row["perplexity_ratio"], -row.get("far_gain_kept", 0.0)) for row in rows]
    return [
        not any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)
        for cost in costs
    ]


def markdown(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, fewest bytes first; rows on the front are bold."""
    far, healed = (any(key in row for row in rows) for key in ("far_gain_kept", "untrained_perplexity_ratio"))
    head = [
        "",
        "student",
        "bytes",
        "perplexity ratio",
        *(["before healing"] if healed else ()),
        *(["far gain kept"] if far else ()),
    ]
    lines = [f"# {escaped(title)}", "", f"| {' | '.join(head)} |", f"|{'--:|---|' + '--:|' * (len(head) - 2)}"]
    for number, row in enumerate(_ordered(rows), 1):
        cells = [
            escaped(row["name"]),
            f"{row['share']:.4f}",
            f"{row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_spread']:.4f}",
        ]
        if healed:
            cells.append(f"{row['untrained_perplexity_ratio']:.4f}" if "untrained_perplexity_ratio" in row else "–")
        if far:
            cells.append(
                f"{100 * row['far_gain_kept']:.1f} ± {100 * row['far_gain_kept_spread']:.1f} %"
                if "far_gain_kept" in row
                else "–"
            )
        lines.append(f"| {number} | {' | '.join(f'**{cell}**' if row['front'] else cell for cell in cells)} |")
    seeds = rows[0]["seeds"]
    spread = f"the standard deviation over {seeds} seeds" if seeds > 1 else "the standard error over blocks of one run"
    lines += [
        "",
        "Bytes are shares of the teacher's 16-bit cache at the context that budgets are counted at. Bold rows are on "
        f"the Pareto front: no other has at most their bytes and is at least as good. ± is {spread}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Perplexity ratio, and far gain kept, against bytes, as SVG; points have the table's numbers."""
    rows = _ordered(rows)
    panels = {"perplexity_ratio": "perplexity over the teacher's"}
    if any("far_gain_kept" in row for row in rows):
        panels["far_gain_kept"] = "far gain kept"
    with matplotlib.rc_context({"svg.hashsalt": "pareto", "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
        for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            points = [(n, row) for n, row in enumerate(rows, 1) if key in row]
            for number, row in points:
                colour = "C0" if row["front"] else "0.6"
                axes.errorbar(
                    row["share"], row[key], row[f"{key}_spread"], fmt="o", color=colour, markersize=4, elinewidth=0.8
                )
                axes.annotate(
                    str(number), (row["share"], row[key]), textcoords="offset points", xytext=(5, 4), fontsize=8
                )
            best = [row for _, row in points if row["front"]]
            axes.plot([row["share"] for row in best], [row[key] for row in best], color="C0", linewidth=0.8)
            axes.set(xscale="log", xlabel="share of the teacher's 16-bit cache", ylabel=label)
            values = [row[key] for _, row in points]
            if key == "perplexity_ratio" and max(values) > 3 * min(values):
                axes.set_yscale("log")
            axes.yaxis.set_major_formatter(PercentFormatter(1) if key == "far_gain_kept" else "{x:g}")
            shares = sorted({round(row["share"], 4) for row in rows})
            axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
            axes.minorticks_off()
        figure.savefig(out, format="svg", metadata={"Date": None})


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: (row["share"], row["perplexity_ratio"]))
