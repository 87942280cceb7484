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
    """Draw dims, bits and expected losses layer by layer into an image file."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    dims, bits, losses = figure.subplots(3, sharex=True)
    k_bits, v_bits = allocation.bits
    parts = (
        ("keys (d_qk)", allocation.d_qk, k_bits, allocation.qk_loss),
        ("values (d_vo)", allocation.d_vo, v_bits, allocation.vo_loss),
    )
    for offset, (label, *columns) in zip((-0.2, 0.2), parts, strict=True):
        for axes, values in zip((dims, bits, losses), columns, strict=True):
            axes.bar([layer + offset for layer in range(len(values))], values, width=0.4, label=label)
    dims.axhline(head_dim, color="grey", linewidth=0.8, linestyle="--", label="head_dim (teacher)")
    dims.set_ylabel("Dims per head")
    dims.set_title(title)
    dims.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    bits.set_ylabel("Bits per dim")
    losses.set_ylabel("Expected loss alone\n(nats per token)")
    losses.set_xlabel("Layer")
    with new_file(out) as partial:
        figure.savefig(partial, dpi=150, format=out.suffix[1:])
