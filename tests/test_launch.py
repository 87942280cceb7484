"""Two processes follow the loss curve of one, data parallel or sharded, and `accelerate launch -m kvlatent` works."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.model.checkpoints import save_checkpoint

pytestmark = pytest.mark.slow

LAUNCH = {
    "ddp": ["--multi_gpu"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
}
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""And float32, also on a machine that multiplies bfloat16, whose rounding depends on the batch."""
SCRIPT = """
import sys, json
from pathlib import Path
import torch
from kvlatent.healing.heal import heal
from kvlatent.healing.config import HealConfig
from transformers import AutoModelForCausalLM
import kvlatent
folder, work, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
blocks = torch.load(folder / "blocks.pt")
answers = torch.load(folder / "answers.pt") if options.pop("answers", False) else None
stop = options.pop("stop", None)
if stop:
    from kvlatent.healing import heal as module
    class Interrupted(list):
        steps = 0
        def __bool__(self):
            Interrupted.steps += 1
            return Interrupted.steps == stop
    from contextlib import contextmanager
    @contextmanager
    def interruptible():
        yield Interrupted()
    module.interruptible = interruptible
resume = options.pop("resume", False)
teacher, student = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("teacher", "student"))
config = HealConfig(stage1_tokens=64 * 4, stage2_tokens=64 * 4, lora_rank=4, lora_alpha=8, **options)
try:
    healed = heal(student, teacher, blocks, work, config, resume=resume, answers=answers)
except KeyboardInterrupt:
    sys.exit(0)
from accelerate import PartialState
if PartialState().is_main_process:
    healed.save_pretrained(work / "healed")
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture
def folder(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], tmp_path: Path
) -> Path:
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    tiny_student("llama").save_pretrained(tmp_path / "student")
    generator = torch.Generator().manual_seed(3)
    torch.save(torch.randint(1, 260, (48, 16), generator=generator), tmp_path / "blocks.pt")
    torch.save(torch.rand(48, 16, generator=generator) < 0.3, tmp_path / "answers.pt")
    (tmp_path / "heal_it.py").write_text(SCRIPT)
    return tmp_path


def heal_it(folder: Path, work: str, processes: int, *, sharded: bool = False, **options: Any) -> None:
    environment = os.environ | ONE_THREAD | {"ACCELERATE_USE_CPU": "true"} | (SHARDED if sharded else {})
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(folder / "heal_it.py"), str(folder),
         str(folder / work), json.dumps(options)],
        capture_output=True, text=True, timeout=1500, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def metrics(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(two: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
    for key in ("stage", "step", "tokens", "lr"):
        assert [line[key] for line in two] == [line[key] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-3)
    for a, b in zip(two, one, strict=True):
        assert a.get("layer_loss", []) == pytest.approx(b.get("layer_loss", []), rel=1e-3)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("ddp", {"train": ["attention", "maps", "norms"]}),
        ("ddp", {"answers": True, "accumulate": 2, "batch_size": 1, "loss": "mix"}),
        ("ddp", {"stream_layers": True}),
        ("fsdp2", {"train": ["attention", "maps", "norms"]}),
        ("fsdp2", {"checkpointing": True, "clip": 1e-2}),
    ],
    ids=["ddp", "ddp, answers", "ddp, streamed", "fsdp2", "fsdp2, checkpointing"],
)
def test_two_processes_follow_one_of_twice_the_batch(folder: Path, how: str, options: dict[str, Any]) -> None:
    options = {"batch_size": 2, **options}
    heal_it(folder, "two", 2, sharded=how == "fsdp2", **options)
    heal_it(folder, "one", 1, **{**options, "batch_size": 2 * options["batch_size"]})
    assert_same_curve(metrics(folder / "two"), metrics(folder / "one"))
    wanted, found = (AutoModelForCausalLM.from_pretrained(folder / w / "healed").state_dict() for w in ("one", "two"))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_stopped_and_resumed_follow_the_same_curve(folder: Path, sharded: bool) -> None:
    heal_it(folder, "whole", 2, sharded=sharded)
    heal_it(folder, "stopped", 2, sharded=sharded, stop=6)
    assert len(metrics(folder / "stopped")) == 6
    heal_it(folder, "stopped", 2, sharded=sharded, resume=True)
    assert_same_curve(metrics(folder / "stopped"), metrics(folder / "whole"))


@pytest.mark.parametrize("how", LAUNCH)
def test_accelerate_launches_the_verb(folder: Path, byte_tokenizer: PreTrainedTokenizerFast, how: str) -> None:
    byte_tokenizer.save_pretrained(folder / "teacher")
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    save_checkpoint(student, byte_tokenizer, folder / "start", record={"teacher": str(folder / "teacher")})
    (folder / "text.txt").write_text("the quiet river carries a lamp under the stone\n" * 60)
    command = [
        "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", "0", *LAUNCH[how], "-m", "kvlatent", "heal",
    ]  # fmt: skip

    def verb(out: str, *, batch: int, launcher: list[str]) -> Any:
        done = subprocess.run(
            [sys.executable, *launcher, str(folder / "start"), "--out", str(folder / out), "--text",
             str(folder / "text.txt"), "--stage1-tokens", "256", "--stage2-tokens", "256", "--block-size", "16",
             "--batch-size", str(batch), "--device", "cpu", "--json"],
            capture_output=True, text=True, timeout=1500, env=os.environ | ONE_THREAD,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout[done.stdout.index("{") :])

    two = verb("two", batch=1, launcher=command)
    one = verb("one", batch=2, launcher=["-m", "kvlatent", "heal"])
    assert two["tokens"] == one["tokens"] == 512
    assert_same_curve(metrics(folder / "two"), metrics(folder / "one"))
    AutoModelForCausalLM.from_pretrained(folder / "two")
    assert not list(folder.glob(".two*"))
