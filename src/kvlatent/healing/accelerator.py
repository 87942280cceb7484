"""The processes, devices and precision of a healing, as accelerate's launcher says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from kvlatent.errors import UserError
from kvlatent.healing.config import HealConfig
from kvlatent.model.checkpoints import multiplies_bfloat16, processes


def accelerator_for(config: HealConfig, device: torch.device, track: Sequence[str], work: Path) -> Accelerator:
    """The processes and devices, as the launcher's environment says.

    Raises:
        UserError: DeepSpeed was asked for, or fp16 on a CPU, or a tracker that isn't there.
    """
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := [name for name in track if name not in available]:
        raise UserError(f"tracker {missing[0]} is not installed; there are: {', '.join(available) or 'none'}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "healing can't save DeepSpeed's state; FSDP2 shards the same: accelerate launch --use_fsdp --fsdp_version 2"
        )
    precision: str = config.mixed_precision
    if precision == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        precision = launched if launched != "no" else "bf16" if multiplies_bfloat16(device) else "no"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("mixed precision fp16 needs an accelerator; use bf16 or no on the CPU")
    processes(device)
    AcceleratorState._reset_state()  # of another training in this process, say a Trainer's in other precision
    accelerator = Accelerator(
        mixed_precision=precision, cpu=device.type == "cpu", gradient_accumulation_steps=config.accumulate,
        log_with=list(track) or None, project_dir=work,
    )  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("healing needs FSDP2: accelerate launch --use_fsdp --fsdp_version 2")
        if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate leaves CPUs out; torch doesn't
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator
