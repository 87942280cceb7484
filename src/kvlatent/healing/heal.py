"""Train a converted student towards its teacher: stage 1 layer by layer, stage 2 end to end."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.data.positions import block_starts
from kvlatent.data.teacher_text import weights_mark
from kvlatent.errors import UserError
from kvlatent.healing.accelerator import accelerator_for
from kvlatent.healing.adapters import finished, with_adapters
from kvlatent.healing.config import HealConfig
from kvlatent.healing.stages import Batch, Stage, Text
from kvlatent.healing.state import Progress, forget_after, load_state, prepare_folder, read_progress, save_state, whole
from kvlatent.healing.streaming import LayerStream, layers_to_steps
from kvlatent.healing.teacher_cache import TeacherCache
from kvlatent.kernels.allocator import freed_memory_kept
from kvlatent.model.checkpoints import peak_memory
from kvlatent.signals import Stopped, interruptible


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    work: Path,
    config: HealConfig,
    *,
    resume: bool = False,
    answers: Bool[Tensor, "blocks block_size"] | None = None,
    separator: int | None = None,
    cache: TeacherCache | None = None,
    held_out: Int[Tensor, "blocks block_size"] | None = None,
    track: Sequence[str] = (),
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Train `student` in place and return it, LoRA merged unless `config.adapters` says otherwise.

    Under `accelerate launch` or torchrun all processes call it alike; the first one writes. With FSDP the student that
    is returned is another one, and whole in the first process only.

    Args:
        student: A converted model, float32 weights.
        teacher: The original; its weights stay as they are.
        ids: Training text: the first blocks serve stage 1, the following ones stage 2.
        work: Folder for `metrics.jsonl` and the resumable state; cleared first unless `resume`.
        config: Hyperparameters.
        resume: Continue from the state in `work`, if there is one.
        answers: The tokens that losses are taken on; None is all.
        separator: The token that starts a document, if documents in a block must not see each other.
        cache: Where to keep the teacher's likeliest tokens, used in stage 2 instead of the teacher.
        held_out: Text to measure the perplexity of, every `config.eval_tokens`.
        track: Trackers of accelerate that are told of every step too, such as `tensorboard`.
        device: Where to train; None is where `student` is. With `stream_layers`, keep the models on the host.

    Raises:
        UserError: Too few blocks, a state of another run, or a loss that is not finite.
    """
    device = device or student.device
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(freed_memory_kept())
        interrupted = stack.enter_context(interruptible())
        starts = block_starts(len(ids), ids.shape[1], config.context) if config.context else None
        text = Text(ids=ids, answers=answers, separator=separator, starts=starts)
        return _Healing(
            student, teacher, text, work, config, resume=resume, cache=cache, held_out=held_out, track=track,
            device=device, interrupted=interrupted,
        ).follow()  # fmt: skip


