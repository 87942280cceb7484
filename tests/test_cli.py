"""The command line: light help, and one JSON object from every command."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import answer, convert, healed

from kvlatent import cli
from kvlatent.compress.statistics import Statistics
from kvlatent.evaluation import evaluate as measuring
from kvlatent.evaluation.tasks import TaskScore
from kvlatent.model.checkpoints import RECORD

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
