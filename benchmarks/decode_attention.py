"""Decode attention alone: bytes of the cache read per second, as a share of the copy bandwidth measured in between.

    OMP_NUM_THREADS=2 python benchmarks/decode_attention.py [--out FILE.json]

One query per sequence over a cache larger than the last-level cache. A copy of b bytes moves 2b. Every candidate and
the copy take turns; numbers are medians over the rounds. `stock` is what transformers does: keys and values repeated
per query head, then `scaled_dot_product_attention`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlatent.kernels.attention import PATHS

SHAPES = {  # name: kv_heads, group_size, (d_qk, d_vo) ...
    "SmolLM2-135M": (3, 3, [(64, 64), (32, 32), (16, 48), (32, 64)]),
    "Llama-3-8B": (8, 4, [(128, 128), (64, 64), (32, 96)]),
}
CACHE_BYTES = 96 * 2**20
ROUNDS = 9


def stock(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: None) -> Tensor:
    """Repeat keys and values per query head, as transformers does, then SDPA."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: None) -> Tensor:
    """Query heads of a group as if they were positions: one SDPA call, nothing repeated."""
    grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v, scale=scale).view(*q.shape[:3], v.shape[-1])


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "kernel": PATHS["kernel"],
    "grouped": PATHS["grouped"],
    "sdpa_grouped": sdpa_grouped,
    "stock": stock,
}


def seconds(work: Callable[..., object], *arguments: object, **options: object) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - start


def main() -> None:
    """Measure all shapes and dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    source = torch.ones(CACHE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    rows = []
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        for model, (kv_heads, group_size, widths) in SHAPES.items():
            for d_qk, d_vo in widths:
                kv_len = CACHE_BYTES // (kv_heads * (d_qk + d_vo) * dtype.itemsize)
                k, v = (torch.randn(1, kv_heads, kv_len, d).to(dtype) for d in (d_qk, d_vo))
                q = torch.randn(1, kv_heads * group_size, 1, d_qk).to(dtype)
                # Slow candidates are timed less often; in half precision only ours and stock are of interest.
                names = list(CANDIDATES) if dtype == torch.float32 else ["kernel", "stock"]
                times: dict[str, list[float]] = {name: [] for name in ["copy", *names]}
                for turn in range(arguments.rounds + 1):
                    for name in times:
                        if turn > 3 and name not in ("copy", "kernel"):
                            continue
                        if name == "copy":
                            took = seconds(target.copy_, source)
                        else:
                            took = seconds(CANDIDATES[name], q, k, v, scale=0.1, mask=None)
                        if turn:
                            times[name].append(took)
                copy = 2 * CACHE_BYTES / statistics.median(times["copy"])
                row = {"model": model, "d_qk": d_qk, "d_vo": d_vo, "dtype": dtype_name, "copy_gb_per_s": copy / 1e9}
                for name in names:
                    speed = [(k.nbytes + v.nbytes) / took / copy for took in times[name]]
                    row[name] = {"share": statistics.median(speed), "range": [min(speed), max(speed)]}
                rows.append(row)
                shares = ", ".join(f"{name} {row[name]['share']:.0%}" for name in names)
                print(f"{model} ({d_qk}, {d_vo}) {dtype_name}: copy {copy / 1e9:.1f} GB/s; {shares}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
