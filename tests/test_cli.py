"""The command line: light help, one JSON object; bad input gives one line, exit code 2, and leaves nothing behind."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.compress.statistics import Statistics
from kvlatent.errors import UserError
from kvlatent.evaluation import evaluate as measuring
from kvlatent.evaluation.tasks import TaskScore
from kvlatent.model.checkpoints import RECORD

WORDS = ["river", "stone", "bread", "lamp", "morning", "harbour", "seven", "quiet", "under", "between", "carries"]


def write_text(path: Path, *, seed: int, words: int = 600) -> Path:
    rng = random.Random(seed)
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(words)))
    return path


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A folder with `teacher`, `student`, `train.txt` and `other.txt`; tests only read it."""
    root = tmp_path_factory.mktemp("cli")
    tiny_teacher("llama").save_pretrained(root / "teacher")
    byte_tokenizer.save_pretrained(root / "teacher")
    write_text(root / "train.txt", seed=1)
    write_text(root / "other.txt", seed=2)
    assert cli.main(convert(root, "--out", f"{root}/student")) == 0
    return root


def convert(root: Path, *changes: str) -> list[str]:
    text = ["--text", f"{root}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    dims = [] if "--budget" in changes else ["--d-qk", "8", "--d-vo", "8"]
    return ["convert", f"{root}/teacher", *text, *dims, *changes]


def healed(root: Path, *changes: str) -> list[str]:
    tokens = ["--stage1-tokens", "128", "--stage2-tokens", "128", "--block-size", "32", "--lora-rank", "2"]
    return ["heal", f"{root}/student", "--text", f"{root}/train.txt", *tokens, *changes]


def answer(capsys: pytest.CaptureFixture[str], argv: list[str]) -> Any:
    """Run in process and read stdout, all of it, as JSON."""
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys, time; began = time.process_time(); sys.argv[0] = 'kvlatent'  # as the console script has it\n"
        "from kvlatent import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "print(time.process_time() - began, heavy, file=sys.stderr)"
    )
    for argv in (["--help"], ["convert", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
        seconds, heavy = done.stderr.split(maxsplit=1)
        assert float(seconds) < 1
        assert heavy.strip() == "set()"
        assert done.stdout.startswith("usage: kvlatent")


def test_console_script_names_every_command() -> None:
    script = Path(sys.executable).with_name("kvlatent")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert f"• {command}" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvlatent", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, complaint = process.communicate(timeout=120)
    assert (process.returncode, complaint) == (1, "")


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["info"], ["info", "m", "--wrong"], ["run", "a.yaml", "--seed", "x"]]
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["calibrate", "convert"])
def test_who_offloads_gives_freed_memory_back(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cli, "freed_memory_kept", lambda: asked.append("kept") or contextlib.nullcontext())
    argv = [command, "nowhere.gguf", "--out", "x", "--text", "y"]
    assert cli.main([*argv, "--offload"]) == 2 and not asked
    assert cli.main(argv) == 2 and asked == ["kept"]


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.parse(["convert", "smollm2", "--out=~/x"]).out == tmp_path / "x"
    merged = cli.parse(["calibrate", "smollm2", "--out", "~/s", "--merge", "~/a", "b"])
    assert (merged.out, merged.asked.merge) == (tmp_path / "s", (tmp_path / "a", Path("b")))


def test_names_of_any_bytes_are_shown(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"model-\xff")
    shutil.copytree(folder / "student", name)
    assert answer(capsys, ["info", str(name)])["model"] == str(name)  # JSON spells a lone surrogate as Python does
    assert cli.main(["info", str(name)]) == 0
    assert "model-\\udcff" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a" * 5000, "./" + "b/" * 2000, "c\nd", "/e" * 3000 + ".gguf"])
def test_names_of_any_length_are_refused_in_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kvlatent: ") and said.count("\n") == 1 and len(said) < 1100


def test_every_command_takes_the_common_options() -> None:
    for command in cli.COMMANDS:
        text = cli.help_text(command)
        for option in ("--json", "--seed", "--device", "--dtype"):
            assert option in text


