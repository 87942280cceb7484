"""Thousands of damaged, odd and hostile inputs, each given to a command that reads it: what becomes of them.

    python benchmarks/mutations.py --count 5000 --failures failures
    python benchmarks/mutations.py --only 1234

Every input is a tiny file or folder with one or a few changes that follow from its number, so `--only` makes it again
and shows all that is said of it. A command either works or says in one line why it doesn't, with exit code 2. What
isn't allowed: a traceback, another exit code, several lines, more than 60 seconds, more than 2 GB resident, code that
came with an input and ran, numbers that are not finite in an answer, and temporary files that stay.

Prints a table by kind of input; exit code 1 if something that isn't allowed has happened.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_T = TypeVar("_T")
RAN = "CODE_RAN"
"""A file that hostile inputs try to make."""
TOUCH = f"__import__('os').system('touch {RAN}')"
NESTED = 100_000
STRINGS = ["", "x", "a" * 100_000, "../../../etc/passwd", "/etc/passwd", "\ud800", "\0", "ü" * 300, "{x}", "%s%n", "-1",
           "NaN", "1" * 5000, TOUCH, f"$(touch {RAN})", "https://example.org/x", "a/b", "a//b/c", ".", "~", "\n\n"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-300, 1e300,
           math.nan, math.inf, -math.inf]  # fmt: skip
TEMPLATES = [
    "", "{{ messages }}", "{% for %}", "{{ undefined.x }}", "{{ 1 / 0 }}", "{{ messages[5] }}", "{{ raise_exception('no') }}",
    "{{ 'x' * 9999999999999 }}", "{{ '%099999999999d' | format(1) }}", "{{ messages | tojson }}", "{{ range(10**9) | list }}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ lipsum(n=1000000) }}", "{% include 'x' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages[0]['content'][::-1] }}", "constant",
    "{{ cycler.__init__.__globals__.os.popen('touch CODE_RAN').read() }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CODE_RAN') }}", "{{ " + "(" * 5000,
    "{{ namespace(a=1) }}{{ strftime_now('%Y') }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "\ud800",
    "{{ 10 ** 10 ** 9 }}", "{{ ('x' * 1000000) | replace('x', 'y' * 1000) }}", "{% set x = [] %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{{ x.append('x' * 1000) or '' }}{% endfor %}{% endfor %}",
]  # fmt: skip


# --- changes ---------------------------------------------------------------------------------------------------------


def value(rng: random.Random) -> Any:
    """Something that a file in JSON could hold where something else belongs."""
    some: list[Callable[[], Any]] = [
        lambda: None, lambda: rng.choice([True, False]), lambda: rng.choice(NUMBERS), lambda: rng.choice(NUMBERS),
        lambda: rng.choice(STRINGS), lambda: rng.choice([[], {}, [[]], [None], {"": {}}, [0] * 1000, ["x"], {"x": "y"}]),
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
    tree = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
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
        "one NaN": lambda: torch.cat((torch.full((1,), math.nan), old.flatten()[1:].float())).to(old.dtype).view_as(old),
        "infinity": lambda: old + math.inf, "zeros": lambda: old * 0, "ones": lambda: old * 0 + 1, "huge": lambda: old * 1e30,
        "large": lambda: old * 1e4, "tiny": lambda: old * 1e-30, "negative": lambda: -old,
        "int64": lambda: old.long(), "float16": lambda: old.half(), "float8": lambda: old.to(torch.float8_e4m3fn),
        "bool": lambda: old.bool(), "uint8": lambda: old.to(torch.uint8), "no rows": lambda: old[:0], "fewer": lambda: old[:-1],
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
        tensors[rng.choice(["x", f"{name}_scale_inv", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"])] = old.clone()
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], old
    save_file({key: x.contiguous().clone() for key, x in tensors.items()}, path, metadata)
    return f"{path.name}: {name} {how}"


# --- kinds of input --------------------------------------------------------------------------------------------------


class Place:
    """The inputs to change, where to put what is changed, and the choices."""

    def __init__(self, root: Path, work: Path, rng: random.Random) -> None:
        self.root, self.work, self.rng = root, work, rng

    def copy(self, name: str, to: str = "") -> Path:
        """A copy of an input."""
        source, target = self.root / name, self.work / (to or name)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        return target

    def model(self) -> Path:
        """A copy of a teacher or a student."""
        return self.copy(self.rng.choice(["teacher", "student", "portable"]))

    def read(self, model: Path, only: str = "") -> list[str]:
        """A command that reads a model."""
        text = ["--text", f"{self.root}/other.txt"]
        some = [*text, "--tokens", "64", "--block-size", "32"]
        whose = model.name if model.name in ("student", "portable") else "teacher"
        commands = {
            "info": ["info", model],
            "doctor": ["doctor", model],
            "eval": ["eval", model, *some, "--json"],
            "generate": ["generate", model, "--prompt", "river and", "--max-new-tokens", "3"],
            "chat": ["generate", model, "--prompt", "river", "--max-new-tokens", "2", "--chat"],
            "stock": ["export", model, "--to", "stock", "--out", "out"],
            "gguf": ["export", model, "--to", "gguf", "--out", "out.gguf"],
        }
        if whose == "teacher":
            commands |= {
                "convert": ["convert", model, *some, *tiny.DIMS, "--out", "out"],
                "paper": ["convert", model, *tiny.DIMS, "--preset", "paper", "--out", "out"],
                "calibrate": ["calibrate", model, *some, "--out", "out"],
                "offload": ["calibrate", model, *some, "--out", "out", "--offload"],
                "heal to": ["heal", self.root / "portable", "--teacher", model, *text, *tiny.HEALING, "--out", "out"],
            }
        else:
            commands["heal"] = ["heal", model, "--teacher", self.root / "teacher", *text, *tiny.HEALING, "--out", "out"]
        return list(map(str, commands[self.rng.choice(only.split() or [*commands, "info", "eval"])]))


CONFIG: dict[str, list[Any]] = {
    "auto_map": [{"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, {"AutoTokenizer": ["evil.Evil", None]}],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "gpt2", "kvlatent_llama", "kvlatent_qwen3", "evil", "gemma3", "bert"],
    "_attn_implementation": ["kernels-community/flash-attn", "eager", "flex_attention", "evil"],
    "attn_implementation": ["kernels-community/flash-attn", "eager", "sdpa", "flash_attention_2"],
    "_experts_implementation": ["a/b"],
    "use_kernels": [True],
    "transformers_weights": ["../../x.safetensors", "evil.bin"],
    "quantization_config": [{"quant_method": x} for x in ("fp8", "bitsandbytes", "gptq", "awq", "evil", "torchao", "")],
    "dtype": ["float16", "float8_e4m3fn", "int8", "evil", "float64", TOUCH, None],
    "torch_dtype": ["float16", "evil", 3],
    "rope_parameters": [
        {"rope_type": kind, "rope_theta": theta, **more}
        for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "evil")
        for theta in (1e4, 0, -1, 1e300, None)
        for more in ({}, {"factor": 0}, {"factor": 1e300}, {"factor": 8.0}, {"short_factor": [1], "long_factor": []})
    ],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"type": "evil"}, {"rope_type": "yarn"}, 3],
    "rope_theta": [0, -1, 1e300, None, "x"],
    "layer_types": [["evil"] * 2, ["sliding_attention"] * 2, ["full_attention"], []],
    "sliding_window": [0, -1, 1, 4, 10**9],
    "tie_word_embeddings": [True, False, "yes"],
    "attention_bias": [True],
    "mlp_bias": [True],
    "num_key_value_heads": [1, 3, 4, 0, None],
    "vocab_size": [0, 1, 319, 321, 2**31, 2**40],
    "hidden_act": ["evil", "relu", "gelu", None, TOUCH],
    "pretraining_tp": [2, 0],
    "architectures": [["Evil"], [], None, "x"],
    "use_cache": [False],
    "latent": [None, {}, [], {"preset": "best"}],
    "base_model_tp_plan": [{"x": "evil"}],
    "is_encoder_decoder": [True],
    "pad_token_id": [-1, 999, 2**40],
    "eos_token_id": [-1, 999, [0, 1], []],
    "generation_config": [{"num_beams": 4}],
    "id2label": [{"0": "x"}, 3],
    "num_labels": [-1, 10**9],
    "problem_type": ["x"],
    "output_attentions": [True],
    "return_dict": [False],
    "chunk_size_feed_forward": [7],
    "attention_dropout": [0.5, -1, "x"],
}
GENERATION: dict[str, list[Any]] = {
    "num_beams": [4, 0, -1, 10**9],
    "temperature": [0, -1, "x"],
    "do_sample": [True, "x"],
    "max_new_tokens": [0, 10**12],
    "max_length": [0, 1, 10**12],
    "stop_strings": [["x"], 3],
    "cache_implementation": ["static", "quantized", "offloaded", "evil"],
    "custom_generate": ["evil", "."],
    "eos_token_id": [[0, 1], -5, "x", [[]], 10**12, None],
    "pad_token_id": [-5, 10**12, "x", None],
    "bad_words_ids": [[[1]], [], [[]], 3],
    "forced_eos_token_id": [1],
    "assistant_early_exit": [1],
    "prompt_lookup_num_tokens": [5],
    "num_return_sequences": [3],
    "penalty_alpha": [0.6],
    "watermarking_config": [{}, {"greenlist_ratio": 9}],
    "guidance_scale": [2.0],
    "compile_config": [{"evil": 1}],
}
TOKENIZER: dict[str, list[Any]] = {
    "auto_map": [{"AutoTokenizer": ["evil.Evil", "evil.Evil"]}],
    "tokenizer_class": ["Evil", "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", None, "", "TokenizersBackend"],
    "chat_template": [*TEMPLATES, {"default": "x"}, [{"name": "a", "template": "b"}], 3],
    "eos_token": ["<none>", None, "", {"content": "x"}, 3, ["a"]],
    "pad_token": ["<none>", None, "river"],
    "added_tokens_decoder": [{"0": {}}, {"x": {"content": "y"}}, {"999999": {"content": "big", "special": True}}, 3],
    "model_max_length": [0, -1, 1e30, "x"],
    "extra_special_tokens": [{"image": "<i>"}, ["<i>"], 3],
    "model": [{"type": "Evil"}, {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Unigram", "vocab": [["x", 0.0]]}],
    "normalizer": [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}, {"type": "Evil"},
                   {"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"}],
    "pre_tokenizer": [None, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
                      {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}],
    "post_processor": [{"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}],
    "decoder": [None, {"type": "Evil"}],
    "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}],
    "padding": [{"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "x"}],
}  # fmt: skip


def evil(model: Path) -> None:
    """Put code into a model's folder."""
    code = f"import os\nos.system('touch {RAN}')\nclass Evil: pass\n"
    (model / "evil.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)


def config(at: Place) -> tuple[list[str], str]:
    """config.json."""
    model = at.model()
    evil(model)
    return at.read(model), change_json(at.rng, model / "config.json", CONFIG)


def spec(at: Place) -> tuple[list[str], str]:
    """The latent spec in a config, and kvlatent.json."""
    model = at.copy(at.rng.choice(["student", "portable"]))
    if at.rng.random() < 0.5:
        return at.read(model, "info heal stock eval"), change_json(at.rng, model / "kvlatent.json")
    return at.read(model), change_json(at.rng, model / "config.json", key="latent")


def weights(at: Place) -> tuple[list[str], str]:
    """model.safetensors, and what may lie beside it."""
    model = at.model()
    if at.rng.random() < 0.1:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + RAN.encode() + b"'\ntR.")
        return at.read(model), "a pickle in place of model.safetensors"
    return at.read(model), change_tensors(at.rng, model / "model.safetensors")


