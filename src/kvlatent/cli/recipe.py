"""`run`: a recipe file, and every step from teacher to report in one folder, resumable."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedModel

from kvlatent.cli.recipe_file import Recipe, Sources, healing_settings, read_recipe
from kvlatent.cli.recipe_measures import MEASURES, Measure, Pair
from kvlatent.cli.recipe_sizes import check_policies, check_sizes, named
from kvlatent.cli.run_folder import commit, model_folder, read_json, read_score, write_json, write_score, write_text
from kvlatent.compress.checkpoints import Target, convert_loaded, target_of
from kvlatent.data.blocks import TokenBlocks, batch_size_for, check_held_out, load_blocks, save_blocks
from kvlatent.data.positions import context_of
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.config import LEAST_FAR_BLOCK, NEAR_ONLY
from kvlatent.evaluation.evaluate import scores_of
from kvlatent.evaluation.far import near_only_perplexity
from kvlatent.evaluation.joined import joined_text
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.evaluation.report.page import write_report
from kvlatent.evaluation.report.text import model_card
from kvlatent.fields import given
from kvlatent.files import LEFTOVER, check_regular, discard, sole_writer, sweep
from kvlatent.healing.checkpoint import forget_finished, heal_student, teacher_dtype
from kvlatent.healing.config import HealConfig
from kvlatent.model.checkpoints import (
    environment,
    load_model,
    memory_of,
    pick_device,
    pick_dtype,
    processes,
    record_of,
)
from kvlatent.model.loading import load_config, load_tokenizer, stored_dtype


@dataclass(frozen=True)
class _Step:
    """One thing to do, done when `output` exists."""

    name: str
    output: Path
    act: Callable[[Path], object]
    all_processes: bool = False
    """Whether all processes do it, rather than the first alone."""


def run(
    recipe: Path, out: Path, *, seed: int | None = None, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """Follow a recipe from teacher to report. Steps whose output is in `out` are reused, so it can be interrupted.

    Args:
        recipe: The recipe's file.
        out: The run folder, new or of the same recipe.
        seed: Instead of the recipe's.
        device: For everything.
        dtype: For evaluation, benchmark and generation; conversion and healing compute in float32.

    Returns:
        The content of `results.json`, and the run folder as `out`.

    Raises:
        UserError: The recipe, a model or a text can't be used, or `out` belongs to something else.
        KeyboardInterrupt: Interrupted; running again goes on.
    """
    wanted = read_recipe(recipe)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    return run_recipe(wanted, out, device=device, dtype=dtype)


def run_recipe(wanted: Recipe, out: Path, *, device: str, dtype: str) -> dict[str, Any]:
    """The same for a recipe that was read."""
    config = load_config(wanted.model)
    context_of(config, wanted.context)
    targets = {}
    for name, student in wanted.by_name.items():
        with named(name):
            targets[name] = target_of(config, wanted.conversion(student))
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes
    with sole_writer(out) if first else nullcontext():
        begun = _Run(wanted, out, config, targets, device, dtype)
        memory, element = memory_of(pick_device(device)), getattr(torch, begun.dtype).itemsize
        check_sizes(wanted, config, begun.tokenizer, targets, memory=memory, element_size=element)
        check_policies(wanted, config, targets)
        if first:
            _prepare_folder(wanted, out)
            begun.forget_finished()
        return begun.follow()


PLANNING = "planning"
"""Folder of a run under way, with what the budgets of all its students are spent by."""
LATER: dict[str, tuple[str, ...]] = {
    "held_out": ("text/held_out.safetensors", "evaluate", "diagnose.json", "report.html"),
    **{name: (measure.file, "report.html") for name, measure in MEASURES.items()},
    "title": ("report.html",),
    "base_model": ("report.html",),
    "license": ("report.html",),
}
"""Entries of a recipe that may change in a run, because no student depends on them, and what is done again then."""


def _prepare_folder(recipe: Recipe, out: Path) -> None:
    """Check that the folder is new or of this recipe, and remove what the recipe's changes have made out of date.

    Raises:
        UserError: It belongs to something else.
    """
    stored = out / "recipe.yaml"
    begun = stored.is_file() or (out.is_dir() and all(LEFTOVER.fullmatch(path.name) for path in out.iterdir()))
    if out.exists() and not begun:  # asked before all that is in it is, which may be a home directory
        raise UserError(f"{out} exists and is not a run folder; choose another --out, or remove it")
    if out.is_dir():
        sweep(out)
        check_regular(out)
    if not stored.is_file():
        return
    before = read_recipe(stored)
    changed = [name for name in Recipe.model_fields if getattr(before, name) != getattr(recipe, name)]
    if early := [name for name in changed if name not in LATER]:
        raise UserError(f"{out} holds a run of another recipe ({', '.join(early)}); choose another --out, or remove it")
    for old in [out / path for name in changed for path in LATER[name]]:
        discard(old, of=old)
    if changed:
        _write_recipe(recipe, stored)  # last: until then a run that was killed finds the changes again


def _write_recipe(recipe: Recipe, path: Path) -> None:
    data = recipe.model_dump(mode="json", exclude_none=True)
    write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


class _Run:
    """A run under way: the recipe, its folder, and the teacher once it is needed."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        config: PreTrainedConfig,
        targets: dict[str, Target],
        device: str,
        dtype: str,
    ) -> None:
        self.recipe, self.out, self.config, self.targets = recipe, out, config, targets
        self.students, self.first = recipe.by_name, recipe.students[0].name
        self.context = context_of(config, recipe.context)
        self.device = device
        self.group = processes(pick_device(device))
        self.dtype = str(pick_dtype(dtype, pick_device(device))).removeprefix("torch.")
        self.tokenizer = load_tokenizer(recipe.model)
        self.kept: tuple[tuple[str, str], PreTrainedModel] | None = None

    def _load(self, model: str, dtype: str) -> PreTrainedModel:
        return load_model(model, device=self.device, dtype=dtype)[0]

    def load(self, model: str, dtype: str) -> PreTrainedModel:
        """A model, kept until another one or another dtype is needed, which then finds its memory free."""
        if self.kept is None or self.kept[0] != (model, dtype):
            self.kept = None
            self.kept = (model, dtype), self._load(model, dtype)
        return self.kept[1]

    def teacher(self, dtype: str = "float32") -> PreTrainedModel:
        """The teacher, as `load` keeps it."""
        return self.load(self.recipe.model, dtype)

    def forget_finished(self) -> None:
        """Remove the work folders of healings that are done; a kill may have come before that."""
        for name in self._healed():
            forget_finished(self.final(name))

    def follow(self) -> dict[str, Any]:
        """Do every step that isn't done yet."""
        *steps, last = self.steps()
        new = False
        for number, step in enumerate((*steps, last), 1):
            self.group.wait_for_everyone()
            done = step.output.exists() and not (step is last and new)
            self.group.wait_for_everyone()  # before anybody makes it
            if self.group.is_main_process:
                place = f"[{number}/{len(steps) + 1}] {step.name}"
                print(f"{place}: reused" if done else place, file=sys.stderr)
            if not done:
                self._do(step)
                new = True
        self.group.wait_for_everyone()
        if self.group.is_main_process:
            discard(self.out / PLANNING, of=self.out / PLANNING)
        return {"out": str(self.out), **read_json(self.out / "results.json", dict[str, Any])}

    def _do(self, step: _Step) -> None:
        clock = self.out / "seconds.json"
        began = time.monotonic()
        try:
            if step.all_processes or self.group.is_main_process:
                step.act(step.output)
        finally:  # an interrupted step adds up over its sessions
            if clock.parent.is_dir() and self.group.is_main_process:
                seconds = read_json(clock, dict[str, float]) if clock.is_file() else {}
                seconds[step.name] = seconds.get(step.name, 0.0) + time.monotonic() - began
                write_json(clock, seconds)

    def start(self, name: str) -> Path:
        """The folder of a student before healing."""
        if self.students[name].heal is None:
            return self.final(name)
        return self.out / "students" / name / "start"

    def final(self, name: str) -> Path:
        """The folder of a finished student."""
        return model_folder(self.out, name, first=self.first)

    @property
    def judges_far(self) -> bool:
        """Whether blocks of held-out text are long enough to judge by far text too."""
        return (self.recipe.held_out.block_size or self.recipe.block_size) >= LEAST_FAR_BLOCK

    def evaluations(self) -> dict[str, Path]:
        """Where the score of each label is kept."""
        labels = ["teacher", *([NEAR_ONLY] if self.judges_far else [])]
        for name, student in self.students.items():
            labels += [f"{name}, no training", *([f"{name}, healed"] if student.heal else ())]
        return {label: self.out / "evaluate" / f"{label.replace(', ', '-').replace(' ', '-')}.json" for label in labels}

    def steps(self) -> list[_Step]:
        """Everything there is to do, in order."""
        scores, folder = self.evaluations(), self.out / "text"

        def evaluate(label: str, model: str) -> _Step:
            return _Step(f"evaluate {label}", scores[label], partial(self._evaluate, model))

        steps = [
            _Step("text", folder / "held_out.safetensors", self._text),
            evaluate("teacher", self.recipe.model),
        ]
        if self.judges_far:
            near_only = partial(self._evaluate, self.recipe.model, measure=near_only_perplexity)
            steps.append(_Step(f"evaluate {NEAR_ONLY}", scores[NEAR_ONLY], near_only))
        for name, student in self.students.items():
            start, final = self.start(name), self.final(name)
            steps.append(_Step(f"convert {name}", start, partial(self._convert, name)))
            steps.append(evaluate(f"{name}, no training", str(start)))
            if student.heal is not None:
                steps.append(_Step(f"heal {name}", final, partial(self._heal, name), all_processes=True))
                steps.append(evaluate(f"{name}, healed", str(final)))
        steps += [
            _Step(name, self.out / measure.file, partial(self._measure, measure))
            for name, measure in self.measures().items()
        ]
        return [*steps, _Step("report", self.out / "report.html", self._report)]

    def measures(self) -> dict[str, Measure]:
        """What the recipe asks for beside perplexity."""
        return {name: measure for name, measure in MEASURES.items() if getattr(self.recipe, name)}

    def _text(self, held_out_file: Path) -> None:
        """Make all text before anything else, and the run folder only once it is there and disjoint."""
        recipe = self.recipe

        def read(sources: Sources, tokens: int, seed: int, *, held_out: bool = False) -> TokenBlocks:
            return read_text(
                sources.text, self.tokenizer, tokens=tokens, block_size=sources.block_size or recipe.block_size,
                seed=seed, vocab_size=self.config.vocab_size, teacher=None if held_out else self.teacher,
            )  # fmt: skip

        def made(name: str, sources: Sources, tokens: int, seed: int) -> TokenBlocks:
            """What students have learnt from already stays, also if its source has changed since."""
            there = (self.out / "text" / f"{name}.safetensors").is_file()
            return self._blocks(name) if there else read(sources, tokens, seed)

        held_out = read(recipe.held_out, recipe.held_out.tokens, recipe.seed, held_out=True)
        used = {"calibration": made("calibration", recipe.calibration, recipe.calibration.tokens, recipe.seed)}
        if recipe.training is not None and (tokens := self._training_tokens(recipe.training)):
            # Another order than calibration's, so that healing sees other text of the same sources.
            used["training"] = made("training", recipe.training, tokens, recipe.seed + 1)
        judged = [held_out]
        if recipe.joined is not None:
            judged.append(joined_text(recipe.joined.text, self.tokenizer, vocab_size=self.config.vocab_size).blocks)
        for blocks_used in used.values():
            for text in judged:
                check_held_out(blocks_used.fingerprints, text)
        _write_recipe(recipe, self.out / "recipe.yaml")
        write_json(self.out / "record.json", environment() | {"commit": commit()})
        for name, blocks_used in used.items():
            save_blocks(blocks_used, self.out / "text" / f"{name}.safetensors")
        save_blocks(held_out, held_out_file)

    def _training_tokens(self, training: Sources) -> int:
        """Tokens of the longest healing; every student reads them from the first."""
        block_size = training.block_size or self.recipe.block_size
        counts = [self._settings(name).blocks(block_size, self.group.num_processes) for name in self._healed()]
        return max(counts, default=0) * block_size

    def _healed(self) -> list[str]:
        return [name for name, student in self.students.items() if student.heal is not None]

    def _settings(self, name: str) -> HealConfig:
        return healing_settings(self.recipe, self.students[name], self.config, coded=self.targets[name].coded)

    def _blocks(self, name: str) -> TokenBlocks:
        return load_blocks(self.out / "text" / f"{name}.safetensors")

    def _convert(self, name: str, out: Path) -> None:
        target = self.targets[name]
        convert_loaded(
            self.teacher(), self.tokenizer, out, target, name=self.recipe.model,
            blocks=self._blocks("calibration") if target.asked.text else None,
            dtype=stored_dtype(self.config, "auto"), planning=self.out / PLANNING,
        )  # fmt: skip

    def _heal(self, name: str, out: Path) -> None:
        teacher = self.teacher(teacher_dtype(self.device))
        heal_student(
            str(self.start(name)), out, teacher=teacher, blocks=self._blocks("training"),
            settings=self._settings(name), asked=given(self.students[name].heal),
            device=self.device, dtype=stored_dtype(self.config, "auto"),
        )  # fmt: skip

    def _evaluate(self, model: str, out: Path, *, measure: Callable[..., Perplexity] = perplexity) -> None:
        held_out = self._blocks("held_out")
        check_held_out(record_of(model).get("fingerprints", ()), held_out)
        settings: dict[str, Any] = {"text_bytes": held_out.bytes, "batch_size": batch_size_for(held_out.ids.shape[1])}
        policy, is_teacher = self.recipe.held_out.asked_policy, model == self.recipe.model
        if policy is not None and not is_teacher:
            settings["policy"] = policy
        score = measure(self.load(model, self.dtype), held_out.ids, **settings)
        write_score(out, score.of_second_half() if policy is not None and is_teacher else score)

    def _measure(self, measure: Measure, out: Path) -> None:
        student = str(self.final(self.first))
        models = {"teacher": self.teacher(self.dtype), "student": self._load(student, self.dtype)}
        pair = Pair(self.recipe, models, self.tokenizer, self._blocks("held_out"), student)
        write_json(out, measure.act(pair))

    def _report(self, out: Path) -> None:
        """Write results, metrics, the student's model card and the page."""
        results = self._results()
        write_json(self.out / "results.json", results)
        for name in self._healed():
            target = "metrics.jsonl" if name == self.first else f"metrics-{name}.jsonl"
            shutil.copyfile(self.final(name) / "metrics.jsonl", self.out / target)
        about = {"base_model": self.recipe.base_model, "license": self.recipe.license}
        write_text(self.final(self.first) / "README.md", model_card(results | about, results["spec"]))
        write_report([self.out], out)

    def _results(self) -> dict[str, Any]:
        scores = {label: read_score(path) for label, path in self.evaluations().items()}
        teacher, near_only = scores["teacher"], scores.get(NEAR_ONLY)
        models = {label: scores_of(score, teacher, near_only) for label, score in scores.items()}
        held_out = self._blocks("held_out")
        measured = {name: read_json(self.out / each.file, each.kind) for name, each in self.measures().items()}
        bench, generations = measured.pop("bench"), measured.pop("generate")
        return {
            "title": self.recipe.title,
            "model": self.recipe.model,
            "record": read_json(self.out / "record.json", dict[str, Any]),
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "seconds": read_json(self.out / "seconds.json", dict[str, float]),
            "evaluate": {
                "text": list(held_out.sources),
                "tokens": held_out.ids.numel(),
                "bytes": held_out.bytes,
                "models": models,
            },
            **measured,
            "bench": {"rows": bench},
            "generations": generations,
            "spec": load_config(str(self.final(self.first))).latent,
        }
