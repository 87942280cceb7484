"""Documents from every kind of source, exact accounting of packed blocks, held-out refusal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvlatent.data import blocks as data
from kvlatent.data.blocks import (
    TokenBlocks,
    check_held_out,
    cut,
    fingerprint,
    load_blocks,
    save_blocks,
    separator_id,
    token_blocks,
)
from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError

WORDS = [
    "the",
    "cache",
    "of",
    "a",
    "layer",
    "holds",
    "keys",
    "naïve",
    "café",
    "—",
    "東京",
    "🙂",
    "for",
    "every",
    "token",
]


def build_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cache of a layer holds the keys and the values"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


TOKENIZER = build_tokenizer(bos_token="<s>", eos_token="</s>")
SEPARATOR = 0


def prose(name: str, characters: int) -> str:
    """Words that differ from place to place, in short paragraphs."""
    words = (f"{WORDS[i % len(WORDS)]}{i}{name}" + ("\n\n" if i % 20 == 19 else " ") for i in range(characters))
    return "".join(words)[:characters]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in "abc":
        lines = [json.dumps({"text": prose(f"{name}{i}", 700)}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def pack(*sources: Path, tokens: int = 4096, block_size: int = 64, seed: int = 0) -> TokenBlocks:
    return token_blocks([str(source) for source in sources], TOKENIZER, block_size=block_size, tokens=tokens, seed=seed)


# --- documents -------------------------------------------------------------------------------------------------------


def test_folder_yields_every_known_file_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst")  # a byte order mark is not text
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "c.bin").write_text("ignored")
    (tmp_path / "sub" / "x.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    assert list(read_documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


def test_parquet_yields_its_text_column(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(path)
    assert list(read_documents(str(path))) == ["one", "two"]
    Dataset.from_dict({"words": ["one"]}).to_parquet(path)
    with pytest.raises(UserError, match=r'no string column "text" nor chats .*; its columns are words'):
        list(read_documents(str(path)))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="can't read"):
        list(read_documents(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "as UTF-8"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "line 2 is not a JSON object"),
        ("field.jsonl", b'{"body": "words"}', 'string field "text"'),
        ("list.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("page.docx", b"PK", r"end in \.txt"),
    ],
)
def test_bad_text_file_is_a_user_error(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_folder_without_text_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.txt"):
        list(read_documents(str(tmp_path)))


def test_no_home_directory_is_needed_to_read_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # KeyError, as for a user that has no entry
    (tmp_path / "a.txt").write_text("one")
    assert list(read_documents(str(tmp_path / "a.txt"))) == ["one"]
    with pytest.raises(UserError, match=r"text ~/a.txt does not exist"):
        list(read_documents("~/a.txt"))


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud800 b"}')
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == ["a ? b"]


def test_hub_failure_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        if args[0] == "absent/one":
            raise ConnectionError("can't reach the hub\nand more")
        return [{"text": "streamed"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents("hf:owner/name:config")) == ["streamed"]
    assert seen == [(("owner/name", "config"), {"split": "train", "streaming": True})]
    with pytest.raises(UserError, match=r"can't read hf:absent/one: can't reach the hub$"):
        list(read_documents("hf:absent/one"))


def test_a_stream_gives_the_same_documents_every_time(tmp_path: Path, byte_tokenizer: Any) -> None:
    """By its files in order and the seed alone, more documents than are held for shuffling among them."""
    for part in range(3):
        rows = (json.dumps({"text": f"row {3_000 * part + n}"}) for n in range(3_000))
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(rows))
    source = f"hf:{tmp_path}"
    assert list(read_documents(source)) == [f"row {n}" for n in range(9_000)]

    def blocks(seed: int) -> TokenBlocks:
        return token_blocks([source], byte_tokenizer, block_size=64, tokens=9_600, seed=seed)

    first, again, other = blocks(1), blocks(1), blocks(2)
    assert torch.equal(first.ids, again.ids) and first.fingerprints == again.fingerprints
    assert first.fingerprints != other.fingerprints


@settings(max_examples=60)
@given(text=st.text("ab .\n", max_size=300), limit=st.integers(4, 50))
def test_cut_loses_nothing_but_whitespace(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cut_prefers_the_end_of_a_paragraph() -> None:
    assert list(cut("one two. three\n\nfour five six", 20)) == ["one two. three", "four five six"]


def test_same_seed_gives_same_blocks_and_another_seed_others(corpus: Path) -> None:
    first, again, other = (pack(corpus / "a.jsonl", corpus / "b.jsonl", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and first.fingerprints == again.fingerprints
    assert not torch.equal(first.ids, other.ids)
    assert first.ids.shape == (64, 64) and first.ids.dtype == torch.int64
    assert first.sources == (str(corpus / "a.jsonl"), str(corpus / "b.jsonl"))


def test_sources_have_equal_shares_until_one_runs_out(corpus: Path) -> None:
    (corpus / "short.txt").write_text("S" * 50)
    owner = {fingerprint(text): name for name in "abc" for text in read_documents(str(corpus / f"{name}.jsonl"))}
    piece = max(len(TOKENIZER(text)["input_ids"]) for text in read_documents(str(corpus / "a.jsonl"))) + 1
    blocks = pack(*(corpus / f"{name}.jsonl" for name in "abc"), corpus / "short.txt", tokens=9000, block_size=100)
    text = TOKENIZER.decode(blocks.ids.flatten().tolist())
    shares = dict.fromkeys("abc", 0)
    for document in text.split("<|endoftext|>"):
        name = owner.get(fingerprint(document))
        if name is not None:
            shares[name] += len(TOKENIZER(document)["input_ids"]) + 1
    assert max(shares.values()) - min(shares.values()) <= piece
    assert sum(shares.values()) > 0.8 * 9000 and "S" * 50 in text


def test_long_documents_are_cut_and_mixed_but_keep_one_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(prose("x", 60_000))
    blocks = pack(tmp_path / "long.txt", tokens=20_000, block_size=100)
    assert blocks.fingerprints == {fingerprint(prose("x", 60_000))}
    assert (blocks.ids == SEPARATOR).sum() >= 2


@settings(max_examples=40)
@given(
    documents=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=8),
    block_size=st.integers(2, 40),
    seed=st.integers(0, 9),
)
def test_bytes_are_those_of_the_decoded_blocks(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], block_size: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"🙂{text}é"}) for text in documents))
    blocks = pack(path, tokens=block_size, block_size=block_size, seed=seed) if block_size <= 6 else None
    if blocks is None:  # as many whole blocks as there are
        found = sum(
            len(TOKENIZER(text.strip(), split_special_tokens=True)["input_ids"]) + 1
            for text in read_documents(str(path))
        )
        if found < block_size:
            return
        blocks = pack(path, tokens=found, block_size=block_size, seed=seed)
    # the byte-level alphabet writes every byte of the text as one character, so the vocabulary gives the exact count
    tokens = TOKENIZER.convert_ids_to_tokens([id for id in blocks.ids.flatten().tolist() if id != SEPARATOR])
    exact = sum(map(len, tokens))
    assert exact - 3 <= blocks.bytes <= exact  # a character cut in the middle of its bytes is not counted
    decoded = TOKENIZER.decode(blocks.ids.flatten().tolist(), skip_special_tokens=True)
    if "\ufffd" not in decoded:
        assert blocks.bytes == len(decoded.encode()) == exact


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before <|endoftext|> after")
    blocks = pack(tmp_path / "a.txt", tokens=10, block_size=10)
    assert SEPARATOR not in blocks.ids


def test_text_is_read_only_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def endless(source: str) -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield prose(str(taken), 200)

    monkeypatch.setattr(data, "read_documents", endless)
    monkeypatch.setattr(data, "SHUFFLE_PIECES", 32)
    pack(Path("stream"), tokens=512)
    assert taken < 32 + 3 * data.TOKENISE_PIECES


def test_too_short_text_names_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the keys")
    found = len(TOKENIZER("the keys")["input_ids"]) + 1
    with pytest.raises(UserError, match=f"too short: {found} tokens found, 1,024 asked for"):
        pack(tmp_path / "a.txt", tokens=1024)


def test_fewer_tokens_than_a_block_or_no_source_is_a_user_error(corpus: Path) -> None:
    with pytest.raises(UserError, match="at least one block of 64"):
        pack(corpus / "a.jsonl", tokens=63)
    with pytest.raises(UserError, match="no text given"):
        pack()


def test_held_out_text_that_was_used_is_refused(corpus: Path) -> None:
    used, other = pack(corpus / "a.jsonl"), pack(corpus / "b.jsonl")
    check_held_out(used.fingerprints, other)
    with pytest.raises(UserError, match=r"held-out documents .*a\.jsonl\) were used"):
        check_held_out(other.fingerprints | used.fingerprints, pack(corpus / "a.jsonl", seed=5))


def test_fingerprint_ignores_whitespace() -> None:
    assert fingerprint(" one\n two") == fingerprint("one two") != fingerprint("onetwo")
    assert len(fingerprint("")) == 16


def test_separator_is_the_pretraining_one_not_the_chat_markers() -> None:
    assert separator_id(TOKENIZER) == SEPARATOR
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1})), eos_token="</s>")
    assert separator_id(plain) == 1
    with pytest.raises(UserError, match="neither"):
        separator_id(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))))


def test_documents_are_cut_no_shorter_than_blocks(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """So that far tokens of long blocks are of the same document."""
    words = " ".join(str(n) for n in range(9000))
    (tmp_path / "long.txt").write_text(words)
    assert len(words) > 40_000
    ids = token_blocks([str(tmp_path / "long.txt")], byte_tokenizer, block_size=8192, tokens=8192, seed=0).ids
    assert separator_id(byte_tokenizer) not in ids[0, :-1]
    short = token_blocks([str(tmp_path / "long.txt")], byte_tokenizer, block_size=64, tokens=8192, seed=0).ids
    assert separator_id(byte_tokenizer) in short.flatten()[:8100]


def test_blocks_on_disk_take_four_bytes_a_token_and_no_memory_of_their_own(tmp_path: Path) -> None:
    made = TokenBlocks(torch.arange(2**20).view(-1, 1024), 1, ("a",), frozenset(("b",)))
    save_blocks(made, tmp_path / "blocks")
    assert (tmp_path / "blocks").stat().st_size < 4 * 2**20 + 1000
    read = load_blocks(tmp_path / "blocks").ids
    assert read.dtype == torch.int32 and read.equal(made.ids.int())
    with (tmp_path / "blocks").open("r+b") as file:  # the tensor is the file
        file.seek(-4, 2)
        file.write((7).to_bytes(4, "little"))
    assert read[-1, -1] == 7
