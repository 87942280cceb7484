"""With the base installation alone, models are converted and used; what needs an extra says which one."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

OPTIONAL = ("accelerate", "datasets", "gguf", "jinja2", "llvmlite", "lm_eval", "matplotlib", "mwparserfromhell", "peft")
RUN = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # importing any of them fails as if it were not there
from kvlatent.cli import main
for line in sys.stdin.read().splitlines():
    print(main(line.split("|")), file=sys.stderr)
"""


def test_the_base_converts_and_generates_and_the_rest_names_its_extra(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    words = ("river", "stone", "bread", "lamp", "morning", "harbour")
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=600)))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    text = "--text|text.txt|--tokens|256|--block-size|32"
    works = [
        "info|teacher",
        f"convert|teacher|--out|student|--d-qk|8|--d-vo|8|--window|8|{text}",
        "generate|student|--prompt|river|--max-new-tokens|2",
        "bench|student|--context|8|--new-tokens|2|--repeats|1",
        "doctor|student",
    ]
    needs = {
        f"heal|student|--out|healed|--stage2-tokens|64|{text.replace('--tokens|256|', '')}": "heal",
        "report|run": "report",
        "bench|student|--out|bench": "report",
        "info|model.gguf": "gguf",
        "export|student|--to|gguf|--out|student.gguf": None,  # refused before anything is needed
        "run|recipe.yaml": "heal,report",
        "eval|student|--tasks|piqa": "eval",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, input="\n".join([*works, *needs]), capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("kvlatent: ") or line in ("0", "2")]
    assert lines[: len(works)] == ["0"] * len(works), done.stderr
    said, codes = lines[len(works) :: 2], lines[len(works) + 1 :: 2]
    assert codes == ["2"] * len(needs), done.stderr
    for line, extra in zip(said, needs.values(), strict=True):
        assert extra is None or line.endswith(f"which is not installed: pip install 'kvlatent[{extra}]'"), line


@pytest.mark.parametrize("name", ["heal", "write_report"])
def test_the_api_names_the_extra_too(name: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import kvlatent; kvlatent.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'kvlatent[" in done.stderr.splitlines()[-1]
