"""What a decode step does between its linear layers and its caches, on a CPU, in one call each.

One row per sequence and head is rotated, taken to latents and back: arithmetic of microseconds, of which a call of an
operator costs several.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlatent.kernels.cpu_decode import SINGLE_THREAD_BYTES, attend_at, available
from kvlatent.kernels.cpu_linear import MOST_ROWS
from kvlatent.kernels.layout import Layout

LANES = 8
"""Numbers of a vector; fewer are left to torch."""
PLAIN = Tensor, nn.Parameter


def fits(x: Tensor, *others: Tensor) -> bool:
    """Whether rows of one token (batch, heads, 1, dim) can be taken here: float32 on a CPU, no gradients, no trace."""
    if torch.is_grad_enabled() or x.shape[2] != 1 or x.shape[0] > MOST_ROWS or not x.is_cpu or type(x) is not Tensor:
        return False
    for y in others:
        if y.dtype != torch.float32 or y.shape[-1] < LANES or type(y) not in PLAIN:
            return False
    plain = x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return plain and not torch.is_autocast_enabled("cpu") and available()


def turned_rows(
    q: Float[Tensor, "batch q_heads 1 dim"], k: Float[Tensor, "batch k_heads 1 dim"], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys, of a dim that is a multiple of 16, rotated by cos and sin (batch or 1, 1, dim / 2)."""
    from kvlatent.kernels.cpu_step_kernel import build_turn

    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    made = torch.empty_like(q), torch.empty_like(k)
    half = q.shape[3] // 2
    call = (
        q.data_ptr(), k.data_ptr(), made[0].data_ptr(), made[1].data_ptr(), cos.data_ptr(), sin.data_ptr(),
        half if len(cos) > 1 else 0, q.shape[1], k.shape[1], half, len(q), 0,
    )  # fmt: skip
    build_turn()(call, 1)
    return made


def mapped_rows(
    x: Float[Tensor, "batch heads 1 inputs"], maps: Float[Tensor, "heads inputs outputs"]
) -> Float[Tensor, "batch heads 1 outputs"]:
    """Every head's row times its own map; at least `LANES` outputs."""
    x, maps = x.contiguous(), maps.contiguous()
    out = torch.empty(len(x), len(maps), 1, maps.shape[2])
    _products(x.data_ptr(), maps, len(x), out.data_ptr())
    return out


def attend(
    q: Float[Tensor, "batch heads 1 dim"],
    near: tuple[Tensor, Tensor, Tensor | None],
    far: tuple[Tensor, Tensor, Tensor | None],
    maps: tuple[Float[Tensor, "heads dim latent"], Float[Tensor, "heads latent_v dim"]],
    *,
    scale: float,
    bias: Float[Tensor, "heads 1"] | None,
    codes: tuple[Layout, Layout] | None,
    means: tuple[Tensor, Tensor] | None,
    near_codes: tuple[Layout, Layout] | None = None,
) -> Float[Tensor, "batch heads 1 dim"]:
    """Attend to keys and values of which the far ones are met through maps of queries and of outputs.

    Args:
        q: Rotated queries.
        near: Keys, values and what is visible of them, as `cpu_decode.decode_segment` takes them.
        far: Those of latents, or their codes.
        maps: To latents, and back.
        scale: Logit multiplier.
        bias: Of the far logits.
        codes: What rows of latents are, if not numbers.
        means: What was taken from latents before they became codes.
        near_codes: What rows of near keys and values are, if not numbers.
    """
    q, to_latents, back = q.contiguous(), maps[0].contiguous(), maps[1].contiguous()
    batch, heads, _, dim = q.shape
    latent, latent_v = to_latents.shape[2], back.shape[1]
    rows = batch * heads
    space = torch.empty(rows * (latent + dim + latent_v + 4))
    absorbed = space.data_ptr()
    near_out = absorbed + 4 * rows * latent
    far_out = near_out + 4 * rows * dim
    near_sums = far_out + 4 * rows * latent_v
    far_sums = near_sums + 8 * rows
    out, bias = torch.empty_like(q), _zeros(heads) if bias is None else bias
    attend_at(q.data_ptr(), heads, near[0], near[1], scale, near[2], near_codes, None, near_out, near_sums)
    _products(q.data_ptr(), to_latents, batch, absorbed)
    attend_at(absorbed, heads, far[0], far[1], scale, far[2], codes, means, far_out, far_sums)
    _products(far_out, back, batch, out.data_ptr(), (near_out, near_sums, far_sums, bias.data_ptr()))
    return out


@cache
def _zeros(heads: int) -> Tensor:
    return torch.zeros(heads)


def _products(x: int, maps: Tensor, batch: int, out: int, merging: tuple[int, ...] = ()) -> None:
    """Rows at an address times maps to another; merging, what they give is that of far tokens."""
    from kvlatent.kernels.cpu_step_kernel import build_maps

    heads, inputs, outputs = maps.shape
    threads = torch.get_num_threads() if maps.nbytes >= SINGLE_THREAD_BYTES else 1
    call = x, maps.data_ptr(), out, heads, inputs, outputs, *merging, heads, 0
    build_maps(batch, outputs // LANES, bool(merging))(call, threads)
