"""The resumable state of a training: what training changes and how far it is, whole on disk or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kvlatent.errors import UserError
from kvlatent.files import differing_settings, replaced, writing

Progress = dict[str, int]
"""`stage` and `step` of the next step; of a streamed stage 1 also `layer`."""


def prepare_folder(work: Path, settings: dict[str, Any], resume: bool) -> None:
    """Clear the folder, or check that the state in it was made with the same settings and text.

    Raises:
        UserError: The state is of another run.
    """
    asked = json.dumps(settings, indent=2) + "\n"
    file, old = work / "heal.json", work / "state.old"
    if old.is_dir() and not (work / "state").exists():  # killed between the two renames of a save
        old.rename(work / "state")
    if resume and file.is_file():
        _check_same(work, file.read_bytes(), settings)
        return
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    with replaced(file) as partial:
        partial.write_text(asked)


def _check_same(work: Path, kept: bytes, asked: dict[str, Any]) -> None:
    """Raise `UserError` with what differs between the settings kept and those asked for."""
    try:
        differing = differing_settings(kept, asked)
    except ValueError as error:
        raise damaged(work, f"heal.json: {error}") from None
    if not differing:
        return
    if "student" in differing:
        reason = "the student has other weights than when the healing began (converted anew?)"
    elif "text" in differing:
        reason = "the healing was begun with other text"
    else:
        reason = f"the healing was begun with other settings ({', '.join(differing)})"
    raise UserError(f"{work} can't be resumed: {reason}; use the same, or --restart to begin anew")


def damaged(work: Path, what: str) -> UserError:
    """What to raise when a file of the state isn't as it was written."""
    return UserError(f"the healing's state in {work} is damaged ({what}); begin anew with --restart")


def has_state(work: Path) -> bool:
    """Whether there is training in the folder that a new start would lose."""
    return (work / "state").is_dir() or (work / "state.old").is_dir()


def read_progress(work: Path) -> Progress:
    """How far the saved state is; the start, if there is none.

    Raises:
        UserError: There is a state, and it doesn't say.
    """
    if not (work / "state").is_dir():
        return {"stage": 1, "step": 0}
    try:
        progress = json.loads((work / "state" / "progress.json").read_bytes())
        whole_numbers = all(type(progress[key]) is int and progress[key] >= 0 for key in progress)
        if progress.keys() - {"layer"} == {"stage", "step"} and progress["stage"] in (1, 2) and whole_numbers:
            return progress
        raise ValueError("it doesn't say how far the training is")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(work, f"progress.json: {error}") from None


def forget_after(metrics: Path, progress: Progress) -> None:
    """Drop the metrics of steps that came after the saved state: they will be done again."""
    if metrics.is_file():
        try:
            lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if _place(json.loads(line)) < _place(progress)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(metrics.parent, f"metrics.jsonl: {error}") from None
        with replaced(metrics) as partial:
            partial.write_text("".join(line + "\n" for line in kept))


def _place(progress: dict[str, Any]) -> tuple[int, int, int]:
    return progress["stage"], progress.get("layer", 0), progress["step"]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes (which must all ask), on the host."""
    tensor = tensor.detach()
    # A gathered tensor may still be on its way; a copy of it has arrived.
    return (tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor).cpu()


def save_state(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, work: Path, progress: Progress
) -> None:
    """Write what trains, the optimizer's moments of it, and the progress beside the old state; then swap.

    Raises:
        UserError: The disk is full; the old state is as it was.
    """
    tensors = {name: whole(value) for name, value in _changing(accelerator, module, optimizer).items()}
    if accelerator.is_main_process:
        with writing(work):
            _swap(work, tensors, accelerator, progress)
    accelerator.wait_for_everyone()


def _swap(work: Path, tensors: dict[str, Tensor], accelerator: Accelerator, progress: Progress) -> None:
    checkpoint, partial, old = work / "state", work / "state.partial", work / "state.old"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_tensors(tensors, partial / "trained.safetensors")
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        (partial / "scaler.json").write_text(json.dumps(scaler))
        (partial / "progress.json").write_text(json.dumps(progress))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if checkpoint.is_dir():
        checkpoint.rename(old)
    partial.rename(checkpoint)
    shutil.rmtree(old, ignore_errors=True)


def load_state(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, work: Path) -> None:
    """Put back what `save_state` wrote.

    Raises:
        UserError: The state is damaged.
    """
    tensors = load_tensors(work / "state" / "trained.safetensors", work)
    parameters = dict(_trained(accelerator, module))
    if parameters.keys() != {name.split("/")[0] for name in tensors}:
        raise damaged(work, "trained.safetensors: it holds other weights than those that train")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(_like(parameter, tensors[name]))
        # All processes must ask for their shares in the same order.
        moments = [key for key in sorted(tensors) if key.startswith(f"{name}/")]
        if moments:
            optimizer.state[parameter] = {
                key.removeprefix(f"{name}/"): _moment(parameter, tensors[key]) for key in moments
            }
    try:
        scaler = json.loads((work / "state" / "scaler.json").read_bytes())
        if scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise damaged(work, f"scaler.json: {error}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors with a hash of them, for `load_tensors`."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={"sha256": _digest(tensors)})


def load_tensors(path: Path, work: Path) -> dict[str, Tensor]:
    """Read tensors of the state in `work`.

    Raises:
        UserError: They aren't what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kept = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise damaged(work, f"{path.name}: {error}") from None
    if kept != _digest(tensors):
        raise damaged(work, f"{path.name}: its tensors aren't those that were written")
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained(accelerator: Accelerator, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    plain = accelerator.unwrap_model(module, keep_torch_compile=False)
    return ((name, parameter) for name, parameter in plain.named_parameters() if parameter.requires_grad)


def _changing(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What trains by name, and the optimizer's state of it as name/moment."""
    found: dict[str, Tensor] = {}
    for name, parameter in _trained(accelerator, module):
        found[name] = parameter
        found |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return found


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, laid out over the processes as `parameter` is."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _moment(parameter: Tensor, value: Tensor) -> Tensor:
    return value if value.ndim == 0 else _like(parameter, value)  # the count of steps stays on the host
