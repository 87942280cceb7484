"""RoPE and maps of one position on a CPU against the plain operations in float64, and where they are used."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.kernels import cpu_decode, cpu_rotary
from kvlatent.kernels.cpu_rotary import fits, rotate_one
from kvlatent.model.rope import rotate

pytestmark = pytest.mark.skipif(not cpu_decode.available(), reason="no llvmlite, or another OpenMP than GNU's")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wanted(x: Tensor, cos: Tensor, sin: Tensor, index: Tensor | None, reduction: Tensor | None) -> Tensor:
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    if index is not None:
        by_head = index.repeat_interleave(x.shape[1] // len(index), dim=0)
        cos, sin = (part[:, 0][..., by_head].transpose(1, 2) for part in (cos, sin))
    x = rotate(x, cos, sin)
    return x if reduction is None else x @ reduction.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_qk", [None, 6, 8, 104])
@pytest.mark.parametrize("own_frequencies", [False, True])
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (3, 1), (3, 3)])
def test_rotated_and_reduced_heads_match_float64(
    dtype: torch.dtype, d_qk: int | None, own_frequencies: bool, batch: int, angles: int
) -> None:
    x = numbers(batch, 6, 1, 10).to(dtype)
    pairs = 9 if own_frequencies else 5
    cos, sin = (part.to(dtype) for part in (numbers(angles, 1, pairs).cos(), numbers(angles, 1, pairs).sin()))
    index = torch.tensor([[0, 2, 4, 6, 8], [8, 1, 1, 3, 5]]) if own_frequencies else None
    reduction = None if d_qk is None else numbers(6, 10, d_qk).to(dtype)
    got = rotate_one(x, cos, sin, freq_index=index, reduction=reduction)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted(x, cos, sin, index, reduction), rtol=2 * eps, atol=20 * eps)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_heads_shared_among_threads_match_float64(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rotary, "SEVERAL_THREADS", 0)
    x, cos, sin, maps = numbers(2, 7, 1, 16), numbers(2, 1, 8), numbers(2, 1, 8), numbers(7, 16, 12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = rotate_one(x, cos, sin, reduction=maps)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), wanted(x, cos, sin, None, maps), rtol=1e-5, atol=1e-5)


def test_views_are_read_right() -> None:
    projected = numbers(3, 1, 40)
    x = projected.unflatten(-1, (4, 10)).transpose(1, 2)  # as projections give heads
    cos, sin = numbers(3, 2, 5)[:, 1:], numbers(3, 2, 6)[:, 1:, :5]
    torch.testing.assert_close(rotate_one(x, cos, sin).double(), wanted(x, cos, sin, None, None), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_stays_with_torch() -> None:
    x, maps = numbers(2, 4, 1, 8), numbers(4, 8, 4)
    assert fits(x, None) and fits(x, maps)
    assert not fits(numbers(2, 4, 2, 8), None)
    assert not fits(x.clone().requires_grad_(), None)
    assert not fits(x, torch.nn.Parameter(maps))
    assert not fits(x.double(), None)
    assert not fits(x.to("meta"), None)
    with torch.no_grad():
        assert fits(x, torch.nn.Parameter(maps))


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-yarn"])
@pytest.mark.parametrize("preset", ["best", "apart", "portable", "paper"])
@torch.no_grad()
def test_decode_steps_take_it_and_say_what_the_whole_text_says(
    name: str, preset: str, tiny_student: Callable[..., PreTrainedModel], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = rotate_one
    monkeypatch.setattr(cpu_rotary, "rotate_one", lambda x, *rest, **more: (seen.append(1), plain(x, *rest, **more))[1])
    student = tiny_student(name, preset)
    cache = student(ids[:3, :-1], use_cache=True).past_key_values
    assert not seen
    got = student(ids[:3, -1:], past_key_values=cache).logits[:, -1]
    assert len(seen) == 4  # queries and keys of two layers
    torch.testing.assert_close(got, student(ids[:3]).logits[:, -1], rtol=0, atol=1e-4)
