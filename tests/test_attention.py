"""latent_attention and LatentAttention against float64 loops, forward and gradients, prefill and decode."""

import copy
import math
from collections.abc import Callable

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from kvlatent.kernels import cuda_decode
from kvlatent.kernels.attention import OWN_KERNELS, choose_path, latent_attention
from kvlatent.model.attention import LatentAttention, taking_back_pays
from kvlatent.model.graft import spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.rope import LatentRotaryEmbedding
from kvlatent.model.spec import LatentSpec

SHAPES = {
    "kv_heads": st.integers(1, 3),
    "group_size": st.integers(1, 3),
    "half_qk": st.integers(1, 3),
    "d_vo": st.integers(1, 7),
    "seed": st.integers(0, 99),
}


CAPS = st.sampled_from([None, 0.8])


def random_heads(
    kv_heads: int, group_size: int, half_qk: int, d_vo: int, seed: int, *, q_len: int, kv_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v for a batch of 2, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    q_heads = kv_heads * group_size
    sizes = (
        (q_heads, q_len, 2 * half_qk),
        (kv_heads, kv_len, 2 * half_qk),
        (kv_heads, kv_len, d_vo),
        (q_heads, q_len, d_vo),
    )
    q, k, v, grad = (torch.randn(2, *size, generator=generator) for size in sizes)
    return q, k, v, grad


def check_forward_and_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, mask: Tensor | None, bias: Tensor, cap: float | None, sunk: bool
) -> None:
    scale = 0.7
    sinks = [torch.linspace(-1, 1, q.shape[1])] if sunk else []
    fast = [x.clone().requires_grad_() for x in (q, k, v, *sinks)]
    slow = [x.double().requires_grad_() for x in (q, k, v, *sinks)]
    got = latent_attention(*fast[:3], scale=scale, cap=cap, sinks=fast[3] if sunk else None, mask=mask)
    wanted = reference.attention(
        *slow[:3], scale=scale, cap=cap, sinks=slow[3] if sunk else None, bias=bias.expand(len(q), -1, -1)
    )
    assert got.dtype == q.dtype
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
    got.backward(grad)
    wanted.backward(grad.double())
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(q_len=st.integers(1, 5), cap=CAPS, sunk=st.booleans(), **SHAPES)
def test_causal_attention_matches_float64_loops(q_len: int, cap: float | None, sunk: bool, **shape: int) -> None:
    heads = random_heads(**shape, q_len=q_len, kv_len=q_len)
    check_forward_and_gradients(*heads, mask=None, bias=reference.causal(q_len, q_len), cap=cap, sunk=sunk)


@settings(max_examples=20)
@given(
    q_len=st.integers(1, 4), earlier=st.integers(0, 4), as_float=st.booleans(), cap=CAPS, sunk=st.booleans(), **SHAPES
)
def test_masked_attention_matches_float64_loops(
    q_len: int, earlier: int, as_float: bool, cap: float | None, sunk: bool, **shape: int
) -> None:
    heads = random_heads(**shape, q_len=q_len, kv_len=q_len + earlier)
    generator = torch.Generator().manual_seed(shape["seed"])
    bias = reference.causal(q_len, q_len + earlier).repeat(2, 1, 1)  # a chunk after `earlier` cached tokens
    bias[torch.rand(bias.shape, generator=generator) < 0.3] = -math.inf
    for i in range(q_len):
        bias[:, i, earlier + i] = 0  # a token always sees itself
    mask = bias[:, None].float() if as_float else bias[:, None] == 0
    check_forward_and_gradients(*heads, mask=mask, bias=bias, cap=cap, sunk=sunk)


