"""Curves of rotary frequencies have the values of their formulas."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent import cli
from kvlatent.evaluation.config import RopePlotConfig
from kvlatent.evaluation.rope_plot import cosine_integral, frequency_lists, limit, quarters_of, rope_plot
from kvlatent.model.rope import inverse_frequencies, plain_exponents, stability


def test_the_cosine_integral_has_its_tabulated_values() -> None:
    x = torch.tensor([0.5, 1.0, 2.0, 5.0, 10.0, 50.0], dtype=torch.float64)
    known = [-0.17778407880661, 0.33740392290097, 0.42298082877486, -0.19002974965664, -0.04545643300446,
             -0.00562838632411]  # fmt: skip
    torch.testing.assert_close(cosine_integral(x), torch.tensor(known, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_the_limit_is_that_of_many_dims(theta: float) -> None:
    distances = torch.tensor([1, 7, 100, 1000])
    many = stability(inverse_frequencies(plain_exponents(2**18), d=2**18, theta=theta), distances)
    torch.testing.assert_close(limit(distances, theta), many, rtol=0, atol=1e-3)


def test_shares_of_negative_values_are_counted(tmp_path: Path) -> None:
    told = rope_plot(RopePlotConfig(dims=(16,), distance=512, out=tmp_path / "rope.svg"))
    assert "</svg>" in (tmp_path / "rope.svg").read_text()
    by_name = {row["frequencies"]: row for row in told["curves"]}
    values = [
        sum(torch.cos(torch.tensor(x * 10000 ** (-e / 16), dtype=torch.float64)).item() for e in range(0, 16, 2)) / 8
        for x in range(1, 513)
    ]
    assert by_name["plain, d = 16"]["negative"] == sum(y < 0 for y in values) / 512
    assert by_name["plain, d = 16"]["least"] == pytest.approx(min(values), abs=1e-4)
    assert by_name["aware, d = 16"]["negative"] < by_name["plain, d = 16"]["negative"]  # the paper's claim, here


def test_a_models_own_frequencies_are_drawn(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llama-llama3-rope", "gemma3_text"):
        teacher = tiny_teacher(name)
        teacher.config.save_pretrained(tmp_path / name)
        _, theta, lists = frequency_lists(RopePlotConfig(model=str(tmp_path / name / "config.json"), dims=(8,)))
        assert theta == 10000.0 and len(lists["kept"]) == 8
        rotary = teacher.model.rotary_emb
        own = rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq
        torch.testing.assert_close(torch.tensor(lists["kept"]), own)
    out = tmp_path / "rope.png"
    assert cli.main(["rope-plot", "--model", str(tmp_path / name), "--dims", "8", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head_dim"] == 16 and out.stat().st_size > 1000
    assert cli.main(["rope-plot", "--dims", "8", "--out", str(tmp_path / "b.png")]) == 0
    assert "limit of many dims" in capsys.readouterr().out
    assert cli.main(["rope-plot", "--dims", "6", "--out", str(tmp_path / "c.png")]) == 2
    assert "multiples of 4" in capsys.readouterr().err


def test_quarters_are_the_fastest_pairs_first() -> None:
    quarters = quarters_of((1.0, 0.5, 0.1, 0.0), torch.tensor([3]))
    assert [round(float(y), 6) for y in quarters.values()] == [-0.989992, 0.070737, 0.955336, 1.0]
