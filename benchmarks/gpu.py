"""What only a GPU can show, in under ten minutes: tests, decode attention, an 8 B model converted, decoded and healed.

    make gpu                                # on the machine with the GPU; nothing is downloaded
    python benchmarks/gpu.py --out runs/gpu # the same with the Python at hand; kvlatent is taken from src/

Weights are random, since times and bytes don't depend on them. Parts run in order of cost, each on its own: one that
fails says why and the others go on; none is begun once the minutes are spent. Writes `gpu.json` and `gpu.md`, a table
per part for docs/results.md. `--small` tries all of it on a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402

import kvlatent  # noqa: E402
from kvlatent.compress.convert import convert, convert_as  # noqa: E402
from kvlatent.compress.planning import requested  # noqa: E402
from kvlatent.evaluation.bench import benchmark, copy_bandwidth, n_max_of  # noqa: E402
from kvlatent.kernels.attention import segment_attention  # noqa: E402
from kvlatent.kernels.codes import Codes  # noqa: E402
from kvlatent.model.checkpoints import environment, peak_memory  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of a model's attention."""

    name: str
    kv_heads: int
    group: int
    head_dim: int


SHAPES = Shape("Llama-3-8B", 8, 4, 128), Shape("Qwen3-8B", 8, 4, 128), Shape("Gemma-3-12B", 8, 2, 256)
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
TINY = LLAMA_8B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of all parts."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    cache_bytes: int
    """The largest cache that attention is timed on."""
    model: dict[str, Any]
    healed: dict[str, Any]
    block: int
    """Tokens of a block of text; calibration takes 4, healing as many as its steps."""
    decoded: tuple[tuple[int, int], ...]
    """Batch and context of decoding."""
    memory: int
    """Bytes for the longest context."""
    tests: tuple[str, ...]
    repeats: int


def sizes(small: bool) -> Sizes:
    """The real ones, or such as a CPU tries in seconds."""
    if small:
        return Sizes(
            device=torch.device("cpu"), dtype=torch.float32, shapes=(Shape("tiny", 2, 2, 16),), contexts=(64, 256),
            batches=(1, 2), cache_bytes=2**20, model=TINY, healed=TINY, block=256, decoded=((1, 192),), memory=2**23,
            tests=("tests/test_segments.py", "-k", "weighs_nothing"), repeats=2,
        )  # fmt: skip
    device = torch.device("cuda")
    return Sizes(
        device=device, dtype=torch.bfloat16, shapes=SHAPES, contexts=(2048, 8192, 32768, 131072),
        batches=(1, 4, 16, 64), cache_bytes=torch.cuda.mem_get_info()[1] // 4, model=LLAMA_8B, healed=LLAMA_1B,
        block=1024, decoded=((1, 2048), (1, 32768), (16, 8192)), memory=torch.cuda.mem_get_info()[1],
        tests=("-m", "gpu"), repeats=5,
    )  # fmt: skip


# --- parts


def tests(at: Sizes) -> Iterator[Row]:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        yield {"tests": "not run: pytest is missing"}
        return
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *at.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "src"})
    yield {"tests": (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"])[-1]}
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-500:])


def attention(at: Sizes) -> Iterator[Row]:
    """One decode step's attention in one layer against the bandwidth of a copy, beside SDPA and FlashAttention."""
    copy = copy_bandwidth(at.device)
    for shape in at.shapes:
        for context in at.contexts:
            for batch in at.batches:
                whole = 2 * batch * shape.kv_heads * context * shape.head_dim * at.dtype.itemsize
                if whole > at.cache_bytes:
                    continue
                row: Row = {"model": shape.name, "batch": batch, "context": context}
                for name, (run, held) in ways(shape, batch, context, at).items():
                    took = median_seconds(run, at)
                    row |= {f"{name}, us": round(took * 1e6, 1), f"{name}, of copy": round(held / took / copy, 2)}
                yield row
                free(at.device)


