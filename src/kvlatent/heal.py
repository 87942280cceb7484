"""Train a converted student towards its teacher: stage 1 layer by layer, stage 2 end to end."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from jaxtyping import Int
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.calibrate import hooks
from kvlatent.errors import UserError
from kvlatent.losses import hidden_mse, kl_loss, ntp_loss, relative_error
from kvlatent.spec import Preset

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_map", "k_map")
"""Trained in full."""
FFN = ("gate_proj", "up_proj", "down_proj")
"""Trained through LoRA."""


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How a student is trained; the defaults are ours, `for_preset("paper")` gives the paper's."""

    stage1_tokens: int = 0
    """Tokens of in-layer distillation."""
    stage2_tokens: int = 0
    """Tokens of end-to-end training."""
    loss: Literal["kl", "ntp"] = "kl"
    """Stage 2: forward KL to the teacher, or next-token cross-entropy."""
    stage1_loss: Literal["relative", "mse"] = "relative"
    """Stage 1: error relative to each position's norm, or the paper's plain squared error."""
    temperature: float = 1.0
    """Divides student's and teacher's logits in the KL."""
    learning_rate: float = 3e-4
    """Peak; cosine to zero over each stage."""
    stage1_learning_rate: float = 5e-4
    """The same for stage 1."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    clip: float | None = 1.0
    """Largest gradient norm."""
    lora_rank: int = 32
    """Rank of the FFN's LoRA; 0 leaves the FFN frozen."""
    lora_alpha: int = 256
    """Scale of the LoRA update, over its rank."""
    train_norms: bool = False
    """Whether RMSNorms train too, as in the authors' code."""
    batch_size: int = 2
    """Token blocks per step and process."""
    save_minutes: float = 5.0
    """A killed run loses at most this much."""
    seed: int = 0
    """Of LoRA's start and of nothing else: the blocks come in a fixed order."""

    @classmethod
    def for_preset(cls, preset: Preset, *, loss: Literal["kl", "ntp"] = "kl", **changes: Any) -> HealConfig:
        """Defaults that go with a conversion preset, with `changes` applied (None means no change)."""
        config = cls(loss=loss)
        if preset == "paper":
            rate = 2e-5 if loss == "ntp" else 2e-7
            config = replace(
                config, stage1_loss="mse", temperature=10.0, learning_rate=rate, stage1_learning_rate=2e-5, warmup=0.0,
                eps=2e-4, clip=None, lora_rank=256, lora_alpha=512, train_norms=True, batch_size=8,
            )  # fmt: skip
        changes = {name: value for name, value in changes.items() if value is not None}
        if "lora_rank" in changes and "lora_alpha" not in changes:
            changes["lora_alpha"] = config.lora_alpha * changes["lora_rank"] // config.lora_rank
        return replace(config, **changes)


class Stage(nn.Module):
    """The student with the loss of one stage on top, so that data-parallel wrappers see one forward per step."""

    def __init__(
        self, trained: nn.Module, student: PreTrainedModel, teacher: PreTrainedModel, stage: int, config: HealConfig
    ) -> None:
        super().__init__()
        self.trained = trained  # the student, possibly inside its LoRA wrapper
        self.stage, self.config = stage, config
        self._unowned = (student, teacher)  # a tuple hides modules: the teacher is neither trained nor saved

    def forward(self, ids: Int[Tensor, "batch seq"]) -> tuple[Tensor, Tensor | None]:
        """Return the loss and, in stage 1, each layer's share of it (layers,)."""
        student, teacher = self._unowned
        if self.stage == 1:
            losses = in_layer_losses(student, teacher, ids, relative=self.config.stage1_loss == "relative")
            return losses.mean(), losses.detach()
        hidden = student.model(ids, use_cache=False).last_hidden_state
        head = student.lm_head.weight
        if self.config.loss == "ntp":
            return ntp_loss(hidden[:, :-1].flatten(0, 1), head, ids[:, 1:].flatten()), None
        with torch.no_grad():
            wanted = teacher.model(ids, use_cache=False).last_hidden_state
        loss = kl_loss(
            hidden.flatten(0, 1),
            head,
            wanted.flatten(0, 1),
            teacher.lm_head.weight,
            temperature=self.config.temperature,
        )
        return loss, None


