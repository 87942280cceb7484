"""From a request to a plan: what is checked without weights, what holds for all layers, and each layer's maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compress.maps import QKReduction, VOReduction, stride_channels
from kvlatent.compress.method import Decision, Heads, Layer, Method
from kvlatent.compress.methods import PRESETS, Recipe
from kvlatent.compress.methods.stride import STRIDE
from kvlatent.compress.statistics import LayerStatistics, Statistics
from kvlatent.compress.values import value_output_svd, value_stride
from kvlatent.errors import UserError
from kvlatent.kernels.layout import Groups
from kvlatent.model.attention import LatentAttention
from kvlatent.model.families import linear_layers, norms_heads, turns_alike
from kvlatent.model.graft import check_teacher, head_dim_of, heads_per_latent_of, identity_spec
from kvlatent.model.sizes import layer_caches
from kvlatent.model.spec import LatentSpec, Preset, check_dims
from kvlatent.model.window import ALL_FAR, Near

WINDOW = Near(window=128, sinks=4)
"""What a student meets whole by default, where its preset and method can; docs/results.md has the table behind it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A student that can be: preset, method, and dims layer by layer, checked against the teacher's config."""

    preset: Preset
    method: Method
    heads_per_latent: int
    near: Near
    """Tokens met whole."""
    window_bits: int = 16
    """Bits of their numbers."""
    d_qk: tuple[int, ...]
    d_vo: tuple[int, ...]
    k_codes: tuple[Groups, ...] = ()
    v_codes: tuple[Groups, ...] = ()
    whole_layers: tuple[int, ...] = ()
    """Layers that stay the teacher's."""

    @property
    def recipe(self) -> Recipe:
        """What the preset promises."""
        return PRESETS[self.preset]


def requested(
    config: PreTrainedConfig,
    *,
    preset: Preset,
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
) -> Request:
    """Resolve a request; needs no weights, so it can come before loading them.

    Args:
        config: The teacher's.
        preset: The recipe.
        qk: The method; None is the preset's.
        d_qk: One number, or one per layer.
        d_vo: Likewise.
        heads_per_latent: KV heads that are reduced together; None is what the statistics are of or, without them,
            what `heads_per_latent_of` says, and 1 for methods that reduce every head on its own.
        window: Newest tokens met whole; None is what the statistics are for or, without them, that of `WINDOW` if any
            dims are reduced.
        sinks: First tokens met whole, likewise.
        window_bits: Bits of their numbers.
        k_codes: Dims and bits of far tokens' keys by layer, where they are to be codes.
        v_codes: Likewise of values.
        whole_layers: Layers that stay the teacher's, with all dims.
        statistics: Those that layers will be reduced by.

    Raises:
        UserError: A teacher, a method or dims that can't be.
    """
    check_teacher(config)
    layers, head_dim = config.num_hidden_layers, head_dim_of(config)
    keys, values = ((d,) * layers if isinstance(d, int) else tuple(d) for d in (d_qk, d_vo))
    check_dims(head_dim, keys, values)
    linear = linear_layers(config)
    keys, values = (tuple(head_dim if i in linear else d for i, d in enumerate(x)) for x in (keys, values))
    whole_layers = sorted({*whole_layers, *linear})
    k_codes, v_codes = (tuple(() if i in linear else x for i, x in enumerate(codes)) for codes in (k_codes, v_codes))
    recipe = PRESETS[preset]
    method = method_of(preset, qk)
    if len(keys) != layers:
        raise UserError(f"d_qk and d_vo must name every one of {layers} layers; got {len(keys)} entries")
    if recipe.uniform and len({*zip(keys, values, strict=True)}) > 1:
        raise UserError(f"preset {preset} has the same dims in every layer; different ones need preset best")
    if method.one_frequency_list and len(set(keys)) > 1:
        raise UserError(f"{method.name} has one frequency list, so every layer the same d_qk; got {sorted(set(keys))}")
    if not (method.takes_window or turns_alike(config)):
        raise UserError(
            f"{config.model_type} models don't rotate all dims of all layers by one list of frequencies, so only maps "
            f"after RoPE reduce their keys: take preset best with project, not preset {preset} with {method.name}"
        )
    for d in set(keys):
        method.check(head_dim, d)
    if not recipe.calibrated:
        stride_channels(head_dim, values[0], "d_vo")
    grouped = grouped_heads(config, method, heads_per_latent, statistics)
    if (
        statistics is None and window is None and {*keys, *values} == {head_dim} and not k_codes
    ):  # there is nothing to lose
        window = 0
    near = near_of(preset, method, window, sinks, statistics)
    if k_codes and not near.window:
        raise UserError("far tokens become codes beside a window of whole ones; give --window, or --bits 16")
    if whole_layers:
        check_whole_layers(config, whole_layers, preset, method)
    return Request(
        preset=preset, method=method, heads_per_latent=grouped, near=near, window_bits=window_bits, d_qk=keys,
        d_vo=values, k_codes=tuple(k_codes), v_codes=tuple(v_codes), whole_layers=tuple(whole_layers),
    )  # fmt: skip