@settings(max_examples=20)
@given(kv_len=st.integers(1, 6), masked=st.booleans(), cap=CAPS, sunk=st.booleans(), **SHAPES)
def test_a_single_query_is_the_last_row_of_the_full_forward(
    kv_len: int, masked: bool, cap: float | None, sunk: bool, **shape: int
) -> None:
    q, k, v, _ = random_heads(**shape, q_len=kv_len, kv_len=kv_len)
    sinks = torch.linspace(-1, 1, q.shape[1]) if sunk else None
    full = latent_attention(q, k, v, scale=0.4, cap=cap, sinks=sinks)
    everything = torch.ones(2, 1, 1, kv_len, dtype=torch.bool) if masked else None
    decoded = latent_attention(q[:, :, -1:], k, v, scale=0.4, cap=cap, sinks=sinks, mask=everything)
    torch.testing.assert_close(decoded, full[:, :, -1:])


CELLS = {
    # phase, dtype, mask, gradients -> path on a CPU with the kernel, on CUDA with Triton, and without either
    ("decode", torch.float32, None, False): ("kernel", "triton", "grouped"),
    ("decode", torch.bfloat16, None, False): ("kernel", "triton", "grouped"),
    ("decode", torch.float16, None, False): ("kernel", "triton", "grouped"),
    ("decode", torch.float64, None, False): ("grouped", "grouped", "grouped"),
    ("decode", torch.float32, "bool", False): ("kernel", "triton", "grouped"),
    ("decode", torch.bfloat16, "bool", False): ("kernel", "triton", "grouped"),
    ("decode", torch.float32, "float", False): ("grouped", "grouped", "grouped"),
    ("decode", torch.float32, None, True): ("grouped", "grouped", "grouped"),
    ("decode", torch.float32, "bool", True): ("grouped", "grouped", "grouped"),
    ("prefill", torch.float32, None, False): ("flash", "flash", "flash"),
    ("prefill", torch.bfloat16, None, False): ("flash", "flash", "flash"),
    ("prefill", torch.float16, None, False): ("flash", "flash", "flash"),
    ("prefill", torch.float32, "bool", False): ("flash", "flash", "flash"),
    ("prefill", torch.float32, "float", False): ("flash", "flash", "flash"),
    ("prefill", torch.float32, None, True): ("flash", "flash", "flash"),
    ("prefill", torch.float32, "bool", True): ("flash", "flash", "flash"),
}


every_cell = pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: "-".join(str(part).removeprefix("torch.") for part in cell)
)


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        ("cpu", True),
        ("cpu", False),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("widths", [(6, 5), (4, 7)])
@every_cell
def test_every_cell_of_the_table_takes_its_path_and_is_right(
    cell: tuple[str, torch.dtype, str | None, bool],
    widths: tuple[int, int],
    device: str,
    kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = OWN_KERNELS[device][1]
    if kernel and not home.available():
        pytest.skip("no kernel here")
    phase, dtype, kind, gradients = cell
    monkeypatch.setattr(home, "available", lambda: kernel)
    q_len = 1 if phase == "decode" else 3
    q, k, v, _ = random_heads(2, 3, widths[0] // 2, widths[1], 1, q_len=q_len, kv_len=70 if phase == "decode" else 3)
    bias = reference.causal(q_len, k.shape[2]).repeat(2, 1, 1)
    if kind is not None:
        bias[1, :, 0] = -math.inf  # left padding
        bias[1, 0, -q_len] = 0
    mask = {None: None, "bool": bias[:, None] == 0, "float": bias[:, None].float()}[kind]
    mask = None if mask is None else mask.to(device)
    q, k, v = (x.to(device, dtype).requires_grad_(gradients) for x in (q, k, v))
    with torch.set_grad_enabled(gradients):
        assert choose_path(q, k, v, mask) == CELLS[cell][("cpu", "cuda").index(device) if kernel else 2]
        got = latent_attention(q, k, v, scale=0.5, mask=mask)
    wanted = reference.attention(*(x.double().cpu() for x in (q, k, v)), scale=0.5, bias=bias)
    assert got.dtype == dtype
    eps = 8 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=eps, atol=eps)


@pytest.mark.parametrize("triton", [True, False])
@every_cell
def test_every_cell_takes_its_path_on_cuda(
    cell: tuple[str, torch.dtype, str | None, bool], triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without content stand in for a GPU's."""
    phase, dtype, kind, gradients = cell
    monkeypatch.setattr(cuda_decode, "available", lambda: triton)
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, heads, length, dim, dtype=dtype, device="cuda", requires_grad=gradients)
            for heads, length, dim in ((6, 1 if phase == "decode" else 3, 6), (2, 70, 6), (2, 70, 5))
        )
        dtypes = {"bool": torch.bool, "float": torch.float32}
        mask = None if kind is None else torch.empty(2, 1, q.shape[2], 70, dtype=dtypes[kind], device="cuda")
        with torch.set_grad_enabled(gradients):
            assert choose_path(q, k, v, mask) == CELLS[cell][1 if triton else 2]


