"""Perplexity of a whole text in windows, against plain loops and lm-eval."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import WORDS, answer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.errors import UserError
from kvlatent.evaluation.joined import Rolling, joined_scores, joined_text, rolling


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(12))) for _ in range(40)]
    path = tmp_path_factory.mktemp("joined") / "raw.txt"
    path.write_text("\n".join(lines))
    return path


def test_a_text_is_whole_and_in_its_order(
    text_file: Path, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = text_file.read_text()
    whole = joined_text([str(text_file)], byte_tokenizer, vocab_size=260)
    first, *ids = whole.blocks.ids[0].tolist()
    assert first == (byte_tokenizer.bos_token_id or byte_tokenizer.eos_token_id)
    assert byte_tokenizer.decode(ids) == text and whole.blocks.bytes == len(text.encode())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ("a b", "", " c\n", "", "d")))
    joined = joined_text([str(rows)], byte_tokenizer, vocab_size=260)
    assert byte_tokenizer.decode(joined.blocks.ids[0, 1:]) == "a b\n\n\n\n c\n\n\n\n\nd"
    assert joined.words == 4
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(UserError, match="plain text"):
        joined_text([str(chat)], byte_tokenizer, vocab_size=260)


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 20), (200, 200), (7, 1), (256, 100)])
@torch.no_grad()
def test_every_token_is_predicted_once_from_all_that_a_window_holds(
    length: int, stride: int, tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast,
    text_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:150])
    model, whole = tiny_teacher("llama"), joined_text([str(short)], byte_tokenizer, vocab_size=260)
    ids = whole.blocks.ids[0].tolist()
    total, predicted = 0.0, 0
    while predicted < len(ids) - 1:
        end = min(len(ids) - 1, length if predicted == 0 else predicted + stride)
        seen = ids[max(0, end - length) : end]
        log_probs = model(torch.tensor([seen])).logits[0].double().log_softmax(-1)
        for target in range(predicted, end):
            total -= float(log_probs[target - end, ids[target + 1]])
        predicted = end
    found = rolling(model, whole, length=length, stride=stride)
    assert int(found.window_tokens.sum()) == len(ids) - 1
    assert found.nll * (len(ids) - 1) == pytest.approx(total, rel=1e-5)
    assert joined_scores(found, whole)["bits_per_byte"] == pytest.approx(total / math.log(2) / 150, rel=1e-5)


def test_lm_eval_says_the_same(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    model, text = tiny_teacher("llama"), text_file.read_text()
    whole = joined_text([str(text_file)], byte_tokenizer, vocab_size=260)
    for length in (50, 256):
        theirs = huggingface.HFLM(pretrained=model, tokenizer=byte_tokenizer, max_length=length, batch_size=1)
        request = instance.Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        (log_likelihood,) = theirs.loglikelihood_rolling([request])
        mine = joined_scores(rolling(model, whole, length=length, stride=length), whole)
        assert mine["word_perplexity"] == pytest.approx(math.exp(-log_likelihood / whole.words), rel=1e-3)
        assert mine["bits_per_byte"] == pytest.approx(-log_likelihood / len(text.encode()) / math.log(2), rel=1e-4)


def test_errors_take_windows_as_samples(byte_tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    whole = joined_text([str(text_file)], byte_tokenizer, vocab_size=260)
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([30] * 500)
    sums = 60 + 3 * torch.randn(500, generator=generator, dtype=torch.float64)
    teacher = Rolling(window_nll=sums - 1.5, window_tokens=counts)
    found = joined_scores(Rolling(window_nll=sums, window_tokens=counts), whole, teacher)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(0.05))
    assert found["perplexity_ratio_stderr"] == pytest.approx(0, abs=1e-9)
    assert found["perplexity_stderr"] == pytest.approx(found["perplexity"] * float(sums.std()) / 30 / 500**0.5)
    one = joined_scores(Rolling(window_nll=sums[:1], window_tokens=counts[:1]), whole)
    assert one["perplexity_stderr"] is None


def test_eval_measures_the_joined_text_beside_the_teacher(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*changes: str) -> Any:
        argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--text", f"{folder}/other.txt"]
        return answer(capsys, [*argv, "--tokens", "256", "--block-size", "64", "--joined", *changes])

    disjoint, strided = run(), run("--stride", "16")
    for result in (disjoint, strided):
        mine, theirs = result["joined"], result["against"]["joined"]
        assert mine["tokens"] == theirs["tokens"] == mine["tokens"]
        assert mine["perplexity_ratio"] == pytest.approx(mine["perplexity"] / theirs["perplexity"])
        assert theirs["perplexity_ratio"] == 1
    assert strided["joined"]["perplexity"] != disjoint["joined"]["perplexity"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--text", "other.txt", "--joined", "--stride", "65"], "between 1 and --block-size, 64; got 65"),
        (["--text", "other.txt", "--joined", "--stride", "0"], "between 1 and --block-size, 64; got 0"),
        (["--text", "other.txt", "--stride", "8"], "got 8 without --joined"),
        (["--joined", "--needle"], "--joined needs held-out text"),
        (["--text", "train.txt", "--joined"], "were used for calibration"),
    ],
)
def test_what_joined_refuses(
    changes: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    argv = ["eval", f"{folder}/student", "--tokens", "256", "--block-size", "64"]
    argv += [f"{folder}/{change}" if change.endswith(".txt") else change for change in changes]
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err
