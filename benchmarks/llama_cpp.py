"""What a smaller cache buys in llama.cpp: MiB of cache, decoded tokens per second at a depth.

    kvlatent export smollm2 --to gguf --out teacher.gguf
    kvlatent export student --to gguf --out student.gguf
    python benchmarks/llama_cpp.py teacher.gguf student.gguf

One JSON object per model: MiB of float16 cache for 8,192 tokens, as llama.cpp's log says; tokens per second by its own
clock, medians of rounds in which the models take turns, since a machine's speed changes from minute to minute; medians
of the ratios to the first model within each round, with the smallest and largest. The engine is the prebuilt one in
`xllamacpp`, on two threads, with flash attention.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request

DEPTHS, NEW_TOKENS, ROUNDS, CELLS = (512, 4096, 8192), 24, 7, 8192 + 64


def serve(path: str) -> None:
    """In a process of its own: print the address, then serve until stdin closes; the log goes to stderr."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, CELLS, 1
    params.warmup = params.fit_params = False
    params.verbosity, params.port = 4, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


class Engine:
    """llama.cpp on one model."""

    def __init__(self, path: str) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, __file__, "--serve", path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def cache_mib(self) -> list[float]:
        """For 8,192 tokens, of every cache in the log."""
        self.log.seek(0)
        sizes = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells", self.log.read())
        return [round(float(size) * 8192 / int(cells), 2) for size, cells in sizes]

    def tokens_per_s(self, depth: int) -> float:
        """Speed of the tokens after a prompt of `depth`; the prompt is kept between calls."""
        prompt = [100 + (token * 7919) % 40000 for token in range(depth - NEW_TOKENS)]
        body = {"prompt": prompt, "n_predict": NEW_TOKENS, "ignore_eos": True, "temperature": 0, "cache_prompt": True}
        request = urllib.request.Request(f"{self.address}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["timings"]["predicted_per_second"]


def _spread(speeds: list[float], firsts: list[float]) -> list[float]:
    """Median, smallest and largest ratio of two models' speeds in the same round."""
    ratios = [speed / first for speed, first in zip(speeds, firsts, strict=True)]
    return [round(of(ratios), 2) for of in (statistics.median, min, max)]


def main(paths: list[str]) -> None:
    """Measure the models at `paths` in turns."""
    engines = [Engine(path) for path in paths]
    speeds: dict[int, list[list[float]]] = {depth: [[] for _ in engines] for depth in DEPTHS}
    for depth in DEPTHS:
        for engine in engines:
            engine.tokens_per_s(depth)  # reads the prompt
        for _ in range(ROUNDS):
            for measured, engine in zip(speeds[depth], engines, strict=True):
                measured.append(engine.tokens_per_s(depth))
        print(depth, speeds[depth], file=sys.stderr, flush=True)
    for at, (path, engine) in enumerate(zip(paths, engines, strict=True)):
        medians = {depth: round(statistics.median(speeds[depth][at]), 2) for depth in DEPTHS}
        ratios = {depth: _spread(speeds[depth][at], speeds[depth][0]) for depth in DEPTHS}
        found = {"model": path, "cache_mib": engine.cache_mib(), "tokens_per_s": medians, "ratio": ratios}
        print(json.dumps(found), flush=True)
        engine.process.communicate()


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "--serve" else main(sys.argv[1:])
