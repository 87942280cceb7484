"""Text as people have it, and as nobody should: read, or refused in one line within bounds."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from kvlatent.data import chats, documents
from kvlatent.data.blocks import encode_chat, load_blocks, save_blocks, token_blocks
from kvlatent.data.chats import chat_text
from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, CHAT[1]]
IMAGE = [{"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT[1]]
UNREADABLE: dict[str, Any] = {
    "null": None,
    "number": 3,
    "other fields": {"conversations": []},
    "text that is a number": {"text": 3},
    "parts that are no text": {"messages": IMAGE},
    "content null beside a tool call": {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
}


def rows(path: Path, *rows: Any) -> list[Any]:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return list(read_documents(str(path)))


@pytest.mark.parametrize("empty", [{"text": ""}, {"text": None}, {"messages": [], "text": ""}, {"messages": None}])
def test_empty_rows_are_passed_over(empty: dict[str, Any], tmp_path: Path) -> None:
    assert rows(tmp_path / "x.jsonl", {"text": "a"}, empty, {"text": "b"}) == ["a", "b"]


def test_empty_rows_of_parquet_are_passed_over(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "x.parquet")
    assert list(read_documents(str(tmp_path / "x.parquet"))) == ["a", "b"]


def test_text_beside_empty_messages_is_read(tmp_path: Path) -> None:
    got = rows(tmp_path / "x.jsonl", {"messages": [], "text": "a"}, {"messages": None, "text": "b"})
    assert got == ["a", "b"]


def test_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    assert rows(tmp_path / "x.jsonl", {"messages": PARTS}) == [CHAT]


@pytest.mark.parametrize("name", UNREADABLE)
def test_rows_without_text_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jsonl line 2 is not"):
        rows(tmp_path / "x.jsonl", {"text": "a"}, UNREADABLE[name])


def test_deep_json_is_a_line_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(UserError, match="line 1 is not"):
        list(read_documents(str(tmp_path / "x.jsonl")))


def test_numbers_too_long_for_python_are_a_line_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "id": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match="line 1 is not"):
        list(read_documents(str(tmp_path / "x.jsonl")))


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.txt"):
        with pytest.raises(UserError, match="no regular file"):
            next(read_documents(str(tmp_path / name)))


def test_files_and_lines_have_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 100)
    (tmp_path / "x.txt").write_text("a" * 101)
    with pytest.raises(UserError, match="one document of more than"):
        next(read_documents(str(tmp_path / "x.txt")))
    with pytest.raises(UserError, match="line 1 is not"):
        rows(tmp_path / "x.jsonl", {"text": "a" * 200})


@pytest.mark.parametrize("name", ["A.TXT", "b.Md"])
def test_endings_in_capitals_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text")
    assert list(read_documents(str(tmp_path / name))) == list(read_documents(str(tmp_path))) == ["text"]


def test_tokens_beyond_the_embeddings_are_refused(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text " * 20)
    options: dict[str, Any] = {"block_size": 16, "tokens": 64, "seed": 0}
    ids = token_blocks([f"{tmp_path}/x.txt"], byte_tokenizer, **options).ids
    highest = int(ids.max())
    assert token_blocks([f"{tmp_path}/x.txt"], byte_tokenizer, vocab_size=highest + 1, **options).ids.equal(ids)
    with pytest.raises(UserError, match=f"makes token {highest} of the text, and the model has {highest} embeddings"):
        token_blocks([f"{tmp_path}/x.txt"], byte_tokenizer, vocab_size=highest, **options)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": (LOOP, "takes more than"),
    "writes without end": (
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "memory|characters|takes more than",
    ),
    "multiplies": ("{{ 'x' * 9999999999999 }}", "memory|refuses"),
    "formats": ("{{ '%099999999999d' | format(1) }}", "memory|refuses"),
    "raises": ("{{ raise_exception('no') }}", "refuses a conversation: no"),
    "is no template": ("{% for %}", "refuses a conversation"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_end_in_time_and_memory(
    name: str, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, said = HOSTILE[name]
    monkeypatch.setattr(chats, "SECONDS", 1.0)
    monkeypatch.setattr(chats, "MEMORY", 2**28)
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    began = time.monotonic()
    with pytest.raises(UserError, match=said):
        chat_text(byte_tokenizer, CHAT)
    assert time.monotonic() - began < 30


def test_a_template_that_writes_the_first_token_itself_gives_one(
    byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "<eos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    ids, answers = encode_chat(byte_tokenizer, CHAT)
    assert ids.count(byte_tokenizer.eos_token_id) == 1
    assert byte_tokenizer.decode([token for token, answer in zip(ids, answers, strict=True) if answer]) == "ho"


@pytest.mark.parametrize(
    "about",
    [
        {},
        [],
        "x",
        {"bytes": "x", "sources": [], "fingerprints": []},
        {"bytes": 1, "sources": ["x"], "fingerprints": ["x", None]},
        {"bytes": 1, "sources": [1], "fingerprints": []},
    ],
)
def test_damaged_blocks_are_one_line(about: Any, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "x.txt").write_text("some text " * 20)
    made = token_blocks([f"{tmp_path}/x.txt"], byte_tokenizer, block_size=16, tokens=64, seed=0)
    save_blocks(made, tmp_path / "b.safetensors")
    assert load_blocks(tmp_path / "b.safetensors").ids.equal(made.ids)
    save_file(load_file(tmp_path / "b.safetensors"), tmp_path / "b.safetensors", {"about": json.dumps(about)})
    with pytest.raises(UserError, match="remove it to make it again"):
        load_blocks(tmp_path / "b.safetensors")