# --- commands --------------------------------------------------------------------------------------------------------


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
    for window, much in ((100, False), (400, True)):
        argv = ["plan", f"{tmp_path}/config.json", "--budget", "0.125", "--window", str(window), "--dtype", "bfloat16"]
        assert cli.main(argv) == 0
        told = f"The window and its sinks take {(window + 4) / (0.125 * 8192):.0%} of these bytes. A shorter --window"
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


def test_statistics_replace_text(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stats, out = tmp_path / "stats.safetensors", tmp_path / "out"
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    told = answer(capsys, ["calibrate", f"{folder}/teacher", *text, "--out", str(stats)])
    assert told["tokens"] == 512
    told = answer(capsys, ["convert", f"{folder}/teacher", "--stats", str(stats), "--budget", "0.5", "--out", str(out)])
    assert sum(told["d_qk"]) + sum(told["d_vo"]) == 32  # half of two layers of 16 + 16
    assert told["cache_bytes_per_token"] * 2 == told["teacher_cache_bytes_per_token"]
    record = json.loads((out / RECORD).read_text())
    assert record["fingerprints"] == json.loads((folder / "student" / RECORD).read_text())["fingerprints"]
    assert record["teacher"] == str((folder / "teacher").resolve())


def test_statistics_of_shards_are_merged(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shards, size = [], ["--tokens", "256", "--block-size", "32", "--window", "0"]
    for name in ("train", "other"):
        shards.append(f"{tmp_path}/{name}")
        answer(capsys, ["calibrate", f"{folder}/teacher", "--text", f"{folder}/{name}.txt", *size, "--out", shards[-1]])
    told = answer(capsys, ["calibrate", f"{folder}/teacher", "--merge", *shards, "--out", f"{tmp_path}/all"])
    assert told["tokens"] == 512 and len(told["text"]) == 2
    first, second, whole = (Statistics.load(tmp_path / name) for name in ("train", "other", "all"))
    assert torch.equal(whole.layers[1].sums["q"], first.layers[1].sums["q"] + second.layers[1].sums["q"])
    assert torch.allclose(whole.probes, (first.probes + second.probes) / 2)
    assert set(whole.about["fingerprints"]) == {*first.about["fingerprints"], *second.about["fingerprints"]}


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


@pytest.mark.parametrize("preset", ["portable", "paper"])
def test_convert_knows_the_other_presets(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, preset: str
) -> None:
    text = ["--text", "teacher", "--tokens", "128", "--block-size", "32"] if preset == "portable" else []
    argv = ["convert", f"{folder}/teacher", "--preset", preset, "--budget", "0.5", *text, "--out", f"{tmp_path}/out"]
    assert answer(capsys, argv)["layout"] == "portable"


def test_heal_evaluate_bench_generate(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, teacher = f"{tmp_path}/healed", f"{folder}/teacher"
    told = answer(capsys, healed(folder, "--out", out))
    assert set(told["loss"]) == {"stage1", "stage2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed"]  # the work folder is gone
    assert len((tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()) == 4
    record = json.loads((tmp_path / "healed" / RECORD).read_text())
    assert [step["verb"] for step in record["steps"]] == ["convert", "heal"]
    assert record["steps"][1]["asked"] == {"stage1_tokens": 128, "stage2_tokens": 128, "lora_rank": 2}
    assert (record["steps"][1]["lora_alpha"], record["steps"][1]["learning_rate"]) == (16, 1e-4)

    text = ["--text", f"{folder}/other.txt", "--tokens", "256", "--block-size", "32"]
    told = answer(capsys, ["eval", out, "--against", teacher, *text])
    assert told["perplexity_ratio"] == pytest.approx(told["perplexity"] / told["against"]["perplexity"])
    assert told["tokens"] == 256
    assert cli.main(["eval", out, "--against", teacher, *text]) == 0
    assert "bits per byte" in capsys.readouterr().out

    sizes = ["--context", "16", "--batch", "2", "--new-tokens", "2"]
    told = answer(capsys, ["bench", out, "--against", teacher, *sizes])
    assert told["cache_bytes"] * 2 == told["against"]["cache_bytes"]
    assert cli.main(["bench", out, *sizes]) == 0
    assert "ttft ms" in capsys.readouterr().out

    grid = ["--context", "8", "16", "--batch", "1", "2", "--dtypes", "float32", "bfloat16", "--new-tokens", "2"]
    extra = ["--repeats", "1", "--synthetic", "--own", "--memory", "0.01", "--out", f"{tmp_path}/bench"]
    told = answer(capsys, ["bench", out, "--against", teacher, *grid, *extra])
    assert [row["model"] for row in told["rows"]] == [out, teacher, f"{teacher} (our path)"] * 8
    assert {(row["context"], row["batch"], row["dtype"]) for row in told["rows"]} == set(
        itertools.product((8, 16), (1, 2), ("float32", "bfloat16"))
    )
    longest = {(x["model"], x["batch"], x["dtype"]): x["context"] for x in told["n_max"]}
    assert longest[out, 1, "float32"] > 1.7 * longest[teacher, 1, "float32"] > 0
    assert json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"] == told["rows"]
    page = (tmp_path / "bench" / "bench.html").read_text()
    assert (
        page.count("<figure>") == page.count('<svg class="light"') == page.count('<svg class="dark"') == 4
        and "TPOT, batch 2, bfloat16" in page
    )
    assert cli.main(["bench", out, "--against", teacher, *grid, "--repeats", "1"]) == 0
    assert "roofline" in capsys.readouterr().out

    told = answer(capsys, ["generate", out, "--prompt", "river stone", "--max-new-tokens", "3"])
    assert told["new_tokens"] == 3
    assert cli.main(["generate", out, "--prompt", "river stone", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == told["completion"] + "\n"


def test_tasks_of_two_models_are_tested_in_pairs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = iter(([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]))  # the student's answers, then the teacher's

    def answered(*_: Any, limit: int, **__: Any) -> dict[str, TaskScore]:
        samples = next(right)[:limit]
        metrics, chance = {"acc": sum(samples) / len(samples)}, {"acc": 0.0}
        return {"letters": TaskScore(metrics=metrics, samples={"acc": samples}, chance=chance)}

    monkeypatch.setattr(measuring, "lm_eval_tasks", answered)
    argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--tasks", "letters", "--limit", "4"]
    told = answer(capsys, argv)
    assert (told["tasks"]["letters"]["acc"], told["against"]["tasks"]["letters"]["acc"]) == (0.75, 0.25)
    assert told["paired"]["letters"]["acc"]["difference"] == 0.5
    assert told["paired"]["letters"]["acc"]["p_value"] == 0.5  # two heads of two coins
    right = iter(([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]))
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "letters acc: +0.5000 ± 0.2887, p = 0.5; kept of the score above chance (0): –" in said  # 0.25 ± 0.25


def test_export_and_doctor(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = ["convert", f"{folder}/teacher", "--preset", "paper", "--d-qk", "8", "--d-vo", "4"]
    answer(capsys, [*student, "--out", f"{tmp_path}/student"])
    told = answer(capsys, ["doctor", f"{tmp_path}/student"])
    runs = {(row["engine"], row["reads"]): row["runs"] for row in told["engines"]}
    assert runs["transformers", "the folder"] and runs["transformers", "export --to stock"]
    assert cli.main(["doctor", f"{folder}/student"]) == 0
    printed = capsys.readouterr().out
    assert "transformers (transformers 5" in printed and "projected after RoPE" in printed

    stock = answer(capsys, ["export", f"{tmp_path}/student", "--to", "stock", "--out", f"{tmp_path}/stock"])
    assert stock["cache_bytes_per_token"] == 2 * 2 * (8 + 8) * 4
    assert stock["student_cache_bytes_per_token"] == 2 * 2 * (8 + 4) * 4
    assert stock["teacher_cache_bytes_per_token"] == 2 * 2 * (16 + 16) * 4
    assert "zero-padded" in stock["note"]
    record = json.loads((tmp_path / "stock" / RECORD).read_text())
    assert [step["verb"] for step in record["steps"]] == ["convert", "export"]
    text = ["--text", f"{folder}/other.txt", "--tokens", "256", "--block-size", "32"]
    ours = answer(capsys, ["eval", f"{tmp_path}/student", *text])  # the export is measured like any model
    theirs = answer(capsys, ["eval", f"{tmp_path}/stock", *text])
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert answer(capsys, ["info", f"{tmp_path}/stock"])["layout"] == "stock"

    (tmp_path / "stock" / RECORD).write_text(json.dumps(record | {"fingerprints": ["seen"]}))
    again = ["convert", f"{tmp_path}/stock", "--preset", "paper", "--d-qk", "4", "--d-vo", "4"]
    answer(capsys, [*again, "--out", f"{tmp_path}/again"])  # what its teacher was calibrated on is no held-out text
    assert json.loads((tmp_path / "again" / RECORD).read_text())["fingerprints"] == ["seen"]

    for source in (f"{tmp_path}/student", f"{folder}/teacher"):
        out = tmp_path / f"{Path(source).name}.gguf"
        told = answer(capsys, ["export", source, "--to", "gguf", "--type", "q8_0", "--out", str(out)])
        assert told["type"] == "q8_0" and out.read_bytes().startswith(b"GGUF")
    assert told["cache_bytes_per_token"] == told["teacher_cache_bytes_per_token"] == 2 * 2 * 32 * 2
    assert cli.main(["export", source, "--to", "gguf", "--out", f"{tmp_path}/f16.gguf"]) == 0
    assert "cache bytes per token" in capsys.readouterr().out


def test_weights_are_written_in_the_dtype_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(capsys, convert(folder, "--out", f"{tmp_path}/out", "--dtype", "bfloat16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_interrupted_healing_resumes_to_the_same_model(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from safetensors.torch import load_file

    from kvlatent.healing import stages

    answer(capsys, healed(folder, "--out", f"{tmp_path}/straight"))
    original, calls = stages.kl_term, []

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "kl_term", interrupting)
    argv = healed(folder, "--out", f"{tmp_path}/out")
    assert cli.main(argv) == 130
    assert "run the same command with --resume to go on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    answer(capsys, [*argv, "--resume"])
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


# --- bad input -------------------------------------------------------------------------------------------------------


def make_bad_files(root: Path, folder: Path) -> None:
    """What the bad inputs below point at."""
    (root / "empty.txt").write_text(" \n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "foreign").mkdir()
    (root / "foreign" / "notes.md").write_text("no model")
    (root / "taken").mkdir()
    (root / "taken" / "mine").write_text("keep me")
    (root / "bad.gguf").write_bytes(b"GGUF")
    (root / "bad.stats").write_bytes(b"no statistics")
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        root / "gpt2"
    )
    (root / "mla.json").write_text('{"model_type": "deepseek_v3", "kv_lora_rank": 8}')
    (root / "wrapper.json").write_text('{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}')
    shutil.copytree(folder / "teacher", root / "truncated")
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(folder / "teacher", root / "garbled")
    (root / "garbled" / "config.json").write_text("{")
    shutil.copytree(folder / "student", root / "no-record")
    (root / "no-record" / RECORD).unlink()


TEXT = ["--text", "{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
CONVERT = ["convert", "{folder}/teacher", "--out", "{root}/out"]
DIMS = ["--d-qk", "8", "--d-vo", "8"]
HEAL = ["heal", "{folder}/student", "--out", "{root}/out", "--block-size", "32"]
STAGES = ["--stage1-tokens", "64", "--stage2-tokens", "64"]
EXPORT = ["export", "{folder}/student", "--to"]
EVAL = ["eval", "{folder}/student", "--block-size", "32", "--tokens", "64"]

BAD = {
    "odd d_qk": ([*CONVERT, *TEXT, "--d-qk", "7", "--d-vo", "8"], "even"),
    "d_qk above head_dim": ([*CONVERT, *TEXT, "--d-qk", "18", "--d-vo", "8"], "at most the model's head_dim 16"),
    "d_vo above head_dim": ([*CONVERT, *TEXT, "--d-qk", "8", "--d-vo", "17"], "between 1 and"),
    "d_qk alone": ([*CONVERT, *TEXT, "--d-qk", "8"], "go together"),
    "nothing to calibrate on": (["calibrate", "{folder}/teacher", "--out", "{root}/out"], "--text"),
    "dims and budget": ([*CONVERT, *TEXT, *DIMS, "--budget", "0.5"], "not both"),
    "budget above 1": ([*CONVERT, *TEXT, "--budget", "50"], "share"),
    "budget too small": ([*CONVERT, *TEXT, "--budget", "0.01"], "at least 0.125"),
    "no divisor for paper": ([*CONVERT, "--preset", "paper", "--d-qk", "12", "--d-vo", "8"], "divide"),
    "paper with text": ([*CONVERT, *TEXT, *DIMS, "--preset", "paper"], "not calibrated"),
    "no such reduction": ([*CONVERT, *TEXT, *DIMS, "--preset", "portable", "--qk", "project"], "can't reduce"),
    "budget for a shared list": ([*CONVERT, *TEXT, "--budget", "0.5", "--qk", "fold"], "one frequency list"),
    "best without text": ([*CONVERT, *DIMS], "--text"),
    "missing text": ([*CONVERT, *DIMS, "--text", "{root}/none.txt"], "does not exist"),
    "empty text": ([*CONVERT, *DIMS, "--text", "{root}/empty.txt"], "holds no text"),
    "no UTF-8": ([*CONVERT, *DIMS, "--text", "{root}/binary.txt"], "UTF-8"),
    "text too short": ([*CONVERT, *DIMS, "--text", "{folder}/train.txt", "--tokens", "99999"], "too short"),
    "no statistics": ([*CONVERT, *DIMS, "--stats", "{root}/bad.stats"], "no calibration statistics"),
    "unsupported family": (["info", "{root}/gpt2"], "supported are llama"),
    "unsupported family to convert": (["convert", "{root}/gpt2", "--out", "{root}/out", *TEXT, *DIMS], "supported are"),
    "truncated checkpoint": (["convert", "{root}/truncated", "--out", "{root}/out", *TEXT, *DIMS], "can't load"),
    "garbled config": (["info", "{root}/garbled"], "can't load"),
    "foreign folder": (["info", "{root}/foreign"], "no config.json"),
    "bad GGUF": (["info", "{root}/bad.gguf"], "GGUF"),
    "unknown folder": (["info", "{root}/nowhere"], "no such folder"),
    "unknown model": (["generate", "nobody/nothing", "--prompt", "x"], "can't load nobody/nothing"),
    "existing output": (["convert", "{folder}/teacher", "--out", "{root}/taken", *TEXT, *DIMS], "exists already"),
    "existing statistics": (["calibrate", "{folder}/teacher", *TEXT, "--out", "{root}/empty.txt"], "exists already"),
    "heads that latents don't divide": (
        ["convert", "{folder}/teacher", "--out", "{root}/out", *TEXT, "--heads-per-latent", "3"],
        "must divide",
    ),
    "heads that are kept apart": (
        ["convert", "{folder}/teacher", "--out", "{root}/out", *TEXT, "--qk", "pairs", "--heads-per-latent", "2"],
        "reduces every head on its own",
    ),
    "converted twice": (["convert", "{folder}/student", "--out", "{root}/out", *TEXT, *DIMS], "converted already"),
    "a share that is no number": ([*CONVERT, *TEXT, "--budget", "nan"], "share"),
    "a plan of an unknown kind": (
        ["plan", "{folder}/teacher", "--budget", "0.5", *TEXT[:2], "--out", "{root}/plan.txt"],
        "ends in .png",
    ),
    "unknown device": ([*CONVERT, *TEXT, *DIMS, "--device", "abacus"], "device"),
    "healing a teacher": (["heal", "{folder}/teacher", "--out", "{root}/out", *TEXT[:2], *STAGES], "not a converted"),
    "healing without tokens": ([*HEAL, *TEXT[:2], "--stage1-tokens", "0", "--stage2-tokens", "0"], "needs tokens"),
    "healing with negative tokens": ([*HEAL, *TEXT[:2], "--stage1-tokens", "-1", "--stage2-tokens", "64"], "negative"),
    "healing with too little text": ([*HEAL, *TEXT[:2], "--stage1-tokens", "0", "--stage2-tokens", "99999"], "short"),
    "healing by no number": ([*HEAL, *TEXT[:2], *STAGES, "--learning-rate", "nan"], "learning_rate must be a number"),
    "healing without end": ([*HEAL, *TEXT[:2], *STAGES, "--clip", "inf"], "clip must be a number up to 1e+12"),
    "healing by too high a rank": ([*HEAL, *TEXT[:2], *STAGES, "--lora-rank", "65"], "at most the 64 dims of the FFN"),
    "healing without a record": (
        ["heal", "{root}/no-record", "--out", "{root}/out", *TEXT[:2], *STAGES],
        "name it with --teacher",
    ),
    "evaluating on training text": ([*EVAL, "--text", "{folder}/train.txt"], "evaluate on other text"),
    "far gain of nobody": ([*EVAL, "--text", "{folder}/other.txt", "--far"], "--against"),
    "far gain on no text": ([*EVAL, "--against", "{folder}/teacher", "--needle", "--far"], "--text"),
    "far gain on short blocks": (
        [*EVAL, "--text", "{folder}/other.txt", "--against", "{folder}/teacher", "--far"],
        "at least 512; got 32",
    ),
    "retrieval from no context": (["eval", "{folder}/student", "--retrieval", "--trials", "0"], "at least 1 trial"),
    "evaluating on nothing": (EVAL, "nothing to evaluate on"),
    "context longer than the model": ([*CONVERT, *TEXT, *DIMS, "--context", "257"], "the model's 256 positions"),
    "healing in no context": ([*HEAL, *TEXT[:2], *STAGES, "--context", "0"], "context must be"),
    "context too long": (["bench", "{folder}/student", "--context", "999"], "exceed the 256 positions"),
    "own path of nothing": (["bench", "{folder}/student", "--own"], "give --against"),
    "benchmark in no memory": (["bench", "{folder}/student", "--memory", "nan"], "--memory must be above 0"),
    "benchmark against itself": (["bench", "{folder}/student", "--against", "{folder}/student"], "twice"),
    "empty prompt": (["generate", "{folder}/student", "--prompt", ""], "empty"),
    "no chat template": (["generate", "{folder}/student", "--prompt", "x", "--chat"], "no chat template"),
    "exporting best to stock": ([*EXPORT, "stock", "--out", "{root}/out"], "--preset portable"),
    "exporting best to gguf": ([*EXPORT, "gguf", "--out", "{root}/out"], "--preset portable"),
    "exporting a teacher to stock": (
        ["export", "{folder}/teacher", "--to", "stock", "--out", "{root}/out"],
        "ordinary checkpoint already",
    ),
    "exporting to a folder that exists": ([*EXPORT, "stock", "--out", "{root}/taken"], "exists already"),
    "exporting to a file that exists": ([*EXPORT, "gguf", "--out", "{root}/empty.txt"], "exists already"),
    "stock with a GGUF type": ([*EXPORT, "stock", "--type", "f16", "--out", "{root}/out"], "--type is for --to gguf"),
    "exporting an unsupported family": (
        ["export", "{root}/gpt2", "--to", "gguf", "--out", "{root}/out"],
        "supported are",
    ),
    "a config alone to convert": (
        ["convert", "{root}/gpt2/config.json", "--out", "{root}/out", *TEXT],
        "supported are",
    ),
    "a config alone to bench": (["bench", "{folder}/teacher/config.json"], "is a config alone"),
    "no config": (["info", "{root}/none.json"], "no such file"),
    "a config of latent attention": (["info", "{root}/mla.json"], "multi-head latent attention"),
    "a config of several models": (["info", "{root}/wrapper.json"], "wrap a text model, gemma3_text"),
    "a plan of a config by statistics": (
        ["plan", "{folder}/teacher/config.json", "--budget", "0.5", "--stats", "{root}/bad.stats"],
        "leave --stats out",
    ),
    "info on no context": (["info", "{folder}/teacher", "--context", "0"], "at least 1"),
    "info on no memory": (["info", "{folder}/teacher", "--memory", "-1"], "--memory must be above 0"),
    "doctor of nothing": (["doctor", "{root}/nowhere"], "no such folder"),
    "no run": (["report", "{root}/foreign"], "no results.json"),
    "no recipe": (["run", "{root}/none.yaml", "--out", "{root}/out"], "can't read recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_and_leaves_nothing(
    name: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_bad_files(tmp_path, folder)
    argv, said = BAD[name]
    check_refused([part.format(root=tmp_path, folder=folder) for part in argv], said, tmp_path, capfd)


LEAST = {
    "convert": ["m", "--out", "o"], "calibrate": ["m", "--out", "o"], "plan": ["m", "--out", "o", "--budget", "0.5"],
    "heal": ["m", "--out", "o", "--text", "t"], "eval": ["m", "--needle"], "generate": ["m", "--prompt", "x"],
    "export": ["m", "--to", "gguf", "--out", "o"], "report": ["run"], "run": ["a.yaml"], "sweep": ["a.yaml"],
    "rope-plot": [], "explore": [], "compress-prompt": ["m", "--prompt", "x"],
}  # fmt: skip
"""Arguments that a command can't do without, where they are more than a model."""


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_seeds_out_of_range_are_refused_by_every_command(
    command: str, seed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [command, *LEAST.get(command, ["m"]), "--seed", seed]
    check_refused(argv, f"seed must be between 0 and 4294967295; got {seed}", tmp_path, capfd)


@pytest.mark.parametrize(
    ("verb", "slow"),
    [("calibrate", "compress.checkpoints.read_text"), ("convert", "compress.checkpoints.read_text"),
     ("plan", "compress.preview.load_model"), ("export", "serving.export.checkpoint.load_model")],
)  # fmt: skip
def test_an_output_has_one_command_from_its_start(
    verb: str, slow: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at what takes its time, a second one is refused, and before it does the same."""
    begun: list[int] = []
    out = tmp_path / "out.png"
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    argv = {
        "calibrate": ["calibrate", f"{folder}/teacher", *text],
        "convert": convert(folder),
        "plan": ["plan", f"{folder}/teacher", "--budget", "0.5", *text],
        "export": ["export", f"{folder}/teacher", "--to", "gguf"],
    }[verb]
    command = cli.parse([*argv, "--out", str(out)])

    def work(*_: Any, **__: Any) -> None:
        begun.append(1)
        assert len(begun) == 1
        with ThreadPoolExecutor(1) as other, pytest.raises(UserError, match=r"out\.png is being written by process"):
            other.submit(command.run).result()
        raise UserError("enough")

    monkeypatch.setattr(f"kvlatent.{slow}", work)
    with pytest.raises(UserError, match="enough"):
        command.run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["convert", "heal", "calibrate"])
def test_a_full_disk_gives_one_line_and_leaves_nothing(
    verb: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(100, 90, 10))
    text = ["--text", f"{folder}/train.txt", "--tokens", "512", "--block-size", "32", "--window", "0"]
    argv = {"convert": convert(folder), "heal": healed(folder), "calibrate": ["calibrate", f"{folder}/teacher", *text]}
    check_refused([*argv[verb], "--out", f"{tmp_path}/out"], "0 MB are free", tmp_path, capfd)


def check_refused(argv: list[str], said: str, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    capfd.readouterr()
    assert cli.main([*argv, "--json"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.split("\r")[-1].splitlines() if not line.startswith("unpacking")]  # that is progress
    assert len(lines) == 1, err
    assert lines[0].startswith("kvlatent: ")
    assert said in lines[0]
    assert sorted(root.rglob("*")) == before
