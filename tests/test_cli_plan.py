"""`info` and `plan`: what a cache takes and where a budget goes, from a config alone or with losses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import answer
from transformers import PreTrainedModel

from kvlatent import cli
from kvlatent.model.checkpoints import RECORD


def test_info_counts_from_the_config_alone(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(folder / "student", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    teacher = answer(capsys, ["info", f"{folder}/teacher"])
    student = answer(capsys, ["info", f"{tmp_path}/bare"])
    assert teacher["cache_bytes_per_token"] == {"float32": 2 * 2 * 32 * 4, "bfloat16": 2 * 2 * 32 * 2}
    assert student["cache_bytes_per_token"]["float32"] * 2 == teacher["cache_bytes_per_token"]["float32"]
    assert (teacher["layout"], student["layout"]) == ("stock", "best")
    assert student["engines"] == ["transformers + kvlatent", "vLLM + kvlatent"]
    assert teacher["family"] == "Llama"
    assert cli.main(["info", f"{folder}/student"]) == 0
    assert "cache bytes per token" in capsys.readouterr().out


def test_a_window_shows_in_plan_convert_info_and_card(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "6", "--sinks", "2"]
    argv = [f"{folder}/teacher", "--budget", "0.5", "--bits", "16", *text]
    planned = answer(capsys, ["plan", *argv, "--out", f"{tmp_path}/plan.svg"])
    assert (planned["window"], planned["sinks"], planned["context"]) == (6, 2, 256)
    whole, latent = planned["teacher_cache_bytes_per_token"], planned["cache_bytes_per_token"]
    assert planned["cache_bytes"] == 8 * whole + 248 * latent <= 0.5 * planned["teacher_cache_bytes"] == 128 * whole
    assert planned["cache_bytes"] + 248 * whole / 32 > 128 * whole  # what one more step of dims would take
    assert "of 256 tokens, the newest 6 tokens and the first 2 whole" in (tmp_path / "plan.svg").read_text()
    assert cli.main(["plan", *argv, "--out", f"{tmp_path}/again.svg"]) == 0
    assert re.search(r"context +256", capsys.readouterr().out)

    made = answer(capsys, ["convert", *argv, "--out", f"{tmp_path}/student"])
    assert (made["d_qk"], made["d_vo"]) == (planned["d_qk"], planned["d_vo"])
    told = answer(capsys, ["info", f"{tmp_path}/student"])
    assert (told["window"], told["sinks"]) == (6, 2)
    assert told["window_bytes"] == {"float32": 8 * whole, "bfloat16": 4 * whole}
    (at_positions,) = told["cache"]
    assert (at_positions["context"], at_positions["bytes"]) == (256, planned["cache_bytes"])
    assert (told["dtype"], at_positions["whole"]) == ("float32", 8 * whole)
    added = told["parameters"] - answer(capsys, ["info", f"{folder}/teacher"])["parameters"]
    assert f"the maps to latents add {added:,} parameters" in told["step"]  # no weight has shrunk
    assert cli.main(["info", f"{tmp_path}/student"]) == 0
    assert "window bytes" in capsys.readouterr().out
    assert "the newest 6 tokens and the first 2 whole" in (tmp_path / "student" / "README.md").read_text()
    assert "window" not in answer(capsys, ["info", f"{folder}/student"])


@pytest.mark.parametrize("name", ["llama", "qwen2-mha-tied"])
def test_info_counts_parameters_as_loading_does(
    name: str, tiny_teacher: Callable[[str], PreTrainedModel], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_teacher(name).config.save_pretrained(tmp_path / "bare")
    assert answer(capsys, ["info", f"{tmp_path}/bare"])["parameters"] == tiny_teacher(name).num_parameters()


GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
    "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "sliding_window": 1024, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
"""Gemma-3-12B's text model, as its config on the hub has it."""