class _Healing:
    """A healing under way."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        text: Text,
        work: Path,
        config: HealConfig,
        *,
        resume: bool,
        cache: TeacherCache | None,
        held_out: Tensor | None,
        track: Sequence[str],
        device: torch.device,
        interrupted: Sequence[signal.Signals],
    ) -> None:
        self.teacher, self.text, self.config = teacher, text, config
        self.cache, self.held_out, self.interrupted = cache, held_out, interrupted
        self.work, self.metrics = work, work / "metrics.jsonl"
        self.accelerator = accelerator_for(config, device, track, work)
        block_size = text.ids.shape[1]
        self.per_step = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.step_tokens = self.per_step * block_size
        self.steps = [math.ceil(n / self.step_tokens) for n in (config.stage1_tokens, config.stage2_tokens)]
        if (needed := sum(self.steps) * self.per_step) > len(text.ids):
            raise UserError(f"healing needs {needed} blocks of {block_size} tokens; the text gives {len(text.ids)}")
        self.first = self.accelerator.is_main_process
        if self.first:
            mark = hashlib.sha256(text.ids.numpy().data)
            if text.answers is not None:
                mark.update(text.answers.numpy().data)
            settings = {**asdict(config), "separator": text.separator, "text": mark.hexdigest()}
            settings["student"] = weights_mark(student)
            prepare_folder(work, settings, resume)
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tracked", config={k: str(v) for k, v in asdict(config).items()})
        set_seed(config.seed)
        teacher.requires_grad_(False).eval()
        self.student, self.trained = student, with_adapters(student, config)
        if self.accelerator.distributed_type == DistributedType.FSDP:  # which cuts the student up for good
            self.blank = _without_weights(self.trained)
        if config.checkpointing:
            student.activation_checkpointing_enable()
        self.saved = time.monotonic()

    def follow(self) -> PreTrainedModel:
        """Do what isn't done yet of both stages."""
        accelerator, progress = self.accelerator, read_progress(self.work)
        kept = (self.work / "state").is_dir()
        if self.first:
            forget_after(self.metrics, progress)
        if self.config.stream_layers and self.steps[0] and progress["stage"] == 1:
            self._stream(progress)
            progress, kept = {"stage": 2, "step": 0}, False
        self.teacher.to(accelerator.device)
        module = Stage(self.trained, self.student, self.teacher, self.config).train()
        module, optimizer = accelerator.prepare(module, self._optimizer(module))
        for stage in (1, 2):
            if stage < progress["stage"] or self.steps[stage - 1] == 0:
                continue
            accelerator.unwrap_model(module, keep_torch_compile=False).stage = stage
            optimizer.state.clear()
            first = 0
            if stage == progress["stage"] and kept:
                load_state(accelerator, module, optimizer, self.work)
                first = progress["step"]
            elif stage == 2 and self.steps[0]:  # so that stage 2 can be resumed from its start
                save_state(accelerator, module, optimizer, self.work, {"stage": 2, "step": 0})
            if stage == 2 and self.cache is not None:
                self._fill(self.cache)
            self._stage(module, optimizer, stage, first)
        for tracker in accelerator.trackers:
            tracker.finish()
        return self._result(module).eval()

    def _stage(self, module: nn.Module, optimizer: torch.optim.Optimizer, stage: int, first: int) -> None:
        """Do the steps of a stage from `first` on."""
        accelerator, config = self.accelerator, self.config
        clipped_together = self._clipped_together(stage)
        with self._bar(stage, first * self.step_tokens, self.steps[stage - 1] * self.step_tokens) as bar:
            for step in range(first, self.steps[stage - 1]):
                began = time.monotonic()
                total, by_layer = torch.zeros((), device=accelerator.device), None
                for batch in self._batches(stage, step):
                    with accelerator.accumulate(module):
                        loss, layer_losses = module(**batch.to(accelerator.device))
                        accelerator.backward(loss)
                        total += loss.detach() / config.accumulate
                        if layer_losses is not None:
                            share = layer_losses / config.accumulate
                            by_layer = share if by_layer is None else by_layer + share
                        if accelerator.sync_gradients and config.clip is not None:
                            accelerator.unscale_gradients()
                            for parameters, limit in clipped_together:
                                nn.utils.clip_grad_norm_(parameters, limit)
                        for group in optimizer.param_groups:
                            group["lr"] = self._rate(stage, step)
                        optimizer.step()
                        optimizer.zero_grad()
                after: Progress = {"stage": stage, "step": step + 1}
                line: dict[str, Any] = {"stage": stage, "step": step}
                if self._measured_after(stage, step):
                    paused = time.monotonic()
                    line["held_out_perplexity"] = self._held_out_perplexity(module, stage)
                    began += time.monotonic() - paused
                self._report(
                    line, total, by_layer, began, bar,
                    save=partial(save_state, accelerator, module, optimizer, self.work, after),
                )  # fmt: skip

    def _stream(self, progress: Progress) -> None:
        """Stage 1, one layer after the other; the student's layers have learnt when it ends."""
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UserError("layers can't be streamed under FSDP; leave one of the two out")
        total = self.steps[0] * self.step_tokens
        done = progress.get("layer", 0) * total + progress["step"] * self.step_tokens
        with self._bar(1, done, total * len(self.student.model.layers)) as bar:
            began = time.monotonic()

            def report(layer: int, step: int, loss: Tensor, save: Callable[[], None]) -> None:
                nonlocal began
                self._report({"stage": 1, "layer": layer, "step": step}, loss, None, began, bar, save=save)
                began = time.monotonic()

            LayerStream(
                student=self.student, teacher=self.teacher, batches=partial(self._batches, 1), steps=self.steps[0],
                work=self.work, config=self.config, accelerator=accelerator, optimizer_for=self._optimizer,
                rate=partial(self._rate, 1), clip=self._layer_clip(), report=report,
            ).run(progress)  # fmt: skip
        if self.first:
            layers_to_steps(self.metrics)

    def _report(
        self,
        line: dict[str, Any],
        loss: Tensor,
        by_layer: Tensor | None,
        began: float,
        bar: tqdm[Any],
        *,
        save: Callable[[], None],
    ) -> None:
        """Write down a step, and save or stop if it is time to: all processes do so together.

        Args:
            line: Stage, step, and the layer of a streamed stage 1.
            loss: This process's.
            by_layer: Its losses by layer (layers,), in stage 1.
            began: When the step began, by the monotonic clock.
            bar: The progress bar.
            save: Saves the state after this step.

        Raises:
            UserError: The loss is not finite.
            KeyboardInterrupt: A signal came; the state is saved.
        """
        accelerator, stage, step = self.accelerator, line["stage"], line["step"]
        due = time.monotonic() - self.saved > 60 * self.config.save_minutes
        mine = torch.tensor([loss.item(), due, bool(self.interrupted)], device=accelerator.device)
        mean, save_now, stop = accelerator.reduce(mine, reduction="mean").tolist()
        if not math.isfinite(mean):
            where = f"stage {stage}, step {step}" + (f", layer {line['layer']}" if "layer" in line else "")
            raise UserError(
                f"the loss is {mean} at {where} (blocks from {self._first_block(stage, step)}); "
                f"lower the learning rate and --resume from the last good state in {self.work}"
            )
        line |= {
            "tokens": (step + 1) * self.step_tokens,
            "loss": mean,
            "lr": self._rate(stage, step),
            "tokens_per_s": self.step_tokens / (time.monotonic() - began),
            "peak_memory_bytes": peak_memory(accelerator.device),
        }
        if by_layer is not None:
            line["layer_loss"] = accelerator.reduce(by_layer, reduction="mean").tolist()
        if self.first:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            bar.update(self.step_tokens)
            bar.set_postfix(loss=f"{mean:.4f}")
        if "layer" not in line:
            told = {f"stage{stage}/{k}": v for k, v in line.items() if isinstance(v, float | int)}
            told |= {f"stage{stage}/layer{i}": v for i, v in enumerate(line.get("layer_loss", ()))}
            accelerator.log(told, step=step + (self.steps[0] if stage == 2 else 0))
        if save_now or stop:
            save()
            self.saved = time.monotonic()
        if stop:
            raise Stopped(self.interrupted[0]) if self.interrupted else KeyboardInterrupt

    def _measured_after(self, stage: int, step: int) -> bool:
        """Whether it is time to measure held-out perplexity."""
        every = self.config.eval_tokens
        if self.held_out is None or not every:
            return False
        tokens = (step + 1) * self.step_tokens
        return tokens // every > (tokens - self.step_tokens) // every or step + 1 == self.steps[stage - 1]

    @torch.no_grad()
    def _held_out_perplexity(self, module: nn.Module, stage: int) -> float:
        """The perplexity of as many held-out blocks as the processes can share evenly."""
        assert self.held_out is not None
        accelerator = self.accelerator
        share = len(self.held_out) // accelerator.num_processes
        mine = self.held_out[accelerator.process_index * share :][:share]
        inside = accelerator.unwrap_model(module, keep_torch_compile=False)
        inside.stage = 0
        module.eval()
        nats = [module(row[None].to(accelerator.device), float(row.numel()))[0] for row in mine]
        module.train()
        inside.stage = stage
        mean = accelerator.reduce(torch.stack(nats).mean(), reduction="mean")
        return float(mean.double().exp())  # infinity where `math.exp` would fail

    def _bar(self, stage: int, done: int, total: int) -> tqdm[Any]:
        """A progress bar over tokens."""
        return tqdm(
            total=total, initial=done, unit="tok", unit_scale=True, desc=f"stage {stage}", disable=not self.first
        )

    def _first_block(self, stage: int, step: int) -> int:
        return (step if stage == 1 else self.steps[0] + step) * self.per_step

    def _batches(self, stage: int, step: int) -> list[Batch]:
        """This process's forwards of a step."""
        config, start = self.config, self._first_block(stage, step)
        whole_step = slice(start, start + self.per_step)
        batches = []
        for number in range(config.accumulate):
            at = number * self.accelerator.num_processes + self.accelerator.process_index
            batch = self.text.batch(start + at * config.batch_size, config.batch_size, whole_step)
            if stage == 2 and self.cache is not None:
                batch = replace(batch, top_k=self.cache.read(start + at * config.batch_size, config.batch_size))
            batches.append(batch)
        return batches

    def _rate(self, stage: int, step: int) -> float:
        """The learning rate of a step."""
        config, total = self.config, self.steps[stage - 1]
        peak = config.stage1_learning_rate if stage == 1 else config.learning_rate
        return peak * cosine(step, total, math.ceil(config.warmup * total))

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over what trains; norms and biases don't decay."""
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]] or groups[:1]  # a streamed layer may have none
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=self.config.eps, fused=True)

    def _clipped_together(self, stage: int) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters whose gradients are clipped by their common norm, and its limit."""
        if self.config.clip is None:
            return []
        if stage == 2:
            return [([p for p in self.trained.parameters() if p.requires_grad], self.config.clip)]
        limit = self._layer_clip()
        assert limit is not None
        return [([p for p in layer.parameters() if p.requires_grad], limit) for layer in self.student.model.layers]

    def _layer_clip(self) -> float | None:
        """Stage 1's limit of a layer's gradient norm: layers of equal norm reach it when all together reach `clip`."""
        return None if self.config.clip is None else self.config.clip / math.sqrt(len(self.student.model.layers))

    def _fill(self, cache: TeacherCache) -> None:
        """Cache what the teacher says to stage 2's text; afterwards the device needs no teacher."""
        blocks = range(self._first_block(2, 0), self._first_block(2, self.steps[1]))
        cache.fill(
            self.teacher, self.text, blocks, temperature=self.config.temperature, accelerator=self.accelerator,
            interrupted=self.interrupted,
        )  # fmt: skip
        self.teacher.to("cpu")

    def _result(self, module: nn.Module) -> PreTrainedModel:
        """The trained student with LoRA merged; under FSDP, put together anew in the first process."""
        how, folder = self.config.adapters, self.work / "adapters"
        inside: nn.Module = self.accelerator.unwrap_model(module, keep_torch_compile=False)
        if not any(isinstance(part, FSDPModule) for part in inside.modules()):
            return finished(self.trained, how if self.first else "merge", folder)
        tensors = {name.removeprefix("trained."): whole(value) for name, value in inside.state_dict().items()}
        self.blank.load_state_dict(tensors, assign=True)
        return finished(self.blank, how if self.first else "merge", folder)


def cosine(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: a linear rise over `warmup` steps, then half a cosine to zero at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters are on the meta device."""
    blank = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, blank)
