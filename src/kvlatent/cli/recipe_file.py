"""A recipe file: what it may hold, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from transformers import PreTrainedConfig

from kvlatent.compress.config import ConvertConfig
from kvlatent.compress.methods import PRESETS
from kvlatent.data.positions import context_of
from kvlatent.errors import UserError
from kvlatent.healing.config import HealChanges, HealConfig, settings_for
from kvlatent.model.spec import Preset


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Sources(_Entry):
    """Text whose length follows from what it is used for."""

    text: list[str] = Field(min_length=1)
    block_size: int | None = Field(default=None, ge=2)
    """Tokens per block, where it is not the recipe's."""


class Text(Sources):
    """Text and how much of it."""

    tokens: PositiveInt


class Student(_Entry):
    """Dims of a student, or its budget; without `heal` it is measured as converted."""

    d_qk: int | None = None
    d_vo: int | None = None
    budget: float | None = None
    """Share of the cache bytes that is kept."""
    heads_per_latent: int | None = None
    """KV heads that are reduced together."""
    heal: HealChanges | None = None
    """What its healing changes of a preset's `HealConfig`."""


class Bench(_Entry):
    """The workload of the benchmark."""

    context: PositiveInt
    batch: PositiveInt
    new_tokens: PositiveInt


class Generate(_Entry):
    """Prompts that teacher and student continue greedily."""

    prompts: list[str] = Field(min_length=1)
    max_new_tokens: PositiveInt


class Recipe(_Entry):
    """A recipe file. The first student is the one that is measured in full and kept as `model`."""

    title: str
    model: str
    base_model: str | None = None
    """The teacher's name on the hub, for the model card."""
    license: str | None = None
    seed: int = 0
    block_size: int = Field(default=512, ge=2)
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
            name: getattr(student, name) for name in ("d_qk", "d_vo", "budget", "heads_per_latent")
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML as `safe_load` reads it, except that a key may not be given twice: of two, one would count unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (where, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise UserError(f"{key} is given twice, the second time in line {where.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: It is missing, no YAML, or has a wrong, missing or unknown entry.
    """
    try:
        return Recipe.model_validate(yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys))
    except OSError as error:
        raise UserError(f"can't read recipe {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]") or "the recipe"
        unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        wrong = "unknown entry" if unknown else first["msg"]
        raise UserError(f"{path}: {where}: {wrong}") from None


def healing_settings(recipe: Recipe, preset: Preset, config: PreTrainedConfig) -> HealConfig:
    """The settings of a student's healing, in the recipe's context unless they name their own.

    Raises:
        UserError: A number that can't be.
    """
    changes = recipe.students[preset].heal
    assert changes is not None
    context = context_of(config, recipe.context if changes.context is None else changes.context)
    return settings_for(preset, changes, context=context, seed=recipe.seed)
