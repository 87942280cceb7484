"""`eval`, `bench`, `generate` and `report`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.data.blocks import batch_size_for, check_held_out
from kvlatent.data.sources import read_text
from kvlatent.errors import UserError
from kvlatent.evaluation.bench import benchmark, n_max_of
from kvlatent.evaluation.perplexity import (
    Perplexity,
    TaskScore,
    compare,
    lm_eval_tasks,
    needle,
    paired_test,
    perplexity,
)
from kvlatent.evaluation.report.page import bench_page, write_report
from kvlatent.files import new_folder
from kvlatent.model.checkpoints import load_model, record_of
from kvlatent.model.graft import graft
from kvlatent.model.loading import load_config, load_tokenizer

NEEDLE_CONTEXTS, NEEDLE_TRIALS = (1024, 2048, 4096), 10


def evaluate_models(
    model: str,
    *,
    against: str | None,
    text: Sequence[str],
    tokens: int,
    block_size: int,
    with_needle: bool,
    tasks: Sequence[str],
    limit: int | None = None,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Perplexity and bits per byte of a model on held-out text, a needle test and lm-eval tasks, beside another's.

    With another model, every metric of a task comes with a test on the samples that both answered,
    under `paired`: its difference (model less the other), the standard error of that, and the p-value.

    Raises:
        UserError: The text was used for calibration or training, nothing was asked for, or a model can't be used.
    """
    if not (text or with_needle or tasks):
        raise UserError("nothing to evaluate on: give --text, --needle or --tasks")
    names = [model] if against is None else [model, against]
    configs = [load_config(name) for name in names]
    tokenizer = load_tokenizer(model)
    if against is not None and load_tokenizer(against).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{model} and {against} have different tokenizers; perplexities can't be compared")
    blocks = None
    if text:
        blocks = read_text(text, tokenizer, tokens=tokens, block_size=block_size, seed=seed)
        for name in names:
            check_held_out(record_of(name).get("fingerprints", ()), blocks)
    positions = min(config.max_position_embeddings for config in configs)
    contexts = [context for context in NEEDLE_CONTEXTS if context <= positions] or [positions]
    scores: list[Perplexity] = []
    answers: list[dict[str, TaskScore]] = []
    entries: list[dict[str, Any]] = []
    for name in names:
        loaded, _ = load_model(name, device=device, dtype=dtype)
        entry: dict[str, Any] = {"model": name}
        if blocks is not None:
            size = batch_size_for(block_size)
            scores.append(perplexity(loaded, blocks.ids, text_bytes=blocks.bytes, batch_size=size))
            entry |= scores_of(scores[-1])
        if with_needle:
            entry["needle"] = {
                str(context): needle(loaded, tokenizer, context=context, trials=NEEDLE_TRIALS, seed=seed)
                for context in contexts
            }
        if tasks:
            answers.append(lm_eval_tasks(loaded, tokenizer, tasks, limit=limit, include_path=None))
            entry["tasks"] = {task: score.metrics for task, score in answers[-1].items()}
        entries.append(entry)
        del loaded
    result = entries[0]
    if blocks is not None:
        result |= {"text": list(blocks.sources), "tokens": blocks.ids.numel(), "bytes": blocks.bytes}
    if against is not None:
        result["against"] = entries[1]
        if scores:
            ratio = compare(scores[1], scores[0])
            result |= {"perplexity_ratio": ratio.perplexity_ratio, "perplexity_ratio_stderr": ratio.stderr}
        if answers:
            mine, theirs = answers
            result["paired"] = {
                task: {
                    metric: paired_test(theirs[task].samples[metric], samples)._asdict()
                    for metric, samples in score.samples.items()
                    if metric in theirs[task].samples and len(samples) > 1
                }
                for task, score in mine.items()
            }
    return result


def scores_of(score: Perplexity) -> dict[str, Any]:
    """What results say of a perplexity."""
    return {
        "perplexity": score.perplexity,
        "perplexity_stderr": score.perplexity_stderr,
        "bits_per_byte": score.bits_per_byte,
        **({"perplexity_at": score.by_position} if len(score.by_position) > 1 else {}),
    }


def benchmark_models(
    model: str,
    *,
    against: str | None,
    contexts: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    new_tokens: int,
    repeats: int,
    synthetic: bool,
    own: bool,
    memory: float | None,
    out: Path | None,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Cache bytes, TTFT, TPOT, throughput and roofline of a model, over a grid, in turns with another's.

    Returns:
        The first cell's row, the other model's under `against`, all cells under `rows`, and under `n_max` the longest
        contexts that fit in `memory` GiB.

    Raises:
        UserError: A size is out of range, a model can't be used, or `own` asks for a model that can't be grafted.
    """
    if model == against:
        raise UserError(f"--against must be another model; got {model} twice")
    if own and against is None:
        raise UserError("--own measures the model of --against on our path; give --against")
    if not (contexts and batches):
        raise UserError("give at least one --context and one --batch")
    if memory is not None and memory <= 0:
        raise UserError(f"--memory must be positive; got {memory}")
    names = [model] if against is None else [model, against]
    for name in names:
        load_config(name)
    rows: list[dict[str, Any]] = []
    n_max: list[dict[str, Any]] = []
    with new_folder(out) if out is not None else nullcontext() as folder:
        for dtype in dtypes:
            models = {name: load_model(name, device=device, dtype=dtype)[0] for name in names}
            if own and against is not None:
                models[f"{against} (our path)"] = graft(models[against], share=True)
            for batch in batches:
                for context in contexts:
                    sizes = {"context": context, "batch": batch, "new_tokens": new_tokens, "repeats": repeats}
                    rows += benchmark(models, **sizes, synthetic=synthetic, seed=seed)
                if memory is not None:
                    n_max += [
                        {"model": name, "batch": batch, **n_max_of(loaded, memory=int(memory * 2**30), batch=batch)}
                        for name, loaded in models.items()
                    ]
            del models
        result = rows[0] | ({} if against is None else {"against": rows[1]}) | {"rows": rows}
        if n_max:
            result |= {"memory_gib": memory, "n_max": n_max}
        if folder is not None:
            (folder / "bench.json").write_text(json.dumps(result, indent=2))
            (folder / "bench.html").write_text(bench_page(result), encoding="utf-8", errors="backslashreplace")
            result |= {"out": str(out)}
    return result


def generate_text(
    model: str, prompt: str, *, max_new_tokens: int, chat: bool, device: str, dtype: str, seed: int
) -> dict[str, Any]:
    """Let a model continue a prompt greedily.

    Raises:
        UserError: The prompt is empty, the model can't be used, or it has no chat template where one is asked for.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least a word")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    load_config(model)
    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    if chat and not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; leave --chat out")
    torch.manual_seed(seed)
    began = time.monotonic()
    completion, new_tokens = complete(loaded, tokenizer, prompt, max_new_tokens, chat=chat)
    seconds = time.monotonic() - began
    return {"model": model, "prompt": prompt, "completion": completion, "new_tokens": new_tokens, "seconds": seconds}


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> tuple[str, int]:
    """Return the greedy continuation as text, and its number of tokens."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # the last three only when sampling
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **plain)
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def report_runs(runs: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """Write one page about run folders, into the first of them unless `out` says where."""
    if not runs:
        raise UserError("no run folder given; expected at least one folder with results.json")
    return {"out": str(write_report(runs, out or runs[0] / "report.html")), "runs": [str(run) for run in runs]}
