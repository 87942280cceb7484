"""What a run folder holds: files that are whole or not there, and checked when they are read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from kvlatent.cli.recipe_file import Count, Entry
from kvlatent.errors import UserError
from kvlatent.evaluation.perplexity import MOST_NATS, Perplexity
from kvlatent.files import replaced


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be any bytes


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


Kept = TypeVar("Kept")


def read_json(path: Path, kind: type[Kept]) -> Kept:
    """What `write_json` wrote.

    Raises:
        UserError: It is missing, damaged or of another kind.
    """
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path} is damaged ({reason}); remove it to make it again") from None


class _Score(Entry):
    """A `Perplexity` on disk."""

    token_nll: list[list[Annotated[float, Field(ge=0, le=MOST_NATS)]]] = Field(min_length=1)
    bytes: Count
    first: Count = 1
    kept: dict[str, float] | None = None

    @model_validator(mode="after")
    def _rows_of_one_length(self) -> _Score:
        if len({len(row) for row in self.token_nll}) > 1 or not self.token_nll[0]:
            raise ValueError("token_nll has rows of several lengths, or empty ones")
        return self


def write_score(path: Path, score: Perplexity) -> None:
    """Write a perplexity as JSON, whole or not at all."""
    write_json(path, vars(score) | {"token_nll": score.token_nll.tolist()})


def read_score(path: Path) -> Perplexity:
    """A perplexity that was written as JSON.

    Raises:
        UserError: It is missing or damaged.
    """
    score = read_json(path, _Score)
    return Perplexity(**dict(score) | {"token_nll": torch.tensor(score.token_nll, dtype=torch.float64)})


def model_folder(out: Path, name: str, *, first: str) -> Path:
    """Where a run keeps the final model of a student; that of the first one lies on top."""
    return out / "model" if name == first else out / "students" / name / "model"


def commit() -> str | None:
    """The commit of the checkout this code runs from, if it does."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", here.name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None
