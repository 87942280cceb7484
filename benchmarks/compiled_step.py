"""One decode step: with a cache that grows, with one of static shapes, and that compiled; in turns, medians.

    OMP_NUM_THREADS=2 python benchmarks/compiled_step.py STUDENT [--context 512 2048] [--batch 1] [--device cuda]

Cache contents are random: time depends on shapes only. Static caches reserve twice the context. On CUDA the
compiled step is replayed as a CUDA graph.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

import kvlatent
from kvlatent.evaluation.bench import filled_cache
from kvlatent.model.cache import StaticLatentCache
from kvlatent.model.compatibility import CACHE


def static(model: PreTrainedModel, grown: Cache, tokens: int) -> StaticLatentCache:
    """A static cache with the content of `grown`."""
    cache = StaticLatentCache(model.config, max_cache_len=2 * tokens)
    for index, layer in enumerate(grown.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


@torch.no_grad()
def main() -> None:
    """Measure every context and batch; print one JSON row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(arguments.device).eval()
    mode = "reduce-overhead" if arguments.device.startswith("cuda") else "default"
    compiled = torch.compile(model, mode=mode, fullgraph=True)

    def step(run: PreTrainedModel, token: torch.Tensor, cache: Cache) -> float:
        start = time.perf_counter()
        token.copy_(run(input_ids=token, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(dim=-1))
        token.sum().item()  # waits for a GPU
        return 1000 * (time.perf_counter() - start)

    for batch in arguments.batch:
        for context in arguments.context:
            token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
            grown = filled_cache(model, batch=batch, tokens=context)
            ways = {
                "growing": (model, grown),
                "static": (model, static(model, grown, context)),
                "static, compiled": (compiled, static(model, grown, context)),
            }
            start = time.perf_counter()
            for _ in range(3):
                for run, cache in ways.values():
                    step(run, token, cache)
            warm_up = time.perf_counter() - start
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.steps):
                for name, (run, cache) in ways.items():
                    times[name].append(step(run, token, cache))
            row = {"version": kvlatent.__version__, "batch": batch, "context": context, "warm_up_s": round(warm_up, 1)}
            for name, measured in times.items():
                low, *_, high = statistics.quantiles(measured, n=4)
                row[name] = {
                    "tpot_ms": round(statistics.median(measured), 2),
                    "quartiles": [round(low, 2), round(high, 2)],
                }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