def index(at: Place) -> tuple[list[str], str]:
    """model.safetensors.index.json and its files."""
    model = at.copy("sharded")
    file = model / "model.safetensors.index.json"
    if at.rng.random() < 0.3:
        shard = at.rng.choice(sorted(model.glob("*.safetensors")))
        return at.read(model), at.rng.choice([change_tensors, change_file])(at.rng, shard)
    if at.rng.random() < 0.4:
        tree = json.loads(file.read_text())
        name = at.rng.choice(sorted(tree["weight_map"]))
        outside = f"{at.root}/sharded/{tree['weight_map'][name]}"
        tree["weight_map"][name] = at.rng.choice([outside, f"../../{outside}", "x.safetensors", "", "evil.bin", ".", "config.json"])
        file.write_text(json.dumps(tree))
        return at.read(model), f"{file.name}: {name} in {tree['weight_map'][name]}"
    return at.read(model), change_json(at.rng, file)


def tokenizer(at: Place) -> tuple[list[str], str]:
    """tokenizer.json and tokenizer_config.json."""
    model = at.model()
    evil(model)
    file = model / at.rng.choice(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"])
    if not file.exists():
        file = model / "tokenizer.json"
    return at.read(model), change_json(at.rng, file, TOKENIZER)


def generation(at: Place) -> tuple[list[str], str]:
    """generation_config.json."""
    model = at.model()
    evil(model)
    reads = "generate eval stock gguf" + (" convert calibrate" if model.name == "teacher" else " heal")
    return at.read(model, reads), change_json(at.rng, model / "generation_config.json", GENERATION)


def templates(at: Place) -> tuple[list[str], str]:
    """Chat templates, also changed ones, with a prompt or with chats as text."""
    model, template = at.model(), at.rng.choice(TEMPLATES)
    if at.rng.random() < 0.3:
        template = changed_bytes(at.rng, tiny.TEMPLATE.encode())[0].decode(errors="replace")
    (model / "chat_template.jinja").write_text(template, errors="surrogatepass")
    chats = at.work / "chats.jsonl"
    chat = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone bread lamp " * 5}]
    chats.write_text("\n".join([json.dumps({"messages": chat})] * 20))
    command = at.read(model, "chat" if model.name != "teacher" else "chat chat calibrate convert")
    return [str(chats) if part.endswith("other.txt") else part for part in command], f"template {template[:60]!r}"


def statistics(at: Place) -> tuple[list[str], str]:
    """Statistics files."""
    file, teacher = at.copy("stats"), f"{at.root}/teacher"
    commands = [
        ["convert", teacher, "--stats", f"{file}", *tiny.DIMS, "--out", "out"],
        ["convert", teacher, "--stats", f"{file}", "--budget", "0.5", "--out", "out"],
        ["calibrate", teacher, "--merge", f"{file}", f"{at.root}/stats", "--out", "out"],
        ["plan", teacher, "--stats", f"{file}", "--budget", "0.4", "--out", "out.png"],
    ]
    return at.rng.choice(commands), (change_tensors if at.rng.random() < 0.85 else change_file)(at.rng, file)


YAML = [
    f"!!python/object/apply:os.system ['touch {RAN}']", "a: &a [x]\nb: *a", "a: 1\na: 2", "[" * NESTED, "? x", "- a", "%TAG",
    f"title: !!python/object/new:os.system [touch {RAN}]", "a: 2024-99-99", "a: " + "1" * 5000, "&a [*a]", "\t", "x: !!binary x",
    "a: .nan", "a: 1:2:3:4", "{}", "null", "\ufeff", "a: '\\ud800'", "---\n---\n", "<<: 3", "? [a]\n: b", "!!set {a, b}",
]  # fmt: skip


def recipes(at: Place) -> tuple[list[str], str]:
    """Recipes, for a new run or for one that is there."""
    file, out = at.work / "tiny.yaml", at.work / "run"
    data = json.loads((at.root / "tiny.yaml").read_text())
    if at.rng.random() < 0.92:
        at.copy("run")
    if at.rng.random() < 0.2:
        how = at.rng.choice(YAML)
        file.write_text(how if at.rng.random() < 0.5 else json.dumps(data)[:-1] + f", {how}}}", errors="surrogatepass")
        how = how[:40]
    else:
        file.write_text(json.dumps(data))
        extra = {"seed": NUMBERS, "model": [*STRINGS, f"{at.root}/student"], "title": STRINGS, "context": NUMBERS,
                 "block_size": NUMBERS, "evil": [1], "license": STRINGS}  # fmt: skip
        how = change_json(at.rng, file, extra)
    return ["run", str(file), "--out", str(out)], how


def runs(at: Place) -> tuple[list[str], str]:
    """Run folders, read by report and by run, which goes on."""
    run = at.copy("run")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".html")
    shallow = [path for path in files if path.suffix == ".json" and path.parent.name in ("run", "evaluate")]
    file = at.rng.choice(at.rng.choice([files, shallow, shallow]))
    how = (
        change_json(at.rng, file)
        if file.suffix in (".json", ".jsonl") and file.stat().st_size
        else change_tensors(at.rng, file)
        if file.suffix == ".safetensors"
        else change_file(at.rng, file)
    )
    if at.rng.random() < 0.2:
        return ["report", str(run), "--out", "page.html"], how
    for name in at.rng.sample(["results.json", "bench.json", "generations.json", "report.html"], at.rng.randrange(2)):
        (run / name).is_file() and (run / name).unlink()
    return ["run", str(at.root / "tiny.yaml"), "--out", str(run)], how


