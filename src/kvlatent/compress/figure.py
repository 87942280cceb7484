"""A figure of how a budget is spent; the only place in conversion that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from kvlatent.compress.allocation import Allocation
from kvlatent.errors import UserError
from kvlatent.files import new_file


def check_ending(out: Path) -> None:
    """Raise `UserError` unless matplotlib draws files that end like `out`."""
    if out.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise UserError(f"a figure's name ends in .png, .svg or .pdf; got {out}")


def draw(allocation: Allocation, out: Path, *, title: str, head_dim: int) -> None:
    """Draw dims and expected losses layer by layer into an image file."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    dims, losses = figure.subplots(2, sharex=True)
    parts = (
        ("keys (d_qk)", allocation.d_qk, allocation.qk_loss),
        ("values (d_vo)", allocation.d_vo, allocation.vo_loss),
    )
    for offset, (label, width, loss) in zip((-0.2, 0.2), parts, strict=True):
        at = [layer + offset for layer in range(len(width))]
        dims.bar(at, width, width=0.4, label=label)
        losses.bar(at, loss, width=0.4, label=label)
    dims.axhline(head_dim, color="grey", linewidth=0.8, linestyle="--", label="head_dim (teacher)")
    dims.set_ylabel("Dims per head")
    dims.set_title(title)
    dims.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    losses.set_ylabel("Expected loss alone\n(nats per token)")
    losses.set_xlabel("Layer")
    with new_file(out) as partial:
        figure.savefig(partial, dpi=150, format=out.suffix[1:])
