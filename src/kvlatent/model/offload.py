"""Models larger than memory: decoder layers stay in their safetensors files and come in one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.model.checkpoints import locate, pick_device, pick_dtype
from kvlatent.model.families import family_of

LAYERS = "model.layers."


@dataclass(frozen=True)
class OffloadedLayers:
    """Where the weights of the decoder layers lie, and where they are wanted."""

    files: dict[str, Path]
    """File by tensor name."""
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UserError: The checkpoint lacks it.
        """
        if name not in self.files:
            raise UserError(f"the checkpoint lacks {name}")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    @contextmanager
    def visiting(self, layer: nn.Module, index: int) -> Iterator[None]:
        """Give decoder layer `index`, built on the meta device, its weights for the body of a `with`."""
        try:
            for name, _ in layer.named_parameters():
                self.put(layer, name, f"{LAYERS}{index}.{name}")
            yield
        finally:
            layer.to("meta")

    def put(self, module: nn.Module, name: str, stored: str) -> None:
        """Give `module` its parameter `name`, stored under the name `stored`."""
        set_module_tensor_to_device(module, name, self.device, value=self.tensor(stored), dtype=self.dtype)


def open_offloaded(model: str, *, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, OffloadedLayers]:
    """Open a teacher with only its embeddings, last norm and output head in memory.

    Args:
        model: Hub id, folder, `.gguf` file (unpacked first), or `smollm2`.
        device: Where layers compute.
        dtype: Of the weights while they are there.

    Raises:
        UserError: Nothing of that name, an unsupported architecture, or no safetensors.
    """
    place, source = pick_device(device), locate(model)
    try:
        config = AutoConfig.from_pretrained(source)
        family_of(config)
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        layers = OffloadedLayers(files, place, pick_dtype(dtype, place))
        with torch.device("meta"), init.no_init_weights():
            teacher = AutoModelForCausalLM.from_config(config, dtype=layers.dtype)
            teacher.tie_weights()  # so that what is tied comes, and is stored, once
        for name, _ in list(teacher.named_parameters()):
            if not name.startswith(LAYERS):
                layers.put(teacher, name, name)
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise UserError(f"can't open {model}: {' '.join(str(error).split())[:300]}") from None
    teacher.tie_weights()  # to the tensor that came
    rotary = teacher.model.rotary_emb
    teacher.model.rotary_emb = type(rotary)(config).to(place)  # its buffers aren't in the files
    return teacher.eval().requires_grad_(False), layers
