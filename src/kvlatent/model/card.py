"""The `README.md` of a checkpoint: what it is, how to load it, how it was made."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from kvlatent.kernels.layout import Layout


def card(
    spec: Mapping[str, Any],
    *,
    model: str | None,
    base_model: str | None = None,
    license: str | None = None,
    title: str | None = None,
    headline: str = "",
    table: Sequence[tuple[str, str, str, str, str]] = (),
    notes: Sequence[str] = (),
    recipe: Mapping[str, Any],
) -> str:
    """Return a Hugging Face model card: YAML front matter and Markdown.

    Args:
        spec: The LatentSpec as stored in `config.json`.
        model: The teacher, as it was named.
        base_model: The teacher's name on the hub; `model` where it looks like `owner/name`.
        license: Of the teacher.
        title: A heading.
        headline: What was achieved, in one line.
        table: Rows of measurements: name, teacher, student, ratio, what is better.
        notes: How they were obtained, as Markdown.
        recipe: Settings of every step.
    """
    hub_id = base_model or (model if re.fullmatch(r"[\w-]+/[\w.-]+", model or "") else None)
    if hub_id and hub_id.endswith(".gguf"):
        hub_id = None
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- kvlatent", "- kv-cache"]
    if hub_id:
        front.append(f"base_model: {json.dumps(hub_id, ensure_ascii=False)}")
    if license:
        front.append(f"license: {json.dumps(license, ensure_ascii=False)}")
    teacher = hub_id or model
    dims = dims_text(spec)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {escaped(title or 'A student with a smaller KV cache')}",
        "",
        f"{headline}." if headline else "No measurements came with this model.",
        "",
        f"This decoder language model was made{f' from `{code(teacher)}`' if teacher else ''} with kvlatent: its "
        "attention keeps fewer key and value dims per head than its teacher, so that its KV cache takes fewer "
        "bytes per token"
        f"{f' ({dims})' if dims else ''}. The method starts from KV-Latent (arXiv:2507.11273).",
        "",
        "## How to load it",
        "",
        "```python",
        "import kvlatent  # registers the model with transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'ids = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
    ]
    if table:
        lines += ["", "## Measured", "", "| | teacher | this model | ratio | |", "|---|--:|--:|--:|---|"]
        lines += [f"| {escaped(name)} | {' | '.join(cells)} |" for name, *cells in table]
    if notes:
        lines += ["", "## How the numbers were obtained", "", *(f"- {note}" for note in notes)]
    if recipe:
        lines += ["", "The recipe:", "", "```json", json.dumps(recipe, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def unmeasured_card(record: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """The model card of a student that nothing was measured on yet."""
    steps = {step["verb"]: {k: v for k, v in step.items() if k not in ("verb", "record")} for step in record["steps"]}
    notes = [f"{key}: `{code(value)}`" for key, value in flatten(record["steps"][-1]["record"])]
    notes += [f"{verb}: {step['seconds']:,.1f} s" for verb, step in steps.items() if "seconds" in step]
    return card(spec, model=record["teacher"], notes=notes, recipe=steps)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text for between backticks."""
    return " ".join(text.split()).replace("`", "'")


def per_layer(spec: Mapping[str, Any], key: str) -> list[float]:
    """Dims by layer as a spec gives them; empty if it doesn't."""
    dims = spec.get(key)
    return list(dims) if isinstance(dims, list | tuple) and all(isinstance(d, int | float) for d in dims) else []


def dims_text(spec: Mapping[str, Any]) -> str:
    """`d_qk = 32, d_vo = 16 to 48, the newest 64 tokens whole`, with means where layers differ; empty without dims."""
    parts = []
    for key in ("d_qk", "d_vo"):
        dims = per_layer(spec, key) or ([spec[key]] if isinstance(spec.get(key), int) else [])
        if dims:
            same = min(dims) == max(dims)
            spread = f"{min(dims):g}" if same else f"{min(dims):g} to {max(dims):g} (mean {sum(dims) / len(dims):.3g})"
            parts.append(f"{key} = {spread}")
    if parts and spec.get("window"):
        parts.append(window_text(spec["window"], spec.get("sinks", 0), spec.get("window_bits", 16)))
    if parts and spec.get("k_codes"):
        bits = [fmean(Layout(tuple(layer)).bits for layer in spec[key] if layer) for key in ("k_codes", "v_codes")]
        parts.append("all others codes of {:.1f} and {:.1f} bits a dim".format(*bits))
    if parts and spec.get("whole_layers"):
        parts.append(f"{len(spec['whole_layers'])} layers as the teacher's")
    return ", ".join(parts)


def window_text(window: int, sinks: int, bits: int = 16) -> str:
    """Which tokens are met whole."""
    which = f"the newest {window} tokens{f' and the first {sinks}' if sinks else ''} whole"
    return which if bits == 16 else f"{which}, in {bits} bits"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values as text of a tree of settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif key == "argv" and isinstance(value, list):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            listed = isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)
            text = ", ".join(map(str, value)) if listed else value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text
