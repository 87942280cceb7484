"""The settings of healing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from kvlatent.model.spec import Origin

Loss = Literal["kl", "ntp", "mix"]
Part = Literal["attention", "maps", "norms"]


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How a student is trained; the defaults are ours, `for_preset("paper")` gives the paper's."""

    stage1_tokens: int = 0
    """Tokens of in-layer distillation."""
    stage2_tokens: int = 0
    """Tokens of end-to-end training."""
    loss: Loss = "kl"
    """Stage 2: forward KL to the teacher, next-token cross-entropy, or both."""
    kl_weight: float = 0.5
    """Share of the KL in `mix`; the rest is next-token cross-entropy."""
    stage1_loss: Literal["relative", "mse"] = "relative"
    """Stage 1: error relative to each position's norm, or the paper's plain squared error."""
    stream_layers: bool = False
    """Stage 1 one layer after the other: the others stay off the device, hidden states wait on disk."""
    temperature: float = 1.0
    """Divides student's and teacher's logits in the KL."""
    temperature_squared: bool = False
    """Whether the KL is multiplied by the temperature's square, which keeps its gradients' size."""
    learning_rate: float = 1e-4
    """Peak; cosine to zero over each stage."""
    stage1_learning_rate: float = 5e-4
    """The same for stage 1."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's; of matrices, not of norms and biases."""
    eps: float = 1e-8
    """AdamW's."""
    clip: float | None = 1.0
    """Largest gradient norm; in stage 1 each layer's, over the square root of their number."""
    train: tuple[Part, ...] = ("attention", "maps")
    """What trains in full: W_Q, W_K, W_V and W_O, the maps of heads, RMSNorms."""
    lora_rank: int = 32
    """Rank of the FFN's LoRA; 0 leaves the FFN frozen."""
    lora_alpha: int = 256
    """Scale of the LoRA update, over its rank."""
    adapters: Literal["merge", "keep", "save"] = "merge"
    """LoRA in the end: into the weights; apart, in its own folder, and the FFN as it was; or both."""
    batch_size: int = 2
    """Token blocks per forward and process."""
    accumulate: int = 1
    """Forwards per step, whose gradients are averaged."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of matrix products; weights and their updates are float32. `auto`: accelerate's choice, or bf16 in hardware."""
    save_minutes: float = 5.0
    """A killed run loses at most this much."""
    eval_tokens: int = 0
    """Held-out perplexity is measured every so many tokens of a stage and at its end; 0 is never."""
    context: int | None = None
    """Positions that the blocks are spread over, if more than a block's."""
    seed: int = 0
    """Of LoRA's start and of nothing else: the blocks come in a fixed order."""

    @classmethod
    def for_preset(cls, preset: Origin, *, loss: Loss = "kl", **changes: Any) -> HealConfig:
        """Defaults that go with a conversion preset, with `changes` applied (None means no change)."""
        config = cls(loss=loss)
        if preset == "paper":
            rate = 2e-7 if loss == "kl" else 2e-5
            config = replace(
                config, stage1_loss="mse", temperature=10.0, learning_rate=rate, stage1_learning_rate=2e-5, warmup=0.0,
                eps=2e-4, clip=None, train=("attention", "maps", "norms"), lora_rank=256, lora_alpha=512, batch_size=8,
            )  # fmt: skip
        changes = {name: value for name, value in changes.items() if value is not None}
        if "lora_rank" in changes and "lora_alpha" not in changes:
            changes["lora_alpha"] = config.lora_alpha * changes["lora_rank"] // config.lora_rank
        return replace(config, **changes)
