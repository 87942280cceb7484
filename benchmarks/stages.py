"""How long stage 1 is worth it: stage 1 against stage 2 at equal tokens and at equal time, from each student of a run.

    kvlatent run recipes/paper/stage1-smollm2.yaml --out RUN
    python benchmarks/stages.py RUN --out stages.jsonl [--cells 0:6144 1536:4608 3072:3072 6144:0] [--plot stages.svg]

A cell is tokens of stage 1 and of stage 2. All cells heal a run's students as they were converted, on the same blocks
in the same order and with the student's own settings in the recipe, and are judged on the run's held-out text. One
JSON line per cell goes to --out as soon as it is measured, with every step's loss; what is there already is not
measured again, nor what the run itself has healed. Time is the process's CPU time, to which other processes add little.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.cli.recipe_file import healing_settings, read_recipe
from kvlatent.cli.run_folder import model_folder
from kvlatent.data.blocks import batch_size_for, load_blocks
from kvlatent.evaluation.config import LEAST_FAR_BLOCK
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.perplexity import perplexity
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.model.checkpoints import load_model
from kvlatent.model.graft import spec_of

CELLS = ("0:20480", "5120:15360", "10240:10240", "15360:5120", "20480:0")


def of_run(run: Path, start: str, first: str) -> dict[str, Any]:
    """What `kvlatent run` has measured of a student's own healing; it doesn't count CPU time."""
    results = json.loads((run / "results.json").read_text())
    return {
        "scores": results["evaluate"]["models"][f"{start}, healed"],
        "cpu_seconds": None,
        "curve": curve_of(model_folder(run, start, first=first)),
    }


def curve_of(folder: Path) -> list[list[Any]]:
    """Stage, tokens and loss of every step of a healing."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[line["stage"], line["tokens"], line["loss"]] for line in lines]


def measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Int[Tensor, "blocks block_size"],
    judge: Callable[[PreTrainedModel], dict[str, Any]],
    config: HealConfig,
) -> dict[str, Any]:
    """Heal a student on the first blocks and judge it."""
    seconds, curve = 0.0, list[list[Any]]()
    if config.stage1_tokens + config.stage2_tokens:
        with tempfile.TemporaryDirectory() as folder:
            work, began = Path(folder, "work"), time.process_time()
            student = heal(student, teacher, ids, work, config)
            seconds = time.process_time() - began
            curve = curve_of(work)
    return {"scores": judge(student), "cpu_seconds": seconds, "curve": curve}


HEADER = """| start | stage 1 | stage 2 | ratio | far gain kept, % | CPU s |
|---|--:|--:|--:|--:|--:|"""


def row(line: dict[str, Any]) -> str:
    """A cell as Markdown."""
    found, far, seconds = line["scores"], "–", line["cpu_seconds"]
    if "far_gain_kept" in found:
        far = f"{100 * found['far_gain_kept']:.1f} ± {100 * found['far_gain_kept_stderr']:.1f}"
    return (
        f"| {line['start']} | {line['stage1']:,} | {line['stage2']:,} "
        f"| {found['perplexity_ratio']:.4f} ± {found['perplexity_ratio_stderr']:.4f} | {far} "
        f"| {'–' if seconds is None else round(seconds)} |"
    )


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
    parser.add_argument("--starts", nargs="+", help="students of the run; default: all that are healed")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--plot", type=Path, help="SVG of the loss curves")
    args = parser.parse_args()
    recipe = read_recipe(args.run / "recipe.yaml")
    starts = args.starts or [student.name for student in recipe.students if student.heal]
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["start"], line["stage1"], line["stage2"]) for line in lines}
    cells = [(start, *map(int, cell.split(":"))) for start in starts for cell in args.cells]
    if missing := [cell for cell in cells if cell not in done]:
        teacher = load_model(recipe.model, device="cpu", dtype="float32")[0]
        ids = load_blocks(args.run / "text" / "training.safetensors").ids
        held_out = load_blocks(args.run / "text" / "held_out.safetensors")
        length = held_out.ids.shape[1]
        sizes: dict[str, Any] = {"text_bytes": held_out.bytes, "batch_size": batch_size_for(length)}
        reference = perplexity(teacher, held_out.ids, **sizes)
        near_only = near_only_perplexity(teacher, held_out.ids, **sizes) if length >= LEAST_FAR_BLOCK else None

        def judge(model: PreTrainedModel) -> dict[str, Any]:
            return scores_of(perplexity(model, held_out.ids, **sizes), reference, near_only)

        for start, stage1, stage2 in missing:
            student = load_model(str(args.run / "students" / start / "start"), device="cpu", dtype="float32")[0]
            spec = spec_of(student)
            assert spec is not None
            settings = healing_settings(recipe, recipe.by_name[start], teacher.config, coded=bool(spec.k_codes))
            if (settings.stage1_tokens, settings.stage2_tokens) == (stage1, stage2):
                found = of_run(args.run, start, recipe.students[0].name)
            else:
                config = replace(settings, stage1_tokens=stage1, stage2_tokens=stage2, save_minutes=1e9)
                found = measure(student, teacher, ids, judge, config)
            lines.append({"start": start, "stage1": stage1, "stage2": stage2, **found})
            with args.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(row(lines[-1]), flush=True)
    print(HEADER, *map(row, lines), sep="\n")
    if args.plot:
        plot(lines, args.plot)


if __name__ == "__main__":
    main()
