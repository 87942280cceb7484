"""Stage 1 streamed against all layers at once: peak memory by depth, and time.

    python benchmarks/streaming.py [--layers 4 8 16] [--steps 6]

Every case runs in its own process on a random Llama. Peak memory is the process's anonymous memory (sampled) above
what it has before training: the models' own weights stand for the host, everything else for the device. One case
runs after the other; the two forms of a depth are neighbours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HIDDEN, FFN, VOCABULARY, BLOCK = 576, 1536, 1024, 256


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """Sample this process's anonymous memory for the body of a `with`: a list of what it was before and at its peak."""
    found = [anonymous_bytes()] * 2
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[1] = max(found[1], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def one(layers: int, stream: bool, steps: int) -> None:
    """Heal a random model and print what it took."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvlatent.compress.convert import convert
    from kvlatent.healing.config import HealConfig
    from kvlatent.healing.heal import heal

    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=FFN, vocab_size=VOCABULARY, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=BLOCK,
        )
    ).eval()  # fmt: skip
    student = convert(teacher, preset="paper", d_qk=32, d_vo=32)
    ids = torch.randint(VOCABULARY, (2 * steps, BLOCK))
    config = HealConfig(stage1_tokens=ids.numel(), batch_size=2, stream_layers=stream)
    with tempfile.TemporaryDirectory() as folder, watched() as memory:
        began = time.monotonic()
        heal(student, teacher, ids, Path(folder, "work"), config)
        seconds = time.monotonic() - began
    print(
        json.dumps({"layers": layers, "stream": stream, "peak_mb": (memory[1] - memory[0]) / 1e6, "seconds": seconds})
    )


def main() -> None:
    """Run every case and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one[0], bool(arguments.one[1]), arguments.steps)
        return
    print("| layers | at once, peak MB | streamed, peak MB | at once, s | streamed, s | time ratio |")
    print("|--:|--:|--:|--:|--:|--:|", flush=True)
    for layers in arguments.layers:
        rows = []
        for stream in (0, 1):
            command = [sys.executable, __file__, "--steps", str(arguments.steps), "--one", str(layers), str(stream)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        together, streamed = rows
        print(
            f"| {layers} | {together['peak_mb']:.0f} | {streamed['peak_mb']:.0f} | {together['seconds']:.1f} "
            f"| {streamed['seconds']:.1f} | {streamed['seconds'] / together['seconds']:.2f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
