"""llama.cpp as the tests use it: the prebuilt engine in `xllamacpp`, in a process of its own, since it logs to fd 2."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODE = """
import json, os, sys, time, urllib.request
import xllamacpp
job = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = job["path"], job["context"], 1
params.warmup = params.fit_params = False
params.verbosity, params.port = 5, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
kind = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + job["cache"])
params.cache_type_k = params.cache_type_v = kind
flash = "ENABLED" if job["flash"] else "DISABLED"
params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + flash)
server = xllamacpp.Server(params)
answers = []
for request in job["requests"]:
    # The token that is sampled plays no part; a plain ASCII one keeps the answer from being held back as half a letter.
    fixed = {"max_tokens": 1, "temperature": 0, "logit_bias": [[job["ascii"], 1000]]}
    answers.append(server.handle_completions({**fixed, **request}))
posted = []
for path, body in job["posts"]:
    url = server.listening_address + path
    posted.append(json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()))))
print(json.dumps([answers, posted]), flush=True)
time.sleep(0.5)  # for the engine's log, which another thread writes
os._exit(0)  # destroying a server that has hardly started can wait for ever
"""


def run(
    path: Path,
    requests: list[dict[str, Any]] | None = None,
    *,
    posts: list[tuple[str, dict[str, Any]]] | None = None,
    context: int = 256,
    cache: str = "F32",
    flash: bool = False,
    ascii_token: int = 33,
    threads: int = 1,
) -> tuple[list[Any], list[Any], str]:
    """Load a GGUF file, ask, and return the completions, the answers to posts, and the engine's log."""
    job = {
        "path": str(path), "requests": requests or [], "posts": posts or [], "context": context, "cache": cache,
        "flash": flash, "ascii": ascii_token, "threads": threads,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CODE], input=json.dumps(job), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers, posted = json.loads(done.stdout.splitlines()[-1])
    return answers, posted, done.stderr


def top_log_probs(path: Path, ids: list[int], *, top: int, **options: Any) -> tuple[list[dict[int, float]], str]:
    """Teacher-forced log-probabilities of the likeliest tokens after every prefix, by token, and the engine's log."""
    prefixes = [ids[:end] for end in range(1, len(ids) + 1)]
    answers, _, log = run(path, [{"prompt": prefix, "logprobs": top} for prefix in prefixes], **options)
    entries = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
    return [{entry["id"]: entry["logprob"] for entry in of_prefix} for of_prefix in entries], log


def log_probs(path: Path, ids: list[int], *, vocabulary: int, **options: Any) -> Tensor:
    """The same of every token, (seq, vocabulary)."""
    rows, _ = top_log_probs(path, ids, top=vocabulary, **options)
    assert all(len(row) == vocabulary for row in rows)
    return torch.tensor([[row[token] for token in range(vocabulary)] for row in rows])


def cache_mib(log: str) -> list[float]:
    """MiB of every KV cache that the engine made, as its log says, rounded to hundredths."""
    return [float(size) for size in re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log)]