def states(at: Place) -> tuple[list[str], str]:
    """The state of an unfinished healing."""
    folder = at.copy("unfinished")
    file = at.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if file.suffix == ".safetensors":
        how = change_tensors(at.rng, file)
    else:
        how = change_json(at.rng, file) if file.suffix in (".json", ".jsonl") else change_file(at.rng, file)
    return [*tiny.healing(at.root, f"{folder}/out"), "--save-minutes", "0", "--resume"], how


def ggufs(at: Place) -> tuple[list[str], str]:
    """GGUF files."""
    file = at.copy("teacher.gguf")
    data, how = changed_bytes(at.rng, file.read_bytes(), at.rng.choice([32, 1000, 12_000, None]))
    file.write_bytes(data)
    return at.read(file, "info eval convert generate"), how


ROWS: list[Any] = [
    {"text": "river stone " * 30}, {"text": None}, {"text": 3}, {"text": ["x"]}, {"messages": []}, {"messages": None}, {}, [], 3,
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40}]}, {"messages": 3}, "x", None,
    {"messages": [{"role": "user"}]}, {"messages": [{"role": 3, "content": "x"}]}, {"messages": ["x"]}, {"messages": {"a": 1}},
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, {"text": "\ud800 lone"},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"messages": [[]]}, {"text": "<eos>" * 50}, {"text": "\0"},
    {"messages": [{"role": "user", "content": [None]}]}, {"text": "a" * 300_000}, {"text": "ü" * 1000}, {"content": "x"},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"text": True}, {"text": {"a": "b"}}, {"text": " "},
    {"messages": [{"role": "user", "content": 3}]}, {"messages": [None]}, {"messages": "abc"}, {"messages": [], "text": "x y"},
]  # fmt: skip


