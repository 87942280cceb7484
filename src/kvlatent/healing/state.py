"""The resumable state of a training: what training changes and how far it is, whole on disk or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kvlatent.errors import UserError
from kvlatent.files import replaced

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
        if file.read_text() != asked:
            raise UserError(
                f"{work} holds a run with other settings or text; use the same ones, or start without --resume"
            )
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    file.write_text(asked)


def read_progress(work: Path) -> Progress:
    """How far the saved state is; the start, if there is none."""
    file = work / "state" / "progress.json"
    return json.loads(file.read_text()) if file.is_file() else {"stage": 1, "step": 0}


def forget_after(metrics: Path, progress: Progress) -> None:
    """Drop the metrics of steps that came after the saved state: they will be done again."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if _place(json.loads(line)) < _place(progress)]
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
    """Write what trains, the optimizer's moments of it, and the progress beside the old state; then swap."""
    tensors = {name: whole(value) for name, value in _changing(accelerator, module, optimizer).items()}
    if accelerator.is_main_process:
        checkpoint, partial, old = work / "state", work / "state.partial", work / "state.old"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial / "trained.safetensors")
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        (partial / "scaler.json").write_text(json.dumps(scaler))
        (partial / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(old, ignore_errors=True)
        if checkpoint.is_dir():
            checkpoint.rename(old)
        partial.rename(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, work: Path) -> None:
    """Put back what `save_state` wrote."""
    with safe_open(work / "state" / "trained.safetensors", framework="pt") as file:
        saved = sorted(file.keys())  # all processes must ask for their shares in the same order
        for name, parameter in _trained(accelerator, module):
            with torch.no_grad():
                parameter.copy_(_like(parameter, file.get_tensor(name)))
            moments = [key for key in saved if key.startswith(f"{name}/")]
            if moments:
                optimizer.state[parameter] = {
                    key.removeprefix(f"{name}/"): _moment(parameter, file.get_tensor(key)) for key in moments
                }
    scaler = json.loads((work / "state" / "scaler.json").read_text())
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)


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