def test_info_of_a_config_alone_tells_where_its_cache_is_and_what_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    asked = ["--context", "512", "8192", "--memory", "40", "--batch", "1", "4"]
    told = answer(capsys, ["info", f"{tmp_path}/config.json", *asked])
    token = 2 * 8 * 256 * 2  # of one layer
    assert (told["sliding_window"], told["sliding_layers"]) == (1024, 40)
    assert told["cache"][0]["bytes"] == 512 * 48 * token
    assert told["cache"][1] == {
        "context": 8192, "bytes": (8 * 8192 + 40 * 1023) * token, "global_layers": 8 * 8192 * token,
        "sliding_layers": 40 * 1023 * token, "whole": 0,
        "keys": (8 * 8192 + 40 * 1023) * token // 2, "values": (8 * 8192 + 40 * 1023) * token // 2,
    }  # fmt: skip
    ffn, attention = 3 * 3840 * 15360, (2 * 16 + 2 * 8) * 256 * 3840
    norms = 4 * 3840 + 2 * 256
    assert told["weight_bytes"] == 2 * (262208 * 3840 + 48 * (ffn + attention + norms) + 3840)
    left = 40 * 2**30 - told["weight_bytes"]
    assert told["n_max"] == [
        {"batch": batch, "context": (left // batch - 40 * 1024 * token) // (8 * token)} for batch in (1, 4)
    ]
    assert answer(capsys, ["info", str(tmp_path)])["cache"][1] == told["cache"][1]  # of a folder that holds no more
    assert cli.main(["info", f"{tmp_path}/config.json", *asked]) == 0
    shown = capsys.readouterr().out
    assert "layers with a sliding window" in shown and "longest context in 40 GiB" in shown


def test_a_plan_of_a_config_alone_shows_the_bytes_and_says_how_to_get_the_losses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    argv = ["plan", f"{tmp_path}/config.json", "--budget", "0.5", "--context", "8192", "131072"]
    argv += ["--memory", "80", "--batch", "16", "--out", f"{tmp_path}/plan.png"]
    told = answer(capsys, argv)
    token = 2 * 8 * 256 * 2  # of one layer
    assert told["whole_layers"] == [layer for layer in range(48) if layer % 6 != 5]
    assert told["whole_layers_bytes"] == 40 * 1023 * token
    assert told["teacher_cache_bytes"] == (40 * 1023 + 8 * 8192) * token
    assert told["cache_bytes"] == told["teacher_cache_bytes"] // 2 == told["cache"][0]["bytes"]
    assert told["cache"][0]["whole"] == 8 * 132 * token
    far = (told["cache_bytes"] - told["whole_layers_bytes"] - 8 * 132 * token) / (8192 - 132)
    assert told["cache"][1]["bytes"] == pytest.approx(told["cache_bytes"] + far * (131072 - 8192))
    (longest,) = told["n_max"]
    left = 80 * 2**30 - told["student_weight_bytes"] - 16 * (40 * (1023 + 128) + 8 * (132 + 64)) * token
    assert longest["context"] == pytest.approx(left / 16 / (far * 17 / 16), rel=0.001)  # a sixteenth is reserved
    assert (
        told["student_weight_bytes"] - told["weight_bytes"] == 8 * 2 * 24 * 256 * 256 * 2
    )  # a head's latent is as wide
    assert longest["teacher_context"] == (
        (80 * 2**30 - told["weight_bytes"]) // 16 - 40 * 1024 * token
    ) // (8 * token)  # fmt: skip
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert (
        "40 layers with a sliding window stay whole" in said and "38.4% of the teacher's cache of 8,192 tokens" in said
    )
    assert said.splitlines()[-1].endswith("give MODEL as a hub id or a folder that holds them.")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_plan_says_where_the_window_takes_much_of_a_budget(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_teacher: Callable[[str], PreTrainedModel]
) -> None:
    config = tiny_teacher("llama").config
    config.max_position_embeddings = 8192
    config.to_json_file(tmp_path / "config.json")
    for window, much in ((100, False), (700, True)):  # in 8 bits, of heads with 16 dims: 17 bytes instead of 32
        argv = ["plan", f"{tmp_path}/config.json", "--budget", "0.125", "--window", str(window), "--dtype", "bfloat16"]
        assert cli.main(argv) == 0
        share = (window + 4) * 17 / 32 / (0.125 * 8192)
        told = f"The window and its sinks take {share:.0%} of these bytes. A shorter --window"
        assert (told in capsys.readouterr().out) == much


def test_a_plan_of_a_config_alone_pays_for_no_more_than_all_dims(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_teacher: Callable[[str], PreTrainedModel]
) -> None:
    tiny_teacher("llama").config.save_pretrained(tmp_path)
    argv = ["plan", str(tmp_path), "--window", "4", "--sinks", "0", "--dtype", "bfloat16", "--budget"]
    most = 2 * 2 * (1 + 32 * 8 // 8)  # 2 layers, keys and values of one latent: a size and 32 dims of 8 bits
    assert answer(capsys, [*argv, "0.9"])["cache_bytes_per_token"] == most
    share = (0.25 * 256 - 4) / 252  # of 128 numbers a token
    assert answer(capsys, [*argv, "0.25"])["cache_bytes_per_token"] == round(share * 256)
    assert answer(capsys, [*argv, "0.9", "--bits", "16"])["cache_bytes_per_token"] == round((0.9 * 256 - 4) / 252 * 256)


def test_where_all_layers_slide_there_is_no_longest_context(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_teacher: Callable[[str], PreTrainedModel]
) -> None:
    tiny_teacher("mistral").config.save_pretrained(tmp_path)
    assert answer(capsys, ["info", str(tmp_path), "--memory", "1"])["n_max"] == [{"batch": 1, "context": None}]
    assert cli.main(["info", str(tmp_path), "--memory", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "any"]
    assert answer(capsys, ["info", str(tmp_path), "--memory", "1e-4"])["n_max"] == [{"batch": 1, "context": 0}]


def test_a_plan_is_shown_drawn_and_followed(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stats, plot = tmp_path / "stats.safetensors", tmp_path / "new" / "plan.svg"
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    answer(capsys, ["calibrate", f"{folder}/teacher", *text, "--out", str(stats)])
    argv = ["plan", f"{folder}/teacher", "--budget", "0.4", "--stats", str(stats), "--out", str(plot)]
    told = answer(capsys, argv)
    assert sum(told["d_qk"]) + sum(told["d_vo"]) == 24  # 0.4 × 64 in steps of 2
    assert all(told["expected_loss"] <= loss for loss in told["alternatives"].values())
    assert "</svg>" in plot.read_text()
    plot.unlink()
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer  d_qk  bits  d_vo  bits")
    assert [line.split()[:5] for line in lines[1:3]] == [
        [str(layer), str(told["d_qk"][layer]), "16.0", str(told["d_vo"][layer]), "16.0"] for layer in (0, 1)
    ]
    convert = ["convert", f"{folder}/teacher", "--budget", "0.4", "--stats", str(stats)]
    for name, source in (("one-shot", []), ("in order", text)):
        made = answer(capsys, [*convert, *source, "--out", f"{tmp_path}/{name}"])
        assert (made["d_qk"], made["d_vo"]) == (told["d_qk"], told["d_vo"])
    assert json.loads((tmp_path / "in order" / RECORD).read_text())["steps"][0]["tokens"] == 512
    short = answer(capsys, ["plan", f"{folder}/teacher", "--budget", "1", *text, "--out", f"{tmp_path}/text.png"])
    assert short["d_qk"] == short["d_vo"] == [16, 16]