def texts(at: Place) -> tuple[list[str], str]:
    """Texts: .txt, .jsonl, .parquet."""
    kind = at.rng.choice([".txt", ".jsonl", ".jsonl", ".parquet"])
    file = at.work / f"text{kind}"
    rows = [ROWS[0]] * at.rng.choice([0, 1, 40]) + [at.rng.choice(ROWS) for _ in range(at.rng.choice([1, 3]))]
    at.rng.shuffle(rows)
    how = f"{kind} {str(rows)[:80]}"
    if kind == ".txt":
        file.write_text(at.rng.choice(["river stone " * 300, "", " \n", "\ufeffa b " * 200, "a" * 500_000, "\0" * 9999, "ü" * 9999]))
    elif kind == ".jsonl":
        junk = at.rng.choice(["", "", "{", "[" * NESTED, "1" * 5000, '{"text": "' + "x " * 99_999 + '"}', "NaN", '{"text": NaN}'])
        file.write_text("\n".join([*map(json.dumps, rows), junk]), errors="surrogatepass")
    else:
        columns = {key: [row.get(key) for row in rows if isinstance(row, dict)] for key in at.rng.choice([["text"], ["messages"], ["text", "messages"], ["x"]])}
        try:
            table = pyarrow.table(columns)
        except (pyarrow.ArrowException, UnicodeError):
            table = pyarrow.table({"text": pyarrow.array([b"\xff\xfe"] * 30, pyarrow.binary())})
        pyarrow.parquet.write_table(table, file)
    if at.rng.random() < 0.35:
        how = f"{kind} {change_file(at.rng, file)}"
    read = at.read(at.root / at.rng.choice(["teacher", "student"]), "eval")
    if at.rng.random() < 0.6:
        read = at.read(at.root / "teacher", "calibrate convert offload")
    return [str(file) if part.endswith("other.txt") else part for part in read], how


