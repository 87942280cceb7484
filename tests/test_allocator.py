"""Freed memory is kept while healing, given back afterwards, and nothing is changed where the user has chosen."""

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import torch
from pathlib import Path
from kvlatent.kernels.allocator import freed_memory_kept
def resident():
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
def grown(size):
    before = resident()
    torch.ones(size)  # freed at once
    return (resident() - before) // 1000
with freed_memory_kept() as kept:
    first, smaller = grown(50_000_000), grown(45_000_000)
print(kept, first > 150, smaller < 50, grown(50_000_000) < 50)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("chosen", "wanted"), [({}, "True True True True"), ({"MALLOC_ARENA_MAX": "2"}, "False False True True")]
)
def test_freed_memory_stays_for_the_body_alone(chosen: dict[str, str], wanted: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PROBE], env=plain | chosen, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted
