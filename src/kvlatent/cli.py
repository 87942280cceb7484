"""The command line: one dataclass per verb; its fields are the arguments, its `run` calls what does the work."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.errors import UserError
from kvlatent.spec import QK, Preset

Model = Annotated[str, arg(metavar="MODEL")]
Number = Annotated[int, arg(metavar="N")]
Folder = Annotated[Path, arg(metavar="DIR")]
Sources = Annotated[tuple[str, ...], arg(metavar="F…", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """MODEL is a hub id, a folder, a .gguf file, or smollm2 (the packaged default)."""

    json: bool = False
    """Print one JSON object on stdout; progress goes to stderr in any case."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0, or the recipe's)")] = None
    """Of everything random."""
    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    """Torch device; auto takes the first accelerator, or the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights used or, for convert and heal, written; auto fits the device or the model read."""

    def place(self) -> dict[str, Any]:
        """Seed, device and dtype, as the verbs' functions take them."""
        return {"seed": self.seed or 0, "device": self.device, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb's arguments."""

    def run(self) -> dict[str, Any]:
        """Do it, and return what --json prints."""
        raise NotImplementedError

    def table(self, result: dict[str, Any]) -> str:
        """What is printed without --json."""
        return _pairs(result)

    def how_to_resume(self) -> str:
        """What to tell who interrupted it."""
        return "nothing was written"


@dataclass(frozen=True, kw_only=True)
class Info(Verb):
    """Show what a model is: family, dims, layout, engines, cache bytes per token. Reads no weights."""

    model: Positional[Model]
    """The model."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import describe

        return describe(self.model)

    def table(self, result: dict[str, Any]) -> str:
        return _pairs({key: _span(value) if key in ("d_qk", "d_vo") else value for key, value in result.items()})


@dataclass(frozen=True, kw_only=True)
class Calibrate(Verb):
    """Run a teacher over text once and save the statistics that conversion needs."""

    model: Positional[Model]
    """The teacher."""
    out: Annotated[Path, arg(metavar="STATS")]
    """The file to write."""
    text: Sources = ()
    """Calibration text: files, folders, package:NAME, hf:ID; or teacher, for text that the teacher writes."""
    merge: Annotated[tuple[Path, ...], arg(metavar="STATS…", help_behavior_hint="")] = ()
    """Statistics of other text to merge in, say of shards calibrated in parallel; then --text may be missing."""
    offload: bool = False
    """Load one layer at a time from the model's safetensors, for models larger than memory."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import calibrate_file

        return calibrate_file(
            self.model, self.out, text=self.text, merge=self.merge, offload=self.offload, tokens=self.tokens,
            block_size=self.block_size, **self.common.place(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan(Verb):
    """Show how a budget would be spent over layers, keys and values, as table and plot. Converts nothing."""

    model: Positional[Model]
    """The teacher."""
    budget: Annotated[float, arg(metavar="SHARE")]
    """The share of the cache bytes to keep."""
    out: Annotated[Path, arg(metavar="PLOT")] = Path("plan.png")
    """The plot to write: .png, .svg or .pdf."""
    stats: Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")] = None
    """Statistics from calibrate; without them, they are taken on text."""
    text: Sources = ("teacher",)
    """Calibration text, as for calibrate."""
    tokens: Number = 4096
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import plan_model

        return plan_model(
            self.model, self.budget, self.out, stats=self.stats, text=self.text, tokens=self.tokens,
            block_size=self.block_size, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        columns = [result[key] for key in ("d_qk", "d_vo", "qk_loss", "vo_loss")]
        lines = ["layer  d_qk  d_vo  loss of keys  loss of values  (each alone, nats per token)"]
        for layer, (d_qk, d_vo, qk, vo) in enumerate(zip(*columns, strict=True)):
            lines.append(f"{layer:5}  {d_qk:4}  {d_vo:4}  {qk:12.4f}  {vo:14.4f}")
        keys = ("budget", "cache_bytes_per_token", "teacher_cache_bytes_per_token", "expected_loss", "uniform_loss")
        return "\n".join([*lines, "", _pairs({key: result[key] for key in (*keys, "out")})])


@dataclass(frozen=True, kw_only=True)
class Convert(Verb):
    """Make a student with fewer dims per head from a teacher."""

    model: Positional[Model]
    """The teacher."""
    out: Folder
    """The new folder."""
    d_qk: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Query/key dims per head; even. Goes with --d-vo."""
    d_vo: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Value/output dims per head. Goes with --d-qk."""
    budget: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(default: 0.5)")] = None
    """Instead of dims: the share of the cache bytes to keep; best spends it layer by layer, as plan shows."""
    preset: Preset = "best"
    """best: what measures best; portable: the same dims and frequencies everywhere; paper: KV-Latent's own recipe."""
    qk: Annotated[QK | None, arg(metavar="METHOD", help_behavior_hint="(default: the preset's)")] = None
    """How queries and keys are reduced: stride, aware, matched, pairs-model, pairs-layer, pairs, partial, fold or
    project (docs/methods.md). The presets take project, fold and aware."""
    stats: Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")] = None
    """Statistics from calibrate, instead of text; with text, only the budget is spent by them."""
    text: Sources = ()
    """Calibration text, as for calibrate; better than statistics, since layers are refitted. Not for paper."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        if (self.d_qk is None) != (self.d_vo is None):
            raise UserError("--d-qk and --d-vo go together; give both, or --budget")
        if self.d_qk is not None and self.budget is not None:
            raise UserError("give either --d-qk and --d-vo or --budget, not both")
        from kvlatent.verbs import convert_folder

        budget = 0.5 if self.d_qk is None and self.budget is None else self.budget
        return convert_folder(
            self.model, self.out, preset=self.preset, qk=self.qk, d_qk=self.d_qk, d_vo=self.d_vo, budget=budget,
            stats=self.stats, text=self.text, tokens=self.tokens, block_size=self.block_size, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        return _pairs({key: _span(value) if isinstance(value, list) else value for key, value in result.items()})


@dataclass(frozen=True, kw_only=True)
class Heal(Verb):
    """Train a student towards its teacher: stage 1 layer by layer, stage 2 end to end.

    The defaults are those of the student's preset.
    """

    student: Positional[Folder]
    """A converted model."""
    out: Folder
    """The new folder."""
    text: Sources
    """Training text, as for calibrate."""
    stage1_tokens: Number
    """Tokens of in-layer distillation; 0 leaves it out."""
    stage2_tokens: Number
    """Tokens of end-to-end training; 0 leaves it out."""
    loss: Literal["kl", "ntp"] = "kl"
    """Stage 2: KL to the teacher, or next-token prediction."""
    resume: bool = False
    """Continue the interrupted healing of OUT."""
    lora_rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Rank of the FFN's LoRA; 0 leaves the FFN as it is."""
    learning_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Peak learning rate of both stages."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Blocks per step."""
    block_size: Number = 512
    """Tokens per block."""
    teacher: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: the one in the record)")] = None
    """The model that the student was converted from."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import heal_folder

        changes = {
            "stage1_tokens": self.stage1_tokens,
            "stage2_tokens": self.stage2_tokens,
            "loss": self.loss,
            "lora_rank": self.lora_rank,
            "learning_rate": self.learning_rate,
            "stage1_learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
        }
        return heal_folder(
            str(self.student), self.out, text=self.text, block_size=self.block_size, changes=changes,
            teacher=self.teacher, resume=self.resume, **self.common.place(),
        )  # fmt: skip

    def how_to_resume(self) -> str:
        from kvlatent.verbs import work_folder

        work = work_folder(self.out)
        if not (work / "state").is_dir():
            return "nothing was saved yet"
        return f"the state is in {work}; run the same command with --resume to go on"


@dataclass(frozen=True, kw_only=True)
class Eval(Verb):
    """Measure a model: perplexity and bits per byte on held-out text, a needle test, lm-eval tasks.

    Text that the model was calibrated or trained on is refused.
    """

    model: Positional[Model]
    """The model."""
    against: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Another one, say its teacher, measured on the same text."""
    text: Sources = ()
    """Held-out text: files, folders, package:NAME, hf:ID."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    needle: bool = False
    """Ask for a code hidden in filler."""
    tasks: Annotated[tuple[str, ...], arg(metavar="T…", help_behavior_hint="")] = ()
    """Tasks of lm-eval (pip install kvlatent[eval]), by name or .yaml file."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import evaluate_models

        return evaluate_models(
            self.model, against=self.against, text=self.text, tokens=self.tokens, block_size=self.block_size,
            with_needle=self.needle, tasks=self.tasks, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        return _side_by_side(result, ("perplexity", "perplexity_stderr", "bits_per_byte", "needle", "tasks"))


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Measure what a model costs: cache bytes, TTFT, TPOT, tokens per second, peak memory."""

    model: Positional[Model]
    """The model."""
    against: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Another one, say its teacher, measured in turns with it."""
    context: Number = 1024
    """Tokens of the prompt."""
    batch: Number = 1
    """Sequences."""
    new_tokens: Number = 32
    """Tokens to decode."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import benchmark_models

        return benchmark_models(
            self.model, against=self.against, context=self.context, batch=self.batch, new_tokens=self.new_tokens,
            **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        keys = ("cache_bytes", "cache_bytes_per_token", "ttft_ms", "tpot_ms", "tokens_per_s", "peak_memory_bytes")
        return _side_by_side(result, keys)


@dataclass(frozen=True, kw_only=True)
class Generate(Verb):
    """Let a model continue a prompt, greedily."""

    model: Positional[Model]
    """The model."""
    prompt: Annotated[str, arg(metavar="P")]
    """What to continue."""
    max_new_tokens: Number = 64
    """Tokens at most."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import generate_text

        return generate_text(
            self.model, self.prompt, max_new_tokens=self.max_new_tokens, chat=self.chat, **self.common.place()
        )

    def table(self, result: dict[str, Any]) -> str:
        return result["completion"]


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write one HTML page with tables and figures about run folders."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN…")]]
    """Folders that run has filled."""
    out: Annotated[Path | None, arg(metavar="PAGE", help_behavior_hint="(default: report.html in the first RUN)")] = (
        None
    )
    """The page to write; replaced if it is there."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.verbs import report_runs

        return report_runs(self.runs, self.out)


@dataclass(frozen=True, kw_only=True)
class Run(Verb):
    """Follow a recipe the whole way: convert, heal, evaluate, bench, generate, report.

    Running it again goes on where it stopped, or prints the results that are there.
    """

    recipe: Positional[Annotated[Path, arg(metavar="RECIPE.yaml")]]
    """The recipe."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/ and the recipe's name)")] = None
    """The run folder."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent import pipeline

        out = self.out or Path("runs", self.recipe.stem)
        return pipeline.run(self.recipe, out, **(self.common.place() | {"seed": self.common.seed}))

    def table(self, result: dict[str, Any]) -> str:
        from kvlatent.report import summary_table

        return f"{summary_table(result)}\n\n{Path(result['out']) / 'report.html'}"

    def how_to_resume(self) -> str:
        return "run the same command again to go on"


VERBS: dict[str, Callable[..., Verb]] = {
    "info": Info,
    "calibrate": Calibrate,
    "plan": Plan,
    "convert": Convert,
    "heal": Heal,
    "eval": Eval,
    "bench": Bench,
    "generate": Generate,
    "report": Report,
    "run": Run,
}
"""Verbs in the order of the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    verb = parse(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print is not the answer
            from transformers.utils import logging

            logging.disable_progress_bar()  # of weight loading; ours stay
            warnings.simplefilter("ignore", FutureWarning)  # libraries about each other
            result = verb.run()
    except UserError as error:
        print(f"kvlatent: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kvlatent: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"kvlatent: interrupted; {verb.how_to_resume()}", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2, ensure_ascii=False) if verb.common.json else verb.table(result))
    return 0


def parse(argv: Sequence[str]) -> Any:
    """The verb that the arguments name; wrong ones end the process with exit code 2, --help with 0."""
    return tyro.extras.subcommand_cli_from_dict(
        VERBS,
        prog="kvlatent",
        description="A smaller KV cache for pretrained LLMs: fewer key and value dims per head, healed and measured.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def help_text(verb: str | None = None) -> str:
    """What `kvlatent [verb] --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse([*([] if verb is None else [verb]), "--help"])
    return text.getvalue()


# --- tables ----------------------------------------------------------------------------------------------------------


def _pairs(values: Mapping[str, Any]) -> str:
    """One line per entry: name, value."""
    rows = [(key.replace("_", " "), _text(value)) for key, value in values.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _side_by_side(result: Mapping[str, Any], keys: Sequence[str]) -> str:
    """One line per quantity: its name, MODEL's value, --against's, and the ratio."""
    models = [result, *([result["against"]] if "against" in result else [])]
    rows = [["", *(str(model["model"]) for model in models), *(["ratio"] if len(models) > 1 else [])]]
    for name, values in _numbers([{key: model[key] for key in keys if key in model} for model in models]).items():
        ratio = [f"{values[0] / values[1]:.4g}"] if len(values) > 1 and values[1] else [""] * (len(values) - 1)
        rows.append([name, *map(_text, values), *ratio])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if at else cell.ljust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _numbers(models: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, list[float]]:
    """Every number that all models have, by its path."""
    found: dict[str, list[float]] = {}
    for key, first in models[0].items():
        values = [model.get(key) for model in models]
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(first, Mapping):
            found |= _numbers([value for value in values if isinstance(value, Mapping)], f"{name} ")
        elif all(isinstance(value, int | float) for value in values):
            found[name] = [float(value) if isinstance(value, float) else value for value in values if value is not None]
    return found


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(item)} ({key})" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _span(values: Sequence[int]) -> str:
    """Dims of the layers: one number where all are the same."""
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