OPTIONS = {
    "info": ["{teacher}"], "doctor": ["{student}"], "report": ["{run}", "--out", "page.html"],
    "generate": ["{student}", "--prompt", "river", "--max-new-tokens", "2"],
    "eval": ["{student}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--against", "{teacher}"],
    "bench": ["{student}", "--context", "16", "--new-tokens", "2", "--repeats", "1", "--batch", "1"],
    "plan": ["{teacher}", "--stats", "{stats}", "--budget", "0.5", "--out", "x.png"],
    "calibrate": ["{teacher}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--out", "x"],
    "convert": ["{teacher}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--d-qk", "8", "--d-vo", "8",
                "--out", "x", "--heads-per-latent", "1", "--window", "8", "--sinks", "2", "--context", "64"],
    "heal": ["{portable}", "--teacher", "{teacher}", "--text", "{other.txt}", *tiny.HEALING, "--out", "x"],
    "export": ["{portable}", "--to", "gguf", "--out", "x.gguf", "--type", "f16"],
    "run": ["{tiny.yaml}", "--out", "{run}"],
}  # fmt: skip
MORE = {
    "generate": ["--chat"], "eval": ["--far", "--needle", "--retrieval", "--trials=1", "--limit=0", "--tasks=evil", "--retrieval-contexts=16"],
    "bench": ["--synthetic", "--own", "--memory=1", "--memory=0", "--dtypes=bfloat16", "--memory=1e300"], "run": ["--seed=5"],
    "plan": ["--heads-per-latent=2", "--window=4", "--tokens=64"], "calibrate": ["--merge={stats}", "--offload", "--window=8", "--heads-per-latent=2", "--context=9", "--text=teacher"],
    "convert": ["--preset=paper", "--preset=portable", "--qk=evil", "--qk=fold", "--qk=partial", "--qk=select", "--qk=project", "--stats={stats}", "--budget=0.5"],
    "heal": ["--resume", "--restart", "--stream-layers", "--loss=mix", "--loss=ntp", "--kl-weight=2", "--temperature=0", "--learning-rate=1e9", "--eps=-1", "--clip=0", "--train=norms",
             "--lora-rank=0", "--lora-rank=10000", "--lora-alpha=-1", "--adapters=keep", "--adapters=save", "--batch-size=0", "--accumulate=999", "--checkpointing", "--mixed-precision=fp16",
             "--save-minutes=-1", "--save-minutes=nan", "--eval-tokens=0", "--warmup=9", "--weight-decay=nan", "--top-k=0", "--top-k=999", "--teacher-cache=c", "--track=evil",
             "--separate-documents", "--held-out={train.txt}", "--held-out={other.txt}", "--held-out-tokens=0", "--temperature-squared", "--like=paper", "--context=7"],
    "export": ["--type=q8_0", "--type=evil", "--to=stock", "--dtype=float16"],
}  # fmt: skip


