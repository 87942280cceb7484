"""What an evaluation, a benchmark and a generation are asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from kvlatent.compose.config import Keep, PolicyName, check_policy
from kvlatent.errors import UserError
from kvlatent.fields import (
    Memory,
    Model,
    Number,
    Numbers,
    OptionalFolder,
    OptionalNumber,
    OtherModel,
    Sources,
    check_memory,
)

NEAR, SINKS = 128, 4
"""What a teacher without far text sees: so many newest tokens, and the first ones."""
NEAR_ONLY = "teacher, near only"
"""What results and tables call it."""
THRESHOLD = 0.5
"""Nats by which a token's loss must fall when all text is visible, to count as one that needs far text."""
LEAST_FAR_BLOCK = 512
"""Tokens of the shortest blocks on which far text is judged."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How good a model is, and on what that is measured."""

    model: Positional[Model]
    """The model to measure."""
    against: OtherModel = None
    """Another model, such as its teacher, measured on the same text."""
    text: Sources = ()
    """Held-out text: files, folders, package:NAME, hf:ID."""
    tokens: Number = 16384
    """Tokens of text."""
    block_size: Number = 1024
    """Tokens per block; above 512, perplexity is reported by position too."""
    far: bool = False
    """Also judge by the tokens of the text that need more than the newest 128 before them: the share of far gain kept,
    beside the model of --against as the teacher, whole and without far text."""
    joined: bool = False
    """Also measure --text by the protocol of WikiText-2: whole, joined, in its order, in windows of --block-size
    tokens; word_perplexity is lm-eval's."""
    stride: OptionalNumber = None
    """Tokens by which the windows of --joined advance, all before them being context; --block-size by default."""
    diagnose: bool = False
    """Also look for how a model fails, beside that of --against: entropy of attention by layer and head, preference for
    the true order of words, perplexity by source of text."""
    needle: bool = False
    """Ask for a code hidden in 1,024, 2,048 and 4,096 tokens of filler."""
    retrieval: bool = False
    """Ask for the code of one name among many pairs, and among a few in filler; with --against, tested in pairs."""
    retrieval_contexts: Numbers = (1024, 2048, 4096, 8192)
    """Tokens of the prompts of --retrieval; more than the model has positions are left out."""
    trials: Number = 20
    """Prompts of --retrieval for each context and test; each is asked eight questions, or four about needles, and one
    with --policy, which chooses anew for each."""
    tasks: Annotated[tuple[str, ...], arg(metavar="T…", help_behavior_hint="")] = ()
    """Tasks of lm-eval (pip install 'kvlatent[eval]'), by name or .yaml file; with --against, tested in pairs, with the
    share of its score above chance that is kept."""
    limit: OptionalNumber = None
    """Samples of each task, from the first; all of them by default."""
    policy: PolicyName = None
    """Which tokens MODEL's cache keeps of a prompt: answers, and the second half of each block of text, are judged from
    what is left of it; --against keeps all."""
    keep: Keep = None
    """Share of tokens that --policy keeps; of a student with a window, of those beyond window and sinks."""
    out: OptionalFolder = None
    """A new folder for eval.json; interrupted, the same command goes on with what isn't measured yet."""

    def __post_init__(self) -> None:
        if not (self.text or self.needle or self.retrieval or self.tasks):
            raise UserError("nothing to evaluate on: give --text, --needle, --retrieval or --tasks")
        if self.far and self.against is None:
            raise UserError("--far measures what is kept of a teacher's gain; give the teacher with --against")
        if self.far and not self.text:
            raise UserError("--far needs held-out text; give --text")
        if self.far and self.block_size < LEAST_FAR_BLOCK:
            raise UserError(
                f"--far needs text with far tokens: give --block-size of at least {LEAST_FAR_BLOCK}; "
                f"got {self.block_size}"
            )
        if self.joined and not self.text:
            raise UserError("--joined needs held-out text; give --text")
        if self.stride is not None and not (self.joined and 1 <= self.stride <= self.block_size):
            raise UserError(
                f"--stride is of the windows of --joined, between 1 and --block-size, {self.block_size}; "
                f"got {self.stride}{'' if self.joined else ' without --joined'}"
            )
        if self.diagnose and not (self.text and self.against):
            raise UserError("--diagnose compares with a teacher on held-out text; give --text and --against")
        if self.retrieval and not self.retrieval_contexts:
            raise UserError("give at least one of --retrieval-contexts")
        check_policy(self.policy, self.keep)
        whole = {"--tasks": self.tasks, "--diagnose": self.diagnose, "--joined": self.joined}
        if self.policy and (named := [name for name, asked in whole.items() if asked]):
            raise UserError(
                f"{named[0]} takes whole texts in one pass, before a policy acts; leave --policy or {named[0]} out"
            )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What a model costs, and at which workloads that is measured."""

    model: Positional[Model]
    """The model to measure."""
    against: OtherModel = None
    """Another model, such as its teacher, measured in turns with it."""
    context: Numbers = (1024,)
    """Tokens of the prompt; several numbers make a grid."""
    batch: Numbers = (1,)
    """Sequences in a batch; several numbers make a grid."""
    dtypes: Annotated[tuple[Literal["float32", "bfloat16", "float16"], ...], arg(metavar="T…")] = ()
    """Dtypes of the grid; --dtype alone by default."""
    new_tokens: Number = 32
    """Tokens to decode."""
    repeats: Number = 5
    """Measured rounds, after one that isn't counted."""
    synthetic: bool = False
    """Fill the cache with random numbers instead of a prefill, which takes long; there is no TTFT then."""
    own: bool = False
    """Measure the model of --against on kvlatent's cache and attention too."""
    memory: Memory = None
    """Also find the longest context that fits in so much memory, for every batch and dtype, and allocate it."""
    policy: PolicyName = None
    """Which tokens MODEL's cache keeps after the prefill."""
    keep: Keep = None
    """Share of tokens that --policy keeps; of a student with a window, of those beyond window and sinks."""
    out: OptionalFolder = None
    """A new folder for bench.json and bench.html with plots."""

    def __post_init__(self) -> None:
        check_policy(self.policy, self.keep)
        if self.policy and (self.synthetic or self.memory is not None):
            raise UserError(
                "a policy acts after a prefill, which --synthetic and --memory leave out; leave --policy or these out"
            )
        if self.model == self.against and not self.policy:
            raise UserError(f"--against must be another model; got {self.model} twice")
        if self.own and self.against is None:
            raise UserError("--own measures the model of --against on our path; give --against")
        if not (self.context and self.batch):
            raise UserError("give at least one --context and one --batch")
        check_memory(self.memory)


