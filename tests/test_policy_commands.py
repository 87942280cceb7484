"""Policies where commands use them: answers and text judged from what is left, and what that costs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_window import windowed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import kvlatent
from kvlatent import cli
from kvlatent.compose.config import Name
from kvlatent.compose.policies import POLICIES
from kvlatent.compose.policies.snapkv import SnapKV
from kvlatent.evaluation.needle import score_answer
from kvlatent.evaluation.perplexity import perplexity

MODELS = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(1, 260, (3, 200), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folder(
    tiny_teacher: MODELS, byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `model`, of 1,024 positions, and `text.txt`."""
    folder, model = tmp_path_factory.mktemp("policies"), tiny_teacher("llama")
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder / "model")
    byte_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The keeper of the lamp walked along the shore and counted boats. " * 40)
    return folder


def answer(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    assert cli.main([*argv, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_commands_know_all_policies() -> None:
    assert get_args(Name) == tuple(POLICIES)
    assert kvlatent.policy("tova", keep=0.25) == POLICIES["tova"](keep=0.25)
    with pytest.raises(kvlatent.UserError, match="there is no policy 'h2o'"):
        kvlatent.policy("h2o")


def test_text_is_judged_from_what_is_left_of_the_first_half(tiny_teacher: MODELS, text: torch.Tensor) -> None:
    model = tiny_teacher("llama")
    settings: dict[str, Any] = {"text_bytes": 600, "batch_size": 2}
    whole = perplexity(model, text, **settings)
    half = whole.of_second_half()
    assert (half.first, half.bytes, half.token_nll.shape) == (101, 300, (3, 99))
    assert torch.equal(half.token_nll, whole.token_nll[:, 100:])
    assert list(half.by_position) == ["0-200"] and half.by_position["0-200"] == pytest.approx(
        half.token_nll.mean(0).mean().exp().item()
    )
    for policy in POLICIES.values():
        all_kept = perplexity(model, text, **settings, policy=policy(keep=1.0))
        torch.testing.assert_close(all_kept.token_nll, half.token_nll, rtol=1e-4, atol=1e-5)
        assert (all_kept.bytes, all_kept.first, all_kept.kept) == (300, 101, {"kept_share": 1})
        asked = policy(keep=0.4)
        found = perplexity(model, text, **settings, policy=asked)
        wanted = sum(asked.budget(100, layer, 2) for layer in range(2)) / 200
        assert found.kept == {"kept_share": pytest.approx(wanted)}
        assert bool(found.token_nll.isfinite().all()) and not torch.equal(found.token_nll, half.token_nll)
    alone = perplexity(model, text[2:], **settings, policy=SnapKV(keep=0.4)).token_nll[0]
    torch.testing.assert_close(
        perplexity(model, text, **settings, policy=SnapKV(keep=0.4)).token_nll[2], alone, rtol=1e-4, atol=1e-5
    )


def test_answers_come_from_what_is_left(tiny_teacher: MODELS, text: torch.Tensor) -> None:
    model, prompt, right = tiny_teacher("llama"), text[0, :150].tolist(), text[1, :3].tolist()
    with torch.no_grad():
        whole = score_answer(model, prompt, right)[1]
        for policy in POLICIES.values():
            all_kept = policy(keep=1.0).cache(model)
            assert score_answer(model, prompt, right, cache=all_kept)[1] == pytest.approx(whole, abs=1e-4)
            cache = policy(keep=0.2).cache(model)
            found = score_answer(model, prompt, right, cache=cache)[1]
            assert score_answer(model, prompt, right, cache=cache, before=100)[1] != found != whole
            cache.reset()
            model(torch.tensor([prompt[:-1]]), past_key_values=cache)
            logits = model(torch.tensor([prompt[-1:] + right]), past_key_values=cache).logits[0].log_softmax(-1)
            wanted = sum(float(logits[i, token]) for i, token in enumerate(right))
            assert found == pytest.approx(wanted, abs=1e-4)


def test_generate_and_bench_tell_what_was_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "model")
    generate = ["generate", model, "--prompt", "The keeper. " * 10, "--max-new-tokens", "5"]
    told = answer(capsys, [*generate, "--policy", "snapkv", "--keep", "0.5"])
    assert (told["policy"], told["keep"], told["kept_share"]) == ("snapkv", 0.5, (60 + 4) / 124)
    assert told["cache_bytes"] == 64 * 2 * 2 * 2 * 16 * 4  # tokens, layers, heads, keys and values, dims, bytes
    whole = answer(capsys, generate)
    assert "policy" not in whole
    assert answer(capsys, [*generate, "--policy", "tova", "--keep", "1"])["completion"] == whole["completion"]
    sizes = ["--context", "100", "--new-tokens", "4", "--repeats", "1"]
    told = answer(capsys, ["bench", model, "--against", model, *sizes, "--policy", "streaming", "--keep", "0.25"])
    row, against = told["rows"]
    assert row["model"] == f"{model} (streaming 0.25)" and against["model"] == model
    assert row["cache_bytes"] * 104 == against["cache_bytes"] * 25 and row["kept_share"] == 25 / 104
    assert row["cache_bytes_predicted"] is None and "policy" not in against
    assert cli.main(["bench", model, *sizes, "--policy", "streaming", "--keep", "0.25"]) == 0
    assert f"{model} (streaming 0.25), 1 × 100: 24.0% of all tokens kept\n" in capsys.readouterr().out


def test_a_share_of_a_students_tokens_is_of_those_beyond_its_window(
    tiny_teacher: MODELS, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windowed(tiny_teacher("llama"), window=60, sinks=4).save_pretrained(tmp_path / "student")
    byte_tokenizer.save_pretrained(tmp_path / "student")
    bench = ["bench", str(tmp_path / "student"), "--context", "124", "--new-tokens", "1", "--repeats", "1"]
    (row,) = answer(capsys, [*bench, "--policy", "snapkv", "--keep", "0.5"])["rows"]
    assert (row["kept_far_tokens"], row["kept_far_share"], row["kept_share"]) == (31, 31 / 61, 95 / 125)
    assert cli.main([*bench, "--policy", "snapkv", "--keep", "0.5"]) == 0
    assert "76.0% of all tokens kept, 50.8% of those beyond the window, 31 in a layer" in capsys.readouterr().out


def test_eval_judges_the_policy_beside_all_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = str(folder / "model"), ["--text", str(folder / "text.txt"), "--tokens", "1024", "--block-size", "512"]
    argv = ["eval", model, "--against", model, *text, "--far", "--policy", "snapkv"]
    told = answer(capsys, [*argv, "--keep", "1"])
    assert told["perplexity_ratio"] == pytest.approx(1, abs=1e-5) and told["kept_share"] == 1
    assert told["far_gain_kept"] == pytest.approx(1, abs=1e-3) and told["near_only"]["far_gain_kept"] == 0
    told = answer(capsys, [*argv, "--keep", "0.2", "--retrieval", "--retrieval-contexts", "700", "--trials", "2"])
    assert (told["policy"], told["keep"], told["kept_share"]) == ("snapkv", 0.2, pytest.approx(51 / 256))
    assert told["perplexity_ratio"] != 1 and "policy" not in told["against"]
    assert told["retrieval"]["needles 700"]["kept_share"] == pytest.approx(0.2, abs=0.001)
    samples = told["retrieval"]["needles 700"], told["against"]["retrieval"]["needles 700"]
    assert samples[0]["log_probability"] != samples[1]["log_probability"]
    assert cli.main([*argv, "--keep", "0.2"]) == 0
    told_of = capsys.readouterr().out
    assert f"{model} (snapkv 0.2)" in told_of and "text: 19.9% of all tokens kept\n" in told_of
    assert cli.main(["eval", model, "--needle", "--policy", "tova", "--keep", "0.2"]) == 0
    assert "needle 1024: 20.0% of all tokens kept\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["generate", "M", "--prompt", "x", "--keep", "0.5"], "name a policy too"),
        (["generate", "M", "--prompt", "x", "--policy", "tova", "--keep", "0"], "above 0 and at most 1; got 0.0"),
        (["bench", "M", "--policy", "tova", "--synthetic"], "a policy acts after a prefill"),
        (["bench", "M", "--policy", "tova", "--memory", "1"], "a policy acts after a prefill"),
        (["eval", "M", "--tasks", "piqa", "--policy", "tova"], "in one pass, before a policy acts"),
        (["eval", "M", "--text", "x.txt", "--joined", "--policy", "tova"], "leave --policy or --joined out"),
        (["eval", "M", "--against", "T", "--text", "x.txt", "--diagnose", "--policy", "tova"], "or --diagnose out"),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = cli.main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2 and why in " ".join(capsys.readouterr().err.split())
