"""Teacher and wanted dims → student, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compress.fill import fill
from kvlatent.compress.in_order import convert_in_order, refits_weights
from kvlatent.compress.planning import Plan, Request, check_source, plan_reduction, reductions, requested
from kvlatent.compress.statistics import Statistics, calibrate, check_far_tokens
from kvlatent.compress.streamed import Stream, kept_statistics, layers_done, visited
from kvlatent.errors import UserError
from kvlatent.kernels.layout import Groups
from kvlatent.model.attention import LatentAttention, attention_of
from kvlatent.model.graft import graft
from kvlatent.model.rope import LatentRotaryEmbedding
from kvlatent.model.spec import Preset


def convert(
    teacher: PreTrainedModel,
    *,
    preset: Preset = "best",
    qk: str | None = None,
    d_qk: int | Sequence[int],
    d_vo: int | Sequence[int],
    heads_per_latent: int | None = None,
    window: int | None = None,
    sinks: int | None = None,
    window_bits: int = 16,
    k_codes: Sequence[Groups] = (),
    v_codes: Sequence[Groups] = (),
    whole_layers: Sequence[int] = (),
    statistics: Statistics | None = None,
    ids: Int[Tensor, "blocks block_size"] | None = None,
    batch_size: int = 4,
    context: int | None = None,
) -> PreTrainedModel:
    """Return a student with d_qk and d_vo dims per head; weights that conversion doesn't touch are the teacher's.

    `paper` needs nothing else. `best` and `portable` need either `statistics` of the teacher (one shot), or text:
    then layers are converted in order on the student's own inputs, maps of queries and keys are refitted on the logits,
    and W_O and the FFN's down projection so that each layer repairs what the earlier ones lost.

    Args:
        teacher: A stock model of a supported family; left as it is.
        preset: The recipe.
        qk: How queries and keys are reduced, one of `methods.METHODS`; None is the preset's default.
        d_qk: Query/key dims per head: one number, or one per layer (`best` only), as `budget.plan` gives them.
        d_vo: Value/output dims per head, likewise.
        heads_per_latent: KV heads that are reduced together and cached as one latent, for the same bytes; None is what
            the statistics are of or `heads_per_latent_of` says if the method can group heads, else 1.
        window: Newest tokens that queries meet whole; None is what the statistics are for or, without them, 128 for
            preset best with method project, as long as any dims are reduced, and 0 for others.
        sinks: First tokens that queries meet whole, likewise; 4 beside a window.
        window_bits: Bits of their numbers beside codes: 16 or 8, as `budget.plan` gives them.
        k_codes: By layer, the dims of a latent's keys and the bits of each, as `budget.plan` gives them; without, far
            tokens are numbers.
        v_codes: Likewise of values.
        whole_layers: Layers that stay the teacher's, as `budget.plan` gives them.
        statistics: From `calibrate`.
        ids: Calibration text as token blocks.
        batch_size: Blocks per forward.
        context: Positions that the blocks are spread over, if more than a block's.

    Raises:
        UserError: Dims the preset or the model doesn't allow, neither statistics nor text where needed, or weights that
            aren't finite.
    """
    request = requested(
        teacher.config, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=heads_per_latent,
        window=window, sinks=sinks, window_bits=window_bits, k_codes=k_codes, v_codes=v_codes,
        whole_layers=whole_layers, statistics=statistics,
    )  # fmt: skip
    return convert_as(request, teacher, statistics=statistics, ids=ids, batch_size=batch_size, context=context)


def convert_as(
    request: Request,
    teacher: PreTrainedModel,
    *,
    statistics: Statistics | None = None,
    ids: Int[Tensor, "blocks block_size"] | None = None,
    batch_size: int = 4,
    context: int | None = None,
    share: bool = False,
    stream: Stream | None = None,
) -> PreTrainedModel:
    """`convert` for a request that is checked already.

    With `share` the student holds the teacher's own tensors where conversion leaves them, for one that is only saved.
    With a `stream` its layers have no weights when they come back: those are in the stream's files.
    """
    check_source(request, given=statistics is not None or ids is not None)
    if ids is not None:
        check_far_tokens(request.near, ids.shape[1])
    check_finite(teacher)
    if request.method.needs_statistics and statistics is None:
        assert ids is not None
        measure = partial(
            calibrate, teacher, ids, batch_size=batch_size, context=context, heads_per_latent=request.heads_per_latent,
            near=request.near, about={}, offloaded=None if stream is None else stream.layers,
        )  # fmt: skip
        statistics = kept_statistics(None if stream is None else stream.work, "calibration", measure)
    plan = plan_reduction(teacher, request, statistics)
    if ids is None or not request.recipe.calibrated:
        return _one_shot(graft(teacher, share=share), plan, statistics, stream)
    student = graft(teacher, share=share and (stream is not None or not refits_weights(teacher.config, plan.spec)))
    return convert_in_order(student, teacher, plan, ids, batch_size, context, stream)


def _one_shot(
    student: PreTrainedModel, plan: Plan, statistics: Statistics | None, stream: Stream | None
) -> PreTrainedModel:
    """Reduce every layer by the teacher's own statistics, or by none; nothing is refitted."""
    spec, done = plan.spec, layers_done(stream, len(student.model.layers))
    for index, layer in enumerate(student.model.layers):
        if index < done:
            continue
        with visited(stream, layer, index):
            if index not in spec.whole_layers and attention_of(layer) is not None:
                whole, stats = layer.self_attn, None if statistics is None else statistics.layers[index]
                layer.self_attn = LatentAttention(student.config, index, whole, spec)
                fill(layer.self_attn, whole, *reductions(plan, index, whole, stats), stats)
            if stream is not None:
                stream.keep(index, layer)
    student.model.rotary_emb = LatentRotaryEmbedding.of(spec, student.config).to(student.device)
    student.config.latent = spec.to_dict()
    return student


def check_finite(teacher: PreTrainedModel) -> None:
    """Raise `UserError` if weights hold NaN or infinity: nothing calibrated on them would mean anything."""
    for name, value in teacher.named_parameters():
        if not value.is_meta and not bool(torch.isfinite(value).all()):
            raise UserError(f"the teacher's {name} holds NaN or infinity")
