"""Models larger than memory: decoder layers stay in their safetensors files and come in one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import BFloat16, UInt8
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.model.checkpoints import locate, pick_device, pick_dtype
from kvlatent.model.families import family_of
from kvlatent.model.folder import (
    check_all_used,
    check_finite,
    check_generation,
    forget_quantization,
    in_mxfp4,
    one_line,
    read_config,
    weight_files,
)

LAYERS = "model.layers."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of a tensor's name where it is stored in MXFP4."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of 4 bits, E2M1, without the sign, which is the highest bit."""


@dataclass(frozen=True)
class OffloadedLayers:
    """Where the weights of the decoder layers lie, and where they are wanted."""

    model: str
    """As it was named."""
    files: dict[str, Path]
    """File by tensor name."""
    device: torch.device
    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UserError: It can't be read, or isn't finite.
        """
        with one_line(f"can't read {name} of {self.model}"):
            if name + BLOCKS in self.files:
                found = from_mxfp4(self._stored(name + BLOCKS), self._stored(name + SCALES))
            else:
                found = self._stored(name)
        check_finite(self.model, name, found)
        return found

    def _stored(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def visiting(self, layer: nn.Module, index: int, part: str = "") -> Iterator[None]:
        """Give decoder layer `index`, built on the meta device, its weights, or a part's, for the body of a `with`."""
        try:
            for name in (name for name, _ in layer.named_parameters() if name.startswith(part)):
                self.put(layer, name, f"{LAYERS}{index}.{name}")
            yield
        finally:
            layer.to("meta")

    def put(self, module: nn.Module, name: str, stored: str) -> None:
        """Give `module` its parameter `name`, stored under the name `stored`.

        Raises:
            UserError: It can't be read, isn't finite, or is of another shape.
        """
        path, _, leaf = name.rpartition(".")
        owner, weight = module.get_submodule(path), self.tensor(stored).to(self.device, self.dtype)
        found, wanted = tuple(weight.shape), tuple(getattr(owner, leaf).shape)
        if found != wanted:
            raise UserError(f"{self.model}: {stored} is of shape {found}; the architecture takes {wanted}")
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=getattr(owner, leaf).requires_grad))


def from_mxfp4(
    blocks: UInt8[Tensor, "experts outputs groups 16"], scales: UInt8[Tensor, "experts outputs groups"]
) -> BFloat16[Tensor, "experts 32*groups outputs"]:
    """Read experts in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss is published; bfloat16 holds them exactly.

    Args:
        blocks: Two numbers of 4 bits a byte, the first one in the lower bits; 32 inputs of an output each.
        scales: Their common exponents of two, above -127.
    """
    numbers = torch.tensor((*FP4, *(-x for x in FP4)), dtype=torch.bfloat16)
    weights = blocks.new_empty(len(blocks), 32 * blocks.shape[2], blocks.shape[1], dtype=torch.bfloat16)
    for weight, packed, exponents in zip(weights, blocks, scales, strict=True):  # indices take eight bytes a number
        pairs = numbers[torch.stack((packed & 15, packed >> 4), dim=-1).long()]
        weight.copy_(pairs.flatten(-2).ldexp(exponents.int()[..., None] - 127).flatten(1).T)
    return weights


def at_hand(
    offloaded: OffloadedLayers | None, layer: nn.Module, index: int, part: str = ""
) -> AbstractContextManager[None]:
    """For the body of a `with`, decoder layer `index` has its weights, or a part's, wherever they are kept."""
    return nullcontext() if offloaded is None else offloaded.visiting(layer, index, part)


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
    with one_line(f"can't open {model}"):
        config = read_config(source)
        if not family_of(config).stored_apart:
            raise UserError(
                f"checkpoints of {config.model_type} models hold fused or split weights, which can't be read layer by "
                "layer; leave --offload out"
            )
        if (quantized := getattr(config, "quantization_config", None)) is not None and not in_mxfp4(config):
            raise UserError(
                f"{model} is quantized ({quantized.get('quant_method')}), and layers that come one at a time are read "
                "as they are stored or from MXFP4; leave --offload out, or give a checkpoint that is not quantized"
            )
        layers = OffloadedLayers(model, weight_files(source), place, pick_dtype(dtype, place))
        if config.tie_word_embeddings and HEAD in layers.files:  # the files are right: it may be one of its own
            config.tie_word_embeddings = torch.equal(layers.tensor(HEAD), layers.tensor(EMBEDDINGS))
        with torch.device("meta"), init.no_init_weights():
            teacher = AutoModelForCausalLM.from_config(config, dtype=layers.dtype)
            teacher.tie_weights()  # so that what is tied comes, and is stored, once
        wanted = {name for name, _ in teacher.named_parameters()}
        stored = {name for name in layers.files if not name.endswith("rotary_emb.inv_freq")}  # follows from the config
        if in_mxfp4(config):
            packed = {name for name in wanted if {name + BLOCKS, name + SCALES} <= stored}
            stored = stored - {name + kind for name in packed for kind in (BLOCKS, SCALES)} | packed
        check_all_used(model, missing=wanted - stored, unused=stored - wanted - {HEAD})
        for name in wanted:
            if not name.startswith(LAYERS):
                layers.put(teacher, name, name)
        if Path(source, "generation_config.json").is_file():
            teacher.generation_config = GenerationConfig.from_pretrained(source)
        check_generation(teacher)
    forget_quantization(teacher)
    teacher.tie_weights()  # to the tensor that came
    rotary = teacher.model.rotary_emb
    teacher.model.rotary_emb = type(rotary)(config).to(place)  # its buffers aren't in the files
    if (scale := getattr(teacher.model.embed_tokens, "scalar_embed_scale", None)) is not None:  # nor is this one
        teacher.model.embed_tokens.embed_scale = torch.tensor(scale, device=place)
    return teacher.eval().requires_grad_(False), layers
