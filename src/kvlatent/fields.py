"""Fields of the commands' configs: their types with what the help calls a value, their docs, and partial configs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg

from kvlatent.errors import UserError

Model = Annotated[str, arg(metavar="MODEL")]
OtherModel = Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")]
Number = Annotated[int, arg(metavar="N")]
Numbers = Annotated[tuple[int, ...], arg(metavar="N…")]
OptionalNumber = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Context = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's positions)")]
HeadsPerLatent = Annotated[
    int | None, arg(metavar="N", help_behavior_hint="(default: as many as have 256 dims together)")
]
Folder = Annotated[Path, arg(metavar="DIR")]
OptionalFolder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
Memory = Annotated[float | None, arg(metavar="GIB", help_behavior_hint="")]
Sources = Annotated[tuple[str, ...], arg(metavar="F…", help_behavior_hint="")]

LARGEST_SEED = 2**32 - 1
"""That every generator in use takes."""
METAVARS = {int: "N", float: "X", str: "NAME", Path: "DIR"}
"""What the help calls a value of a type."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whose caches are told, and what has to hold them."""

    context: Annotated[
        tuple[int, ...], arg(metavar="N…", help_behavior_hint="(default: some up to the positions)")
    ] = ()
    """Tokens of the sequences whose cache is told."""
    memory: Memory = None
    """Also tell the longest context that fits in so much memory beside the weights, activations left out."""
    batch: Numbers = (1,)
    """Sequences in a batch that --memory is to hold."""

    def __post_init__(self) -> None:
        if min((*self.context, *self.batch), default=1) < 1:
            raise UserError("--context and --batch are at least 1")
        check_memory(self.memory)


def check_memory(memory: float | None) -> None:
    """Raise `UserError` for GiB that no machine has."""
    if memory is not None and not 0 < memory <= 10**9:
        raise UserError(f"--memory must be above 0 and at most 1e9; got {memory}")


def field_docs(config: type) -> dict[str, str]:
    """The string below each field of a dataclass, as its source has it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for line, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(line.target)] = " ".join(ast.literal_eval(below.value).split())
    return docs


def partial(config: type, *, defaults: Mapping[str, str], without: Collection[str] = ()) -> type:
    """A dataclass with the fields of another, each of which may be left out: what somebody wants to be different.

    A field that is left out is None, or False where it is a flag; `given` tells the others.

    Args:
        config: A dataclass; every field has a default and a doc.
        defaults: What the help says of defaults that are not the dataclass's own.
        without: Fields to leave out.
    """
    docs, hints = field_docs(config), get_type_hints(config)
    made: list[tuple[str, Any, Any]] = []
    for each in fields(config):
        name, kind = each.name, hints[each.name]
        if name in without:
            continue
        if kind is bool:
            assert each.default is False, name
            made.append((name, Annotated[bool, arg(help=docs[name])], field(default=False)))
            continue
        inner = [part for part in get_args(kind) if part is not type(None)]
        if get_origin(kind) is Literal:
            metavar = f"{{{','.join(map(str, inner))}}}"
        elif get_origin(kind) is tuple:
            metavar = f"{{{','.join(get_args(inner[0]))}}}…"
        else:
            metavar = METAVARS[inner[0] if inner else kind]
        default = defaults.get(name, each.default)
        hint = "" if default is None else f"(default: {default})"
        about = arg(help=docs[name], metavar=metavar, help_behavior_hint=hint)
        made.append((name, Annotated[kind | None, about], field(default=None)))
    namespace = {
        "__doc__": f"What is to be different from the defaults of `{config.__name__}`.",
        "__module__": config.__module__,
        "__pydantic_config__": {"extra": "forbid", "strict": True},
    }
    return make_dataclass(f"{config.__name__}Changes", made, frozen=True, kw_only=True, namespace=namespace)


def given(changes: Any) -> dict[str, Any]:
    """The fields of a partial config that were not left out."""
    values = {each.name: getattr(changes, each.name) for each in fields(changes)}
    return {name: value for name, value in values.items() if value is not None and value is not False}
