"""Prompts with fewer tokens: signals against whole attention maps in float64, exact counts, and what must stay."""

import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.cli import main
from kvlatent.compose import received as received_module
from kvlatent.compose.prompt import by_word, chosen, compress_chat, compress_prompt, importance
from kvlatent.compose.received import Signals, signals
from kvlatent.compress.convert import convert
from kvlatent.data.chats import Chat
from kvlatent.errors import UserError

TEXT = "The keeper of the lamp walked along the shore. " * 8 + "Naïve café — 水 owners agreed: the code is 4711."


def test_signals_are_those_of_whole_attention_maps(
    any_teacher: PreTrainedModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received_module, "ROWS", 7)
    before = any_teacher.config._attn_implementation
    found = signals(any_teacher, ids[0])
    assert any_teacher.config._attn_implementation == before
    any_teacher.set_attn_implementation("eager")
    with torch.no_grad():
        out = any_teacher(ids[:1], output_attentions=True)
    any_teacher.set_attn_implementation(before)
    wanted = sum(maps.double().sum((0, 1, 2)) for maps in out.attentions)
    torch.testing.assert_close(found.received.double(), wanted, rtol=1e-4, atol=1e-4)
    log_probs = out.logits[0].double().log_softmax(-1)
    surprisal = [-float(log_probs[t - 1, ids[0, t]]) for t in range(1, ids.shape[1])]
    assert found.surprisal[0] == 0
    torch.testing.assert_close(found.surprisal[1:].double(), torch.tensor(surprisal).double(), rtol=1e-4, atol=1e-4)


def test_importance_leaves_the_first_token_out_of_its_scales() -> None:
    found = importance(Signals(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([100.0, 4.0, 2.0])))
    torch.testing.assert_close(found[1:], torch.tensor([0.8, 0.2]))


def test_words_score_as_their_best_token() -> None:
    found = by_word(torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([3, 5, 5, 6]))
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 4.0, 0.0]))


@given(
    scores=st.lists(st.floats(0, 1), min_size=2, max_size=12), data=st.data(), spread=st.booleans(),
)  # fmt: skip
def test_exactly_the_asked_number_stays_and_all_that_is_protected(
    scores: list[float], data: st.DataObject, spread: bool
) -> None:
    n = len(scores)
    protected = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    count = data.draw(st.integers(int(protected.sum()), n))
    stays = chosen(torch.tensor(scores), protected, count, spread=spread).tolist()
    assert len(stays) == count and stays == sorted(set(stays))
    assert set(protected.nonzero()[:, 0].tolist()) <= set(stays)
    if not spread:
        best = sorted(scores[t] for t in range(n) if not protected[t])[n - count :]
        assert sorted(scores[t] for t in stays if not protected[t]) == pytest.approx(best)


def test_spread_drops_no_neighbours_while_others_are_left() -> None:
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 8.0])
    none = torch.zeros(6, dtype=torch.bool)
    assert chosen(scores, none, 4, spread=False).tolist() == [0, 3, 4, 5]
    assert chosen(scores, none, 4, spread=True).tolist() == [0, 2, 4, 5]
    assert chosen(scores, none, 2, spread=True).tolist() == [0, 4]


@pytest.fixture
def small(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = tiny_teacher("llama")
    model.config.max_position_embeddings = 1000
    return model, copy.deepcopy(byte_tokenizer)


@pytest.fixture
def folder(small: tuple[PreTrainedModel, PreTrainedTokenizerFast], tmp_path: Path) -> str:
    for part in small:
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("keep", "stages", "spread"), [(0.5, None, False), (0.3, 4, True), (0.9, 1, False), (1.0, 3, True)]
)
def test_the_rate_is_met_exactly(
    small: tuple[PreTrainedModel, PreTrainedTokenizerFast], keep: float, stages: int | None, spread: bool
) -> None:
    found = compress_prompt(*small, TEXT, keep=keep, stages=stages, spread=spread)
    assert len(found.kept) == round(keep * found.tokens) and found.kept[0] == 0
    if keep == 1:
        assert found.text == TEXT
    rest = iter(TEXT)
    assert all(char in rest for char in found.text)  # what stays is of the text, in order
    assert "\ufffd" not in found.text


