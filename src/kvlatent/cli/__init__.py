"""The command line: one dataclass per verb; its fields are the arguments, its `run` calls what does the work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from kvlatent.errors import UserError
from kvlatent.healing.config import Part
from kvlatent.model.spec import QK, Preset

Model = Annotated[str, arg(metavar="MODEL")]
Number = Annotated[int, arg(metavar="N")]
Numbers = Annotated[tuple[int, ...], arg(metavar="N…")]
Context = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's positions)")]
HeadsPerLatent = Annotated[
    int | None, arg(metavar="N", help_behavior_hint="(default: as many as have 256 dims together)")
]
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
        from kvlatent.serving.info import describe

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
    """Calibration text: files, folders, package:NAME, hf:ID[:CONFIG[:SPLIT]]; or teacher, for text that it writes."""
    merge: Annotated[tuple[Path, ...], arg(metavar="STATS…", help_behavior_hint="")] = ()
    """Statistics of other text to merge in, say of shards calibrated in parallel; then --text may be missing."""
    offload: bool = False
    """Load one layer at a time from the model's safetensors, for models larger than memory."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    heads_per_latent: HeadsPerLatent = None
    """KV heads that convert may reduce together."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import calibrate_file

        return calibrate_file(
            self.model, self.out, text=self.text, merge=self.merge, offload=self.offload, tokens=self.tokens,
            block_size=self.block_size, context=self.context, heads_per_latent=self.heads_per_latent,
            **self.common.place(),
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
    heads_per_latent: HeadsPerLatent = None
    """KV heads that are reduced together, as for convert."""
    text: Sources = ("teacher",)
    """Calibration text, as for calibrate."""
    tokens: Number = 4096
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import plan_model

        return plan_model(
            self.model, self.budget, self.out, heads_per_latent=self.heads_per_latent, stats=self.stats,
            text=self.text, tokens=self.tokens, block_size=self.block_size, **self.common.place(),
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
    heads_per_latent: HeadsPerLatent = None
    """KV heads whose keys and values are reduced together and cached as one latent, for the same bytes; 1 keeps heads
    apart. With project and fold only."""
    stats: Annotated[Path | None, arg(metavar="STATS", help_behavior_hint="")] = None
    """Statistics from calibrate, instead of text; with text, only the budget is spent by them."""
    text: Sources = ()
    """Calibration text, as for calibrate; better than statistics, since layers are refitted. Not for paper."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.compress.commands import convert_folder

        budget = 0.5 if self.d_qk is None and self.d_vo is None and self.budget is None else self.budget
        return convert_folder(
            self.model, self.out, preset=self.preset, qk=self.qk, d_qk=self.d_qk, d_vo=self.d_vo, budget=budget,
            heads_per_latent=self.heads_per_latent, stats=self.stats, text=self.text, tokens=self.tokens,
            block_size=self.block_size, context=self.context, **self.common.place(),
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
    """Training text, as for calibrate; of chats, losses are taken on the answers alone."""
    separate_documents: bool = False
    """Keep documents in a block from seeing each other; slower on the CPU."""
    stage1_tokens: Number
    """Tokens of in-layer distillation; 0 leaves it out."""
    stage2_tokens: Number
    """Tokens of end-to-end training; 0 leaves it out."""
    loss: Literal["kl", "ntp", "mix"] = "kl"
    """Stage 2: KL to the teacher, next-token prediction, or both."""
    kl_weight: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 0.5)")] = None
    """Share of the KL in mix."""
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="")] = None
    """Divides both models' logits in the KL."""
    temperature_squared: bool = False
    """Multiply the KL by T², so that its gradients keep their size."""
    teacher_cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Keep the teacher's likeliest tokens there, and use them in stage 2 instead of the teacher."""
    top_k: Number = 64
    """How many of them per position; all others count as one."""
    stream_layers: bool = False
    """Stage 1 one layer after the other, the others off the device and hidden states on disk: the same weights."""
    resume: bool = False
    """Continue the interrupted healing of OUT."""
    held_out: Sources = ()
    """Text to measure perplexity on while training."""
    held_out_tokens: Number = 8192
    """Tokens of that text."""
    eval_tokens: Number = 100_000
    """Training tokens between measurements."""
    track: Annotated[tuple[str, ...], arg(metavar="NAME…", help_behavior_hint="")] = ()
    """Trackers of accelerate to tell of every step, such as tensorboard."""
    train: Annotated[tuple[Part, ...] | None, arg(metavar="PART…", help_behavior_hint="(default: the preset's)")] = None
    """What trains in full: attention, maps, norms."""
    adapters: Literal["merge", "keep", "save"] = "merge"
    """The FFN's LoRA in the end: merged; kept apart in OUT/adapters; or both."""
    lora_rank: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Rank of the FFN's LoRA; 0 leaves the FFN as it is."""
    learning_rate: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Peak learning rate of both stages."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Blocks per forward and process."""
    accumulate: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Forwards per step."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of matrix products; weights stay float32. auto: as accelerate launch says, or bf16 where the hardware has it."""
    block_size: Number = 512
    """Tokens per block."""
    context: Context = None
    """Positions that blocks are spread over: as far as the student will be used."""
    teacher: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: the one in the record)")] = None
    """The model that the student was converted from."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.healing.commands import heal_folder

        names = (
            "stage1_tokens", "stage2_tokens", "loss", "kl_weight", "temperature", "temperature_squared",
            "stream_layers", "lora_rank", "learning_rate", "batch_size", "accumulate", "checkpointing",
            "mixed_precision", "eval_tokens", "train", "adapters", "context",
        )  # fmt: skip
        changes = {name: getattr(self, name) for name in names} | {"stage1_learning_rate": self.learning_rate}
        return heal_folder(
            str(self.student), self.out, text=self.text, block_size=self.block_size, changes=changes,
            teacher=self.teacher, resume=self.resume, cache=self.teacher_cache, top_k=self.top_k,
            separate_documents=self.separate_documents,
            held_out=self.held_out, held_out_tokens=self.held_out_tokens, track=self.track, **self.common.place(),
        )  # fmt: skip

    def how_to_resume(self) -> str:
        from kvlatent.healing.commands import work_folder

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
    """Tokens per block; above 512, perplexity is told by position too."""
    needle: bool = False
    """Ask for a code hidden in 1,024, 2,048 and 4,096 tokens of filler."""
    tasks: Annotated[tuple[str, ...], arg(metavar="T…", help_behavior_hint="")] = ()
    """Tasks of lm-eval (pip install kvlatent[eval]), by name or .yaml file; with --against, tested in pairs."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Samples of each task, from the first; without it, all."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import evaluate_models

        return evaluate_models(
            self.model, against=self.against, text=self.text, tokens=self.tokens, block_size=self.block_size,
            with_needle=self.needle, tasks=self.tasks, limit=self.limit, **self.common.place(),
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        table = _side_by_side(
            result, ("perplexity", "perplexity_stderr", "perplexity_at", "bits_per_byte", "needle", "tasks")
        )
        lines = [
            f"{task} {metric}: {test['difference']:+.4f} ± {test['stderr']:.4f}, p = {test['p_value']:.3g}"
            for task, tests in result.get("paired", {}).items()
            for metric, test in tests.items()
        ]
        return "\n".join((table, *(["", "on the same samples:", *lines] if lines else [])))


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Measure what a model costs: cache bytes, TTFT, TPOT, tokens per second, peak memory."""

    model: Positional[Model]
    """The model."""
    against: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """Another one, say its teacher, measured in turns with it."""
    context: Numbers = (1024,)
    """Tokens of the prompt; several make a grid."""
    batch: Numbers = (1,)
    """Sequences; several make a grid."""
    dtypes: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], arg(metavar="T…")] = ()
    """Dtypes of the grid; without them, --dtype."""
    new_tokens: Number = 32
    """Tokens to decode."""
    repeats: Number = 5
    """Rounds, after one that isn't counted."""
    synthetic: bool = False
    """Fill the cache with random numbers instead of a prefill, which takes long; there is no TTFT then."""
    own: bool = False
    """Measure the model of --against on our own cache and attention too."""
    memory: Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")] = None
    """Also tell the longest context that fits in so much memory, for every batch and dtype, and allocate it."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """A new folder for bench.json and bench.html with plots."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.evaluation.commands import benchmark_models

        place = self.common.place()
        dtypes = self.dtypes or (place.pop("dtype"),)
        return benchmark_models(
            self.model, against=self.against, contexts=self.context, batches=self.batch, dtypes=dtypes,
            new_tokens=self.new_tokens, repeats=self.repeats, synthetic=self.synthetic, own=self.own,
            memory=self.memory, out=self.out, seed=place["seed"], device=place["device"],
        )  # fmt: skip

    def table(self, result: dict[str, Any]) -> str:
        if len(result["rows"]) <= 2:
            keys = ("cache_bytes", "cache_bytes_per_token", "ttft_ms", "tpot_ms", "tokens_per_s", "roofline_share")
            return _side_by_side(result, (*keys, "peak_memory_bytes"))
        from kvlatent.evaluation.report.text import bench_table

        return bench_table(result)


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
        from kvlatent.evaluation.commands import generate_text

        return generate_text(
            self.model, self.prompt, max_new_tokens=self.max_new_tokens, chat=self.chat, **self.common.place()
        )

    def table(self, result: dict[str, Any]) -> str:
        return result["completion"]


@dataclass(frozen=True, kw_only=True)
class Serve(Verb):
    """Serve a model to OpenAI clients: by vLLM if it is installed, otherwise by llama.cpp from an exported GGUF file.

    Ends when interrupted, after the requests in flight. Options not listed here: vllm serve MODEL takes converted
    models too.
    """

    model: Positional[Model]
    """The model."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every interface, without any password."""
    port: Number = 8000
    """Likewise."""
    engine: Literal["auto", "vllm", "llama.cpp"] = "auto"
    """auto takes the first that is installed."""
    context: Context = None
    """Tokens of a request at most, answer included."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.commands import serve_model

        return serve_model(
            self.model, host=self.host, port=self.port, engine=self.engine, context=self.context,
            dtype=self.common.dtype, seed=self.common.seed or 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write a model in a form that engines without kvlatent read; `doctor` says which forms it can take.

    stock: an ordinary Llama, Mistral or Qwen2 folder for transformers, vLLM and SGLang. gguf: one file for llama.cpp.
    """

    model: Positional[Annotated[str, arg(metavar="DIR")]]
    """A converted model; for gguf also a stock one."""
    to: Literal["stock", "gguf", "vllm"]
    """The form; vllm is refused, because vLLM with kvlatent serves the folder as it is."""
    out: Annotated[Path, arg(metavar="PATH")]
    """The new folder, or the new .gguf file."""
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, arg(metavar="T", help_behavior_hint="(default: f16)")
    ] = None
    """Of the matrices in a GGUF file: f32, f16, bf16 or q8_0."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.commands import export_model

        return export_model(self.model, self.out, to=self.to, file_type=self.type, **self.common.place())

    def table(self, result: dict[str, Any]) -> str:
        return _pairs({key: value for key, value in result.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Say for each engine whether a model runs on it here, from which files, with what cache, and why not."""

    model: Positional[Annotated[str, arg(metavar="DIR")]]
    """The model. Its weights are not read."""
    common: OmitArgPrefixes[Common] = field(default_factory=Common)

    def run(self) -> dict[str, Any]:
        from kvlatent.serving.commands import diagnose_model

        return diagnose_model(self.model)

    def table(self, result: dict[str, Any]) -> str:
        lines = []
        for row in result["engines"]:
            found = ", ".join(row["installed"]) or "not installed"
            lines.append(f"{row['engine']} ({found}), {row['reads']}: {'runs' if row['runs'] else 'does not run'}")
            cache = _text(row["cache_bytes_per_token"]) if "cache_bytes_per_token" in row else None
            details = {"cache bytes per token": cache, "why not": row["why_not"], "note": row["note"]}
            lines += [f"  {name}: {value}" for name, value in details.items() if value]
        return "\n".join(lines)


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
        from kvlatent.evaluation.commands import report_runs

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
        from kvlatent.cli import recipe as pipeline

        out = self.out or Path("runs", self.recipe.stem)
        return pipeline.run(self.recipe, out, **(self.common.place() | {"seed": self.common.seed}))

    def table(self, result: dict[str, Any]) -> str:
        from kvlatent.evaluation.report.text import summary_table

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
    "export": Export,
    "doctor": Doctor,
    "serve": Serve,
    "report": Report,
    "run": Run,
}
"""Verbs in the order of the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails at exit
        return 1


def _main(argv: Sequence[str] | None) -> int:
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
    if os.environ.get("RANK", "0") != "0":  # a launcher started several processes: the first one speaks
        return 0
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