def options(at: Place) -> tuple[list[str], str]:
    """Arguments of commands."""
    name = at.rng.choice(list(OPTIONS))
    if name == "run":
        at.copy("run")
    argv = [name, *OPTIONS[name]]
    for _ in range(at.rng.choice([0, 1, 1, 2])):
        argv += [at.rng.choice([*MORE.get(name, []), "--json", "--device=evil", "--device=meta", "--device=cuda", "--dtype=float16",
                                "--dtype=bfloat16", "--seed=-1", "--seed=99999999999999999999", "--evil", "--device=cpu:7"])]  # fmt: skip
    if at.rng.random() < 0.7:
        which = at.rng.randrange(1, len(argv))
        if not argv[which].startswith("--"):
            argv[which] = at.rng.choice([*map(str, NUMBERS), *STRINGS, "{teacher}", "{run}", "{stats}", "{teacher.gguf}", "/dev/null", "/dev/zero",
                                         "/proc/self/mem", "{tiny.yaml}", "/nowhere/x", "{train.txt}", "{train.txt}/x", "hf:x", "package:evil", "teacher", "smollm3"])  # fmt: skip
        elif at.rng.random() < 0.5:
            del argv[which]
    argv = [part.replace("\0", "\\0").encode("utf-8", "surrogateescape" if part == "\udc80" else "replace").decode() for part in argv]
    filled = [re.sub(r"\{(\w[\w.]*)\}", lambda m: f"{at.work if m[1] == 'run' and name == 'run' else at.root}/{m[1]}", part) for part in argv]
    return filled, "options"