def in_layer_losses(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, *, relative: bool) -> Tensor:
    """Error of each student layer on the teacher's hidden states (Eq. 6-7): layer l gets H^(l-1) and is held to H^l.

    Args:
        student: The converted model.
        teacher: The original.
        ids: (batch, seq) tokens.
        relative: Whether to measure each position's error relative to its norm.

    Returns:
        (layers,) losses; gradients stay within each layer.
    """
    states: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        states.extend((args[0], output) if not states else (output,))

    with torch.no_grad(), hooks(layer.register_forward_hook(keep) for layer in teacher.model.layers):
        teacher.model(ids, use_cache=False)
    error = relative_error if relative else hidden_mse
    losses: list[Tensor] = []

    def feed(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states[len(losses)], *args[1:])

    def judge(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        losses.append(error(output, states[len(losses) + 1]))

    layers = student.model.layers
    with (
        hooks(layer.register_forward_pre_hook(feed) for layer in layers),
        hooks(layer.register_forward_hook(judge) for layer in layers),
    ):
        student.model(ids, use_cache=False)
    return torch.stack(losses)


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    work: Path,
    config: HealConfig,
    *,
    resume: bool = False,
) -> PreTrainedModel:
    """Train `student` in place and return it, LoRA merged.

    Args:
        student: A converted model, float32 weights.
        teacher: The original; its weights stay as they are.
        ids: Training text: the first blocks serve stage 1, the following ones stage 2.
        work: Folder for `metrics.jsonl` and the resumable state; cleared first unless `resume`.
        config: Hyperparameters.
        resume: Continue from the state in `work`, if there is one.

    Raises:
        UserError: Too few blocks, a state of another run, or a loss that is not finite.
    """
    block_size = ids.shape[1]
    accelerator = Accelerator(mixed_precision=_mixed_precision(student.device), cpu=student.device.type == "cpu")
    per_step = config.batch_size * accelerator.num_processes
    steps = [math.ceil(n / (per_step * block_size)) for n in (config.stage1_tokens, config.stage2_tokens)]
    if sum(steps) * per_step > len(ids):
        needed = sum(steps) * per_step
        raise UserError(f"healing needs {needed} blocks of {block_size} tokens; the text gives {len(ids)}")
    if accelerator.is_main_process:
        _prepare_folder(work, {**asdict(config), "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}, resume)
    accelerator.wait_for_everyone()
    set_seed(config.seed)
    teacher.requires_grad_(False).eval()
    trained = _with_adapters(student, config)
    checkpoint, metrics = work / "state", work / "metrics.jsonl"
    progress = {"stage": 1, "step": 0}
    if checkpoint.is_dir():
        progress = json.loads((checkpoint / "progress.json").read_text())
    if accelerator.is_main_process:
        _forget_after(metrics, progress)
    with interruptible() as interrupted:
        for stage in (1, 2):
            if stage < progress["stage"] or steps[stage - 1] == 0:
                continue
            module = Stage(trained, student, teacher, stage, config).train()
            student.model.norm.requires_grad_(config.train_norms and stage == 2)  # no single layer's error sees it
            rate = config.stage1_learning_rate if stage == 1 else config.learning_rate
            parameters = [p for p in module.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(
                parameters, lr=rate, betas=(0.9, 0.999), eps=config.eps, weight_decay=config.weight_decay
            )
            total = steps[stage - 1]
            module, optimizer = accelerator.prepare(module, optimizer)
            first = 0
            if stage == progress["stage"] and checkpoint.is_dir():
                accelerator.load_state(str(checkpoint))
                first = progress["step"]
            elif stage == 2 and steps[0]:  # with stage 2's own optimizer and schedule, so that it can be resumed here
                _save_state(accelerator, checkpoint, {"stage": 2, "step": 0})
            saved = time.monotonic()
            offset = 0 if stage == 1 else steps[0] * per_step
            with tqdm(
                total=total * per_step * block_size,
                initial=first * per_step * block_size,
                unit="tok",
                unit_scale=True,
                desc=f"stage {stage}",
                disable=not accelerator.is_main_process,
            ) as bar:
                for step in range(first, total):
                    began = time.monotonic()
                    start = offset + step * per_step + accelerator.process_index * config.batch_size
                    batch = ids[start : start + config.batch_size].to(accelerator.device)
                    loss, by_layer = module(batch)
                    accelerator.backward(loss)
                    if config.clip is not None:
                        accelerator.clip_grad_norm_(parameters, config.clip)
                    for group in optimizer.param_groups:
                        group["lr"] = rate * cosine(step, total, math.ceil(config.warmup * total))
                    optimizer.step()
                    optimizer.zero_grad()
                    # Processes save and stop together, as soon as one of them is due or interrupted.
                    due = time.monotonic() - saved > 60 * config.save_minutes
                    mine = torch.tensor([loss.item(), due, bool(interrupted)], device=accelerator.device)
                    mean, save, stop = accelerator.reduce(mine, reduction="mean").tolist()
                    if by_layer is not None:
                        by_layer = accelerator.reduce(by_layer, reduction="mean")
                    if not math.isfinite(mean):
                        raise UserError(
                            f"the loss is {mean} at stage {stage}, step {step} (blocks from {start}); "
                            f"lower the learning rate and --resume from the last good state in {work}"
                        )
                    tokens = (step + 1) * per_step * block_size
                    if accelerator.is_main_process:
                        line: dict[str, Any] = {
                            "stage": stage, "step": step, "tokens": tokens, "loss": mean,
                            "lr": optimizer.param_groups[0]["lr"],
                            "tokens_per_s": per_step * block_size / (time.monotonic() - began),
                        }  # fmt: skip
                        if by_layer is not None:
                            line["layer_loss"] = by_layer.tolist()
                        with metrics.open("a") as file:
                            file.write(json.dumps(line) + "\n")
                        bar.update(per_step * block_size)
                        bar.set_postfix(loss=f"{mean:.4f}")
                    if save or stop:
                        _save_state(accelerator, checkpoint, {"stage": stage, "step": step + 1})
                        saved = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt
            accelerator.free_memory()
    return _merged(trained, student).eval()


def _with_adapters(student: PreTrainedModel, config: HealConfig) -> nn.Module:
    """Freeze everything but attention, LoRA on the FFN, and the norms if they train."""
    student.requires_grad_(False)
    trained: nn.Module = student
    if config.lora_rank:
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(FFN), lora_dropout=0.0, bias="none"
        )
        trained = get_peft_model(student, lora)
    for layer in student.model.layers:
        for name, parameter in layer.self_attn.named_parameters():
            if name.split(".")[0] in ATTENTION:
                parameter.requires_grad_(True)
    if config.train_norms:
        for module in student.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.requires_grad_(True)
    return trained


def _merged(trained: nn.Module, student: PreTrainedModel) -> PreTrainedModel:
    """The student with LoRA merged into its FFN weights."""
    merge = getattr(trained, "merge_and_unload", None)
    return student if merge is None else merge()


def cosine(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: a linear rise over `warmup` steps, then half a cosine to zero at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _mixed_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it; emulated bf16 is many times slower than float32."""
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported() if device.type == "cpu" else torch.cuda.is_bf16_supported()
    return "bf16" if native else "no"


def _prepare_folder(work: Path, settings: dict[str, Any], resume: bool) -> None:
    """Clear the folder, or check that the state in it was made with the same settings and text."""
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


def _forget_after(metrics: Path, progress: dict[str, int]) -> None:
    """Drop the metrics of steps that came after the saved state: they will be done again."""
    if metrics.is_file():
        lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
        kept = [x for x in lines if ((d := json.loads(x))["stage"], d["step"]) < (progress["stage"], progress["step"])]
        metrics.write_text("".join(line + "\n" for line in kept))


def _save_state(accelerator: Accelerator, checkpoint: Path, progress: dict[str, int]) -> None:
    """Write the state beside the old one, then swap."""
    partial = checkpoint.with_name("state.partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps(progress))
        old = checkpoint.with_name("state.old")
        shutil.rmtree(old, ignore_errors=True)
        if checkpoint.is_dir():
            checkpoint.rename(old)
        partial.rename(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying, so that the step in hand can be saved."""
    seen: list[int] = []
    old = {s: signal.signal(s, lambda number, _frame: seen.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
