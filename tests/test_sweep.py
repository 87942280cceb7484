"""A sweep is the students of a grid, run by the same code: named, resumable, told in one table."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_recipe import changed, write

from kvlatent import cli
from kvlatent.cli import grid as sweeping
from kvlatent.cli import recipe as pipeline
from kvlatent.errors import UserError
from kvlatent.evaluation.report.pareto import draw, front, markdown

GRID = {"preset": ["best", "paper"], "budget": [0.5, 0.25], "seed": [0, 1]}


@pytest.fixture(scope="module")
def asked(recipe: dict[str, Any]) -> dict[str, Any]:
    heal = recipe["students"][0]["heal"] | {"stage1_tokens": 0}
    return recipe | {"students": [{"window": 0, "heal": heal}], "grid": GRID}


@pytest.fixture(scope="module")
def done(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweeping.sweep(write(asked, folder / "s.yaml"), folder / "sweep")


NAMES = [f"preset={preset},budget={budget}" for preset in ("best", "paper") for budget in (0.5, 0.25)]


def test_every_point_is_a_student_of_every_seed(done: tuple[Path, dict[str, Any]]) -> None:
    folder, result = done
    assert [row["name"] for row in result["students"]] == NAMES
    assert [row["share"] for row in result["students"]] == [0.5, 0.25, 0.5, 0.25]
    assert json.loads((folder / "sweep" / "sweep.json").read_text()) | {"out": result["out"]} == result
    runs = [json.loads((folder / "sweep" / f"seed-{seed}" / "results.json").read_text()) for seed in (0, 1)]
    assert [run["recipe"]["seed"] for run in runs] == [0, 1]
    for row in result["students"]:
        ratios = [run["evaluate"]["models"][f"{row['name']}, healed"]["perplexity_ratio"] for run in runs]
        assert row["perplexity_ratio"] == pytest.approx(sum(ratios) / 2)
        assert row["perplexity_ratio_spread"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2**0.5)
    table = (folder / "sweep" / "sweep.md").read_text()
    assert table.count("\n| ") == 5 and "standard deviation over 2 seeds" in table
    assert "</svg>" in (folder / "sweep" / "sweep.svg").read_text()


def test_a_sweep_goes_on_where_it_stopped(
    asked: dict[str, Any], done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, result = done
    copy = shutil.copytree(folder / "sweep", tmp_path / "sweep")
    shutil.rmtree(copy / "seed-1" / "students" / NAMES[2])
    (copy / "seed-1" / "report.html").unlink()
    (copy / "sweep.json").unlink()
    converted = []
    convert = pipeline.convert_loaded

    def counted(*arguments: Any, **others: Any) -> Any:
        converted.append(arguments[2])
        return convert(*arguments, **others)

    monkeypatch.setattr(pipeline, "convert_loaded", counted)
    file = write(asked, tmp_path / "s.yaml")
    assert cli.main(["sweep", str(file), "--out", str(copy)]) == 0
    assert converted == [copy / "seed-1" / "students" / NAMES[2] / "start"]
    assert json.loads((copy / "sweep.json").read_text()) | {"out": result["out"]} == result
    assert "| **preset=best,budget=0.5** |" in capsys.readouterr().out
    other = write(changed(asked, "grid.budget", [0.5]), tmp_path / "other.yaml")
    with pytest.raises(UserError, match=r"another recipe \(students\)"):
        sweeping.sweep(other, copy)
    (copy / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        sweeping.sweep(file, copy)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("grid", None, "grid: Field required"),
        ("grid", {}, "grid"),
        ("grid.budget", [], "grid: budget has no values"),
        ("grid.budget", [0.5, 0.5], r"there are two students preset=best,budget=0\.5"),
        ("grid.budget", [0.5, "half"], "preset=best,budget=half: budget: Input should be a valid number"),
        ("grid.colour", ["red"], "preset=best,budget=0.5,colour=red: colour: Extra inputs"),
        ("grid.bench.context", [1], r"bench\.context is no field of a student"),
        ("grid.name", ["x"], "name is no field of a student"),
        ("grid.seed", [0, 0], "a seed is given twice"),
        ("grid.seed", [-1], "grid: seed: Input should be greater"),
        ("grid.heal.lora_rank", [1, None, 65], "lora_rank=65: lora_rank must be at most the 64 dims"),
        ("colour", "red", "colour: unknown entry"),
    ],
)
def test_bad_grids_are_one_line(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, value: Any, said: str
) -> None:
    if path.startswith("grid."):
        wrong = asked | {"grid": GRID | {path.removeprefix("grid."): value}}
    else:
        wrong = changed(asked, path, value)
    file = write(wrong, tmp_path / "bad.yaml")
    with pytest.raises(UserError, match=said):
        sweeping.sweep(file, tmp_path / "out")
    assert cli.main(["sweep", str(file), "--out", f"{tmp_path}/out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_recipe_with_a_grid_is_no_plain_recipe(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grid: unknown entry"):
        pipeline.run(write(asked, tmp_path / "s.yaml"), tmp_path / "run")


POINTS = st.tuples(*[st.sampled_from([0.25, 0.5, 1.0])] * 3)


@given(st.lists(POINTS, min_size=1, max_size=6))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float, float]]) -> None:
    rows = [{"share": s, "perplexity_ratio": r, "far_gain_kept": f} for s, r, f in points]
    for (share, ratio, kept), best in zip(points, front(rows), strict=True):
        beaten = False
        for s, r, f in points:
            no_worse = s <= share and r <= ratio and f >= kept
            beaten |= no_worse and (s < share or r < ratio or f > kept)
        assert best != beaten


def test_far_gain_has_its_column_and_panel(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "share": 0.5, "perplexity_ratio": 1.0, "far_gain_kept": 0.99, "seeds": 1},
        {"name": "b", "share": 0.5, "perplexity_ratio": 40.0, "far_gain_kept": 0.2, "seeds": 1},
    ]
    rows = [row | {"perplexity_ratio_spread": 0.01, "far_gain_kept_spread": 0.02} for row in rows]
    rows = [row | {"front": best} for row, best in zip(rows, front(rows), strict=True)]
    table = markdown("T", rows)
    assert "| 1 | **a** | **0.5000** | **1.0000 ± 0.0100** | **99.0 ± 2.0 %** |" in table
    assert "| 2 | b | 0.5000 | 40.0000 ± 0.0100 | 20.0 ± 2.0 % |" in table and "of one run" in table
    draw(rows, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("far gain kept") == 1
