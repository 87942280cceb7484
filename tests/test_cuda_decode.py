"""The Triton kernel against float64 loops, in Triton's interpreter where there is no GPU, and through its compiler."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlatent.kernels import attention, cuda_decode
from kvlatent.kernels.codes import Codes
from kvlatent.kernels.cuda_decode import decode_attention, split
from kvlatent.kernels.layout import Groups

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products() -> Iterator[None]:
    """Triton's interpreter holds bfloat16 as bits and multiplies the bits; let it multiply the numbers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)
        )
        yield


def heads(
    d_qk: int, d_vo: int, dtype: torch.dtype, *, kv_len: int, kv_heads: int = 2, group_size: int = 3, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `dtype`; k and v as views of buffers that hold NaN behind them."""
    generator = torch.Generator().manual_seed(d_qk + d_vo + kv_len)
    k, v = (torch.full((batch, kv_heads, kv_len + 5, d), math.nan, dtype=dtype, device=DEVICE) for d in (d_qk, d_vo))
    k, v = k[:, :, :kv_len], v[:, :, :kv_len]
    k.copy_(torch.randn(k.shape, generator=generator))
    v.copy_(torch.randn(v.shape, generator=generator))
    q = torch.randn(batch, kv_heads * group_size, 1, d_qk, generator=generator)
    return q.to(DEVICE, dtype), k, v


def wanted(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    bias = torch.zeros(len(q), 1, k.shape[2], dtype=torch.float64)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, 0].cpu(), -math.inf)
    return reference.attention(*(x.double().cpu() for x in (q, k, v)), scale=scale, bias=bias)


def check(got: Tensor, exact: Tensor, float32: float = 5e-6) -> None:
    eps = 8 * torch.finfo(got.dtype).eps if got.dtype != torch.float32 else float32
    torch.testing.assert_close(got.double().cpu(), exact, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("k_groups", "v_groups"), [(((4, 8), (9, 4), (6, 2)), ((33, 2),)), (((32, 4),), ((7, 8),))])
@pytest.mark.parametrize("masked", [False, True])
def test_codes_are_read_as_they_are(dtype: torch.dtype, k_groups: Groups, v_groups: Groups, masked: bool) -> None:
    codes = Codes(k_groups), Codes(v_groups)
    q, k, v = heads(codes[0].width, codes[1].width, dtype, kv_len=70)
    rows = [x.encode(y.float().cpu()).to(DEVICE) for x, y in zip(codes, (k, v), strict=True)]
    mask = (torch.arange(70) % 3 > 0).expand(2, 1, 1, -1).to(DEVICE) if masked else None
    got = cuda_decode.decode_segment(q, *rows, scale=0.2, mask=mask, codes=codes)[0]
    numbers = [x.decode(y.cpu(), torch.float32) for x, y in zip(codes, rows, strict=True)]
    check(got, wanted(q, *numbers, scale=0.2, mask=mask))


def splitting(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(cuda_decode, "processors", lambda device: processors)


@pytest.mark.parametrize(
    ("d_qk", "d_vo", "dtype", "kv_len"),
    [
        (6, 5, torch.float32, 1),
        (6, 5, torch.float32, 130),
        (16, 48, torch.bfloat16, 130),
        (32, 20, torch.float16, 70),
        (12, 64, torch.float32, 70),
    ],
)
def test_widths_and_dtypes_match_float64_loops(d_qk: int, d_vo: int, dtype: torch.dtype, kv_len: int) -> None:
    q, k, v = heads(d_qk, d_vo, dtype, kv_len=kv_len)
    got = decode_attention(q, k, v, scale=0.4)
    assert got.dtype == dtype and got.shape == (2, 6, 1, d_vo)
    check(got, wanted(q, k, v, scale=0.4))


@pytest.mark.parametrize(("kv_heads", "group_size"), [(3, 1), (1, 17)])
def test_groups_of_any_size_share_a_head(kv_heads: int, group_size: int) -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=20, kv_heads=kv_heads, group_size=group_size, batch=1)
    check(decode_attention(q, k, v, scale=0.4), wanted(q, k, v, scale=0.4))


@pytest.mark.parametrize("shared", [False, True])
def test_padding_unused_room_and_holes_match_float64_loops(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    splitting(monkeypatch, 4)
    q, k, v = heads(6, 5, torch.float32, kv_len=300)
    token = torch.arange(300)
    mask = (token >= torch.tensor([3, 140])[:, None]) & (token < torch.tensor([297, 200])[:, None]) & (token % 7 != 0)
    mask = mask[:1, None, None] if shared else mask[:, None, None]
    got = decode_attention(q, k, v, scale=0.7, mask=mask.to(DEVICE))
    check(got, wanted(q, k, v, scale=0.7, mask=mask.expand(2, -1, -1, -1)))


def test_parts_of_a_context_are_merged_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    splitting(monkeypatch, 3)
    q, k, v = heads(6, 5, torch.float32, kv_len=700, kv_heads=1, batch=1)
    q[:, 0] *= 30  # one head looks at few keys: parts differ by hundreds in their maxima
    mask = torch.ones(1, 1, 1, 700, dtype=torch.bool, device=DEVICE)
    mask[..., 100:400] = False  # a part that isn't seen at all
    assert split(700, 1, 128, DEVICE) == (3, 256)
    got = decode_attention(q, k, v, scale=1.0, mask=mask)
    logits = (q.double().view(1, 1, 3, 6) @ k.double().transpose(-1, -2)).masked_fill(~mask, -math.inf)
    check(got.view(1, 1, 3, 5), (logits.softmax(-1) @ v.double()).cpu(), float32=1e-4)


def test_what_is_not_seen_is_not_read_and_who_sees_nothing_gets_zeros() -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=90)
    q *= 1e4  # large logits must not overflow
    k[:, :, :20] = v[:, :, :20] = k[:, :, 80:] = v[:, :, 80:] = math.nan
    token = torch.arange(90, device=DEVICE)
    mask = ((token >= 20) & (token < 80)).repeat(2, 1)[:, None, None]
    mask[1] = False
    got = decode_attention(q, k, v, scale=1.0, mask=mask)
    assert torch.equal(got[1].cpu(), torch.zeros(6, 1, 5))
    exact = wanted(q[:1], k[:1, :, 20:80], v[:1, :, 20:80], scale=1.0)
    torch.testing.assert_close(got[:1].double().cpu(), exact, rtol=1e-3, atol=1e-4)


def test_tensors_of_any_layout_are_read() -> None:
    q, k, v = heads(6, 5, torch.float32, kv_len=20)
    spread = torch.stack((q, q), dim=-1)[..., 0]  # dims two apart
    flipped = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert spread.stride(-1) == 2 and flipped.stride(-1) != 1
    tokens_first = v.transpose(1, 2).contiguous().transpose(1, 2)
    check(decode_attention(spread, flipped, tokens_first, scale=0.4), wanted(q, k, v, scale=0.4))


@settings(max_examples=200)
@given(length=st.integers(1, 200_000), pairs=st.integers(1, 4096), block=st.sampled_from([16, 32, 64, 128]))
def test_parts_cover_the_context_once(length: int, pairs: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        splitting(patch, 132)
        parts, part = split(length, pairs, block, DEVICE)
    assert 1 <= parts <= cuda_decode.MOST_PARTS and part % block == 0
    assert (parts - 1) * part < length <= parts * part


COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvlatent.kernels import cuda_decode, cuda_kernel
from kvlatent.kernels.codes import Codes

def compiled(kernel, grid, arguments, settings, capability):
    options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
    names, types, divisible = kernel.arg_names, {}, {}
    for index, (name, value) in enumerate(zip(names, arguments)):
        if isinstance(value, torch.Tensor):
            short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "int32": "i32"}
            types[name] = "*" + short[str(value.dtype).removeprefix("torch.")]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and name not in ("length", "part", "mask_row", "parts")):
            divisible[(index,)] = [["tt.divisibility", 16]]
    types |= {name: "constexpr" for name in settings}
    constants = {(names.index(name),): value for name, value in settings.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

class Launch:
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *arguments, **settings: launches.append((self.kernel, grid, arguments, settings))

cuda_kernel.attend, cuda_kernel.merge = Launch(cuda_kernel.attend), Launch(cuda_kernel.merge)
dtype, d_qk, d_vo, masked, batch, capability = json.loads(sys.argv[1])
launches, coded, dtype = [], dtype == "codes", getattr(torch, "bfloat16" if dtype == "codes" else dtype)
codes = [Codes(((16, 8), (d - 48, 4), (32, 2))) for d in (d_qk, d_vo)] if coded else None
widths, held = ([x.row_bytes for x in codes], torch.uint8) if coded else ((d_qk, d_vo), dtype)
k, v = (torch.zeros(batch, 8, 1024, width, dtype=held) for width in widths)
mask = torch.ones(batch, 1, 1, 1024, dtype=torch.bool) if masked else None
cuda_decode.processors = lambda device: 132
q = torch.zeros(batch, 32, 1, d_qk, dtype=dtype)
cuda_decode.decode_segment(q, k, v, scale=0.1, mask=mask, codes=codes)
results = [compiled(*launch, capability) for launch in launches]
print(json.dumps({
    "grids": [launch[1] for launch in launches],
    "shared": [result.metadata.shared for result in results],
    "binary": [len(result.asm["cubin"]) for result in results],
    "matrix_units": "mma.sync" in results[0].asm["ptx"],
    "copies_ahead": "cp.async" in results[0].asm["ptx"],
    "spills": any(".local" in result.asm["ptx"] for result in results),
}))
"""


@pytest.mark.parametrize(
    "case",
    [
        ["bfloat16", 64, 64, True, 1, 90],
        ["codes", 128, 96, True, 1, 90],
        pytest.param(["float16", 32, 96, False, 1, 80], marks=pytest.mark.slow),
        pytest.param(["bfloat16", 16, 48, True, 1, 89], marks=pytest.mark.slow),
        pytest.param(["bfloat16", 128, 128, True, 64, 90], marks=pytest.mark.slow),
        pytest.param(["bfloat16", 192, 168, True, 1, 90], marks=pytest.mark.slow),  # a latent
        pytest.param(["float32", 128, 128, True, 1, 90], marks=pytest.mark.slow),
        pytest.param(["float16", 20, 12, True, 1, 80], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_kernels_compile_for_gpus(case: list[Any], tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, json.dumps(case)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    made = json.loads(out.stdout.splitlines()[-1])
    batch = case[4]  # a large one isn't split, so nothing is merged
    assert made["grids"] == ([[8, 8], [32]] if batch == 1 else [[8 * batch, 1]])
    assert max(made["shared"]) <= 48 * 1024  # fits two to a multiprocessor on every GPU since Ampere
    assert min(made["binary"]) > 0 and (made["copies_ahead"] or case[0] == "codes") and not made["spills"]
    assert made["matrix_units"] == (case[0] != "float32")


@pytest.mark.usefixtures("compilable")
def test_torch_compile_sees_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA is missing the CPU's path stands in, with the Triton kernel behind it."""
    path, home = attention.OWN_KERNELS[DEVICE.type]
    monkeypatch.setattr(home, "available", lambda: True)
    monkeypatch.setitem(attention.PATHS, path, decode_attention)
    q, k, v = heads(6, 5, torch.float32, kv_len=20)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :4] = False
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention.latent_attention(q * 2, k, v, scale=0.4, mask=mask) + 1

    with torch.no_grad():
        got = attend(q, k, v, mask)
    assert [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"] == [
        "<built-in function mul>",
        "kvlatent.decode_attention.default",
        "<built-in function add>",
    ]
    check(got - 1, wanted(q * 2, k, v, scale=0.4, mask=mask))
