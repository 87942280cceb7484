"""The examples run, on tiny models."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_tunes_a_converted_checkpoint(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    kind: str,
) -> None:
    pytest.importorskip("trl")
    student = tiny_student("llama")
    student.save_pretrained(tmp_path / "student")
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(tmp_path / "student")

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = {
        "sft": {"messages": [turn("user", "who keeps the light?"), turn("assistant", "the keeper")]},
        "dpo": {
            "prompt": [turn("user", "who keeps the light?")],
            "chosen": [turn("assistant", "the keeper")],
            "rejected": [turn("assistant", "the stone")],
        },
    }
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps(rows[kind]) + "\n") * 4)
    spec = importlib.util.spec_from_file_location("sft_trl", Path(__file__).parents[1] / "examples" / "sft_trl.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "out"
    example.main([str(tmp_path / "student"), str(out), f"--{kind}", str(data), "--steps", "2", "--max-length", "64"])
    tuned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(tuned).__name__ == type(student).__name__
    assert tuned.config.latent == student.config.latent
    changed = [name for name, value in tuned.state_dict().items() if not torch.equal(value, student.state_dict()[name])]
    assert any("q_proj" in name for name in changed)
    with torch.no_grad():
        assert tuned(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
