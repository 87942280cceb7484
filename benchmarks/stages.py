"""How long stage 1 is worth it: stage 1 against stage 2 at equal tokens and at equal time, from each student of a run.

    kvlatent run recipes/paper-vs-best.yaml --out RUN
    python benchmarks/stages.py RUN --out stages.jsonl [--cells 0:6144 1536:4608 3072:3072 6144:0] [--plot stages.svg]

A cell is tokens of stage 1 and of stage 2. All cells of a run heal its unhealed students on the same blocks in the same
order with the same settings, and are judged on its held-out text. One JSON line per cell goes to --out as soon as it is
measured, with every step's loss; what is there already is not measured again. Time is the process's CPU time, to which
other processes add little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from kvlatent.data.blocks import load_blocks
from kvlatent.evaluation.perplexity import compare, perplexity
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.model.checkpoints import load_model

CELLS = ("0:2048", "512:1536", "1024:1024", "0:6144", "1536:4608", "3072:3072", "6144:0")


def measure(start: Path, teacher: Any, ids: Any, judge: Any, stage1: int, stage2: int) -> dict[str, Any]:
    """Heal a start on the first blocks and judge it."""
    student = load_model(str(start), device="cpu", dtype="float32")[0]
    seconds, lines = 0.0, []
    if stage1 + stage2:
        with tempfile.TemporaryDirectory() as folder:
            work, began = Path(folder, "work"), time.process_time()
            config = HealConfig(stage1_tokens=stage1, stage2_tokens=stage2, batch_size=1, save_minutes=1e9)
            student = heal(student, teacher, ids, work, config)
            seconds = time.process_time() - began
            lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    ratio = judge(student)
    curve = [[line["stage"], line["tokens"], line["loss"]] for line in lines]
    return {"ratio": ratio.perplexity_ratio, "stderr": ratio.stderr, "cpu_seconds": seconds, "curve": curve}


def table(lines: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    rows = ["| start | stage 1 | stage 2 | ratio | CPU s |", "|---|--:|--:|--:|--:|"]
    for line in lines:
        rows.append(
            f"| {line['start']} | {line['stage1']:,} | {line['stage2']:,} | {line['ratio']:.3f} ± {line['stderr']:.3f} "
            f"| {line['cpu_seconds']:.0f} |"
        )
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss of stage 2 (KL, mean of two steps) over all tokens healed on, a panel per start."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    starts = sorted({line["start"] for line in lines})
    figure, panels = pyplot.subplots(1, len(starts), figsize=(5 * len(starts), 3.6), squeeze=False, layout="tight")
    for start, panel in zip(starts, panels[0], strict=True):
        for line in lines:
            points = [(tokens, loss) for stage, tokens, loss in line["curve"] if stage == 2]
            if line["start"] != start or len(points) < 2:
                continue
            groups = [points[at : at + 2] for at in range(0, len(points) - 1, 2)]
            x = [line["stage1"] + group[-1][0] for group in groups]
            y = [sum(loss for _, loss in group) / len(group) for group in groups]
            panel.plot(x, y, marker=".", label=f"{line['stage1']:,} + {line['stage2']:,}")
        panel.set(title=f"start: {start}", xlabel="tokens, both stages", ylabel="KL to the teacher, nats")
        panel.set_yscale("log")
        panel.legend(title="stage 1 + stage 2", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure what isn't there, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of `kvlatent run` with unhealed students and their text")
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="STAGE1:STAGE2")
    parser.add_argument("--starts", nargs="+", help="students of the run; default: all")
    parser.add_argument("--held-out-blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--plot", type=Path, help="SVG of the loss curves")
    args = parser.parse_args()
    starts = args.starts or sorted(folder.parent.name for folder in args.run.glob("students/*/start"))
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["start"], line["stage1"], line["stage2"]) for line in lines}
    cells = [(start, *map(int, cell.split(":"))) for cell in args.cells for start in starts]
    if missing := [cell for cell in cells if cell not in done]:
        teacher_name = json.loads((args.run / "students" / starts[0] / "start" / "kvlatent.json").read_text())[
            "teacher"
        ]
        teacher = load_model(teacher_name, device="cpu", dtype="float32")[0]
        ids = load_blocks(args.run / "text" / "training.safetensors").ids
        held_out = load_blocks(args.run / "text" / "held_out.safetensors").ids[: args.held_out_blocks]
        score: dict[str, Any] = {
            "text_bytes": held_out.numel(),
            "batch_size": 2,
        }  # the number of bytes cancels in a ratio
        reference = perplexity(teacher, held_out, **score)
        for start, stage1, stage2 in missing:
            folder = args.run / "students" / start / "start"
            found = measure(folder, teacher, ids, lambda m: compare(reference, perplexity(m, held_out, **score)),
                            stage1, stage2)  # fmt: skip
            lines.append({"start": start, "stage1": stage1, "stage2": stage2, **found})
            with args.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))
    if args.plot:
        plot(lines, args.plot)


if __name__ == "__main__":
    main()
