"""Dims, bits, or both, at equal bytes: students and quantized caches, judged on average and by far gain.

    python benchmarks/bits.py smollm2 --stats stats.safetensors --held-out package:wikipedia --out bits.jsonl

One shot from statistics of `kvlatent calibrate`, so that a row takes a minute or two. A budget is a share of the bytes
of the 16-bit cache of 8,192 tokens, the window of whole tokens included. `mix` is what `convert --budget` does, `16
bits` spends the budget on dims alone, `4 bits` on dims of so many bits; `kivi 4` is KIVI's quantization
(arXiv:2402.02750) of the teacher's whole heads beside the same window, groups of 128 tokens, scales counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compress.allocation import Allocation
from kvlatent.compress.budget import plan
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.convert import convert
from kvlatent.compress.statistics import Statistics
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.model.cache import cache_bytes
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE
from kvlatent.model.graft import head_dim_of
from kvlatent.model.quantized import QuantizedCache
from kvlatent.model.sizes import counted_context, predicted_cache_bytes, whole_token_bytes

CHUNK = 32
"""Tokens at a time into a quantized cache, so that all but the newest are read back from codes."""


@torch.no_grad()
def quantized_perplexity(model: PreTrainedModel, ids: Tensor, bits: int, text_bytes: int) -> Perplexity:
    """Perplexity through a cache of so many bits."""
    losses = []
    for blocks in ids.split(4):
        cache = QuantizedCache(model.config, bits=bits)
        logits = torch.cat([model(piece, **{CACHE: cache}).logits for piece in blocks.split(CHUNK, dim=1)], dim=1)
        losses.append(F.cross_entropy(logits[:, :-1].float().mT, blocks[:, 1:], reduction="none"))
    return Perplexity(token_nll=torch.cat(losses).double(), bytes=text_bytes)


@torch.no_grad()
def quantized_share(model: PreTrainedModel, bits: int) -> float:
    """Bytes of a quantized cache over those of the teacher's in 16 bits, at the context that budgets count at."""
    config, tokens = model.config, counted_context(model.config)
    cache = QuantizedCache(config, bits=bits)
    for index, layer in enumerate(model.model.layers):
        whole = torch.zeros(1, config.num_key_value_heads, tokens, head_dim_of(config), dtype=torch.bfloat16)
        cache.update(whole, whole, index, layer.self_attn.far_maps().of(torch.bfloat16), None)
    return cache_bytes(cache) / (tokens * whole_token_bytes(config, 2))


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What students in one shot are made of and judged on."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", type=Path, required=True, help="from kvlatent calibrate")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0, help="of the held-out text")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def held_out_text(
    asked: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Int[Tensor, "blocks block_size"], dict[str, Any]]:
    """Blocks to judge on, and what `perplexity` is told of them."""
    text = read_text(
        asked.held_out, tokenizer, tokens=asked.held_out_tokens, block_size=asked.block_size, seed=asked.seed,
        vocab_size=teacher.config.vocab_size,
    )  # fmt: skip
    return text.ids, {"text_bytes": text.bytes, "batch_size": max(1, 2048 // asked.block_size)}


def student_of(teacher: PreTrainedModel, statistics: Statistics, spent: Allocation) -> PreTrainedModel:
    """The teacher with dims and bits as a budget was spent, nothing refitted."""
    return convert(teacher, **spent.reduction, statistics=statistics)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Both measures against bytes, one line per way to spend them."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    average, far = figure.subplots(1, 2, sharex=True)
    names = {
        "mix": "dims and bits (default)",
        "16": "dims only",
        "4": "dims of 4 bits",
        "kivi": "KIVI: whole heads, 4 and 2 bits",
    }
    for kind in ("mix", "16", "4", "kivi"):
        points = sorted(
            (row["share"], row["perplexity_ratio"], row["far_gain_kept"]) for row in rows if row["kind"] == kind
        )
        share, ratio, kept = zip(*points, strict=True)
        style = "o-" if kind == "mix" else "s:" if kind == "kivi" else ".--"
        average.plot(share, ratio, style, label=names[kind])
        far.plot(share, [100 * x for x in kept], style, label=names[kind])
    average.set(
        xscale="log", ylim=(0.995, 1.065), ylabel="perplexity over the teacher's", xlabel="share of the 16-bit cache"
    )
    far.set(xscale="log", ylim=(0, 105), ylabel="far gain kept, %", xlabel="share of the 16-bit cache")
    shares = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for panel in (average, far):
        panel.set_xticks(shares, [f"1/{round(1 / x)}" for x in shares])
        panel.minorticks_off()
    far.legend(frameon=False, loc="lower right")
    figure.savefig(out)


def main() -> None:
    """Measure, and append a line of JSON for every row."""
    parser = arguments(__doc__)
    parser.add_argument("--from-position", type=int, default=1, help="judge the tokens of a block from this one on")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.5, 0.25, 0.125, 0.0625, 0.03125])
    parser.add_argument("--bits", nargs="*", default=["mix", "16", "8", "4", "2"])
    parser.add_argument("--kivi", type=int, nargs="*", default=[4, 2])
    parser.add_argument("--students", nargs="*", default=[], help="folders of students with this window, healed or not")
    parser.add_argument("--figure", type=Path, help="draw all rows of --out")
    asked = parser.parse_args()

    teacher, tokenizer = load_model(asked.model, dtype="float32")
    statistics = load_statistics(asked.stats, teacher.config)
    held_out, settings = held_out_text(asked, teacher, tokenizer)
    first = asked.from_position - 1  # the first token of a block isn't predicted

    def judged(found: Perplexity) -> Perplexity:
        return replace(found, token_nll=found.token_nll[:, first:])

    whole = judged(perplexity(teacher, held_out, **settings))
    near_only = judged(near_only_perplexity(teacher, held_out, **settings))
    context = counted_context(teacher.config)
    original = predicted_cache_bytes(teacher.config, batch=1, tokens=context, element_size=2)

    def share_of(student: PreTrainedModel) -> float:
        return predicted_cache_bytes(student.config, batch=1, tokens=context, element_size=2) / original

    def write(label: str, share: float, found: Perplexity, **more: object) -> None:
        row = {
            "label": label,
            "kind": label.split()[-1 if label[0] == "0" else 0],
            "share": share,
            **scores_of(found, whole, near_only),
            **more,
        }
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{label:16} {share:.4f} {row['perplexity_ratio']:.4f} {row.get('far_gain_kept')}", flush=True)

    write("near only", sum(statistics.near) / context, near_only)
    for budget in asked.budgets:
        for bits in asked.bits:
            try:
                spent = plan(teacher, statistics, budget, bits=None if bits == "mix" else int(bits))
            except UserError as error:
                print(f"{budget:g} {bits}: {error}", flush=True)
                continue
            student = student_of(teacher, statistics, spent)
            found = judged(perplexity(student, held_out, **settings))
            write(f"{budget:g} {bits}", share_of(student), found, expected=spent.expected_loss)
    for folder in asked.students:
        student = load_model(folder, dtype="float32")[0]
        write(folder, share_of(student), judged(perplexity(student, held_out, **settings)))
    for bits in asked.kivi:
        dim = head_dim_of(teacher.config)
        student = convert(teacher, d_qk=dim, d_vo=dim, statistics=statistics)
        found = judged(quantized_perplexity(student, held_out, bits, settings["text_bytes"]))
        write(f"kivi {bits}", quantized_share(student, bits), found)
    if asked.figure is not None:
        rows = [json.loads(line) for line in asked.out.read_text().splitlines()]
        draw([row for row in rows if row["kind"] != "near"], asked.figure)


if __name__ == "__main__":
    main()
