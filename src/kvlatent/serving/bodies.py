"""What the body of a request may hold, checked before an engine reads it: it dies of nesting and slows down of size.

llama.cpp overflows its stack on deeply nested values and grammars, takes minutes for tens of thousands of messages or
special tokens, and looks ids up wherever they point.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvlatent.errors import UserError, first_error

DEEPEST = 64
"""Lists and objects within each other."""
MOST_VALUES = 2**13
"""Lists, objects and texts in all; of numbers a prompt has as many as tokens."""
MOST_NAMES = 512
"""Entries of an object; of a schema's properties llama.cpp makes a grammar in the square of their number."""
MOST_MESSAGES = 2048
"""Messages of a chat, and parts of a message."""
MOST_REPEATS = 2000
"""What the bounds of a schema's pattern, which multiply, may repeat, and lengths and counts of a schema's values."""
SCHEMAS = ("response_format", "json_schema", "tools")
"""Where a request has schemas, of which llama.cpp makes grammars."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
MOST_SEARCHED = 2**30
"""Bytes of a body times special tokens in its texts: from each of them llama.cpp searches the rest of the text."""
PER_MESSAGE = 2
"""Special tokens that a template writes around a message."""
IDS = ("prompt", "tokens", "content", "input")
"""Where a request has token ids, alone or beside texts."""
CHATS = ("/chat/completions", "/apply-template", "/api/chat")
"""Paths that take a chat in OpenAI's form."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What of a served model bounds its requests."""

    context: int
    """Most tokens of a request."""
    vocabulary: int
    """Token ids are below it."""
    special: tuple[str, ...] = ()
    """Texts that are one token wherever they stand."""


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: str
    content: Annotated[list[_Text], Field(max_length=MOST_MESSAGES)] | str | None = None


class _Chat(BaseModel):
    model_config = ConfigDict(strict=True)

    messages: Annotated[list[_Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    tools: list[dict[str, Any]] | None = None


def check_body(path: str, body: bytes, served: Served) -> None:
    """Check a request's body as far as an engine needs it; what else is wrong it says itself.

    Raises:
        UserError: The body is no JSON object, nested too deeply or holds too much, has ids that are no tokens, a
            grammar of llama.cpp's own or, for a chat, messages that aren't text.
    """
    try:
        request = json.loads(body, object_pairs_hook=_object, parse_constant=_no_number)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"the body is nested more than {DEEPEST} levels deep") from None
    except ValueError as error:  # that it is no UTF-8, too
        raise UserError(f"the body is no JSON: {' '.join(str(error).split())[:100]}") from None
    if not isinstance(request, dict):
        raise UserError("the body is a JSON object")
    texts = _checked_size(request)
    if "grammar" in request:
        raise UserError("grammar is not supported; response_format takes a JSON schema")
    for name in SCHEMAS:
        _check_schema(request.get(name))
    for name in IDS:
        _check_ids(request.get(name), served.vocabulary)
    messages = 0
    if path.partition("?")[0].endswith(CHATS):
        try:
            messages = len(_Chat.model_validate(request).messages)
        except ValidationError as error:
            raise UserError(first_error(error)) from None
    most = MOST_SEARCHED // len(body)
    if PER_MESSAGE * messages + _occurrences(served.special, texts, most=most + 1) > most:
        raise UserError(
            f"a body of {len(body)} bytes holds at most {most} special tokens, {PER_MESSAGE} of them for each message"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are different: of two values an engine might take the other one."""
    if len(pairs) > MOST_NAMES:
        raise UserError(f"the body has an object of more than {MOST_NAMES} entries")
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a name twice")
    return made


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _inside(value: Any) -> Iterable[Any]:
    """What an object or a list holds; nothing of other values."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_schema(value: Any) -> None:
    """Refuse what takes llama.cpp's grammars more than a moment; `_check_size` has seen to the depth."""
    for each in _inside(value):
        _check_schema(each)
    if not isinstance(value, dict):
        return
    pattern, choices = value.get("pattern"), value.get("enum")
    if isinstance(pattern, str):
        bounds = re.findall(r"\{(\d*),?(\d*)\}", pattern)
        if any(len(bound) > 4 for pair in bounds for bound in pair) or (
            math.prod(max(1, *(int(bound or 1) for bound in pair)) for pair in bounds) > MOST_REPEATS
        ):
            raise UserError(f"a schema's pattern repeats something more than {MOST_REPEATS} times")
    if isinstance(choices, list) and len(choices) > MOST_NAMES:
        raise UserError(f"a schema has an enum of more than {MOST_NAMES} values")
    for name in COUNTS:
        count = value.get(name)
        if isinstance(count, int | float) and not 0 <= count <= MOST_REPEATS:
            raise UserError(f"a schema's {name} is beyond {MOST_REPEATS}")


def _check_ids(value: Any, vocabulary: int) -> None:
    """Refuse numbers in lists, and in lists of these, that are no tokens."""
    for each in value if isinstance(value, list) else ():
        if isinstance(each, list):
            _check_ids(each, vocabulary)
        elif isinstance(each, int | float) and not (isinstance(each, int) and 0 <= each < vocabulary):
            raise UserError(f"{str(each)[:30]} is no token; ids go from 0 to {vocabulary - 1}")


def _occurrences(special: Iterable[str], texts: Iterable[str], *, most: int) -> int:
    """How often special tokens stand in texts, counted as far as `most`."""
    pattern = re.compile("|".join(map(re.escape, filter(None, special))) or "(?!)")
    found = (match for text in texts for match in pattern.finditer(text))
    return sum(1 for _ in islice(found, most))


def _checked_size(request: dict[str, Any]) -> list[str]:
    """The texts of a request that is neither too deep nor too large."""
    level: list[Any] = [request]
    texts: list[str] = []
    count = 0
    for _ in range(DEEPEST):
        count += len(level)
        if count > MOST_VALUES:
            raise UserError(f"the body holds more than {MOST_VALUES} lists, objects and texts")
        texts += (value for value in level if isinstance(value, str))
        level = [value for each in level for value in _inside(each) if isinstance(value, dict | list | str)]
        if not level:
            return texts
    raise UserError(f"the body is nested more than {DEEPEST} levels deep")
