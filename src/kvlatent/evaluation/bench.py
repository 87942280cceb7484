"""What a model costs: cache bytes from the live tensors, TTFT, TPOT, throughput, peak memory and roofline, in turns."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from kvlatent.compose.evicting import PolicyCache
from kvlatent.compose.policies import policy_of
from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError, needs
from kvlatent.evaluation.config import BenchConfig
from kvlatent.files import new_folder
from kvlatent.model.cache import LatentCache, allocated_bytes, cache_bytes
from kvlatent.model.checkpoints import load_model, peak_memory
from kvlatent.model.compatibility import CACHE
from kvlatent.model.families import linear_layers
from kvlatent.model.graft import cached_dims, cached_heads, graft, spec_of
from kvlatent.model.loading import load_config
from kvlatent.model.sizes import (
    far_token_bytes,
    layer_caches,
    most_tokens,
    predicted_cache_bytes,
    window_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One prefill and the decode steps after it."""

    ttft_ms: float | None
    """None where the cache was filled without a prefill."""
    tpot_ms: float
    """Median over the decode steps."""
    peak_memory_bytes: int
    cache_bytes: int
    cache_bytes_predicted: int | None
    """None where a policy keeps what the prompt tells."""
    cache_bytes_allocated: int
    kept: dict[str, float]
    """Of tokens, with a policy."""
    bandwidth: float
    """Bytes per second that a copy moved just before, reads and writes counted."""


