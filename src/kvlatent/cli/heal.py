"""`kvlatent heal`: training of a student towards its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.cli.options import Command, Common, Context, Folder, Number, Sources
from kvlatent.healing.config import Part


@dataclass(frozen=True, kw_only=True)
class Heal(Command):
    """Train a student towards its teacher: stage 1 layer by layer, stage 2 end to end.

    The defaults are those of the student's preset.
    """

    student: Positional[Folder]
    """A converted model."""
    out: Folder
    """The new folder."""
    text: Sources
    """Training text, as for calibrate; of chats, losses are taken on the answers alone."""
    separate_documents: bool = False
    """Keep documents in a block from seeing each other; slower on the CPU."""
    stage1_tokens: Number
    """Tokens of in-layer distillation; 0 leaves it out."""
    stage2_tokens: Number
    """Tokens of end-to-end training; 0 leaves it out."""
    loss: Literal["kl", "ntp", "mix"] = "kl"
    """Stage 2: KL to the teacher, next-token prediction, or both."""
    kl_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 0.5)")] = None
    """Share of the KL in mix."""
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="")] = None
    """Divides both models' logits in the KL."""
    temperature_squared: bool = False
    """Multiply the KL by T², so that its gradients keep their size."""
    teacher_cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Keep the teacher's likeliest tokens there, and use them in stage 2 instead of the teacher."""
    top_k: Number = 64
    """How many of them per position; all others count as one."""
    stream_layers: bool = False
    """Stage 1 one layer after the other, the others off the device and hidden states on disk: the same weights."""
    resume: bool = False
    """Continue the interrupted healing of OUT."""
    held_out: Sources = ()
    """Text to measure perplexity on while training."""
    held_out_tokens: Number = 8192
    """Tokens of that text."""
    eval_tokens: Number = 100_000
    """Training tokens between measurements."""
    track: Annotated[tuple[str, ...], arg(metavar="NAME…", help_behavior_hint="")] = ()
    """Trackers of accelerate to tell of every step, such as tensorboard."""
    train: Annotated[tuple[Part, ...] | None, arg(metavar="PART…", help_behavior_hint="(default: the preset's)")] = None
    """What trains in full: attention, maps, norms."""
    adapters: Literal["merge", "keep", "save"] = "merge"
    """The FFN's LoRA in the end: merged; kept apart in OUT/adapters; or both."""
    lora_rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Rank of the FFN's LoRA; 0 leaves the FFN as it is."""
    learning_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Peak learning rate of both stages."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Blocks per forward and process."""
    accumulate: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Forwards per step."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of matrix products; weights stay float32. auto: as accelerate launch says, or bf16 where the hardware has it."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    teacher: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: the one in the record)")] = None
    """The model that the student was converted from."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.healing.commands import heal_folder

        names = (
            "stage1_tokens", "stage2_tokens", "loss", "kl_weight", "temperature", "temperature_squared",
            "stream_layers", "lora_rank", "learning_rate", "batch_size", "accumulate", "checkpointing",
            "mixed_precision", "eval_tokens", "train", "adapters", "context",
        )  # fmt: skip
        changes = {name: getattr(self, name) for name in names} | {"stage1_learning_rate": self.learning_rate}
        return heal_folder(
            str(self.student), self.out, text=self.text, block_size=self.block_size, changes=changes,
            teacher=self.teacher, resume=self.resume, cache=self.teacher_cache, top_k=self.top_k,
            separate_documents=self.separate_documents,
            held_out=self.held_out, held_out_tokens=self.held_out_tokens, track=self.track, **self.common.place(),
        )  # fmt: skip

    def how_to_resume(self) -> str:
        from kvlatent.healing.commands import work_folder

        work = work_folder(self.out)
        if not (work / "state").is_dir():
            return "nothing was saved yet"
        return f"the state is in {work}; run the same command with --resume to go on"
