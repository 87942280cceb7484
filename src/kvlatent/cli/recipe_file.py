"""A recipe file: what it may hold, and how it is read."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedConfig

from kvlatent.compose.config import Name, check_policy
from kvlatent.compose.policies import policy_of
from kvlatent.compose.policy import Policy
from kvlatent.compress.config import ConvertConfig
from kvlatent.compress.methods import PRESETS
from kvlatent.errors import UserError
from kvlatent.evaluation.needle import DEPTH_BINS
from kvlatent.fields import LARGEST_SEED
from kvlatent.healing.checkpoint import settings_for
from kvlatent.healing.config import HealChanges, HealConfig
from kvlatent.model.spec import Preset

LARGEST_FILE = 1_000_000
"""Bytes of a recipe; more is something else."""
Count = Annotated[int, Field(gt=0, le=10**12)]


class Entry(BaseModel):
    """What holds the fields it names and no others, each of its own type: `yes` is no number, and none is infinite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Sources(Entry):
    """Text whose length follows from what it is used for."""

    text: list[str] = Field(min_length=1)
    block_size: int | None = Field(default=None, ge=2)
    """Tokens per block, where it is not the recipe's."""


class Text(Sources):
    """Text and how much of it."""

    tokens: Count


class Kept(Entry):
    """The policy that students' caches keep to in a step, as `--policy` and `--keep` of its command."""

    policy: Name | None = None
    keep: float | None = None

    @model_validator(mode="after")
    def _share_of_a_policy(self) -> Kept:
        check_policy(self.policy, self.keep)
        return self

    @property
    def asked_policy(self) -> Policy | None:
        """The policy, if any."""
        return policy_of(self.policy, self.keep)


class HeldOut(Text, Kept):
    """Text that models are judged on."""


class Student(Entry):
    """Dims of a student, or its budget; without `heal` it is measured as converted."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9=,._-]{0,99}$")
    """What results and folders call it; its preset by default."""
    preset: Preset = "best"
    qk: str | None = None
    """How queries and keys are reduced; the preset's own method by default."""
    d_qk: int | None = None
    d_vo: int | None = None
    budget: float | None = None
    """Share of the bytes of a 16-bit cache that is kept."""
    bits: int | None = None
    """Bits of every number of a far token; a mix by default, where a budget is spent beside a window."""
    heads_per_latent: int | None = None
    """KV heads that are reduced together."""
    window: int | None = None
    """Newest tokens met whole; the preset's own by default."""
    sinks: int | None = None
    """First tokens met whole, likewise."""
    heal: HealChanges | None = None
    """What its healing changes of a preset's `HealConfig`."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_preset(cls, data: Any) -> Any:
        return {"name": data.get("preset", "best"), **data} if isinstance(data, dict) else data


class Bench(Kept):
    """The workload of the benchmark."""

    context: Count
    batch: Count
    new_tokens: Count


class Joined(Entry):
    """A whole text, documents joined in their order, in windows, as `eval --joined` measures it."""

    text: list[str] = Field(min_length=1)
    length: Count
    """Tokens of a window."""
    stride: Count | None = None
    """Tokens by which windows advance; their length by default."""

    @model_validator(mode="after")
    def _windows_meet(self) -> Joined:
        if self.stride is not None and self.stride > self.length:
            raise ValueError(f"windows of {self.length} tokens can't advance by {self.stride}")
        return self


class Needle(Kept):
    """A code hidden in filler, as `eval --needle` asks for it, by length of the text and depth in it."""

    contexts: list[Count] = Field(min_length=1)
    """Tokens of the prompts."""
    depths: int = Field(default=DEPTH_BINS, gt=0, le=100)
    """Bins of depth, of equal size."""
    trials: Count
    """Prompts of each length, spread evenly over the depths."""

    @model_validator(mode="after")
    def _each_depth_is_tried(self) -> Needle:
        if self.trials < self.depths:
            raise ValueError(f"every one of {self.depths} depths needs a trial; got {self.trials}")
        return self


class Retrieval(Kept):
    """Codes among many and in filler, as `eval --retrieval` asks for them."""

    contexts: list[Count] = Field(min_length=1)
    """Tokens of the prompts."""
    trials: Count
    """Prompts of each length and test; each is asked eight questions, or four about needles."""


class Tasks(Entry):
    """Tasks of lm-eval, as `eval --tasks` runs them."""

    names: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """By name or .yaml file."""
    limit: Count | None = None
    """Samples of each task, from the first; all of them by default."""


class Generate(Kept):
    """Prompts that teacher and student continue greedily."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    max_new_tokens: Count