def check_whole_layers(config: PreTrainedConfig, whole_layers: Sequence[int], preset: Preset, method: Method) -> None:
    """Raise `UserError` unless a student can leave these layers whole."""
    if not method.takes_window or PRESETS[preset].uniform:
        raise UserError(
            f"preset {preset} with method {method.name} reduces all layers or none: layers are left whole by preset "
            "best with project"
        )
    sliding = {index for index, layer in enumerate(layer_caches(config, 1)) if layer.sliding is not None}
    if sliding & {*whole_layers} not in (set(), sliding):  # whose masks are made once for all of them
        raise UserError("layers with a sliding window are left whole all together, or none of them")


def check_source(request: Request, *, given: bool) -> None:
    """Raise `UserError` if a preset that is calibrated has neither text nor statistics."""
    if request.recipe.calibrated and not given:
        raise UserError(f"preset {request.preset} is calibrated: give text (--text) or statistics (--stats)")


def method_of(preset: Preset, qk: str | None) -> Method:
    """The method that a preset is asked to reduce queries and keys by, or its own.

    Raises:
        UserError: The preset doesn't allow it, or there is none of that name.
    """
    recipe = PRESETS[preset]
    if qk is None:
        return recipe.default
    if qk not in recipe.methods:
        raise UserError(f"preset {preset} can't reduce queries and keys by {qk}; {', '.join(recipe.methods)} can")
    return recipe.methods[qk]


def near_of(
    preset: Preset, method: Method, window: int | None, sinks: int | None, statistics: Statistics | None = None
) -> Near:
    """The tokens that a student meets whole: as asked, or as the statistics are for, or `WINDOW`.

    Raises:
        UserError: The preset or the method has no window, or the statistics are for another one.
    """
    able = method.takes_window and not PRESETS[preset].uniform
    usual = ALL_FAR if not able or window == 0 else WINDOW if statistics is None else statistics.near
    near = Near(usual.window if window is None else window, usual.sinks if sinks is None else sinks)
    if near.window < 0 or near.sinks < 0 or (near.sinks and not near.window):
        raise UserError(
            f"window and sinks are counts of tokens, sinks only beside a window; got {near.window} and {near.sinks}"
        )
    if near.window and not able:
        raise UserError(
            f"preset {preset} with method {method.name} has no window of whole tokens: take preset best with project, "
            "or --window 0"
        )
    if statistics is not None and near != statistics.near:
        raise UserError(
            f"the statistics are for a window of {statistics.near.window} tokens and {statistics.near.sinks} sinks, "
            f"not of {near.window} and {near.sinks}; calibrate with --window {near.window} --sinks {near.sinks}"
        )
    return near


