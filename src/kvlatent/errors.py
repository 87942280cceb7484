"""The one exception users see: a clear line and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """The request can't be met; the message names what is wrong and what would be right, in one line."""


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a file, and where in it."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part)[:40] for part in found["loc"][:3])
    return f"{place + ': ' if place else ''}{found['msg']}; got {str(found['input'])[:60]!r}"


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Let imports in the body of a `with` say how to get what is missing; several extras are separated by commas.

    Raises:
        UserError: A package of this extra of ours is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvlatent"):
            raise
        raise UserError(
            f"this needs {(error.name or extra).split('.')[0]}, which is not installed: pip install 'kvlatent[{extra}]'"
        ) from error
