"""Models larger than memory: decoder layers stay in their safetensors files and come in one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import BFloat16, UInt8
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention, attention_of
from kvlatent.model.checkpoints import locate, pick_device, pick_dtype
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
from kvlatent.model.graft import head_dim_of, identity_spec, rotated_dims
from kvlatent.model.stock_weights import unfused

LAYERS = "model.layers."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of a tensor's name where it is stored in MXFP4."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of 4 bits, E2M1, without the sign, which is the highest bit."""
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
"""What Mixtral's checkpoints call what the others do, and transformers' modules."""
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
"""A weight of one expert, as files hold it."""
MERGED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Of which weights of each expert the modules make theirs, one above the other."""


@dataclass(frozen=True)
class OffloadedLayers:
    """Where the weights of the decoder layers lie, and where they are wanted."""

    model: str
    """As it was named."""
    files: dict[str, Path]
    """File by the name of a tensor in it."""
    device: torch.device
    dtype: torch.dtype
    config: PreTrainedConfig
    stored: dict[str, tuple[tuple[str, ...], ...]]
    """Of what in the files a weight is made, by its name in modules: itself; its numbers of 4 bits and their exponents;
    or for each expert the parts that stand one above the other."""
    rotated: int = 0
    """Dims of each head that RoPE turns."""

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            UserError: It can't be read, or isn't finite.
        """
        with one_line(f"can't read {name} of {self.model}"):
            made_of = self.stored[name]
            parts = [[self._stored(part) for part in each] for each in made_of]
            if made_of[0][0].endswith(BLOCKS):
                found = from_mxfp4(*parts[0])
            elif name.rpartition(".")[2] in MERGED and made_of[0][0].endswith(".weight"):  # a file's parts of experts
                found = torch.stack([torch.cat(each) for each in parts])
            else:
                found = parts[0][0]
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
            self._fill(layer, f"{LAYERS}{index}.", part)
            yield
        finally:
            layer.to("meta")

    def _fill(self, layer: nn.Module, prefix: str, part: str) -> None:
        """Give a layer its weights, a module's at a time: as they are stored, or as a graft names and orders them."""
        wanted = [name for name, _ in layer.named_parameters() if name.startswith(part)]
        if not isinstance(attention_of(layer), LatentAttention):
            for name in wanted:
                self.put(layer, name, self.tensor(prefix + name), prefix + name)
            return
        order = {"head_dim": head_dim_of(self.config), "rotated": self.rotated}
        for module in sorted({name.partition(".")[0] + "." for name in wanted}):
            stock = {name: self.tensor(name) for name in self.stored if name.startswith(prefix + module)}
            weights = unfused(stock, self.config, **order)
            for name in (name for name in wanted if name.startswith(module)):
                self.put(layer, name, weights[prefix + name], prefix + name)

    def put(self, module: nn.Module, name: str, weight: Tensor, stored: str) -> None:
        """Give `module` its parameter `name`, which users know as `stored`.

        Raises:
            UserError: It is of another shape.
        """
        path, _, leaf = name.rpartition(".")
        owner, weight = module.get_submodule(path), weight.to(self.device, self.dtype)
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
        if (quantized := getattr(config, "quantization_config", None)) is not None and not in_mxfp4(config):
            raise UserError(
                f"{model} is quantized ({quantized.get('quant_method')}), and layers that come one at a time are read "
                "as they are stored or from MXFP4; leave --offload out, or give a checkpoint that is not quantized"
            )
        files = weight_files(source)
        made_of = _made_of(files, config.model_type)
        layers = OffloadedLayers(model, files, place, pick_dtype(dtype, place), config, made_of)
        if config.tie_word_embeddings and HEAD in layers.stored:  # the files are right: it may be one of its own
            config.tie_word_embeddings = torch.equal(layers.tensor(HEAD), layers.tensor(EMBEDDINGS))
        with torch.device("meta"), init.no_init_weights():
            teacher = AutoModelForCausalLM.from_config(config, dtype=layers.dtype)
            teacher.tie_weights()  # so that what is tied comes, and is stored, once
        wanted = {name for name, _ in teacher.named_parameters()}
        stored = {name for name in layers.stored if not name.endswith("rotary_emb.inv_freq")}  # the config tells it
        check_all_used(model, missing=wanted - stored, unused=stored - wanted - {HEAD})
        for name in wanted:
            if not name.startswith(LAYERS):
                layers.put(teacher, name, layers.tensor(name), name)
        if Path(source, "generation_config.json").is_file():
            teacher.generation_config = GenerationConfig.from_pretrained(source)
        check_generation(teacher)
    forget_quantization(teacher)
    teacher.tie_weights()  # to the tensor that came
    rotary = teacher.model.rotary_emb
    teacher.model.rotary_emb = type(rotary)(config).to(place)  # its buffers aren't in the files
    if (scale := getattr(teacher.model.embed_tokens, "scalar_embed_scale", None)) is not None:  # nor is this one
        teacher.model.embed_tokens.embed_scale = torch.tensor(scale, device=place)
    return teacher.eval().requires_grad_(False), replace(layers, rotated=rotated_dims(identity_spec(teacher)))


def _made_of(files: Iterable[str], model_type: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    """`OffloadedLayers.stored` of a checkpoint, by the names of its tensors."""
    known = dict[str, str]()
    for name in files:
        ours = name
        for old, new in MIXTRAL.items() if model_type == "mixtral" else ():
            ours = ours.replace(old, new)
        known[ours] = name
    count = dict[str, int]()
    for name in known:
        if found := EXPERT.fullmatch(name):
            count[found[1]] = max(count.get(found[1], 0), int(found[2]) + 1)
    made: dict[str, tuple[tuple[str, ...], ...]] = {
        name.removesuffix(BLOCKS): ((name, name.removesuffix(BLOCKS) + SCALES),)
        for name in known
        if name.endswith(BLOCKS)
    }
    made |= {
        f"{stem}.{kind}": tuple(
            tuple(f"{stem}.{expert}.{part}_proj.weight" for part in MERGED[kind]) for expert in range(experts)
        )
        for stem, experts in count.items()
        for kind in MERGED
    }
    made = {name: parts for name, parts in made.items() if all(part in known for each in parts for part in each)}
    used = {part for parts in made.values() for each in parts for part in each}
    made |= {name: ((name,),) for name in known if name not in used}
    return {name: tuple(tuple(known[part] for part in each) for each in parts) for name, parts in made.items()}