@dataclass(frozen=True, kw_only=True)
class RopePlotConfig:
    """Which rotary frequencies are drawn."""

    model: OtherModel = None
    """A model, or its config.json, whose own frequencies and theta are drawn too."""
    dims: Numbers = (128, 64, 32, 16)
    """Dims per head of plain and frequency-aware RoPE."""
    theta: Annotated[float, arg(metavar="X")] = 10000.0
    """Base of the frequencies, where there is no model."""
    distance: Number = 4096
    """The largest distance, in tokens."""
    out: Annotated[Path, arg(metavar="PLOT")] = Path("rope.png")
    """The plot to write: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        if not self.dims or any(d < 4 or d % 4 for d in self.dims):
            raise UserError(f"--dims are multiples of 4, since the paper's list has quarters; got {list(self.dims)}")
        if not 1 < self.theta <= 10**12:
            raise UserError(f"--theta must be above 1 and at most 1e12; got {self.theta}")
        if not 1 <= self.distance <= 100_000:
            raise UserError(f"--distance must be between 1 and 100,000; got {self.distance}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A prompt, and how far a model continues it."""

    model: Positional[Model]
    """The model that writes."""
    prompt: Annotated[str, arg(metavar="TEXT")]
    """Text to continue."""
    max_new_tokens: Number = 64
    """Most tokens to write."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    policy: PolicyName = None
    """Which tokens the cache keeps after the prompt."""
    keep: Keep = None
    """Share of tokens that --policy keeps; of a student with a window, of those beyond window and sinks."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("the prompt is empty; give at least a word")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        check_policy(self.policy, self.keep)
