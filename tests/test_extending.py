"""docs/extending.md does what it says: its blocks are run, and what they add works."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from transformers import SeedOssConfig, SeedOssForCausalLM

from kvlatent.compress.convert import convert
from kvlatent.compress.methods import METHODS
from kvlatent.model.config import CONFIGS
from kvlatent.model.families import FAMILIES
from kvlatent.model.graft import spec_of
from kvlatent.model.models import MODELS

PAGE = Path(__file__).parents[1] / "docs/extending.md"


def run_blocks(heading: str) -> None:
    """Run the Python of the section under `heading`."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    space: dict[str, Any] = {"__name__": "extension"}
    for block in re.findall(r"^ *```python\n(.*?)^ *```", section, re.S | re.M):
        exec(compile(dedent(block), str(PAGE), "exec"), space)


@pytest.fixture(autouse=True)
def tables_as_before() -> Iterator[None]:
    """Take back what a page added."""
    tables: list[dict[str, Any]] = [FAMILIES, CONFIGS, MODELS, METHODS]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_a_family_is_a_row_and_two_classes(ids: torch.Tensor) -> None:
    run_blocks("Add a family")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = SeedOssConfig(vocab_size=260, hidden_size=64, intermediate_size=80, initializer_range=0.2, **sizes)
    teacher = SeedOssForCausalLM(config).eval().requires_grad_(False)
    whole = convert(teacher, d_qk=16, d_vo=16, ids=ids, window=0)
    assert type(whole).__name__ == "KVLatentSeedOssForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, teacher(ids).logits, rtol=0, atol=1e-4)
        student = convert(teacher, d_qk=8, d_vo=4, ids=ids, window=0)
        first = student(ids[:1, :20], use_cache=True)
        step = student(ids[:1, 20:21], past_key_values=first.past_key_values)
        torch.testing.assert_close(step.logits[:, -1], student(ids[:1, :21]).logits[:, -1], rtol=1e-3, atol=1e-4)


def test_a_reduction_is_a_file_and_a_row(tiny_teacher: Any, ids: torch.Tensor) -> None:
    run_blocks("Add a reduction")
    teacher = tiny_teacher("llama")
    student = convert(teacher, preset="portable", qk="slowest", d_qk=8, d_vo=8, ids=ids, window=0)
    spec = spec_of(student)
    assert spec is not None
    assert spec.inv_freq == pytest.approx(sorted(teacher.model.rotary_emb.inv_freq.tolist(), reverse=True)[-4:])
