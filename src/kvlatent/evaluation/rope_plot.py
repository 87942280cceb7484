"""Stability curves of RoPE (KV-Latent, arXiv:2507.11273, Eq. 10 and 12, Fig. 3–10).

Where 2·d divides head_dim, the matched pairs of `compress/methods/stride.py` have the frequency-aware list's curve.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kvlatent.compress.figure import check_ending
from kvlatent.evaluation.config import RopePlotConfig
from kvlatent.files import new_file, new_output
from kvlatent.model.graft import head_dim_of, spec_in
from kvlatent.model.loading import bare_model, load_config
from kvlatent.model.rope import (
    frequencies_of,
    frequency_aware_exponents,
    inverse_frequencies,
    plain_exponents,
    stability,
)

POINTS = 0.005
"""Step of the numerical integral, in radians."""
SMALL = 4.0
"""Up to here the cosine integral is a series that converges at once."""


def limit(distances: Tensor, theta: float) -> Tensor:
    """What the stability of plain RoPE approaches for many dims: ∫ cos(θ^p) dp over [log_θ x − 1, log_θ x] (Eq. 12).

    That is (Ci(x) − Ci(x / θ)) / ln θ, with the cosine integral Ci.

    Args:
        distances: Distances x in tokens, above 0, any shape.
        theta: Base of the frequencies.
    """
    x = distances.double()
    return (cosine_integral(x) - cosine_integral(x / theta)) / math.log(theta)


def cosine_integral(x: Tensor) -> Tensor:
    """Ci(x) = γ + ln x + ∫ (cos t − 1) / t dt from 0 to x, for x above 0, within 1e-6."""
    powers, series = torch.ones_like(x), torch.zeros_like(x)
    small = x.clamp(max=SMALL)
    for k in range(1, 20):
        powers = -powers * small.square() / ((2 * k - 1) * (2 * k))
        series = series + powers / (2 * k)
    found = 0.5772156649015329 + small.log() + series
    steps = max(1, math.ceil((float(x.max()) - SMALL) / POINTS))
    middles = SMALL + POINTS * (torch.arange(steps, dtype=torch.float64) + 0.5)
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), (POINTS * middles.cos() / middles).cumsum(0)))
    at = ((x - SMALL) / POINTS).clamp(min=0)
    whole = at.long().clamp(max=steps - 1)
    return found + sums[whole] + (at - whole) * (sums[whole + 1] - sums[whole])


def frequency_lists(config: RopePlotConfig) -> tuple[int, float | None, dict[str, tuple[float, ...]]]:
    """Dims per head, theta where there is one, and the lists to compare by name.

    Raises:
        UserError: The model, or dims that the paper's list can't have.
    """
    lists: dict[str, tuple[float, ...]] = {}
    theta: float | None = config.theta
    if config.model is None:
        head_dim = max(config.dims)
    else:
        model = load_config(config.model)
        head_dim, spec = head_dim_of(model), spec_in(model)
        parameters = model.rope_parameters
        theta = parameters.get("rope_theta", parameters.get("full_attention", {}).get("rope_theta"))
        if spec is not None:
            lists["kept"] = spec.inv_freq
        else:
            rotary = type(bare_model(model, config.model).model.rotary_emb)(model)
            by_type = not hasattr(rotary, "inv_freq")
            lists["kept"] = frequencies_of(rotary, head_dim, "full_attention" if by_type else None)[0]
    assert theta is not None
    for d in config.dims:
        lists[f"plain, d = {d}"] = inverse_frequencies(plain_exponents(d), d=d, theta=theta)
        lists[f"aware, d = {d}"] = inverse_frequencies(frequency_aware_exponents(d), d=d, theta=theta)
    return head_dim, theta, lists


def rope_plot(config: RopePlotConfig) -> dict[str, Any]:
    """Draw the curves to a file.

    Returns:
        `theta`, `head_dim`, `out` and, for each list of frequencies, `curves`: the share of negative values, the least
        one and the mean over the distances 1 to `distance`.

    Raises:
        UserError: `out` exists or ends in what can't be drawn, or dims or a model can't be used.
    """
    check_ending(config.out)
    with new_output(config.out):
        head_dim, theta, lists = frequency_lists(config)
        distances = torch.arange(1, config.distance + 1)
        curves = {name: stability(frequencies, distances) for name, frequencies in lists.items()}
        curves["limit of many dims"] = limit(distances, theta or 0.0)
        quarters = quarters_of(lists.get("kept", lists[f"plain, d = {max(config.dims)}"]), distances)
        figure = Figure(figsize=(9, 11), layout="constrained")
        plain, aware, parts = figure.subplots(3)
        _draw(plain, distances, {k: v for k, v in curves.items() if not k.startswith("aware")}, "Plain RoPE")
        smallest = min(config.dims)
        pair = {k: v for k, v in curves.items() if k in ("kept", f"plain, d = {smallest}", f"aware, d = {smallest}")}
        _draw(aware, distances, pair, f"{smallest} dims: plain, frequency-aware (Eq. 11) and all frequencies kept")
        _draw(parts, distances, quarters, "Quarters of the pairs, from the fastest")
        parts.set_xlabel("Distance in tokens")
        with new_file(config.out) as partial:
            figure.savefig(partial, dpi=150, format=config.out.suffix[1:])
    told = [
        {
            "frequencies": name,
            "negative": float((y < 0).double().mean()),
            "least": float(y.min()),
            "mean": float(y.mean()),
        }
        for name, y in curves.items()
    ]
    return {"theta": theta, "head_dim": head_dim, "distance": config.distance, "curves": told, "out": str(config.out)}


def quarters_of(inv_freq: tuple[float, ...], distances: Tensor) -> dict[str, Tensor]:
    """The stability of each quarter of the pairs alone."""
    size = max(1, len(inv_freq) // 4)
    return {f"quarter {n + 1}": stability(inv_freq[n * size : (n + 1) * size], distances) for n in range(4)}


def _draw(axes: Axes, distances: Tensor, curves: dict[str, Tensor], title: str) -> None:
    for name, y in curves.items():
        axes.plot(distances.numpy(), y.numpy(), label=name, linewidth=0.9)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_ylabel("Mean cosine")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize="small", ncols=3)