def test_several_queries_without_a_mask_see_no_more_of_a_longer_buffer() -> None:
    q, k, v, _ = random_heads(2, 2, 3, 5, 0, q_len=4, kv_len=9)
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.nan
    wanted = reference.attention(
        q.double(), k[:, :, :4].double(), v[:, :, :4].double(), scale=0.5, bias=reference.causal(4, 4).repeat(2, 1, 1)
    )
    torch.testing.assert_close(latent_attention(q, k, v, scale=0.5).double(), wanted, rtol=1e-5, atol=1e-5)


def test_decode_reads_views_of_longer_buffers() -> None:
    q, k, v, _ = random_heads(2, 3, 2, 3, 0, q_len=4, kv_len=4)
    sequence_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(
        latent_attention(sequence_first[:, :, -1:], k, v, scale=1.0), latent_attention(q, k, v, scale=1.0)[:, :, -1:]
    )


def test_heads_that_cannot_be_grouped_are_an_error() -> None:
    q, k, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="3 query heads can't share 2 key/value heads evenly"):
        latent_attention(q, k, v, scale=1.0)


def test_low_precision_decode_accumulates_logits_in_float32() -> None:
    q, k, v, _ = random_heads(2, 2, 3, 4, 0, q_len=1, kv_len=6)
    got = latent_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), latent_attention(q, k, v, scale=0.5), rtol=0.05, atol=0.05)