def grouped_heads(
    config: PreTrainedConfig, method: Method, asked: int | None, statistics: Statistics | None = None
) -> int:
    """How many KV heads a method reduces together.

    Raises:
        UserError: The method reduces every head on its own, the model's heads can't be shared so, or the statistics
            are of other groups.
    """
    if asked is None:
        if not method.groups_heads:
            return 1
        return heads_per_latent_of(config) if statistics is None else statistics.heads_per_latent
    if heads_per_latent_of(config, asked) > 1 and not method.groups_heads:
        able = " and ".join(name for name, other in PRESETS["best"].methods.items() if other.groups_heads)
        raise UserError(f"heads share latents with {able} only; {method.name} reduces every head on its own")
    if statistics is not None and asked not in (1, statistics.heads_per_latent):
        raise UserError(
            f"the statistics are of {statistics.heads_per_latent} KV heads per latent, not of {asked}; "
            "calibrate with --heads-per-latent"
        )
    return asked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided for the whole model before its layers are reduced one by one."""

    spec: LatentSpec
    method: Method
    decision: Decision
    recipe: Recipe

    @property
    def refits_logits(self) -> bool:
        """Whether queries and keys lose something that refitting their maps can give back."""
        return min(self.spec.d_qk) < self.spec.head_dim and self.recipe.calibrated


def plan_reduction(teacher: PreTrainedModel, request: Request, statistics: Statistics | None = None) -> Plan:
    """The spec of a request, and what its method decides for all layers together.

    Args:
        teacher: A stock model of a supported family.
        request: From `requested`.
        statistics: Of the whole model, where the method needs them.
    """
    whole, method, recipe = identity_spec(teacher), request.method, request.recipe
    alone = request.heads_per_latent == 1 and not request.near.window
    untouched = min(request.d_qk) == whole.head_dim and alone and method.calibrated
    if untouched:  # all pairs at their own frequencies, for which there is nothing to know
        method = STRIDE
    decision = method.plan(
        Heads(
            config=teacher.config,
            head_dim=whole.head_dim,
            inv_freq=whole.inv_freq,
            d_qk=request.d_qk,
            heads_per_latent=request.heads_per_latent,
            statistics=statistics,
        )
    )
    qk_map = decision.qk_map
    if untouched or (qk_map == "before_rope" and not norms_heads(teacher.config)):
        qk_map = "folded"
    plain = (request.heads_per_latent * request.d_qk[0]) ** -0.5  # to which scales are as the teacher's to its dims'
    spec = replace(
        whole,
        preset=request.preset,
        d_qk=request.d_qk,
        d_vo=request.d_vo,
        heads_per_latent=request.heads_per_latent,
        window=request.near.window,
        sinks=request.near.sinks,
        window_bits=request.window_bits,
        k_codes=request.k_codes,
        v_codes=request.v_codes,
        whole_layers=() if qk_map == "folded" else request.whole_layers,
        inv_freq=decision.inv_freq,
        per_head_frequencies=decision.per_head_frequencies,
        qk_map=qk_map,
        scale=plain * whole.scale * whole.head_dim**0.5 if recipe.uniform else whole.scale,
    )
    return Plan(spec=spec, method=method, decision=decision, recipe=recipe)


def reductions(
    plan: Plan, index: int, whole: LatentAttention, statistics: LayerStatistics | None
) -> tuple[QKReduction, VOReduction]:
    """The head maps of layer `index` under a plan."""
    spec, head_dim = plan.spec, plan.spec.head_dim
    layer = Layer(
        q_heads=whole.q_heads,
        kv_heads=whole.kv_heads,
        head_dim=head_dim,
        d_qk=spec.d_qk[index],
        heads_per_latent=spec.heads_per_latent,
        latent_dims=spec.latent_dims[0][index],
        statistics=statistics,
    )
    qk = plan.method.reduce(layer, plan.decision)
    if not plan.recipe.calibrated:
        return qk, value_stride(head_dim, spec.d_vo[index], kv_heads=whole.kv_heads)
    qk = replace(qk, q_map=qk.q_map * (whole.scale / spec.scale))  # the teacher's logit scale, folded into queries
    assert statistics is not None
    outputs, d_vo = statistics.mean("o", heads_per_latent=spec.heads_per_latent), spec.latent_dims[1][index]
    return qk, value_output_svd(outputs, whole.o_proj.weight, d_vo, kv_heads=whole.kv_heads)
