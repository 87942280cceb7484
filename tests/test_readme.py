"""The Python example in the README runs as it stands, and the public API is what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kvlatent

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_its_student_loads(tmp_path: Path) -> None:
    example, loading, *_ = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert "from kvlatent import" in example and 'from_pretrained("healed")' in loading
    again = (
        "import kvlatent\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(AutoModelForCausalLM.from_pretrained('healed').config.latent)"
    )
    ran = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ, capture_output=True, text=True)
        for code in (example, again)
    ]
    assert [done.returncode for done in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    ratio = re.fullmatch(r"perplexity x (\d+\.\d+), at half the cache\n", ran[0].stdout)
    assert ratio is not None and 0.5 < float(ratio[1]) < 2
    assert "'d_qk': [8, 8]" in ran[1].stdout


def test_every_public_name_is_loaded_from_where_it_says() -> None:
    assert sorted(kvlatent.PUBLIC) == sorted(kvlatent.__all__)
    for name, module in kvlatent.PUBLIC.items():
        assert getattr(kvlatent, name) is vars(sys.modules[module])[name]
