"""What `make gpu` runs, tried on a CPU with tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_all_parts_of_the_gpu_script_run_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--small", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == ["tests", "decode attention", "conversion and decoding", "healing"]
    assert "passed" in parts["tests"]["rows"][0]["tests"]
    attention = parts["decode attention"]["rows"]
    assert {(row["batch"], row["context"]) for row in attention} == {(1, 64), (2, 64), (1, 256), (2, 256)}
    assert all(row["ours, codes, us"] > 0 for row in attention)
    steps = {row["step"] for row in parts["conversion and decoding"]["rows"]}
    assert steps == {"convert, in order", "decode", "decode, static cache, compiled", "n_max"}
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n## ") == 4 and "| tiny | 2 | 256 |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "gpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr and not (tmp_path / "gpu").exists()
