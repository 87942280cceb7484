"""Tiny models, texts and runs for harnesses, and commands in processes forked from one that has imported everything.

A forked command takes little more than its own work, tens of milliseconds, so that thousands can be tried.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import contextlib
import hashlib
import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gguf import GGUFReader  # noqa: F401  # this import and the next ones are for the forked processes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.healing import heal
from kvlatent.healing.state import save_state

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # which would be a thread
MEMORY = 2 * 2**30
SECONDS = 60.0
WORDS = ["river", "stone", "bread", "lamp", "morning", "harbour", "seven", "quiet", "under", "between", "carries",
         "the", "and", "of", "a", "in", "it", "was"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALIBRATION = ["--tokens", "256", "--block-size", "32"]
NEAR = ["--window", "8", "--sinks", "2"]
DIMS = ["--d-qk", "8", "--d-vo", "8"]
HEALING = ["--block-size", "32", "--stage1-tokens", "128", "--stage2-tokens", "128", "--lora-rank", "2"]


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """As shells count: 128 + a signal."""
    said: str
    """On stderr."""
    answer: str
    """On stdout."""
    seconds: float
    memory: int
    """The most bytes it had resident, those of the imports included."""
    stopped: str = ""
    """What it was killed for, time or memory."""


def start(work: Callable[[], object], folder: Path) -> int:
    """Fork a process that does `work` in `folder`, whose temporary files and cache lie there too; returns its id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code: object = 1
    try:
        os.setsid()
        torch.set_num_threads(1)  # makes its pool anew after the fork, before threads would at once
        tqdm.set_lock(threading.RLock())  # the one of several processes would stay locked by one that is killed
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        os.chdir(folder)
        os.environ |= {"TMPDIR": f"{folder}.tmp", "XDG_CACHE_HOME": f"{folder}.cache"}
        os.makedirs(os.environ["TMPDIR"], exist_ok=True)
        code = work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)


def start_command(argv: Sequence[str], folder: Path) -> int:
    """Fork a `kvlatent` command."""

    def work() -> int:
        sys.argv = ["kvlatent", *argv]
        return cli.main(argv)

    return start(work, folder)


def wait(process: int, folder: Path, began: float) -> Ended:
    """Wait for a forked process to end, and end it when it takes more than `SECONDS` or `MEMORY`."""
    stopped = ""
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        with contextlib.suppress(OSError, IndexError):
            resident = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            over = "memory" if resident > MEMORY else "time" if time.monotonic() - began > SECONDS else ""
            if over and not stopped:
                stopped = over
                os.killpg(process, 9)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    said, answer = (Path(f"{folder}.{name}").read_text(errors="replace") for name in ("stderr", "stdout"))
    if usage.ru_maxrss * 1024 > MEMORY:
        stopped = stopped or "memory"
    seconds = time.monotonic() - began
    return Ended(code if code >= 0 else 128 - code, said, answer, seconds, usage.ru_maxrss * 1024, stopped)


def command(argv: Sequence[str], folder: Path) -> Ended:
    """Run a `kvlatent` command in `folder` to its end."""
    began = time.monotonic()
    return wait(start_command(argv, folder), folder, began)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits as SmolLM2's, so that GGUF files of it can be read back."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<eos>", "<|im_start|>", "<|im_end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator([" ".join(WORDS) * 3] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def teacher(folder: Path, shard: str = "1GB") -> None:
    """Write a random Llama of 2 layers, with 4 query heads of 16 dims and 2 KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)


def text(path: Path, seed: int) -> None:
    """Write random words."""
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(800)))


def recipe(root: Path) -> dict[str, object]:
    """A recipe of two students, one of them healed."""
    heal = {"stage1_tokens": 64, "stage2_tokens": 64, "lora_rank": 2, "batch_size": 2}
    return {
        "title": "Tiny",
        "model": f"{root}/teacher",
        "block_size": 32,
        "calibration": {"text": [f"{root}/train.txt"], "tokens": 128},
        "training": {"text": [f"{root}/train.txt"]},
        "held_out": {"text": [f"{root}/other.txt"], "tokens": 128},
        "students": [
            {"preset": "portable", "d_qk": 8, "d_vo": 8, "heal": heal},
            {"preset": "paper", "d_qk": 8, "d_vo": 8},
        ],
        "bench": {"context": 16, "batch": 1, "new_tokens": 2},
        "generate": {"prompts": ["river"], "max_new_tokens": 2},
    }


def healing(root: Path, out: str) -> list[str]:
    """The command that heals the portable student."""
    return ["heal", f"{root}/portable", "--teacher", f"{root}/teacher", "--text", f"{root}/train.txt", *HEALING,
            "--out", out]  # fmt: skip


def inputs(root: Path) -> None:
    """Fill a new folder with one of everything that commands read."""
    text(root / "train.txt", 1)
    text(root / "other.txt", 2)
    (root / "short.txt").write_text(" ".join(WORDS * 3))
    (root / "tiny.yaml").write_text(json.dumps(recipe(root), indent=1))
    work = root / "work"
    work.mkdir()
    os.environ["XDG_CACHE_HOME"] = f"{work}.cache"

    def do(*argv: str) -> None:
        """In this process, which so imports, compiles and caches all that the forked ones would each do again."""
        with contextlib.redirect_stdout(sys.stderr):
            assert cli.main(argv) == 0, argv

    def killed() -> int:
        """A healing that ends after its third saved state."""
        saves = 0

        def counted(*arguments: Any) -> None:
            nonlocal saves
            save_state(*arguments)
            saves += 1
            if saves == 3:
                os._exit(9)

        with patch.object(heal, "save_state", counted):
            return cli.main([*healing(root, f"{root}/unfinished/out"), "--save-minutes", "0"])

    train = ["--text", f"{root}/train.txt", *CALIBRATION]
    teacher(root / "teacher")
    teacher(root / "sharded", shard="50KB")
    do("convert", f"{root}/teacher", *train, *DIMS, *NEAR, "--out", f"{root}/student")
    do("convert", f"{root}/teacher", *train, *DIMS, *NEAR, "--bits", "4", "--out", f"{root}/coded")
    do("convert", f"{root}/teacher", *train, *DIMS, "--preset", "portable", "--out", f"{root}/portable")
    do("calibrate", f"{root}/teacher", *train, *NEAR, "--out", f"{root}/stats")
    do("plan", f"{root}/teacher", "--stats", f"{root}/stats", "--budget", "0.5", "--out", f"{work}/plan.png")
    do("export", f"{root}/teacher", "--to", "gguf", "--out", f"{root}/teacher.gguf")
    do("export", f"{root}/portable", "--to", "stock", "--out", f"{work}/stock")
    do("info", f"{root}/teacher.gguf")
    do("run", f"{root}/tiny.yaml", "--out", f"{root}/run")
    do("compress-prompt", f"{root}/teacher", "--prompt", f"{root}/short.txt")
    for student in ("student", "coded"):
        do("generate", f"{root}/{student}", "--prompt", "river " * 9, "--chat", "--max-new-tokens", "2")
    ended = wait(start(killed, work), work, time.monotonic())
    assert ended.code == 9, ended


def marks(out: Path) -> dict[str, str]:
    """What must be the same every time that an output is made: its files, with the content of those without times."""
    found = {}
    for file in [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.name == "metrics.jsonl":  # losses, without seconds
            lines = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([[line[key] for key in ("stage", "step", "loss")] for line in lines]).encode()
        elif (
            file.name.endswith((".html", "results.json", "seconds.json", "bench.json", "record.json", "kvlatent.json"))
            or file.name == "README.md"
        ):
            content = b""
        found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()[:16]
    return found
