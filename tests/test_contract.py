"""What kvlatent asks of the libraries it builds on, family by family (`make test-oldest`, `make test-latest`)."""

import copy
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.data.documents import read_documents
from kvlatent.errors import UserError
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.model.checkpoints import load_model, save_checkpoint
from kvlatent.model.families import FAMILIES, linear_layers
from kvlatent.serving.export.gguf import export_gguf
from kvlatent.serving.export.stock import export_stock

pytestmark = pytest.mark.contract
PLAIN = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_student = pytest.mark.parametrize(
    ("family", "preset"),
    [
        (name, preset)
        for name, family in FAMILIES.items()
        for preset in ("windowed", "best", *(["paper"] if family.on_engines else []))
    ],
)
with_and_without_window = pytest.mark.parametrize("preset", ["windowed", "best"])


@each_student
def test_greedy_tokens_are_the_same_cached_uncached_and_in_a_static_cache(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, family: str, preset: str
) -> None:
    student = tiny_student(family, preset)
    wanted = student.generate(ids[:2, :9], use_cache=False, **PLAIN)
    assert torch.equal(student.generate(ids[:2, :9], **PLAIN), wanted)
    static = {**PLAIN, "cache_implementation": "static"}
    if preset == "windowed" and getattr(student.config, "sliding_window", None):
        with pytest.raises(UserError, match="sliding window of 6 tokens and the student's own"):
            student.generate(ids[:2, :9], **static)
    else:
        assert torch.equal(student.generate(ids[:2, :9], **static), wanted)


@each_family
@with_and_without_window
def test_beams_are_the_same_cached_and_uncached(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, family: str, preset: str
) -> None:
    student = tiny_student(family, preset)
    cached, uncached = (student.generate(ids[:2, :9], num_beams=3, use_cache=use, **PLAIN) for use in (True, False))
    assert torch.equal(cached, uncached)


@each_family
@with_and_without_window
def test_a_left_padded_prompt_continues_as_alone(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, family: str, preset: str
) -> None:
    student, prompts = tiny_student(family, preset), ids[:2, :9].clone()
    mask = torch.ones_like(prompts)
    mask[0, :4] = prompts[0, :4] = 0
    got = student.generate(prompts, attention_mask=mask, **PLAIN)
    assert torch.equal(got[:1, 4:], student.generate(prompts[:1, 4:], **PLAIN))
    assert torch.equal(got[1:], student.generate(prompts[1:], **PLAIN))


@each_family
@with_and_without_window
def test_a_training_step_with_adapters_changes_attention_and_ffn(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    ids: Tensor,
    tmp_path: Path,
    family: str,
    preset: str,
) -> None:
    student = tiny_student(family, preset)
    before = copy.deepcopy(student.state_dict())
    tokens = ids.numel() // 2
    config = HealConfig(stage1_tokens=tokens, stage2_tokens=tokens, lora_rank=4, lora_alpha=8)
    healed = heal(student, tiny_teacher(family), ids, tmp_path, config)
    trained = [name for name in before if name.endswith(("self_attn.v_proj.weight", "mlp.up_proj.weight"))]
    first = len(linear_layers(student.config))
    assert f"model.layers.{first}.self_attn.v_proj.weight" in trained[:2]
    assert not any(torch.equal(healed.state_dict()[name], before[name]) for name in trained)


@each_family
@with_and_without_window
@torch.no_grad()
def test_a_checkpoint_loads_with_the_same_logits(
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
    family: str,
    preset: str,
) -> None:
    student = tiny_student(family, preset)
    save_checkpoint(student, byte_tokenizer, tmp_path / "student", record={})
    for loaded in (
        load_model(str(tmp_path / "student"))[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval(),
    ):
        assert type(loaded) is type(student)
        torch.testing.assert_close(loaded(ids[:1]).logits, student(ids[:1]).logits, rtol=0, atol=1e-5)


def test_datasets_reads_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "rows.parquet")
    assert list(read_documents(str(tmp_path / "rows.parquet"))) == ["one", "two"]


@torch.no_grad()
def test_portable_students_are_exported_to_stock_and_gguf(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("llama", "portable", 8, 8)
    save_checkpoint(student, byte_tokenizer, tmp_path / "student", record={})
    export_stock(student, byte_tokenizer, tmp_path / "stock", record={})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(stock(ids[:1]).logits, student(ids[:1]).logits, rtol=1e-4, atol=1e-4)
    export_gguf(student, byte_tokenizer, tmp_path / "model.gguf", file_type="f32")
    names = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert tuple(names["blk.0.attn_k.weight"].shape) == (64, 2 * 8)  # hidden_size; KV heads of d_qk
