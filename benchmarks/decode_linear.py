"""What `kernels/cpu_linear` brings to a whole decode step: steps with it and without it, in turn, on one student.

    OMP_NUM_THREADS=1 python benchmarks/decode_linear.py smollm2 --dims 32

CPU time of the process, so that other processes on the machine take nothing from it; the step without the kernel over
the step with it, as the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from kvlatent.compress.convert import convert
from kvlatent.evaluation.bench import filled_cache
from kvlatent.kernels import cpu_linear
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE


def decode_step(model: PreTrainedModel, batch: int, context: int) -> Callable[[], float]:
    """Return a function that takes one step on a filled cache, takes it back, and says how long it took."""
    cache, token = filled_cache(model, batch=batch, tokens=context), torch.zeros(batch, 1, dtype=torch.long)

    def step() -> float:
        start = time.process_time()
        model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        spent = time.process_time() - start
        cache.crop(-1)
        return spent

    return step


@torch.no_grad()
def main() -> None:
    """Print a table row for every batch and context."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dims", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    teacher, _ = load_model(arguments.model, device="cpu")
    student = convert(teacher, preset="paper", d_qk=arguments.dims, d_vo=arguments.dims, ids=None).eval()
    fits = cpu_linear.fits
    print("| batch | context | ms with | without / with |\n|--:|--:|--:|--:|")
    for batch in (1, 4, 8):
        for context in (512, 2048):
            step, pairs = decode_step(student, batch, context), []
            for _ in range(arguments.rounds):
                pair = []
                for allowed in (fits, lambda *_: False):
                    cpu_linear.fits = allowed
                    pair.append(min(step() for _ in range(3)))
                pairs.append(pair)
            least = 1000 * min(pair[0] for pair in pairs)
            ratio = statistics.median(without / with_it for with_it, without in pairs)
            print(f"| {batch} | {context:,} | {least:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
