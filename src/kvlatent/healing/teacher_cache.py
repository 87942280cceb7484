"""The teacher's likeliest next tokens on disk: computed once, then stage 2 needs no teacher."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.data.teacher_text import weights_mark
from kvlatent.errors import UserError
from kvlatent.files import replaced, sole_writer, sweep
from kvlatent.healing import losses
from kvlatent.healing.stages import Text
from kvlatent.model.layers import output_logits
from kvlatent.signals import Stopped

SHARD = 64
"""Blocks per file."""
BYTES = 6
"""Per token kept: its id as int32 and its log-probability as float16."""


@dataclass(frozen=True)
class TeacherCache:
    """A folder of files that each hold `tokens` and `log_probs`, (blocks, seq, k), of `SHARD` blocks."""

    folder: Path
    k: int

    def read(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """The teacher's k likeliest next tokens after each position of some blocks, and their log-probabilities."""
        parts: list[tuple[Tensor, Tensor]] = []
        while size > 0:
            first = start // SHARD * SHARD
            stop = min(start + size, first + SHARD)
            try:
                with safe_open(self._file(first), framework="pt") as file:
                    inside = slice(start - first, stop - first)
                    parts.append((file.get_slice("tokens")[inside], file.get_slice("log_probs")[inside]))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self._file(first)} can't be read ({error}); remove it to make it again") from None
            start, size = stop, size - (stop - start)
        tokens, log_probs = (torch.cat(x) for x in zip(*parts, strict=True))
        return tokens, log_probs

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"

    def fill(
        self,
        teacher: PreTrainedModel,
        text: Text,
        blocks: range,
        *,
        temperature: float,
        accelerator: Accelerator,
        interrupted: Sequence[signal.Signals] = (),
    ) -> None:
        """Write the files that aren't there yet, each process its share.

        Args:
            teacher: The teacher, on its device.
            text: The training text.
            blocks: Those that are needed.
            temperature: Divides the logits.
            accelerator: The processes.
            interrupted: Signals that have come; looked at before every block.

        Raises:
            UserError: The folder holds the cache of another teacher, text, temperature or k.
            KeyboardInterrupt: A signal came; files that are there stay and are used the next time.
        """
        about = {
            "k": self.k,
            "temperature": temperature,
            "separator": text.separator,
            "text": hashlib.sha256(text.ids.numpy().data).hexdigest(),
            "teacher": weights_mark(teacher),
        }
        if accelerator.is_main_process:
            self._claim(about)
        accelerator.wait_for_everyone()
        files = [(i, first) for i, first in enumerate(range(blocks.start // SHARD * SHARD, blocks.stop, SHARD))]
        mine = [
            first
            for i, first in files
            if i % accelerator.num_processes == accelerator.process_index and not self._file(first).exists()
        ]
        for first in tqdm(
            mine, desc="teacher's log-probabilities", unit="file", disable=not accelerator.is_main_process
        ):
            rows = range(first, min(first + SHARD, len(text.ids)))
            found = []
            for row in rows:
                if interrupted:
                    raise Stopped(interrupted[0])
                found.append(self._top_k(teacher, text, row, temperature))
            tokens, log_probs = (torch.stack(x) for x in zip(*found, strict=True))
            with replaced(self._file(first)) as partial:
                save_file({"tokens": tokens, "log_probs": log_probs}, partial)
        accelerator.wait_for_everyone()

    def _claim(self, about: dict[str, Any]) -> None:
        file, wanted = self.folder / "about.json", json.dumps(about, indent=2) + "\n"
        with sole_writer(self.folder, wait=True):
            sweep(self.folder)
            if not file.is_file():
                if self.folder.is_dir() and any(self.folder.iterdir()):
                    raise UserError(f"{self.folder} is not a teacher cache; give a new folder")
                with replaced(file) as partial:
                    partial.write_text(wanted)
            elif file.read_bytes() != wanted.encode():
                raise UserError(
                    f"{self.folder} caches another teacher, text, temperature or number of tokens; give another folder"
                )

    @torch.no_grad()
    def _top_k(self, teacher: PreTrainedModel, text: Text, row: int, temperature: float) -> tuple[Tensor, Tensor]:
        batch = text.batch(row, 1, slice(row, row + 1)).to(teacher.device)
        hidden = teacher.model(batch["ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state[0]
        found = [
            (output_logits(teacher, part) / temperature).log_softmax(-1).topk(self.k)
            for part in hidden.split(losses.CHUNK)
        ]
        tokens = torch.cat([top.indices for top in found]).int().cpu()
        log_probs = torch.cat([top.values for top in found]).clamp(min=torch.finfo(torch.float16).min).half().cpu()
        return tokens, log_probs
