"""Tiny random models of every family, a byte tokenizer, and shape checks on tensor functions; nothing from a hub."""

import copy
import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before transformers imports Triton: its kernels then run as Python

import jaxtyping
from hypothesis import settings
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TENSOR_MODULES = [
    "model.attention", "model.rope", "model.far_maps", "model.window", "kernels.attention", "kernels.cpu_decode",
    "kernels.cpu_linear", "kernels.cuda_decode", "compress.linear_algebra", "compress.maps", "compress.methods.fold",
    "compress.methods.pairs", "compress.methods.partial", "compress.methods.project", "compress.values",
    "compress.refit", "healing.losses",
]  # fmt: skip
jaxtyping.install_import_hook([f"kvlatent.{name}" for name in TENSOR_MODULES], "beartype.beartype")

import commands  # noqa: E402
import tiny_recipe  # noqa: E402

from kvlatent.cli import main  # noqa: E402
from kvlatent.compress.convert import convert  # noqa: E402
from kvlatent.kernels.allocator import freed_memory_kept  # noqa: E402
from kvlatent.model.config import CONFIGS  # noqa: E402
from kvlatent.model.families import FAMILIES  # noqa: E402
from kvlatent.model.far_maps import FarMaps  # noqa: E402
from kvlatent.model.models import MODELS  # noqa: E402

settings.register_profile("busy machines", deadline=None)
settings.load_profile("busy machines")
gc.freeze()  # accelerate collects garbage after every stage: spare it the walk through all that was imported

VOCABULARY = 260
GQA, MHA = {"num_key_value_heads": 2}, {"num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MULTIPLIERS = {
    "attention_multiplier": 0.1, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0
}  # fmt: skip
ROPES = {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}}
GROWING = YARN | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
    "original_max_position_embeddings": 200,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0}
