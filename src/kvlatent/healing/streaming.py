"""Stage 1 one layer after the other: what is larger than the device can be trained, in memory independent of depth."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.files import replaced
from kvlatent.healing.config import HealConfig
from kvlatent.healing.stages import Batch, counted_positions, in_layer_loss
from kvlatent.healing.state import Progress, damaged, load_state, load_tensors, save_state, save_tensors
from kvlatent.model.hidden_states import OnDisk, forget
from kvlatent.model.layers import enter_layers


class LayerStage(nn.Module):
    """One student layer with its in-layer error on top."""

    def __init__(self, layer: nn.Module, config: HealConfig) -> None:
        super().__init__()
        self.layer, self.relative = layer, config.stage1_loss == "relative"

    def forward(self, hidden: Tensor, wanted: Tensor, kwargs: dict[str, Any], counted: Tensor | None) -> Tensor:
        """The error between two of the teacher's hidden states (batch, seq, hidden)."""
        return in_layer_loss(self.layer, hidden, wanted, kwargs, relative=self.relative, counted=counted)


@dataclass(kw_only=True)
class LayerStream:
    """Stage 1 one layer after the other.

    Both models stay where they are, best in host memory; a copy of the layer in hand is on the device. Steps, learning
    rates and gradients are those of all layers at once, so the trained weights are too.
    """

    student: PreTrainedModel
    """With adapters; its layers' trained weights are replaced."""
    teacher: PreTrainedModel
    batches: Callable[[int], list[Batch]]
    """A step's forwards of this process."""
    steps: int
    """Training steps of each layer."""
    work: Path
    """Folder for hidden states, trained layers and the state."""
    config: HealConfig
    accelerator: Accelerator
    optimizer_for: Callable[[nn.Module], torch.optim.Optimizer]
    rate: Callable[[int], float]
    """Learning rate of a step."""
    clip: float | None
    """Largest gradient norm of a layer."""
    report: Callable[[int, int, Tensor, Callable[[], None]], None]
    """Is told of every step: layer, step, loss, and how to save the state after it."""

    def run(self, progress: Progress) -> None:
        """Train every layer, from where `progress` is."""
        layers, done = self.student.model.layers, self.work / "layers"
        done.mkdir(exist_ok=True)
        at = progress.get("layer", 0)
        for index in range(at):
            _put_trained(layers[index], load_tensors(done / f"{index:03d}.safetensors", self.work))
        store = self._store(begun=at > 0) if at < len(layers) else None
        for index in range(at, len(layers)):
            assert store is not None
            self._train(index, store, progress["step"] if index == at else 0)
            self.accelerator.free_memory()
        del store
        forget(self.work, self._name)

    def _store(self, *, begun: bool) -> OnDisk:
        """Room for the hidden states of all forwards; once layers are `begun`, with those of the last one in it."""
        batch = self.batches(0)[0]
        start, _ = self._enter(self.teacher, batch)
        shapes = [tuple(start.shape)] * (self.steps * self.config.accumulate)
        return OnDisk(self.work, self._name, shapes, start.dtype, begun=begun, damaged=partial(damaged, self.work))

    @property
    def _name(self) -> str:
        """Of this process's hidden states."""
        return str(self.accelerator.process_index)

    def _enter(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, list[dict[str, Any]]]:
        positions = None if batch.position_ids is None else batch.position_ids.to(model.device)
        return enter_layers(model, batch.ids.to(model.device), positions)

    def _train(self, index: int, store: OnDisk, first: int) -> None:
        """Train one layer from step `first` on, put what it has learnt into the student and on disk."""
        accelerator, device, work = self.accelerator, self.accelerator.device, self.work
        layer, of_teacher = (copy.deepcopy(m.model.layers[index]).to(device) for m in (self.student, self.teacher))
        stage = LayerStage(layer.train(), self.config)
        module, optimizer = accelerator.prepare(stage, self.optimizer_for(stage))
        if first:
            load_state(accelerator, module, optimizer, work)
        parameters = [p for p in module.parameters() if p.requires_grad]
        for step in range(first, self.steps):
            total = torch.zeros((), device=device)
            for number, batch in enumerate(self.batches(step)):
                at = step * self.config.accumulate + number
                start, theirs = self._enter(self.teacher, batch)
                _, ours = self._enter(self.student, batch)
                hidden = (start if index == 0 else store.before(index, at)).to(device)
                with torch.no_grad():
                    wanted = of_teacher(hidden, **_moved(theirs[index], device))
                if index < len(self.student.model.layers) - 1:
                    store.keep(index, at, wanted)
                counted = None if batch.counted is None else batch.counted.to(device)
                with accelerator.accumulate(module):
                    loss = module(hidden, wanted, _moved(ours[index], device), counted)
                    loss = loss * (counted_positions(batch.ids, counted) / batch.positions)
                    if loss.requires_grad:  # linear attention beside frozen experts trains nothing
                        accelerator.backward(loss / len(self.student.model.layers))  # the loss of all is their mean
                    total += loss.detach() / self.config.accumulate
                    if accelerator.sync_gradients and self.clip is not None:
                        accelerator.clip_grad_norm_(parameters, self.clip)
                    for group in optimizer.param_groups:
                        group["lr"] = self.rate(step)
                    optimizer.step()
                    optimizer.zero_grad()
            after: Progress = {"stage": 1, "layer": index, "step": step + 1}
            self.report(index, step, total, partial(save_state, accelerator, module, optimizer, work, after))
        trained = {name: p.detach().cpu() for name, p in layer.named_parameters() if p.requires_grad}
        _put_trained(self.student.model.layers[index], trained)
        if accelerator.is_main_process:
            with replaced(work / "layers" / f"{index:03d}.safetensors") as partial_file:
                save_tensors(trained, partial_file)
        optimizer.state.clear()
        module.requires_grad_(False)  # nothing of this layer needs saving any more
        save_state(accelerator, module, optimizer, work, {"stage": 1, "layer": index + 1, "step": 0})


def hidden_bytes(tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Disk that the hidden states of stage 1 take."""
    return 2 * tokens * hidden_size * dtype.itemsize


def _put_trained(layer: nn.Module, trained: dict[str, Tensor]) -> None:
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)


def _moved(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return {name: move(value) for name, value in kwargs.items()}


def layers_to_steps(metrics: Path) -> None:
    """Rewrite a streamed stage 1's lines, one per layer and step, as one line per step with all layers' losses."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if "layer" in line:
            steps.setdefault(line["step"], []).append(line)
    joined = []
    for of_step in steps.values():
        losses = [line["loss"] for line in of_step]
        line = {key: value for key, value in of_step[0].items() if key != "layer"}
        line |= {"loss": sum(losses) / len(losses), "layer_loss": losses}
        line["tokens_per_s"] = 1 / sum(1 / line["tokens_per_s"] for line in of_step)
        joined.append(line)
    kept = [*joined, *(line for line in lines if "layer" not in line)]
    with replaced(metrics) as partial_file:
        partial_file.write_text("".join(json.dumps(line) + "\n" for line in kept))
