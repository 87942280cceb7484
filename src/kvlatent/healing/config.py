"""What a healing is asked to do: its hyperparameters, and the text it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import arg

from kvlatent.errors import UserError
from kvlatent.fields import Number, OptionalFolder, OtherModel, Sources, partial
from kvlatent.model.spec import Preset

Loss = Literal["kl", "ntp", "mix"]
Part = Literal["attention", "maps", "norms"]

LARGEST = 10**12
"""Of every number here."""
NEVER_NEGATIVE = (
    "stage1_tokens", "stage2_tokens", "learning_rate", "stage1_learning_rate", "weight_decay", "lora_rank",
    "lora_alpha", "save_minutes", "eval_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How a student is trained; the defaults are ours, `for_preset("paper")` gives the paper's."""

    like: Preset = "best"
    """The preset whose settings are the defaults of all others here."""
    stage1_tokens: int = 0
    """Tokens of in-layer distillation; 0 leaves it out, which is best after presets best and portable."""
    stage2_tokens: int = 0
    """Tokens of end-to-end training; 0 leaves it out."""
    loss: Loss = "kl"
    """Loss of stage 2: forward KL to the teacher, next-token cross-entropy, or a mix of both."""
    kl_weight: float = 0.5
    """Share of the KL in mix; the rest is next-token cross-entropy."""
    stage1_loss: Literal["relative", "mse"] = "relative"
    """Loss of stage 1: the error relative to each position's norm, or the paper's plain squared error."""
    stream_layers: bool = False
    """Run stage 1 one layer after the other, with the others off the device and hidden states on disk: the same
    weights in less memory."""
    temperature: float = 1.0
    """Divides student's and teacher's logits in the KL."""
    temperature_squared: bool = False
    """Multiply the KL by the temperature's square, so that its gradients keep their size."""
    learning_rate: float = 1e-4
    """Peak learning rate of stage 2; it falls as a cosine to zero."""
    stage1_learning_rate: float = 5e-4
    """Peak learning rate of stage 1, likewise."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, for matrices and not for norms and biases."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    clip: float | None = 1.0
    """Largest gradient norm; in stage 1 each layer's, over the square root of their number."""
    train: tuple[Part, ...] = ("attention", "maps")
    """What trains in full: W_Q, W_K, W_V and W_O (attention), the maps of heads (maps), norms (norms)."""
    lora_rank: int = 32
    """Rank of the FFN's LoRA; 0 leaves the FFN frozen."""
    lora_alpha: int = 256
    """Scale of the LoRA update, over its rank; a rank that is given alone keeps the preset's ratio."""
    adapters: Literal["merge", "keep", "save"] = "merge"
    """What becomes of LoRA: merged into the weights; kept apart in OUT/adapters, with the FFN as it was; or both
    (save)."""
    batch_size: int = 2
    """Token blocks per forward pass and process."""
    accumulate: int = 1
    """Forward passes per step, whose gradients are averaged."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of matrix products; weights and their updates stay float32. auto follows accelerate launch, or takes
    bf16 where the hardware has it."""
    save_minutes: float = 5.0
    """Minutes between saved states; a killed run loses at most this much."""
    eval_tokens: int = 100_000
    """Training tokens between measurements of held-out perplexity, which is measured at the end of a stage too."""
    context: int | None = None
    """Positions that blocks are spread over, if more than a block's; a command takes all that the model has."""
    seed: int = 0
    """Random seed of LoRA's start and of nothing else: the blocks come in a fixed order."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not abs(value) <= LARGEST:  # nor what is no number
                raise UserError(f"{name} must be a number up to {LARGEST:.0e}; got {value}")
        for name in NEVER_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative; got {getattr(self, name)}")
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("temperature", "eps", "clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0; got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup is a share of the steps, between 0 and 1; got {self.warmup}")
        if (unknown := set(self.train) - set(get_args(Part))) or not self.train:
            raise UserError(f"train takes {', '.join(get_args(Part))}; got {', '.join(unknown) or 'nothing'}")
        if not 0 < self.kl_weight < 1:
            raise UserError(f"kl_weight is the KL's share in mix, between 0 and 1; got {self.kl_weight}")

    @classmethod
    def for_preset(cls, preset: Preset, *, loss: Loss | None = None, **changes: Any) -> HealConfig:
        """Defaults that go with a conversion preset, with `changes` applied (None means no change)."""
        config = cls(like=preset, loss=loss or "kl")
        if preset == "paper":
            config = replace(config, **PAPER, learning_rate=2e-7 if config.loss == "kl" else 2e-5)
        changes = {name: value for name, value in changes.items() if value is not None}
        if "lora_rank" in changes and "lora_alpha" not in changes:
            changes["lora_alpha"] = config.lora_alpha * changes["lora_rank"] // config.lora_rank
        return replace(config, **changes)

    def blocks(self, block_size: int, processes: int) -> int:
        """Blocks that both stages take, each stage rounded up to whole steps."""
        step = self.batch_size * self.accumulate * processes
        return sum(math.ceil(n / (step * block_size)) * step for n in (self.stage1_tokens, self.stage2_tokens))


PAPER: dict[str, Any] = {
    "stage1_loss": "mse",
    "temperature": 10.0,
    "stage1_learning_rate": 2e-5,
    "warmup": 0.0,
    "eps": 2e-4,
    "clip": None,
    "train": ("attention", "maps", "norms"),
    "lora_rank": 256,
    "lora_alpha": 512,
    "batch_size": 8,
}
"""What the paper trains with; its learning rate of stage 2 depends on the loss."""

if TYPE_CHECKING:
    HealChanges = HealConfig
else:
    HealChanges = partial(
        HealConfig,
        defaults={
            **dict.fromkeys((*PAPER, "learning_rate"), "the preset's"),
            "like": "the student's",
            "context": "the model's positions",
        },
        without=("seed",),
    )


@dataclass(frozen=True, kw_only=True)
class HealInputs:
    """What a healing reads besides the student."""

    text: Sources
    """Training text, as for calibrate; of chats, only the answers count."""
    block_size: Number = 1024
    """Tokens per block."""
    separate_documents: bool = False
    """Keep documents in a block from seeing each other; slower on the CPU."""
    held_out: Sources = ()
    """Text to measure perplexity on while training."""
    held_out_tokens: Number = 8192
    """Tokens of held-out text."""
    teacher: OtherModel = None
    """The model that the student was converted from; the one in its record by default."""
    teacher_cache: OptionalFolder = None
    """Folder for the teacher's likeliest tokens, which stage 2 then uses instead of the teacher."""
    top_k: Number = 64
    """Likeliest tokens kept per position; all others count as one."""
    track: Annotated[tuple[str, ...], arg(metavar="NAME…", help_behavior_hint="")] = ()
    """Trackers of accelerate that are told of every step, such as tensorboard."""


def work_folder(out: Path) -> Path:
    """Where the healing that will become `out` keeps its text, its metrics and its resumable state."""
    return out.with_name(f".{out.name}.healing")
