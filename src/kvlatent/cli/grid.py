"""`sweep`: a recipe whose students come from a grid, run by `recipe.run`, and one table of all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from kvlatent.cli.recipe import run_recipe
from kvlatent.cli.recipe_file import Recipe, Student, read_as
from kvlatent.cli.run_folder import model_folder, write_json, write_text
from kvlatent.errors import UserError
from kvlatent.evaluation.report.pareto import draw, front, markdown
from kvlatent.files import LEFTOVER, replaced, sole_writer
from kvlatent.model.loading import load_config
from kvlatent.model.sizes import cache_parts, counted_context, layer_caches

RUN = "seed-{}"
"""The run folder of a seed."""
OUTPUTS = ("sweep.json", "sweep.md", "sweep.svg")


class Sweep(Recipe):
    """A recipe, and a grid that changes its students."""

    students: list[Student] = Field(default=[Student(name="best")], min_length=1)
    """What the grid changes."""
    grid: dict[str, list[JsonValue]] = Field(min_length=1)
    """Values to try by the name of a student's field, of `heal.` and one of healing's, or of `seed`; null is a default.
    Every student meets every combination."""


def sweep(path: Path, out: Path, *, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Run all students of a grid, a run folder for each seed, and tell which of them none other beats.

    Args:
        path: The recipe's file, with its `grid`.
        out: The folder of the run folders, new or of the same sweep: what is done there is reused.
        device: For everything.
        dtype: For evaluation, benchmark and generation.

    Returns:
        The content of `sweep.json`, and the folder as `out`.

    Raises:
        UserError: As `recipe.run`, or the grid can't be.
        KeyboardInterrupt: Interrupted; running again goes on.
    """
    wanted = read_as(Sweep, path)
    try:
        recipes = list(_recipes(wanted))
    except UserError as error:
        raise UserError(f"{path}: grid: {error}") from None
    first = os.environ.get("RANK", "0") == "0"
    with sole_writer(out) if first else nullcontext():
        _check_folder(out)
        runs = [run_recipe(recipe, out / RUN.format(recipe.seed), device=device, dtype=dtype) for recipe in recipes]
        rows = [_row(student, runs) for student in recipes[0].students]
        for row, best in zip(rows, front(rows), strict=True):
            row["front"] = best
        result = {"title": wanted.title, "model": wanted.model, "grid": wanted.grid, "students": rows}
        if first:
            write_json(out / "sweep.json", result)
            write_text(out / "sweep.md", markdown(wanted.title, rows))
            with replaced(out / "sweep.svg") as partial:
                draw(rows, partial)
    return {"out": str(out), **result}


def _recipes(wanted: Sweep) -> Iterator[Recipe]:
    """The recipe of every seed, with the students of the grid.

    Raises:
        UserError: A field or a value that can't be, or two students of one name.
    """
    grid = dict(wanted.grid)
    if empty := [field for field, values in grid.items() if not values]:
        raise UserError(f"{empty[0]} has no values")
    seeds = grid.pop("seed", [wanted.seed])
    points = list(itertools.product(*grid.values()))
    students = [
        _changed(student, dict(zip(grid, point, strict=True)), named=len(wanted.students) > 1)
        for student in wanted.students
        for point in points
    ]
    names = [student["name"] for student in students]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"there are two students {name}; give each value once")
    shared = wanted.model_dump(mode="json", exclude_none=True, exclude={"grid"})
    if len({*map(str, seeds)}) < len(seeds):
        raise UserError("a seed is given twice")
    for seed in seeds:
        try:
            yield Recipe.model_validate_json(json.dumps(shared | {"seed": seed, "students": students}))
        except ValidationError as error:
            first = error.errors()[0]
            at = first["loc"]
            student = f"{names[int(at[1])]}: " if at[0] == "students" and len(at) > 1 else ""
            where = ".".join(map(str, at[2:] if student else at))
            raise UserError(f"{student}{where}: {first['msg']}") from None


def _changed(student: Student, point: dict[str, Any], *, named: bool) -> dict[str, Any]:
    """A student with the values of a point of the grid, called by them."""
    data = student.model_dump(mode="json", exclude_none=True)
    parts = [student.name] if named else []
    for field, value in point.items():
        *healing, name = field.split(".")
        if healing not in ([], ["heal"]) or name == "name":
            raise UserError(f"{field} is no field of a student")
        inside = data.setdefault("heal", {}) if healing else data
        inside.pop(name, None)
        if value is not None:
            inside[name] = value
        parts.append(f"{name}={'default' if value is None else value}")
    return data | {"name": ",".join(parts) or student.name}


def _check_folder(out: Path) -> None:
    """Raise `UserError` if a folder holds anything that isn't a sweep's."""
    if not out.exists():
        return
    ours = out.is_dir() and all(
        path.name.startswith(RUN.format("")) or path.name in OUTPUTS or LEFTOVER.fullmatch(path.name)
        for path in out.iterdir()
    )
    if not ours:
        raise UserError(f"{out} exists and is not the folder of a sweep; choose another --out, or remove it")


def _row(student: Student, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured of a student: means over seeds, and how far these differ."""
    name, state = student.name, "healed" if student.heal else "no training"
    scores = [run["evaluate"]["models"][f"{name}, {state}"] for run in runs]
    row: dict[str, Any] = student.model_dump(mode="json", exclude_none=True)
    row |= {"share": fmean(_share(run, name) for run in runs), "seeds": len(runs)}
    for key in ("perplexity_ratio", "far_gain_kept"):
        found = [score[key] for score in scores if score.get(key) is not None]
        if found:
            error = stdev(found) if len(found) > 1 else scores[0][f"{key}_stderr"]
            row |= {key: fmean(found), f"{key}_spread": error}
    if student.heal:
        before = [run["evaluate"]["models"][f"{name}, no training"]["perplexity_ratio"] for run in runs]
        row["untrained_perplexity_ratio"] = fmean(before)
    return row


def _share(run: dict[str, Any], name: str) -> float:
    """A student's share of the bytes of its teacher's 16-bit cache, at the context that budgets are counted at."""
    folder = model_folder(Path(run["out"]), name, first=run["recipe"]["students"][0]["name"])
    config, teacher = load_config(str(folder)), load_config(run["model"])
    student, whole = (cache_parts(layer_caches(x, 2), counted_context(teacher))["bytes"] for x in (config, teacher))
    return student / whole