def module_of(
    teacher: PreTrainedModel,
    *,
    qk_map: str,
    per_head_frequencies: bool,
    d_qk: int = 6,
    d_vo: int = 5,
    heads_per_latent: int = 1,
) -> tuple[LatentAttention, LatentRotaryEmbedding]:
    """A randomly filled attention of the teacher's family, in float32, and the RoPE it needs."""
    rotated = 16 if qk_map == "after_rope" else d_qk
    spec = LatentSpec(
        preset="best",
        head_dim=16,
        d_qk=(d_qk, d_qk),
        d_vo=(d_vo, d_vo),
        qk_map=qk_map,
        inv_freq=tuple(0.6**i for i in range(8 if per_head_frequencies else rotated // 2)),
        per_head_frequencies=per_head_frequencies,
        scale=0.3,
        rope_scaling=1.0,
        heads_per_latent=heads_per_latent,
    )
    stock = teacher.model.layers[0].self_attn
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LatentAttention(teacher.config, 0, stock, spec)
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.3 / heads_per_latent)
        if module.freq_index is not None:
            for row in module.freq_index:
                row.copy_(torch.randperm(8)[: len(row)].sort().values)
    return module.requires_grad_(), LatentRotaryEmbedding(spec.inv_freq, 1.0)


def matches_float64_loops(module: LatentAttention, rotary: LatentRotaryEmbedding, *, seq: int) -> None:
    """Outputs, and the gradients of inputs and of every parameter."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, seq, module.q_proj.in_features, generator=generator)
    oracle = copy.deepcopy(module).double()
    fast_x, slow_x = x.clone().requires_grad_(), x.double().requires_grad_()
    got, weights = module(fast_x, rotary(x, torch.arange(seq)[None].expand(2, -1)))
    wanted = reference.latent_attention_module(oracle, slow_x, rotary.inv_freq.tolist(), reference.causal(seq, seq))
    assert weights is None
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    got.backward(grad)
    wanted.backward(grad.double())
    torch.testing.assert_close(fast_x.grad.double(), slow_x.grad, rtol=1e-4, atol=1e-4)
    slow = dict(oracle.named_parameters())
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        torch.testing.assert_close(parameter.grad.double(), slow[parameter_name].grad, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "qk_map", "per_head_frequencies"),
    [
        ("llama", "folded", False),
        ("llama-biases", "folded", True),
        ("qwen2", "after_rope", False),
        ("mistral-mha", "before_rope", True),
        ("qwen3", "before_rope", False),
        ("qwen3", "after_rope", False),
        ("gemma2", "after_rope", False),
        ("gpt_oss", "folded", False),
    ],
)
def test_module_matches_float64_loops_with_gradients(
    tiny_teacher: Callable[[str], PreTrainedModel], name: str, qk_map: str, per_head_frequencies: bool
) -> None:
    module, rotary = module_of(tiny_teacher(name), qk_map=qk_map, per_head_frequencies=per_head_frequencies)
    if qk_map != "folded":
        assert module.q_map.shape == (4, 16, 6) and module.k_map.shape == (2 if "mha" not in name else 4, 16, 6)
    matches_float64_loops(module, rotary, seq=4)


@pytest.mark.parametrize("seq", [4, 40])
@pytest.mark.parametrize(("d_qk", "d_vo"), [(16, 16), (6, 14), (14, 5)])
def test_latents_wider_than_a_head_match_float64_loops_on_both_ways(
    tiny_teacher: Callable[[str], PreTrainedModel], seq: int, d_qk: int, d_vo: int
) -> None:
    """Few queries go to the latents; for many, keys and values come back to the heads."""
    dims = {"d_qk": d_qk, "d_vo": d_vo, "heads_per_latent": 2}
    module, rotary = module_of(tiny_teacher("llama"), qk_map="after_rope", per_head_frequencies=False, **dims)
    backs = [x for x in (module.q_map.mT, module.o_map) if x is not None and x.shape[1] > 16]
    assert backs and all(taking_back_pays(x, seq) == (seq == 40) for x in backs)
    assert module.o_proj.in_features == 4 * min(16, 2 * d_vo)
    matches_float64_loops(module, rotary, seq=seq)


def test_reduced_keys_and_values_are_what_the_cache_gets(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    module, rotary = module_of(tiny_teacher("llama"), qk_map="after_rope", per_head_frequencies=False)
    x = torch.randn(3, 7, 64)
    q, k, v = module.queries_keys_values(x, *rotary(x, torch.arange(7)[None]))
    assert (q.shape, k.shape, v.shape) == ((3, 4, 7, 6), (3, 2, 7, 6), (3, 2, 7, 5))


def test_layers_of_different_dims_live_in_one_model(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    student = tiny_student("llama")
    uneven = LatentSpec.from_dict(spec_of(student).to_dict() | {"d_qk": [6, 10], "d_vo": [3, 16]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        set_spec(student, uneven)
    with torch.no_grad():
        out = student(ids[:2], use_cache=True)
        steps, cache = [], None
        for part in ids[:2].split([20, 1, 3], dim=1):
            steps.append(student(part, past_key_values=cache, use_cache=True))
            cache = steps[-1].past_key_values
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), out.logits, rtol=1e-4, atol=1e-4)
    shapes = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in out.past_key_values.layers]
    assert shapes == [(12, 6), (20, 32)]  # of a latent that two heads share
    assert out.logits.isfinite().all()