@pytest.mark.parametrize("stages", [1, 3])
def test_words_stay_or_go_as_one(small: tuple[PreTrainedModel, PreTrainedTokenizerFast], stages: int) -> None:
    model, tokenizer = small
    text = "Lot 48151 sold for 162342 in 1945; lot 77003 for 99. " * 6
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found = compress_prompt(model, tokenizer, text, keep=0.5, stages=stages, words=True)
    assert len(found.kept) == round(0.5 * found.tokens)
    stays = [False] * len(text)
    for start, end in (tokens["offset_mapping"][token] for token in found.kept):
        stays[start:end] = [True] * (end - start)
    parts = [stays[word.start() : word.end()] for word in re.finditer(r"[^\W_]+", text)]
    assert sum(len(set(part)) > 1 for part in parts) <= stages  # each pass meets its count within a word
    apart = compress_prompt(model, tokenizer, text, keep=0.5, stages=stages)
    assert apart.kept != found.kept


def test_stages_look_again_at_what_is_left(small: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = small
    once, twice = (compress_prompt(model, tokenizer, TEXT, keep=0.4, stages=n) for n in (1, 2))
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    first = torch.zeros(len(ids), dtype=torch.bool)
    first[0] = True
    n, kept = len(ids), torch.arange(len(ids))
    for left in (1 + round((n - 1) * ((len(twice.kept) - 1) / (n - 1)) ** 0.5), len(twice.kept)):
        scores = importance(signals(model, ids[kept]))
        kept = kept[chosen(scores, first[kept], left, spread=False)]
    assert twice.kept == kept.tolist() != once.kept


def test_protected_passages_stay(small: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    found = compress_prompt(*small, TEXT, keep=0.4, protect=("the code is 4711.", "the shore"))
    assert found.text.endswith("the code is 4711.") and found.text.count("the shore") == 8


def test_a_conversation_keeps_its_template(small: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = small
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages: Chat = [{"role": "user", "content": "user"}, {"role": "user", "content": TEXT}]
    shorter, found = compress_chat(model, tokenizer, messages, keep=0.6, protect=("4711",))
    assert [m["role"] for m in shorter] == ["user", "user"]
    assert found.text == f"<user>{shorter[0]['content']}</><user>{shorter[1]['content']}</><assistant>"
    assert "4711" in shorter[1]["content"] and len(shorter[1]["content"]) < len(TEXT)
    for template in ("{{ messages[0]['content'] }}", "{{ messages[1]['content'] }}{{ messages[1]['content'] }}"):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match="doesn't write every message once"):
            compress_chat(model, tokenizer, messages)


def test_the_command_prints_the_shorter_prompt(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text(TEXT)
    argv = ["compress-prompt", folder, "--keep", "0.5", "--dtype", "float32"]
    assert main([*argv, "--prompt", str(tmp_path / "p.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kept_tokens"] == round(0.5 * result["tokens"]) and 0 < len(result["text"]) < len(TEXT)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main([*argv, "--prompt", "-"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == result["text"].rstrip("\n")


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"\xff\xfe", [], "can't be read as a prompt"),
        (b"", [], "at least 2 tokens"),
        (TEXT.encode(), ["--keep", "0"], "--keep must be above 0"),
        (TEXT.encode(), ["--stages", "0"], "--stages must be between"),
        (TEXT.encode(), ["--protect", "nowhere to be found"], "doesn't hold the passage"),
        (TEXT.encode(), ["--protect", TEXT, "--keep", "0.5"], "are protected, so --keep must be at least 1.000"),
        (TEXT.encode() * 200, [], "positions"),
    ],
)
def test_wrong_input_is_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, more: list[str], message: str
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert main(["compress-prompt", folder, "--prompt", str(tmp_path / "p.txt"), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["[", "{}", "[]", '[{"role": "user"}]', '[{"role": "user", "content": [1]}]', "[" * 10**5]
)
def test_what_is_no_conversation_is_refused(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "p.json").write_text(content)
    assert main(["compress-prompt", folder, "--prompt", str(tmp_path / "p.json")]) == 2
    assert "p.json" in capsys.readouterr().err


def test_a_student_is_refused_as_compressor(tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor) -> None:
    student = convert(tiny_teacher("llama"), d_qk=8, d_vo=4, ids=ids, window=0)
    with pytest.raises(UserError, match="never forms attention"):
        signals(student, ids[0])


def test_stages_end_where_nothing_is_left_to_drop(small: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    found = compress_prompt(*small, TEXT, keep=0.003, stages=3)
    assert found.kept == [0] and found.text == TEXT[0]