KINDS: dict[str, Callable[[Place], tuple[list[str], str]]] = {
    kind.__name__: kind
    for kind in (config, spec, weights, index, tokenizer, generation, templates, statistics, recipes, runs, states, ggufs, texts, options)
}  # fmt: skip


# --- what becomes of them --------------------------------------------------------------------------------------------


def judge(ended: tiny.Ended, work: Path) -> str:
    """What became of an input."""
    lines = [line for line in re.split(r"[\r\n]+", ended.said) if line.startswith("kvlatent: ")]
    left = [path.name for path in work.rglob(".*") if re.search(r"\.partial|-lock$", path.name) and path.parent.name != "state"]
    if (work / RAN).exists():
        return "code run"
    if ended.stopped:
        return {"time": "hang", "memory": "memory"}[ended.stopped]
    if "Traceback (most recent call last)" in ended.said or ended.code not in (0, 2):
        return "traceback"
    if left:
        return "leftover"
    if ended.code == 0:
        return "not finite" if re.search(r"\b(nan|NaN|Infinity)\b", ended.answer) else "works"
    usage = "╭─" in ended.said
    return "refused" if (len(lines) == 1 and len(lines[0]) < 1500) or usage else "unclear"


OUTCOMES = ["works", "refused", "traceback", "hang", "memory", "code run", "not finite", "unclear", "leftover"]


def main() -> int:
    """Make, try, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", type=int, help="the number of an input to try alone, showing everything")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--failures", type=Path, help="a folder for what was said of the inputs that went wrong")
    asked = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    examples: dict[tuple[str, str], str] = {}
    numbers = range(asked.first, asked.first + asked.count) if asked.only is None else [asked.only]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder, "in")
        root.mkdir()
        tiny.inputs(root)
        for number in numbers:
            name = list(KINDS)[number % len(KINDS)]
            if name not in asked.kinds:
                continue
            work = Path(folder, "work")
            work.mkdir()
            argv, how = KINDS[name](Place(root, work, random.Random(number)))
            ended = tiny.command(argv, work)
            became = judge(ended, work)
            counts[name][became] += 1
            about = f"{number} {name}: {how[:200]}\n  {shlex.join(argv)[:600].replace(folder, '')}\n  exit {ended.code}, "
            about += f"{ended.seconds:.1f} s, {ended.memory / 1e6:.0f} MB, {became}: "
            about = about.encode(errors="backslashreplace").decode()
            if number % 100 == 99:
                print(f"{number + 1} inputs", file=sys.stderr, flush=True)
            if asked.only is not None:
                print(about, ended.said, ended.answer, sep="\n")
            if became not in ("works", "refused"):
                last = [line for line in ended.said.splitlines() if line.strip() and "%|" not in line] or [""]
                examples.setdefault((name, became), about + last[-1][:300])
                if asked.failures:
                    asked.failures.mkdir(parents=True, exist_ok=True)
                    (asked.failures / f"{number}.txt").write_text(f"{about}\n{ended.said[-20_000:]}\n{ended.answer[-2000:]}")
            for path in Path(folder).glob("work*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{'':12}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for name, row in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"{name:12}" + "".join(f"{row[outcome]:11}" for outcome in OUTCOMES))
    print(*examples.values(), sep="\n")
    return int(bool(examples))


if __name__ == "__main__":
    sys.exit(main())
