"""A tiny run of every preset and reduction, as hashes and as numbers: what a change of layout must leave alone.

    python tests/golden.py > before.json    # at one commit
    python tests/golden.py > after.json     # at another, on the same machine: equal to the last bit

Hashes differ between processors, whose matrix products round differently; `tests/test_golden.py` therefore compares the
numbers, which don't depend on the signs and bases that a singular value decomposition is free to choose.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from windowless import convert

from kvlatent.compress import budget
from kvlatent.compress.statistics import calibrate
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal

GOLDEN = Path(__file__).with_name("golden.json")
PAPER = ("stride", "aware", "matched")
SHARED = (*PAPER, "pairs-model", "fold")
ALL = (*SHARED, "pairs-layer", "pairs", "partial", "project")
PRESETS = {"paper": PAPER, "portable": SHARED, "best": ALL}
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip


def teacher(family: str) -> PreTrainedModel:
    """A random two-layer model."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**SIZES))
    return made.eval().requires_grad_(False)


def hashed(model: PreTrainedModel) -> str:
    """SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def numbers(model: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """Some logits, and the norm of all of them."""
    logits = model(ids[:2]).logits.double()
    return [*logits[:, ::11, 7].flatten().tolist(), float(logits.norm())]


def cases() -> dict[str, dict[str, Any]]:
    """Every preset with every reduction that it allows, one shot and layer by layer, healed, and planned."""
    torch.set_num_threads(1)
    ids = torch.randint(128, (8, 48), generator=torch.Generator().manual_seed(1))
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, model: PreTrainedModel) -> PreTrainedModel:
        found[name] = {"hash": hashed(model), "numbers": numbers(model, ids)}
        return model

    for family in ("llama", "qwen3"):
        whole = teacher(family)
        statistics = calibrate(whole, ids, context=256, about={})
        for preset, methods in PRESETS.items():
            for qk in methods:
                given = {} if preset == "paper" else {"ids": ids, "context": 256}
                add(f"{family} {preset} {qk}", convert(whole, preset=preset, qk=qk, d_qk=8, d_vo=8, **given))
        for preset in ("best", "portable"):
            apart = {"heads_per_latent": 1, "d_qk": 8, "d_vo": 4}
            add(f"{family} {preset} apart", convert(whole, preset=preset, ids=ids, **apart))
            add(f"{family} {preset} one shot", convert(whole, preset=preset, d_qk=8, d_vo=6, statistics=statistics))
        statistics.probes = budget.probe(whole, statistics, ids[:4])
        plan = budget.plan(whole, statistics, 0.4)
        found[f"{family} plan"] = {"dims": [*plan.d_qk, *plan.d_vo], "numbers": [*plan.qk_loss, *plan.vo_loss]}
        student = add(f"{family} planned", convert(whole, d_qk=plan.d_qk, d_vo=plan.d_vo, ids=ids, context=256))
        for preset in ("best", "paper"):
            config = HealConfig.for_preset(preset, stage1_tokens=384, stage2_tokens=384, lora_rank=4, context=256)
            config = replace(config, mixed_precision="no", learning_rate=1e-3, stage1_learning_rate=1e-3, batch_size=2)
            with tempfile.TemporaryDirectory() as folder:
                start = convert(whole, preset="paper", d_qk=8, d_vo=8) if preset == "paper" else student
                add(f"{family} healed like {preset}", heal(start, whole, ids.repeat(2, 1), Path(folder, "w"), config))
    return found


if __name__ == "__main__":
    print(json.dumps(cases(), indent=1))