def bench(config: BenchConfig, *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Measure cache bytes, TTFT, TPOT, throughput and roofline of a model, over a grid, in turns with another's.

    Returns:
        The first cell's row, the other model's under `against`, all cells under `rows`, and under `n_max` the longest
        contexts that fit in `memory` GiB.

    Raises:
        UserError: A size is out of range, a model can't be used, or `own` asks for a model that can't be grafted.
    """
    if config.out is not None:
        with needs("report"):
            from kvlatent.evaluation.report.page import bench_page
    against = config.against
    names = [config.model, *([] if against is None else [against])]
    for name in names:
        load_config(name)
    policy = policy_of(config.policy, config.keep)
    label = f"{config.model} ({policy})"
    policies = {} if policy is None else {label: policy}
    rows: list[dict[str, Any]] = []
    n_max: list[dict[str, Any]] = []
    with new_folder(config.out) if config.out is not None else nullcontext() as folder:
        for kind in config.dtypes or (dtype,):
            models = {name: load_model(name, device=device, dtype=kind)[0] for name in dict.fromkeys(names)}
            if policy is not None:
                models = {label: models[config.model], **({} if against is None else {against: models[against]})}
            if config.own and against is not None:
                models[f"{against} (our path)"] = graft(models[against], share=True)
            for batch in config.batch:
                for context in config.context:
                    sizes: dict[str, Any] = {"context": context, "batch": batch, "new_tokens": config.new_tokens}
                    sizes |= {"repeats": config.repeats, "synthetic": config.synthetic, "seed": seed}
                    rows += benchmark(models, **sizes, policies=policies)
                if config.memory is not None:
                    n_max += [
                        {
                            "model": name,
                            "batch": batch,
                            **n_max_of(loaded, memory=int(config.memory * 2**30), batch=batch),
                        }
                        for name, loaded in models.items()
                    ]
            del models
        result = rows[0] | ({} if against is None else {"against": rows[1]}) | {"rows": rows}
        if n_max:
            result |= {"memory_gib": config.memory, "n_max": n_max}
        if folder is not None:
            (folder / "bench.json").write_text(json.dumps(result, indent=2))
            (folder / "bench.html").write_text(bench_page(result), encoding="utf-8", errors="backslashreplace")
            result |= {"out": str(config.out)}
    return result


def benchmark(
    models: Mapping[str, PreTrainedModel],
    *,
    context: int,
    batch: int,
    new_tokens: int,
    repeats: int = 5,
    synthetic: bool = False,
    seed: int,
    policies: Mapping[str, Policy] | None = None,
) -> list[dict[str, Any]]:
    """Time models on the same random tokens, in turns (A B A B), so that a drifting machine slows them alike.

    TTFT is the prefill of `context` tokens with the logits of the last position, up to the first token. TPOT is the
    median of the `new_tokens` greedy cached decode steps that follow. Both are medians over the repeats, with the
    lowest and highest repeat as range; one warm-up round is not counted.

    A decode step must move all weights that it multiplies by and the whole cache. `roofline_ms` is the time that takes
    at the bandwidth of a plain copy, measured before every turn; `roofline_share` is that time over TPOT.

    Args:
        models: Name to model; each on its device, all of them resident throughout.
        context: Tokens per sequence before decoding.
        batch: Sequences.
        new_tokens: Decode steps; the cache ends with `context + new_tokens` tokens.
        repeats: Counted rounds.
        synthetic: Fill the cache with random numbers instead of a prefill: decode time depends on shapes only, and
            a long prefill of a large batch takes minutes. TTFT is None then.
        seed: Chooses the tokens.
        policies: By name of the model whose cache keeps to it; its row has `policy`, `keep` and what it kept, as
            `PolicyCache.kept` says, and no prediction.

    Returns:
        A row per model: `model, context, batch, new_tokens, dtype, synthetic, cache_bytes` (in use at the end, from the
        live tensors), `cache_bytes_predicted, cache_bytes_allocated` (with reserved capacity), `cache_bytes_per_token`
        (one token of one sequence in all layers, beyond a window), `window_bytes` (what a sequence's window and sinks
        take once they are full), `ttft_ms, ttft_ms_range, tpot_ms, tpot_ms_range, tokens_per_s`
        (`batch / TPOT`), `bandwidth_gb_per_s, roofline_ms, roofline_share` and `peak_memory_bytes`: on a GPU what
        torch allocated on it, on a CPU the resident memory of the process; the weights of every model count in both,
        so the difference between rows is what tells.

    Raises:
        UserError: A size is not positive, or a prefill and `new_tokens` exceed a model's positions.
        RuntimeError: A live cache is not of the predicted size.
    """
    for name, value in {"context": context, "batch": batch, "new_tokens": new_tokens, "repeats": repeats}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1; got {value}")
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", None)
        if not synthetic and positions is not None and context + new_tokens > positions:
            raise UserError(
                f"context {context} + {new_tokens} new tokens exceed the {positions} positions of {name} "
                "(max_position_embeddings)"
            )
    vocab_size = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocab_size, (batch, context), generator=torch.Generator().manual_seed(seed))

    policies = policies or {}
    measured: dict[str, list[Measurement]] = {name: [] for name in models}
    turns = [name for _ in range(repeats + 1) for name in models]
    for turn, name in enumerate(tqdm(turns, desc=f"bench {batch} x {context}", unit="runs")):
        policy = policies.get(name)
        measurement = _measure(models[name], ids, new_tokens=new_tokens, synthetic=synthetic, policy=policy)
        if turn >= len(models):  # the first round is the warm-up
            measured[name].append(measurement)
    return [
        {
            "model": name,
            "context": context,
            "batch": batch,
            "new_tokens": new_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "synthetic": synthetic,
            **_summary(model, measured[name], batch=batch),
            "cache_bytes_per_token": far_token_bytes(model.config, model.dtype.itemsize),
            "window_bytes": window_bytes(model.config, model.dtype.itemsize),
            **_about(policies.get(name), measured[name][-1]),
        }
        for name, model in models.items()
    ]


def _about(policy: Policy | None, last: Measurement) -> dict[str, Any]:
    """What a row says of a policy."""
    if policy is None:
        return {}
    return {"policy": policy.name, "keep": policy.keep, **last.kept}


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch context"],
    *,
    new_tokens: int,
    synthetic: bool,
    policy: Policy | None = None,
) -> Measurement:
    device = model.device
    ids = ids.to(device)
    model.eval()
    bandwidth = copy_bandwidth(device)
    _reset_peak_memory(device)

    ttft = None
    if synthetic:
        cache, token = filled_cache(model, batch=len(ids), tokens=ids.shape[1]), ids[:, -1:]
    else:
        given = {} if policy is None else {CACHE: policy.cache(model)}
        start = _now(device)
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
        token = output.logits[:, -1:].argmax(dim=-1)  # (batch, 1)
        ttft = _now(device) - start
        cache = output[CACHE]
    steps = []
    for _ in range(new_tokens):
        start = _now(device)
        logits = model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
        token = logits[:, -1:].argmax(dim=-1)
        steps.append(_now(device) - start)

    sizes = {"batch": len(ids), "tokens": ids.shape[1] + new_tokens, "element_size": model.dtype.itemsize}
    live = cache_bytes(cache)
    predicted = predicted_cache_bytes(model.config, **sizes) if policy is None else None
    if predicted is not None and live != predicted:
        raise RuntimeError(f"the live cache holds {live} bytes, but {predicted} were predicted")
    return Measurement(
        ttft_ms=None if ttft is None else 1000 * ttft,
        tpot_ms=1000 * statistics.median(steps),
        peak_memory_bytes=peak_memory(device),
        cache_bytes=live,
        cache_bytes_predicted=predicted,
        cache_bytes_allocated=allocated_bytes(cache),
        kept=cache.kept() if isinstance(cache, PolicyCache) else {},
        bandwidth=bandwidth,
    )


@torch.no_grad()
def filled_cache(model: PreTrainedModel, *, batch: int, tokens: int) -> Cache:
    """Return the cache a model makes by default, filled with random numbers."""
    config, spec = model.config, spec_of(model)
    cache = DynamicCache(config=config) if spec is None else LatentCache(config)
    where = {"dtype": model.dtype, "device": model.device}
    linear = linear_layers(config)
    for index, dims in enumerate(zip(*cached_dims(config), strict=True)):
        if index in linear:
            continue
        heads, beside = cached_heads(config), list[Any]()
        left_whole = spec is not None and index in spec.whole_layers
        if spec is not None and (spec.window or left_whole):
            heads, dims = config.num_key_value_heads, (spec.head_dim, spec.head_dim)
        if spec is not None and spec.window and not left_whole:  # the cache itself reduces what leaves the window
            beside = [model.model.layers[index].self_attn.far_maps().of(model.dtype), None]
        keys, values = (torch.randn(1, heads, 1, d, **where).expand(batch, -1, tokens, -1) for d in dims)
        held = (
            keys.shape[2] - 1 if cache.layers[index].is_sliding else 0
        )  # stock ones let go of a prefill's tensor then
        for part in (slice(0, held), slice(held, None)):
            if part != slice(0, 0):
                cache.update(keys[:, :, part], values[:, :, part], index, *beside)
    return cache


def copy_bandwidth(device: torch.device | str = "cpu", *, megabytes: int = 128, repeats: int = 3) -> float:
    """Bytes per second that a copy moves: it reads b bytes and writes b bytes, so 2b over its median time."""
    device = torch.device(device)
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 1):  # the first one touches the pages
        start = _now(device)
        target.copy_(source)
        times.append(_now(device) - start)
    return 2 * source.nbytes / statistics.median(times[1:])


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step multiplies by: all but an input embedding that isn't the output's too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(x.nbytes for x in model.parameters()) - (0 if embedding is head else embedding.nbytes)


def n_max_of(model: PreTrainedModel, *, memory: int, batch: int) -> dict[str, Any]:
    """The longest context that fits in `memory` bytes beside the weights (`n_max` of the paper's Table 2), tried out.

    Computed, whatever positions the model was trained for; a cache of that size is then allocated and written.

    Returns:
        `context` (tokens per sequence; zero where not even the weights fit, and None where no context is too long,
        since all layers have a sliding window), `bytes` (weights and the allocated cache) and `dtype`.

    Raises:
        RuntimeError: What was allocated takes more than `memory`.
    """
    weights = sum(x.nbytes for x in model.parameters())
    layers, grows = layer_caches(model.config, model.dtype.itemsize), spec_of(model) is not None
    context = most_tokens(layers, memory=memory - weights, batch=batch, grows=grows)
    tried = model.config.max_position_embeddings if context is None else context
    taken = weights
    if tried:
        taken += allocated_bytes(filled_cache(model, batch=batch, tokens=tried))
        if taken > memory:
            raise RuntimeError(f"{tried} tokens were computed to fit in {memory} bytes; allocated, they take {taken}")
    return {"context": context, "bytes": taken, "dtype": str(model.dtype).removeprefix("torch.")}


def _summary(model: PreTrainedModel, measured: Sequence[Measurement], *, batch: int) -> dict[str, Any]:
    ttft = [measurement.ttft_ms for measurement in measured if measurement.ttft_ms is not None]
    tpot = [measurement.tpot_ms for measurement in measured]
    bandwidth = statistics.median(measurement.bandwidth for measurement in measured)
    last = measured[-1]
    roofline_ms = 1000 * (weight_bytes(model) + last.cache_bytes) / bandwidth
    return {
        "cache_bytes": last.cache_bytes,
        "cache_bytes_predicted": last.cache_bytes_predicted,
        "cache_bytes_allocated": last.cache_bytes_allocated,
        "ttft_ms": statistics.median(ttft) if ttft else None,
        "ttft_ms_range": [min(ttft), max(ttft)] if ttft else None,
        "tpot_ms": statistics.median(tpot),
        "tpot_ms_range": [min(tpot), max(tpot)],
        "tokens_per_s": 1000 * batch / statistics.median(tpot),
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "roofline_ms": roofline_ms,
        "roofline_share": roofline_ms / statistics.median(tpot),
        "peak_memory_bytes": max(measurement.peak_memory_bytes for measurement in measured),
    }


def _now(device: torch.device) -> float:
    """Return seconds, once all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux forgets the peak of the process; elsewhere it stays the highest so far
            Path("/proc/self/clear_refs").write_text("5")