def ways(shape: Shape, batch: int, context: int, at: Sizes) -> dict[str, tuple[Callable[[], Any], int]]:
    """Ways to attend by name, each with the bytes that it has to read."""
    heads, dim, device = shape.kv_heads, shape.head_dim, at.device
    scale, found = dim**-0.5, dict[str, tuple[Callable[[], Any], int]]()

    def tensors(heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (torch.randn(batch, heads, context, width, dtype=at.dtype, device=device) for _ in range(2))
        return torch.randn(batch, shape.kv_heads * shape.group, 1, width, dtype=at.dtype, device=device), k, v

    q, k, v = tensors(heads, dim)
    held = k.nbytes + v.nbytes
    found["SDPA"] = (lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)), held
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        found["FlashAttention"] = (lambda: flash_attn_with_kvcache(*turned, softmax_scale=scale)), held
    found["ours, whole"] = (lambda: segment_attention(q, k, v, scale=scale, mask=None)), held
    together = max(1, min(heads, 256 // dim))  # KV heads that share a latent by default
    width = together * dim // 2
    q2, k2, v2 = tensors(heads // together, width)
    found["ours, half"] = (lambda: segment_attention(q2, k2, v2, scale=scale, mask=None)), k2.nbytes + v2.nbytes
    codes = Codes(((width // 4, 4), (3 * width // 4, 2)))  # about an eighth
    rows = [codes.encode(x.float()) for x in (k2, v2)]
    found["ours, codes"] = (
        (lambda: segment_attention(q2, *rows, scale=scale, mask=None, codes=(codes, codes))),
        sum(x.nbytes for x in rows),
    )
    return found


def converted(at: Sizes) -> Iterator[Row]:
    """A model of 8 B converted in order, decoded beside its teacher, and the longest contexts."""
    torch.manual_seed(0)
    with torch.device(at.device):
        teacher = LlamaForCausalLM(LlamaConfig(**at.model)).eval()
    weights = sum(p.nbytes for p in teacher.parameters())
    reset_peak(at.device)
    ids = torch.randint(at.model["vocab_size"], (4, at.block), device=at.device)
    half, width = (teacher.config.head_dim // 2, teacher.config.head_dim)
    latent = 2 * half if 2 * width <= 256 else half
    codes = ((((latent, 4),),) * teacher.config.num_hidden_layers,) * 2
    config = teacher.config
    maps = 2 * config.num_hidden_layers * latent * width * (config.num_attention_heads + config.num_key_value_heads)
    began = time.monotonic()
    request = requested(teacher.config, preset="best", d_qk=half, d_vo=half, k_codes=codes[0], v_codes=codes[1])
    student = convert_as(request, teacher, ids=ids, batch_size=2, share=True)  # as `kvlatent convert` does
    yield {
        "step": "convert, in order", "tokens": ids.numel(), "seconds": round(time.monotonic() - began, 1),
        "peak GiB": round(peak_memory(at.device) / 2**30, 1),
        "of it weights, by arithmetic": round((weights + attention_bytes(teacher) + 4 * maps) / 2**30, 1),
    }  # fmt: skip
    models: dict[str, PreTrainedModel] = {"teacher": teacher.to(at.dtype), "student": student.to(at.dtype)}
    free(at.device)
    for batch, context in at.decoded:
        settings: dict[str, Any] = {"context": context, "batch": batch, "new_tokens": 8, "repeats": at.repeats}
        for row in benchmark(models, **settings, seed=0):
            keys = ("model", "batch", "context", "ttft_ms", "tpot_ms", "roofline_share", "cache_bytes")
            yield {"step": "decode"} | {key: row[key] for key in keys}
        for name, model in models.items():
            with torch.no_grad():
                yield {"step": "decode, static cache, compiled", "model": name, "batch": batch, "context": context,
                       "tpot_ms": compiled_tpot(model, batch, context, at)}  # fmt: skip
        free(at.device)
    for name in list(models):
        yield {"step": "n_max", "model": name, "batch": 1, **n_max_of(models[name], memory=at.memory // 2, batch=1)}
        free(at.device)


def attention_bytes(model: PreTrainedModel) -> int:
    """What all attention modules take, which a student that shares all else has anew."""
    return sum(p.nbytes for layer in model.model.layers for p in layer.self_attn.parameters())


def compiled_tpot(model: PreTrainedModel, batch: int, context: int, at: Sizes) -> float:
    """Milliseconds of a step of `generate` with a static cache: on CUDA it is compiled, and replayed as a graph."""
    ids = torch.randint(model.config.vocab_size, (batch, context), device=at.device)
    took = []
    for new in (8, 8, 40):  # the first compiles
        synchronize(at.device)
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            cache_implementation="static", pad_token_id=0,
        )  # fmt: skip
        synchronize(at.device)
        took.append(time.perf_counter() - began)
    return 1000 * (took[2] - took[1]) / 32


def healed(at: Sizes) -> Iterator[Row]:
    """Tokens per second and peak memory of stage 2."""
    from kvlatent.healing.config import HealConfig
    from kvlatent.healing.heal import heal

    torch.manual_seed(0)
    with torch.device(at.device):
        teacher = LlamaForCausalLM(LlamaConfig(**at.healed)).eval()
    width = teacher.config.head_dim
    ids = torch.randint(at.healed["vocab_size"], (8, at.block))
    student = convert(teacher, d_qk=width // 2, d_vo=width // 2, ids=ids[:2].to(at.device), batch_size=2)
    reset_peak(at.device)
    settings = HealConfig(stage2_tokens=ids.numel(), batch_size=2, lora_rank=16)
    with tempfile.TemporaryDirectory() as folder:
        heal(student, teacher.to(at.dtype), ids, Path(folder, "work"), settings, device=at.device)
        lines = [json.loads(x) for x in Path(folder, "work", "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_s"] for line in lines if line["stage"] == 2]
    yield {
        "tokens/s": round(statistics.median(speeds[len(speeds) // 2 :]), 1),
        "peak GiB": round(peak_memory(at.device) / 2**30, 1),
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
    }


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "tests": tests,
    "decode attention": attention,
    "conversion and decoding": converted,
    "healing": healed,
}


# --- small words


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory back that nothing holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count peak memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def median_seconds(run: Callable[[], Any], at: Sizes) -> float:
    """Seconds of a call, of which several are queued at a time so that launching them doesn't count."""
    run()
    queued = 20 if at.device.type == "cuda" else 1
    took = []
    for _ in range(at.repeats):
        synchronize(at.device)
        began = time.perf_counter()
        for _ in range(queued):
            run()
        synchronize(at.device)
        took.append((time.perf_counter() - began) / queued)
    return statistics.median(took)


def table(rows: list[Row]) -> str:
    """Rows as Markdown; those of other columns begin a table of their own."""
    lines: list[str] = []
    header: list[str] = []
    for row in rows:
        if list(row) != header:
            header = list(row)
            lines += ["", "| " + " | ".join(header) + " |", "|" + "--|" * len(header)]
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the parts; the exit code is the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--minutes", type=float, default=8, help="no part is begun after these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args(argv)
    if not asked.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --small tries the script on a CPU")
    at, began = sizes(asked.small), time.monotonic()
    result: dict[str, Any] = {"environment": environment(), "parts": {}}
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.parts:
        part: dict[str, Any] = {"rows": []}
        result["parts"][name] = part
        if time.monotonic() - began > 60 * asked.minutes:
            part["error"] = "not begun: the minutes were spent"
        else:
            started = time.monotonic()
            try:
                for row in PARTS[name](at):
                    part["rows"].append(row)
                    print(name, json.dumps(row), flush=True)
            except Exception as error:  # the other parts are worth having
                part["error"] = f"{type(error).__name__}: {error}"
            part["seconds"] = round(time.monotonic() - started, 1)
            free(at.device)
        where = f"{result['environment']['device']}, kvlatent {kvlatent.__version__}, torch {torch.__version__}"
        pages = [f"# {where}"]
        for heading, done in result["parts"].items():
            pages.append(f"\n## {heading}, {done.get('seconds', 0)} s\n{table(done['rows'])}")
            pages += [f"\nFailed: {done['error']}"] if "error" in done else []
        (asked.out / "gpu.json").write_text(json.dumps(result, indent=2))
        (asked.out / "gpu.md").write_text("\n".join(pages) + "\n")
    failed = [name for name, part in result["parts"].items() if "error" in part]
    print(f"written to {asked.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
