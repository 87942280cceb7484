"""The real vLLM (`make test-engines`): log-probabilities and text of transformers, cache of the predicted size."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import VLLM_CPU_BLOCK, VLLM_CPU_HAS_FP8, vllm_tokens_per_gib
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.spec import QKMap
from kvlatent.serving.export.vllm import cache_bytes_per_token

pytestmark = pytest.mark.engines

TOLERANCE = 1e-3
"""Mean |Δ log-probability| in float32, teacher-forced; measured: about 1e-6 on tiny models, 1e-5 on SmolLM2."""
os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines of tiny models run in this process
}


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's engine on a checkpoint; token ids in, token ids out."""
    from vllm import LLM

    known = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "skip_tokenizer_init": True}
    yield LLM(model=str(folder), **known | options)


def vllm_logprobs(llm: Any, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probability of each prompt token after the first, given those before it."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(prompts, outputs, strict=True)
    ]


@torch.no_grad()
def logprobs(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[float]]:
    """The same by transformers."""
    every = []
    for ids in prompts:
        scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        every.append(scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return every


def mean_difference(mine: list[list[float]], theirs: list[list[float]]) -> float:
    return (torch.tensor([*chain(*mine)]) - torch.tensor([*chain(*theirs)])).abs().mean().item()


def random_prompts(*lengths: int, vocabulary: int = 260) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


# --- every layout, tiny ----------------------------------------------------------------------------------------------


def own_frequencies(teacher: PreTrainedModel, *, qk_map: QKMap = "folded", d_qk: int = 8) -> PreTrainedModel:
    """Random weights in a layout that no preset makes: every KV head rotates by frequencies of its own choice."""
    student = graft(teacher)
    spec = replace(spec_of(student), d_qk=(d_qk,) * 2, d_vo=(8, 8), qk_map=qk_map, per_head_frequencies=True)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    set_spec(student, spec)
    for layer in student.model.layers:
        index = layer.self_attn.freq_index
        for head in index:
            head.copy_(torch.randperm(8, generator=generator)[: len(head)])
    return student.requires_grad_(False).eval()


def own_frequencies_and_maps(teacher: PreTrainedModel) -> PreTrainedModel:
    """The same, reduced after the rotation."""
    return own_frequencies(teacher, qk_map="after_rope")


def random_student(*, kv_heads: int, head_dim: int, **shape: Any) -> PreTrainedModel:
    """Random weights of two query heads per KV head, in a layout that no preset makes."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=80, num_hidden_layers=len(shape["d_qk"]),
        num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=256,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    student = graft(LlamaForCausalLM(config).eval())
    set_spec(student, replace(spec_of(student), qk_map="after_rope", **shape))
    return student.requires_grad_(False).eval()


def unlike_layers(_: PreTrainedModel) -> PreTrainedModel:
    """Other dims in each layer, as a budget by layer gives them; cached 32, 48 and 64 wide."""
    return random_student(kv_heads=2, head_dim=64, d_qk=(32, 40, 64), d_vo=(16, 48, 8))


def two_latents(_: PreTrainedModel) -> PreTrainedModel:
    """Four KV heads in two latents, one for each of two ranks."""
    return random_student(kv_heads=4, head_dim=16, d_qk=(10, 6), d_vo=(9, 16), heads_per_latent=2)


LAYOUTS = [
    ("llama", "best", 8, 4),
    ("llama", "portable", 8, 8),
    ("llama", "paper", 8, 4),
    ("llama", "apart", 8, 4),
    ("llama", "best", 16, 8),
    ("llama-mha-tied", "best", 8, 4),
    ("llama-yarn", "best", 8, 8),
    ("llama-biases", "portable", 4, 8),
    ("mistral", "best", 8, 8),
    ("qwen2", "best", 8, 8),
    ("qwen2", "portable", 8, 4),
    ("qwen3", "best", 8, 8),
    ("qwen3", "portable", 8, 4),
]


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, own_frequencies, own_frequencies_and_maps, unlike_layers],
    ids=lambda layout: layout.__name__ if callable(layout) else "-".join(map(str, layout)),
)
def test_log_probabilities_are_those_of_transformers(
    layout: Any,
    tiny_teacher: Callable[..., PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    """Heads of 4 to 64 dims, padded as the CPU backend wants them; prompts are prefilled in chunks."""
    student = layout(tiny_teacher("llama")) if callable(layout) else tiny_student(*layout)
    student.save_pretrained(tmp_path / "student")
    prompts = random_prompts(120, 33, 75)
    with engine(tmp_path / "student", max_model_len=160, max_num_batched_tokens=48) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.enable_chunked_prefill
        difference = mean_difference(vllm_logprobs(llm, prompts), logprobs(student, prompts))
        cache = llm.llm_engine.vllm_config.cache_config
    print(f"mean |Δ log-probability| {difference:.1e}")
    assert difference <= TOLERANCE
    heads = student.config.num_key_value_heads
    whole, padding = cache_bytes_per_token(spec_of(student), "CPU_ATTN", kv_heads=heads, element_size=4)
    assert padding > 0
    assert cache.num_gpu_blocks * VLLM_CPU_BLOCK == vllm_tokens_per_gib(whole)


@pytest.mark.skipif(not VLLM_CPU_HAS_FP8, reason="needs AVX-512")
@pytest.mark.parametrize("layout", [("llama", "best", 8, 4), ("llama", "portable", 8, 8), unlike_layers])
def test_an_fp8_cache_is_read_as_it_is_written(
    layout: Any,
    tiny_teacher: Callable[..., PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-probabilities are those of transformers with keys and values rounded to e4m3; one byte a number."""
    student = layout(tiny_teacher("llama")) if callable(layout) else tiny_student(*layout)
    student.save_pretrained(tmp_path / "student")
    prompts = random_prompts(120, 33, 75)
    with engine(tmp_path / "student", max_model_len=160, kv_cache_dtype="fp8_e4m3") as llm:
        got = vllm_logprobs(llm, prompts)
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    exact = logprobs(student, prompts)
    plain = LatentAttention.queries_keys_values

    def rounded(self: LatentAttention, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(self, *args, **options)
        return q, k.to(torch.float8_e4m3fn).to(k), v.to(torch.float8_e4m3fn).to(v)

    monkeypatch.setattr(LatentAttention, "queries_keys_values", rounded)
    difference, lost = (mean_difference(got, x) for x in (logprobs(student, prompts), exact))
    print(f"mean |Δ log-probability| {difference:.1e}, to the unrounded {lost:.1e}")
    assert difference <= TOLERANCE < lost
    heads = student.config.num_key_value_heads
    whole, _ = cache_bytes_per_token(spec_of(student), "CPU_ATTN", kv_heads=heads, element_size=4, fp8=True)
    assert blocks * VLLM_CPU_BLOCK == vllm_tokens_per_gib(whole)


def test_a_student_with_a_window_is_refused(tiny_student: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_student("llama", "windowed").save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="vLLM has one cache per layer"), engine(tmp_path / "student"):
        pass


def test_a_cached_prefix_is_used_and_changes_nothing(
    tiny_student: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    student = tiny_student("llama", "best", 8, 4)
    student.save_pretrained(tmp_path / "student")
    [prompt] = random_prompts(200)
    greedy = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)
    with engine(tmp_path / "student", max_model_len=250) as llm:
        first, again = (llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, VLLM_CPU_BLOCK)
    plain = {"do_sample": False, "use_cache": False}  # decoding by our CPU kernel loads LLVM, which vLLM chokes on here
    expected = student.generate(torch.tensor([prompt]), max_new_tokens=12, **plain)[0, len(prompt) :].tolist()
    assert list(first.outputs[0].token_ids) == list(again.outputs[0].token_ids) == expected


@pytest.mark.parametrize(
    ("parallel", "layout"),
    [("tensor", own_frequencies_and_maps), ("tensor", two_latents), ("pipeline", own_frequencies_and_maps)],
)
def test_two_processes_share_the_model(
    parallel: str,
    layout: Any,
    tiny_teacher: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has half of the query and KV heads, with their maps, frequencies and latents; or one of the layers."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options: dict[str, Any] = {"max_model_len": 128, f"{parallel}_parallel_size": 2}
    if parallel == "pipeline":  # vLLM (0.32, CPU) makes the buffers between stages when it compiles, else it fails
        options["enforce_eager"] = False
    student = layout(tiny_teacher("llama"))
    student.save_pretrained(tmp_path / "student")
    prompts = random_prompts(60, 33)
    with engine(tmp_path / "student", **options) as llm:
        difference = mean_difference(vllm_logprobs(llm, prompts), logprobs(student, prompts))
    print(f"mean |Δ log-probability| {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize(("heads", "ranks", "held"), [(4, 2, [[0, 1], [2, 3]]), (2, 4, [[0], [0], [1], [1]])])
def test_each_rank_loads_its_heads(
    heads: int, ranks: int, held: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlatent.serving import vllm_model

    monkeypatch.setattr(vllm_model, "get_tensor_model_parallel_world_size", lambda: ranks)
    whole = torch.arange(heads).float()[:, None, None].expand(heads, 5, 3)
    for rank, expected in enumerate(held):
        monkeypatch.setattr(vllm_model, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parameter = vllm_model._by_head(torch.empty(len(expected), 5, 3), heads)
        parameter.weight_loader(parameter, whole)
        assert parameter[:, 0, 0].tolist() == expected
    with pytest.raises(ValueError, match="the model has"):
        parameter.weight_loader(parameter, whole[:1])


def test_gpus_get_a_backend_with_two_sizes(
    tiny_student: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a CPU lets: the choice, and a cache laid out with keys of 48 and values of 16 dims."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from kvlatent.serving import vllm_model

    config, equal = VllmConfig(), spec_of(tiny_student("llama", "best", 8, 8))
    apart = replace(spec_of(unlike_layers(tiny_student("llama"))), d_qk=(48,) * 3, d_vo=(16,) * 3)
    with set_current_vllm_config(config):
        assert vllm_model.choose_backend(apart) == "CPU_ATTN"
        monkeypatch.setattr(vllm_model, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        assert (vllm_model.choose_backend(apart), vllm_model.choose_backend(equal)) == ("DIFFKV", "EQUAL")
        backend = vllm_model._diffkv_backend(16)
        assert (backend.get_name(), backend.head_size_v) == ("TRITON_ATTN_DIFFKV", 16)
        attention = Attention(4, 48, 0.1, num_kv_heads=2, prefix="0.attn", attn_backend=backend, head_size_v=16)
        spec = attention.get_kv_cache_spec(config)
        assert spec.page_size_bytes == spec.block_size * 2 * (48 + 16) * spec.dtype.itemsize
        config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN_DIFFKV
        assert vllm_model.choose_backend(equal) == "DIFFKV"
        config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
        assert vllm_model.choose_backend(apart) == "EQUAL"


def test_vllm_finds_the_plugin() -> None:
    [found] = entry_points(group="vllm.general_plugins", name="kvlatent")
    from vllm import ModelRegistry

    found.load()()
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        assert f"KVLatent{name}ForCausalLM" in ModelRegistry.get_supported_archs()
