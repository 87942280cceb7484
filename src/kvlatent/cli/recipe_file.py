"""A recipe file: what it may hold, and how it is read."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedConfig

from kvlatent.compress.config import ConvertConfig
from kvlatent.compress.methods import PRESETS
from kvlatent.errors import UserError
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


class Student(Entry):
    """Dims of a student, or its budget; without `heal` it is measured as converted."""

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


class Bench(Entry):
    """The workload of the benchmark."""

    context: Count
    batch: Count
    new_tokens: Count


class Generate(Entry):
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
    held_out: Text
    students: dict[Preset, Student] = Field(min_length=1)
    bench: Bench
    generate: Generate

    def conversion(self, preset: Preset) -> ConvertConfig:
        """How a student is converted."""
        student = self.students[preset]
        asked: dict[str, Any] = {
            name: getattr(student, name)
            for name in ("d_qk", "d_vo", "budget", "bits", "heads_per_latent", "window", "sinks")
        }
        if PRESETS[preset].calibrated:
            asked |= {"text": tuple(self.calibration.text), "tokens": self.calibration.tokens}
            asked["block_size"] = self.calibration.block_size or self.block_size
        return ConvertConfig(preset=preset, context=self.context, **asked)

    @model_validator(mode="after")
    def _training_where_healed(self) -> Recipe:
        if self.training is None and any(student.heal for student in self.students.values()):
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
        for key, (where, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
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
    try:
        data = yaml.load(_read_text(path), _PlainLoader)
        return Recipe.model_validate_json(json.dumps(data, default=str))  # where types are exact, but a list is a tuple
    except OSError as error:
        raise UserError(f"can't read recipe {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]") or "the recipe"
        unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        wrong = "unknown entry" if unknown else first["msg"]
        raise UserError(f"{path}: {where}: {wrong}") from None
    except RecursionError:
        raise UserError(f"{path} is not a recipe: its entries are nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # of text that isn't UTF-8, dates, numbers and keys
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


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


def healing_settings(recipe: Recipe, preset: Preset, config: PreTrainedConfig, *, coded: bool) -> HealConfig:
    """The settings of a student's healing, in the recipe's context unless they name their own.

    Args:
        recipe: The recipe.
        preset: The student's.
        config: The teacher's.
        coded: Whether the student's far tokens are codes.

    Raises:
        UserError: A number that can't be.
    """
    changes = recipe.students[preset].heal
    assert changes is not None
    return settings_for(preset, changes, config, coded=coded, context=recipe.context, seed=recipe.seed)
