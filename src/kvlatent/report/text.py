"""The same for a terminal and for a model card."""

import json
import re
from collections.abc import Mapping
from typing import Any

from kvlatent.report.results import Score, parse_results
from kvlatent.report.summary import (
    dims_text,
    fixed,
    flatten,
    headline_of,
    mib,
    milliseconds,
    notes_on,
    perplexity_cell,
    score_ratio,
    summary_of,
)


def summary_table(results: Mapping[str, Any]) -> str:
    """Return the report's summary as aligned plain text for a terminal.

    Args:
        results: The content of `results.json`; sections may be absent.

    Returns:
        Headline, teacher against student, and the perplexity of every model; without a final newline.

    Raises:
        UserError: A section has the wrong type.
    """
    parsed = parse_results(results, "the given object")
    blocks = [headline] if (headline := headline_of(parsed)) else []
    if metrics := summary_of(parsed):
        blocks.append(
            _aligned(
                ["", "teacher", "student", "ratio", ""],
                [[m.label, m.teacher.text, m.student.text, m.ratio.text, m.better] for m in metrics],
            )
        )
    if len(parsed.evaluate.models) > 2:
        teacher = parsed.evaluate.models.get("teacher", Score())
        rows = [
            [name, str(perplexity_cell(score)), str(score_ratio(score, teacher)), fixed(score.bits_per_byte, 3)]
            for name, score in parsed.evaluate.models.items()
        ]
        blocks.append(_aligned(["", "perplexity", "ratio", "bits per byte"], rows))
    return "\n\n".join(blocks) or "no measurements yet"


def bench_table(bench: Mapping[str, Any]) -> str:
    """Return the rows of `kvlatent bench` as aligned plain text, and the longest contexts where they were asked for."""
    header = ["model", "dtype", "batch", "context", "cache MiB", "TTFT ms", "TPOT ms", "range", "tokens/s", "roofline"]
    rows = [
        [
            row["model"],
            row["dtype"],
            str(row["batch"]),
            f"{row['context']:,}",
            mib(row["cache_bytes"]),
            milliseconds(row["ttft_ms"]),
            milliseconds(row["tpot_ms"]),
            " – ".join(map(milliseconds, row["tpot_ms_range"])),
            f"{row['tokens_per_s']:.1f}",
            f"{row['roofline_share']:.0%}",
        ]
        for row in bench["rows"]
    ]
    blocks = [_aligned(header, rows)]
    if "n_max" in bench:
        found = [[x["model"], x["dtype"], str(x["batch"]), f"{x['context']:,}"] for x in bench["n_max"]]
        head = ["model", "dtype", "batch", f"longest context in {bench['memory_gib']:g} GiB"]
        blocks.append(_aligned(head, found))
    return "\n\n".join(blocks)


def _aligned(header: list[str], rows: list[list[str]]) -> str:
    """Columns of text: words to the left, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    words = {0} | {column for column, name in enumerate(header) if not name}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def model_card(results: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """Return a Hugging Face `README.md` for a student; it states only numbers that `results` holds.

    Args:
        results: The content of `results.json`; sections may be absent. `base_model`, where given, names the teacher on
            the hub; otherwise `model` does, if it looks like `owner/name`. `license` is passed on.
        spec: The LatentSpec as stored in `config.json`.

    Returns:
        YAML front matter and Markdown.

    Raises:
        UserError: A section of `results` has the wrong type.
    """
    parsed = parse_results(results, "the given object")
    hub_id = parsed.base_model or (parsed.model if re.fullmatch(r"[\w-]+/[\w.-]+", parsed.model or "") else None)
    if hub_id and hub_id.endswith(".gguf"):
        hub_id = None
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- kvlatent", "- kv-cache"]
    if hub_id:
        front.append(f"base_model: {json.dumps(hub_id, ensure_ascii=False)}")
    if parsed.license:
        front.append(f"license: {json.dumps(parsed.license, ensure_ascii=False)}")
    teacher = hub_id or parsed.model
    dims = dims_text(spec)
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {_markdown(parsed.title or 'A student with a smaller KV cache')}",
        "",
        f"{headline_of(parsed)}." if headline_of(parsed) else "No measurements came with this model.",
        "",
        f"This decoder language model was made{f' from `{_code(teacher)}`' if teacher else ''} with kvlatent: its "
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
    if metrics := summary_of(parsed):
        lines += ["", "## Measured", "", "| | teacher | this model | ratio | |", "|---|--:|--:|--:|---|"]
        for m in metrics:
            name = ", ".join(filter(None, (m.label, m.condition)))
            lines.append(f"| {_markdown(name)} | {m.teacher} | {m.student} | {m.ratio} | {m.better} |")
    measured = [_markdown(note) for note in notes_on(parsed)]
    measured += [f"{key}: `{_code(value)}`" for key, value in flatten(parsed.record)]
    measured += [f"{step}: {fixed(seconds, 1)} s" for step, seconds in parsed.seconds.items()]
    if measured:
        lines += ["", "## How the numbers were obtained", "", *(f"- {item}" for item in measured)]
    if parsed.recipe:
        lines += ["", "The recipe:", "", "```json", json.dumps(parsed.recipe, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")