ALTERNATING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SHARED = EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "llama-mha-tied": ("llama", MHA | {"tie_word_embeddings": True}),
    "llama-llama3-rope": ("llama", GQA | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", GQA | {"rope_parameters": YARN}),
    "llama-biases": ("llama", GQA | {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic": ("llama", GQA | {"rope_parameters": DYNAMIC}),
    "mistral": ("mistral", GQA | {"sliding_window": 6}),
    "mistral-mha": ("mistral", MHA | {"sliding_window": None}),
    "qwen2": ("qwen2", GQA),
    "qwen2-mha-tied": ("qwen2", MHA | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", GQA),
    "qwen3-mha-tied": ("qwen3", MHA | {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", GQA | EXPERTS),
    "ministral3": ("ministral3", GQA | {"rope_parameters": GROWING}),
    "smollm3": ("smollm3", GQA | {"no_rope_layers": [1, 0]}),
    "granite": ("granite", GQA | MULTIPLIERS),
    "olmo2": ("olmo2", GQA),
    "olmo3": ("olmo3", GQA | ALTERNATING | ROPES),
    "phi3": ("phi3", GQA | {"rope_parameters": PARTIAL}),
    "phi3-longrope": ("phi3", GQA | {"rope_parameters": LONG, "original_max_position_embeddings": 200}),
    "phi3-whole": ("phi3", GQA),
    "glm4": ("glm4", GQA | {"attention_bias": True}),
    "cohere": ("cohere", GQA | {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere-mha-plain": ("cohere", MHA | {"attention_bias": True}),
    "cohere2": ("cohere2", GQA | {"logit_scale": 0.5, **ALTERNATING}),
    "gpt_oss": ("gpt_oss", GQA | {**ALTERNATING, **EXPERTS, "rope_parameters": YARN | {"truncate": False}}),
    "qwen3_next": ("qwen3_next", GQA | LINEAR | SHARED | {"mlp_only_layers": [0]}),
    "qwen3_5_text": ("qwen3_5_text", GQA | LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", GQA | LINEAR | SHARED),
    "gemma2": ("gemma2", GQA | {"query_pre_attn_scalar": 9, **ALTERNATING, **CAPS}),
    "gemma3_text": ("gemma3_text", GQA | {"query_pre_attn_scalar": 9, **ALTERNATING, **ROPES}),
    "qwen3_moe": ("qwen3_moe", GQA | EXPERTS | {"moe_intermediate_size": 24, "mlp_only_layers": [0]}),
}
"""Family and what is special, by name; the plain family names have grouped heads."""
ON_ENGINES = [name for name, (family, _) in TEACHERS.items() if FAMILIES[family].on_engines and name != "llama-dynamic"]


@cache
def _teacher(name: str) -> PreTrainedModel:
    model_type, changes = TEACHERS[name]
    stock_config, stock_model = CONFIGS[model_type].__bases__[0], MODELS[model_type].__bases__[1]
    # Qwen3's head_dim is not hidden_size / heads, as in its small checkpoints.
    config = stock_config(
        vocab_size=VOCABULARY,
        hidden_size=32 if model_type == "qwen3" else 64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = stock_model(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" in parameter_name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif "sinks" in parameter_name:
                torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)


@pytest.fixture(autouse=True, scope="session")
def quick_allocations() -> Iterator[None]:
    """As every command computes."""
    with freed_memory_kept():
        yield


@pytest.fixture(autouse=True, scope="session")
def float32_by_default() -> Iterator[None]:
    """Training in the precision that results are compared in, whatever the machine multiplies."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("model.checkpoints", "healing.accelerator", "healing.checkpoint"):
            patched.setattr(f"kvlatent.{module}.multiplies_bfloat16", lambda _: False)
        yield


@pytest.fixture(scope="session")
def tiny_teacher() -> Callable[[str], PreTrainedModel]:
    """A fresh copy of the teacher called so in `TEACHERS`: 2 layers, 4 query heads of 16 dims."""
    return lambda name: copy.deepcopy(_teacher(name))


@pytest.fixture(params=ON_ENGINES)
def plain_teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every entry of `TEACHERS` in turn whose family all presets and engines take."""
    return copy.deepcopy(_teacher(request.param))


@pytest.fixture(params=TEACHERS)
def any_teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every entry of `TEACHERS` in turn."""
    return copy.deepcopy(_teacher(request.param))


@pytest.fixture(scope="session")
def tiny_student(ids: torch.Tensor) -> Callable[..., PreTrainedModel]:
    """A fresh copy of a teacher's conversion to 8 and 4 dims (or those asked for).

    `apart` is best without latents, `windowed` best with its newest five tokens and two sinks whole.
    """

    @cache
    def student(name: str, preset: str, d_qk: int, d_vo: int) -> PreTrainedModel:
        options: dict[str, Any] = {"preset": preset, "ids": None if preset == "paper" else ids, "window": 0}
        if preset == "apart":
            options = {"heads_per_latent": 1, "ids": ids, "window": 0}
        if preset == "windowed":
            options = {"window": 5, "sinks": 2, "ids": ids}
        return convert(_teacher(name), d_qk=d_qk, d_vo=d_vo, **options).requires_grad_(False)

    return lambda name, preset="best", d_qk=8, d_vo=4: copy.deepcopy(student(name, preset, d_qk, d_vo))


@pytest.fixture(scope="session")
def models(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel]
) -> Callable[[str], PreTrainedModel]:
    """A Llama, and its students by what is special about their caches."""
    from test_window import windowed  # which settles hypothesis' settings

    def model(kind: str) -> PreTrainedModel:
        if kind == "stock":
            return tiny_teacher("llama")
        if kind in ("window", "codes"):
            coded = kind == "codes"
            return windowed(tiny_teacher("llama"), codes=coded, window_bits=8 if coded else 16)
        return tiny_student("llama", kind)

    return model


@pytest.fixture(scope="session")
def text() -> torch.Tensor:
    """Random text, (blocks 3, block_size 120), without the token that pads."""
    return torch.randint(1, 260, (3, 120), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def compilable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile starts afresh, and shapes aren't checked: it can't look into the checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # Of an object that is made inside a graph not even a check that is off passes.
    for name in ("of", "held", "hold", "met", "held_and_met", "reduced", "stored", "read_keys", "read"):
        monkeypatch.setattr(FarMaps, name, getattr(FarMaps, name).__wrapped__)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Random text, (blocks 12, block_size 24)."""
    return torch.randint(VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def blocks() -> torch.Tensor:
    """Text with something to learn: 12 phrases in random order, (blocks 48, 16)."""
    generator = torch.Generator().manual_seed(3)
    phrases = torch.randint(1, 260, (12, 4), generator=generator)
    return phrases[torch.randint(12, (48, 4), generator=generator)].flatten(1)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: every text has an encoding, and nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A folder with `teacher`, `student`, `train.txt` and `other.txt`; tests only read it."""
    root = tmp_path_factory.mktemp("folder")
    tiny_teacher("llama").save_pretrained(root / "teacher")
    byte_tokenizer.save_pretrained(root / "teacher")
    commands.write_text(root / "train.txt", seed=1)
    commands.write_text(root / "other.txt", seed=2)
    assert main(commands.convert(root, "--out", f"{root}/student")) == 0
    return root


@pytest.fixture(scope="session")
def recipe(folder: Path) -> dict[str, Any]:
    """A small recipe, as data."""
    return tiny_recipe.tiny(folder)


@pytest.fixture(scope="session")
def roomy(
    recipe: dict[str, Any],
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The same without healing, for a teacher with positions for questions about far text."""
    folder = tmp_path_factory.mktemp("roomy")
    teacher = tiny_teacher("llama")
    teacher.config.max_position_embeddings = 700
    teacher.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    small = recipe | {"model": str(folder), "students": [{"preset": "paper", "d_qk": 8, "d_vo": 4}]}
    del small["training"]
    return small


@pytest.fixture(scope="session")
def finished(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run of the small recipe, beside `tiny.yaml`, and its results; tests only read it."""
    from kvlatent.cli.recipe import run  # which needs more than the contract tests have installed

    root = tmp_path_factory.mktemp("run")
    return root / "run", run(tiny_recipe.write(recipe, root / "tiny.yaml"), root / "run")