class Recipe(Entry):
    """A recipe file. The first student is the one that is measured in full and kept as `model`."""

    title: str
    model: str
    base_model: str | None = None
    """The teacher's name on the hub, for the model card."""
    license: str | None = None
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    block_size: int = Field(default=1024, ge=2, le=10**9)
    context: int | None = None
    """Positions that blocks are spread over; all that the model has by default."""
    calibration: Text
    training: Sources | None = None
    held_out: HeldOut
    students: list[Student] = Field(min_length=1)
    diagnose: bool = False
    """Whether the first student is diagnosed beside the teacher, as `eval --diagnose` does."""
    joined: Joined | None = None
    needle: Needle | None = None
    retrieval: Retrieval | None = None
    tasks: Tasks | None = None
    bench: Bench
    generate: Generate

    @property
    def by_name(self) -> dict[str, Student]:
        """The students, the first one first."""
        return {student.name: student for student in self.students}

    def conversion(self, student: Student) -> ConvertConfig:
        """How a student is converted."""
        asked: dict[str, Any] = {
            name: getattr(student, name)
            for name in ("qk", "d_qk", "d_vo", "budget", "bits", "heads_per_latent", "window", "sinks")
        }
        if PRESETS[student.preset].calibrated:
            asked |= {"text": tuple(self.calibration.text), "tokens": self.calibration.tokens}
            asked["block_size"] = self.calibration.block_size or self.block_size
        return ConvertConfig(preset=student.preset, context=self.context, **asked)

    @model_validator(mode="after")
    def _training_where_healed(self) -> Recipe:
        if self.training is None and any(student.heal for student in self.students):
            raise ValueError("a student is healed, so training: text: is needed")
        return self


class _PlainLoader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, without aliases, by which a small file becomes a large recipe.

    A key may not be given twice: of two, one would count unseen. `1e-4` is a number, as in YAML 1.2.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise UserError(f"recipes have no aliases; there is one in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, (where, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:index]:
                raise UserError(f"{key} is given twice, the second time in line {where.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: It is missing, no YAML, or has a wrong, missing or unknown entry.
    """
    return read_as(Recipe, path)


Read = TypeVar("Read", bound=Recipe)


def read_as(kind: type[Read], path: Path) -> Read:
    """Read a file that is a recipe, or more than one.

    Raises:
        UserError: It is missing, no YAML, or has a wrong, missing or unknown entry, or two students of one name.
    """
    try:
        text = _read_text(path)
        data = yaml.load(text, _PlainLoader)
        recipe = kind.model_validate_json(json.dumps(data, default=str))  # where types are exact, but a list is a tuple
        names = [student.name for student in recipe.students]
        if recipe.diagnose and recipe.held_out.policy:
            line = _line_of(text, ("held_out", "policy"))
            raise UserError(
                f"line {line}: diagnose takes whole texts in one pass, before a policy acts; leave one of both out"
            )
        for index, name in enumerate(names):
            if name in names[:index]:
                line = _line_of(text, ("students", index, "name"))
                raise UserError(f"line {line}: there are two students {name}; give one of them another name")
        return recipe
    except OSError as error:
        raise UserError(f"can't read recipe {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"] if part != "[key]")
        where = ".".join(map(str, place)) or "the recipe"
        unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        wrong = "unknown entry" if unknown else first["msg"]
        raise UserError(f"{path}: line {_line_of(text, place)}: {where}: {wrong}") from None
    except RecursionError:
        raise UserError(f"{path} is not a recipe: its entries are nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # of text that isn't UTF-8, dates, numbers and keys
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _line_of(text: str, place: Sequence[str | int]) -> int:
    """The line of the entry at a place, or of what should hold it."""
    node = yaml.compose(text, _PlainLoader)
    line = 0 if node is None else node.start_mark.line
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                break
            node, line = found[1], found[0].start_mark.line
            continue
        else:
            break
        line = node.start_mark.line
    return line + 1


def _read_text(path: Path) -> str:
    """A small text file as a whole.

    Raises:
        OSError: It can't be read, or is no file.
        UserError: It is too large.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"a recipe is not larger than {LARGEST_FILE / 1e6:.0f} MB")
    return path.read_text(encoding="utf-8")


def healing_settings(recipe: Recipe, student: Student, config: PreTrainedConfig, *, coded: bool) -> HealConfig:
    """The settings of a student's healing, in the recipe's context unless they name their own.

    Args:
        recipe: The recipe.
        student: One of its students that are healed.
        config: The teacher's.
        coded: Whether the student's far tokens are codes.

    Raises:
        UserError: A number that can't be.
    """
    assert student.heal is not None
    return settings_for(student.preset, student.heal, config, coded=coded, context=recipe.context, seed=recipe.seed)
