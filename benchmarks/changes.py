"""Changes of files for `mutations.py`: of JSON, of safetensors, of any bytes."""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile import NESTED, NUMBERS, STRINGS
from safetensors.torch import load_file, save_file
from torch import Tensor


def value(rng: random.Random) -> Any:
    """Something that a file in JSON could hold where something else belongs."""
    some: list[Callable[[], Any]] = [
        lambda: None, lambda: rng.choice([True, False]), lambda: rng.choice(NUMBERS), lambda: rng.choice(NUMBERS),
        lambda: rng.choice(STRINGS),
        lambda: rng.choice([[], {}, [[]], [None], {"": {}}, [0] * 1000, ["x"], {"x": "y"}]),
        lambda: [value(rng)], lambda: {"x": value(rng)}, lambda: rng.randrange(-300, 300),
    ]  # fmt: skip
    return rng.choice(some)()


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that a tree holds; of long lists and dicts some."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    found = []
    for key, below in items[:40]:
        found += [(*path, key), *places(below, (*path, key))]
    return found


def changed(rng: random.Random, tree: Any, extra: dict[str, list[Any]] | None = None) -> str:
    """Change a tree in one place; returns how."""
    if extra and rng.random() < 0.4:
        key = rng.choice(list(extra))
        tree[key] = rng.choice(extra[key])
        return f"{key} = {str(tree[key])[:60]!r}"
    found = places(tree)
    if not found:
        return "nothing"
    depth = rng.randrange(1, 1 + max(map(len, found)))
    *path, last = rng.choice([place for place in found if len(place) <= depth])
    owner = tree
    for key in path:
        owner = owner[key]
    old, where = owner[last], ".".join(map(str, (*path, last)))
    how = rng.randrange(8)
    if how == 0:
        del owner[last]
        return f"without {where}"
    if how == 1 and isinstance(owner, dict):
        owner[rng.choice(STRINGS)] = owner.pop(last)
        return f"{where} renamed"
    if how == 2 and isinstance(old, list | str):
        owner[last] = old * 2 if rng.random() < 0.5 else old[: len(old) // 2]
    elif how <= 4 and isinstance(old, int | float):
        owner[last] = rng.choice([-old, old * 2, old + 1, old - 1, old / 2, old * 1000, str(old), [old]])
    else:
        owner[last] = value(rng)
    return f"{where}: {str(old)[:30]} -> {str(owner[last])[:60]!r}"


def changed_bytes(rng: random.Random, data: bytes, first: int | None = None) -> tuple[bytes, str]:
    """Change a file without knowing what it is; `first` limits where to its first bytes."""
    kind, at = rng.randrange(9), rng.randrange(max(1, min(len(data), first or len(data))))
    size = rng.choice([1, 2, 4, 8])
    if kind == 0:
        return data[:at], f"cut off at {at}"
    if kind == 1:
        return b"", "emptied"
    if kind == 2:
        return rng.randbytes(len(data)), "random"
    if kind == 3:
        return data + rng.randbytes(rng.choice([1, 100, 10_000])), "longer"
    if kind == 4:
        return bytes(len(data)), "zeros"
    if kind == 5:
        return data[:at] + data[at + size :], f"{size} bytes less at {at}"
    if kind == 6:
        number = rng.choice([0, 1, 2**15, 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")[:size]
        return data[:at] + number + data[at + size :], f"{number.hex()} at {at}"
    for _ in range(rng.choice([1, 1, 3, 30])):
        at = rng.randrange(max(1, min(len(data), first or len(data))))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data
    return data, "flipped bits"


def change_json(rng: random.Random, path: Path, extra: dict[str, list[Any]] | None = None, key: str = "") -> str:
    """Change a file in JSON, as a tree (below `key`) or as text."""
    if rng.random() < 0.15:
        return change_file(rng, path)
    if rng.random() < 0.05:
        deep = rng.choice(["[" * NESTED, '{"a":' * NESTED, "[" * NESTED + "]" * NESTED, "1" * 5000, "NaN", '"\\ud800"'])
        path.write_text(deep)
        return f"{path.name} is {deep[:10]}…"
    lines = path.suffix == ".jsonl"
    tree: Any = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    how = [changed(rng, tree[key] if key else tree, extra) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
    path.write_text("\n".join(map(json.dumps, tree)) if lines else json.dumps(tree))
    return f"{path.name}: {'; '.join(how)}"


def change_file(rng: random.Random, path: Path) -> str:
    """Change a file as bytes, or put something else in its place."""
    kind = rng.randrange(12)
    if kind < 8:
        data, how = changed_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name} {how}"
    path.unlink()
    if kind == 8:
        path.mkdir()
    elif kind == 9:
        os.mkfifo(path)
    elif kind == 10:
        path.symlink_to(rng.choice([path.name, "/dev/zero", "/nowhere", "/proc/self/mem"]))
    return f"{path.name} is {['a folder', 'a pipe', 'a link', 'not there'][kind - 8]}"


def change_tensors(rng: random.Random, path: Path) -> str:
    """Change a safetensors file: its header, its tensors or its bytes."""
    data, kind = path.read_bytes(), rng.randrange(4)
    size = struct.unpack("<Q", data[:8])[0]
    if kind == 0:
        data, how = changed_bytes(rng, data, rng.choice([8, size, len(data)]))
        path.write_bytes(data)
        return f"{path.name} {how}"
    if kind == 1:
        header = json.loads(data[8 : 8 + size])
        if "__metadata__" in header and rng.random() < 0.5:
            below = rng.choice(list(header["__metadata__"]))
            try:
                tree = json.loads(header["__metadata__"][below])
                how = changed(rng, tree) if isinstance(tree, dict | list) else "other"
                header["__metadata__"][below] = json.dumps(tree if isinstance(tree, dict | list) else value(rng))
            except ValueError:
                how = changed(rng, header["__metadata__"])
        else:
            how = changed(rng, header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        return f"{path.name} header: {how}"
    metadata, tensors = json.loads(data[8 : 8 + size]).get("__metadata__"), load_file(path)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    changes: dict[str, Callable[[], Tensor]] = {
        "NaN": lambda: old.masked_fill(torch.ones_like(old, dtype=torch.bool), math.nan),
        "one NaN": lambda: old.flatten().index_fill(0, torch.tensor([0]), math.nan).view_as(old),
        "infinity": lambda: old + math.inf, "zeros": lambda: old * 0, "ones": lambda: old * 0 + 1,
        "huge": lambda: old * 1e30,
        "large": lambda: old * 1e4, "tiny": lambda: old * 1e-30, "negative": lambda: -old,
        "int64": lambda: old.long(), "float16": lambda: old.half(), "float8": lambda: old.to(torch.float8_e4m3fn),
        "bool": lambda: old.bool(), "uint8": lambda: old.to(torch.uint8), "no rows": lambda: old[:0],
        "fewer": lambda: old[:-1],
        "transposed": lambda: old.mT if old.ndim > 1 else old[None], "flat": lambda: old.flatten(),
        "one number": lambda: old.flatten()[0], "more": lambda: torch.cat((old, old)),
    }  # fmt: skip
    how = rng.choice([*changes, "missing", "renamed", "extra", "swapped"])
    if how in changes:
        tensors[name] = changes[how]() if old.dtype.is_floating_point or how not in ("NaN", "one NaN") else old * 0 - 1
    elif how in ("missing", "renamed"):
        tensors[rng.choice(["x", name + ".bias", "model.layers.9.x"])] = tensors.pop(name)
        if how == "missing":
            tensors.popitem()
    elif how == "extra":
        tensors[rng.choice(["x", f"{name}_scale_inv", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"])] = (
            old.clone()
        )
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], old
    save_file({key: x.contiguous().clone() for key, x in tensors.items()}, path, metadata)
    return f"{path.name}: {name} {how}"
