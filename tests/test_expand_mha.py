"""A model with a KV head for every query head says what the model with grouped heads says."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import load_model

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "expand_mha.py"))


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "qwen2", "qwen3"])
def test_logits_stay_and_every_query_head_has_its_own_keys(
    name: str, tiny_teacher: Callable[[str], PreTrainedModel]
) -> None:
    teacher = tiny_teacher(name)
    wide: Any = SCRIPT["expanded"](teacher)
    assert wide.config.num_key_value_heads == 4 > teacher.config.num_key_value_heads
    assert wide.model.layers[1].self_attn.k_proj.weight.shape[0] == 4 * 16
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (wide(ids).logits - teacher(ids).logits).abs().max().item()
    # Equal sums of equal numbers; kernels for other widths may add in another order on other machines.
    assert difference <= 1e-5 * teacher(ids).logits.abs().max().item()


def test_the_script_writes_what_a_recipe_can_name(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")

    def ran(model: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["expand_mha.py", str(model), "--out", f"{tmp_path}/wide"])
        code: int = SCRIPT["main"]()
        return code

    assert ran(tmp_path / "teacher") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kv_heads"], told["expanded"]) == (2, 4) and told["largest_logit_difference"] < 1e-4
    assert load_model(f"{tmp_path}/wide")[0].config.num_key_value_heads == 4
    assert ran(tmp_path / "teacher") == 2 and "exists" in capsys.readouterr().err
    (tmp_path / "wide").rename(tmp_path / "done")
    assert ran(tmp_path / "done") == 2 and "nothing to expand" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()
