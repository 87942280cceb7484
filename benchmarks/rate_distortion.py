"""How far from the limit are the bits of a budget? By layer, beside reverse water-filling with real numbers of bits.

    python benchmarks/rate_distortion.py smollm2 --stats stats.safetensors --budget 0.125 --out docs/rate_distortion.svg

The error of a layer's keys, or values, is what `compress/bits.py` counts with: the energy of dims without bits, the
noise of all others. The limit is the least number of bits per token at the same error if a dim of spread s² could have
any rate R, at an error of s²·2^(-2R), the rate-distortion function of a Gaussian.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from matplotlib.figure import Figure

from kvlatent.compress.bits import full_axes
from kvlatent.compress.budget import plan
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.codes import Axes
from kvlatent.kernels.layout import DISTORTION, SIZE_BYTES, Groups
from kvlatent.model.checkpoints import load_model


def used(axes: Axes, groups: Groups) -> tuple[float, float]:
    """Bits of a token, sizes of rows included, and the error."""
    kept = sum(n for n, _ in groups)
    noise = axes.noise[:kept].sort(descending=True).values
    error, start = float(axes.dropped[kept:].sum()), 0
    for n, bits in groups:
        error += DISTORTION[bits] * float(noise[start : start + n].sum())
        start += n
    return len(axes.to) * (sum(n * bits for n, bits in groups) + 8 * SIZE_BYTES), error


def least_bits(axes: Axes, error: float) -> float:
    """Bits of a token without which no code has so little error."""
    dims = [(float(a), float(b)) for a, b in zip(axes.dropped, axes.noise, strict=True)]

    def at(level: float) -> tuple[float, float]:
        """Bits and error where every dim with bits has the error `level`."""
        bits = wrong = 0.0
        for dropped, spread in dims:
            rate = 0.5 * math.log2(spread / level) if spread > level else 0.0
            if rate and level + 2 * math.log(2) * level * rate < dropped:  # bits at their price, against none
                bits, wrong = bits + rate, wrong + level
            else:
                wrong += dropped
        return bits, wrong

    low, high = 1e-12 * max(b for _, b in dims), max(b for _, b in dims)
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle)[1] < error else (low, middle)
    return len(axes.to) * at(low)[0]


def main() -> None:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    teacher, _ = load_model(asked.model, dtype="float32")
    statistics = load_statistics(asked.stats, teacher.config)
    spent = plan(teacher, statistics, asked.budget)
    figure = Figure(figsize=(8, 5), layout="constrained")
    total = [0.0, 0.0]
    sides = (("keys", spent.k_codes), ("values", spent.v_codes))
    for which, (panel, (label, codes)) in enumerate(zip(figure.subplots(2, sharex=True), sides, strict=True)):
        rows = []
        for layer, groups in zip(full_axes(teacher, statistics), codes, strict=True):
            bits, error = used(layer[which], groups)
            rows.append((bits, least_bits(layer[which], error)))
        for column, name in enumerate(("used", "limit at the same error")):
            at = [layer + 0.4 * column - 0.2 for layer in range(len(rows))]
            panel.bar(at, [row[column] for row in rows], width=0.4, label=name)
            total[column] += sum(row[column] for row in rows)
        panel.set_ylabel(f"{label}: bits per token")
        print(label, *(f"{bits:.0f}/{least:.0f}" for bits, least in rows))
    figure.axes[0].legend(frameon=False)
    figure.axes[1].set_xlabel("Layer")
    figure.savefig(asked.out)
    print(f"{total[0]:.0f} bits used, {total[1]:.0f} at the limit: {total[0] / total[1]:.2f} x")


if __name__ == "__main__":
    main()
