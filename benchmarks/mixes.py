"""Dims × bits × tokens: what a cache of so many bytes keeps, narrow with all tokens or wider with fewer of them.

    python benchmarks/mixes.py smollm2 --stats stats.safetensors --held-out package:wikipedia --out mixes.jsonl

At every budget, a share of the bytes of the 16-bit cache of 8,192 tokens, the window included, each share of the far
tokens stays by a policy, in a student that is as wide as the budget then allows (one shot from statistics of `kvlatent
calibrate`; dims and bits as `convert --budget` spends them). Judged on text (the first 128 tokens of the second half of
every block, from what is left of the first half: later ones would have far tokens among themselves, which all stay) and
by codes among codes, a question per prompt. `--cells` gives students and policies instead, each `STUDENT:POLICY:KEEP`
or `STUDENT` with all tokens; a student is a budget, or the folder of one with this window, which may be healed. A
budget of 1 is the teacher, which has no window:

    … --cells 1:pyramid-infer:0.5 0.5 0.5:pyramid-infer:0.5 0.25 1:pyramid-infer:0.25 --out table4.jsonl
    … --cells 0.1004:tova:0.25 healed healed:expected-attention:0.25 --out healed.jsonl
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from bits import arguments, held_out_text, student_of
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.compose.policies import policy_of
from kvlatent.compress.bits import bits_of_window
from kvlatent.compress.budget import plan
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.evaluation.config import NEAR
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.evaluation.retrieval import RETRIEVAL_TESTS, retrieval
from kvlatent.model.checkpoints import load_model
from kvlatent.model.graft import head_dim_of
from kvlatent.model.sizes import counted_context, predicted_cache_bytes, window_bytes
from kvlatent.model.spec import near_bytes
from kvlatent.model.window import Near


class Cell(NamedTuple):
    """A student and what it forgets."""

    student: float | str
    """Share of the bytes that it would take with all tokens, 1 for the teacher, or the folder of one."""
    policy: str | None = None
    keep: float | None = None

    def share(self, model: PreTrainedModel, teacher: PreTrainedModel) -> float:
        """Bytes that it takes of the counted context over those of the teacher, both in 16 bits."""
        tokens = counted_context(teacher.config)
        student, whole = (
            predicted_cache_bytes(x.config, batch=1, tokens=tokens, element_size=2) for x in (model, teacher)
        )
        window = window_bytes(model.config, 2)
        return (window + (student - window) * (1.0 if self.keep is None else self.keep)) / whole


def cell_of(text: str) -> Cell:
    """A cell as the command line writes it."""
    student, *policy = text.split(":")
    try:
        of: float | str = float(student)
    except ValueError:
        of = student
    return Cell(of, policy[0], float(policy[1])) if policy else Cell(of)


def cell_for(config: PreTrainedConfig, near: Near, budget: float, policy: str, keep: float) -> Cell | None:
    """The student that takes a budget with a share of its far tokens; None where it would be wider than the teacher."""
    dims, tokens = head_dim_of(config), counted_context(config)
    for bits in (8, 16):
        window = near_bytes(dims, bits, 1, 2) / near_bytes(dims, 16, 1, 2) * sum(near) / tokens
        student = window + (budget - window) / keep
        if window < budget and student < 1 and bits_of_window(config, student, None, near) == bits:
            return Cell(student) if keep == 1 else Cell(student, policy, keep)
    return None


def main() -> None:
    """Measure, and append a line of JSON for every cell."""
    parser = arguments(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125, 0.0625, 0.03125])
    parser.add_argument("--policy", default="expected-attention")
    parser.add_argument("--keep", type=float, nargs="+", default=[1, 0.5, 0.25])
    parser.add_argument("--cells", type=cell_of, nargs="+")
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompts")
    parser.add_argument("--trials", type=int, default=12)
    asked = parser.parse_args()

    teacher, tokenizer = load_model(asked.model, dtype="float32")
    statistics = load_statistics(asked.stats, teacher.config)
    window = sum(statistics.near) / counted_context(teacher.config)
    cells = asked.cells or [
        cell
        for budget in asked.budgets
        for keep in asked.keep
        if (cell := cell_for(teacher.config, statistics.near, budget, asked.policy, keep)) is not None
    ]
    text, sizes = held_out_text(asked, teacher, tokenizer)

    def judged(found: Perplexity) -> Perplexity:
        return replace(found, token_nll=found.token_nll[:, :NEAR])

    whole = judged(perplexity(teacher, text, **sizes).of_second_half())
    near_only = judged(near_only_perplexity(teacher, text, **sizes).of_second_half())

    def write(label: str, share: float, model: PreTrainedModel | None, cell: Cell) -> None:
        row: dict[str, Any] = {"label": label, "share": share, **cell._asdict()}
        if model is None:
            row |= scores_of(near_only, whole, near_only)
        else:
            policy = policy_of(cell.policy, cell.keep)
            found = perplexity(model, text, **sizes, policy=policy)
            row |= scores_of(judged(found if policy else found.of_second_half()), whole, near_only)
            how: dict[str, Any] = {"context": asked.context, "trials": asked.trials, "seed": asked.seed, "questions": 1}
            for test in RETRIEVAL_TESTS:
                row[test] = retrieval(model, tokenizer, test, **how, policy=policy).scores()
        with asked.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        codes = [
            f"{row[test]['exact_match']:.2f} {row[test]['log_probability']:.2f}"
            for test in RETRIEVAL_TESTS
            if test in row
        ]
        print(f"{label:32} {share:.4f} {row['perplexity_ratio']:.4f} {row['far_gain_kept']:.3f}", *codes, flush=True)

    write("near only", window, None, Cell(window))
    write("teacher", 1.0, teacher, Cell(1))
    for cell in cells:
        if cell.student == 1:
            name, model = "teacher", teacher
        elif isinstance(cell.student, str):
            name, model = cell.student, load_model(cell.student, dtype="float32")[0]
        else:
            spent = plan(teacher, statistics, cell.student)
            name, model = f"student of {cell.student:.4f}", student_of(teacher, statistics, spent)
        label = name if cell.policy is None else f"{name}, {cell.policy} {cell.keep:g}"
        write(label, cell.share(model, teacher), model, cell)


if __name__ == "__main__":
    main()
