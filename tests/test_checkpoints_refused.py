"""What of a checkpoint is refused before it is computed with, and what is read of strange ones."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from windowless import convert

from kvlatent.compress.checkpoints import convert_checkpoint
from kvlatent.compress.config import ConvertConfig
from kvlatent.errors import UserError
from kvlatent.model.checkpoints import load_model, pick_device, pick_dtype, record_of, save_checkpoint
from kvlatent.model.graft import graft
from kvlatent.model.offload import open_offloaded
from kvlatent.serving.export.plain import plain_weights
from kvlatent.serving.export.stock import export_stock
from kvlatent.serving.info import describe

# --- refused


@pytest.fixture
def folder(
    tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    save_checkpoint(tiny_student("llama"), byte_tokenizer, tmp_path / "student", record={})
    return tmp_path / "student"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(model: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(model), device="cpu")
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(folder, f"can't load {folder}: ")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"student holds no model\.safetensors")


def test_incomplete_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_map"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "k_map")


def test_unsupported_architectures_are_refused_with_the_list_of_supported_ones(tmp_path: Path) -> None:
    GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    refused(tmp_path, "'gpt2' models are not supported; supported are llama, mistral, qwen2, qwen3")


def test_foreign_specs_are_refused(folder: Path) -> None:
    latent = json.loads((folder / "config.json").read_text())["latent"]
    edit_config(folder, latent=latent | {"d_kv": 4})
    refused(folder, "unknown entries in the checkpoint's latent spec: d_kv")
    edit_config(folder, latent={k: v for k, v in latent.items() if k != "scale"})
    refused(folder, "spec is incomplete")
    edit_config(folder, latent=latent | {"d_qk": [7, 7]})
    refused(folder, "d_qk must be even")
    edit_config(folder, latent=latent | {"inv_freq": {"a": 1}})
    refused(folder, "spec is damaged: inv_freq")
    edit_config(folder, latent=latent | {"scale": "1"})
    refused(folder, "spec is damaged: scale")
    edit_config(folder, latent=[])
    refused(folder, "spec is damaged")
    edit_config(folder, latent=None)
    refused(folder, "needs its latent spec")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing", "no such folder")
    refused(tmp_path / "missing.gguf", "no such file")
    refused(tmp_path, "holds no config.json: not a Hugging Face checkpoint")


def test_impossible_devices_and_dtypes_are_refused() -> None:
    for device in ("quantum", "meta"):
        with pytest.raises(UserError, match=f"device '{device}' can't be used"):
            pick_device(device)
    with pytest.raises(UserError, match="dtype must be auto, float32, bfloat16 or float16; got 'int8'"):
        pick_dtype("int8", torch.device("cpu"))
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16


# --- a stranger's folder


@pytest.fixture
def stock(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    tiny_teacher("llama").save_pretrained(tmp_path / "stock")
    byte_tokenizer.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def refused_by_all(folder: Path, message: str) -> None:
    refused(folder, message)
    with pytest.raises(UserError, match=message):
        open_offloaded(str(folder), device="cpu")


def edit_weights(folder: Path, **changes: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_of_its_own_survives_a_config_that_says_tied(
    stock: Path, byte_tokenizer: PreTrainedTokenizerFast, ids: Tensor, tmp_path: Path
) -> None:
    edit_config(stock, tie_word_embeddings=True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(stock), ids)
    teacher, _ = load_model(str(stock), device="cpu")
    offloaded, layers = open_offloaded(str(stock), device="cpu")
    assert torch.equal(logits(teacher, ids), wanted)
    assert torch.equal(offloaded.lm_head.weight, teacher.lm_head.weight) and "lm_head.weight" in layers.files
    own = AutoModelForCausalLM.from_pretrained(stock)  # not by way of us
    assert "lm_head.weight" in dict(plain_weights(own, d_qk=16, d_vo=16))
    save_checkpoint(graft(own), byte_tokenizer, tmp_path / "student", record={})
    torch.testing.assert_close(logits(load_model(str(tmp_path / "student"))[0], ids), wanted, rtol=0, atol=1e-4)
    edit_weights(stock, **{"lm_head.weight": load_file(stock / "model.safetensors")["model.embed_tokens.weight"]})
    for model in (load_model(str(stock), device="cpu")[0], open_offloaded(str(stock), device="cpu")[0]):
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_tensors_without_a_place_are_refused(stock: Path) -> None:
    edit_weights(stock, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})  # of old: the config's
    load_model(str(stock), device="cpu")
    open_offloaded(str(stock), device="cpu")
    edit_weights(stock, **{"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})
    refused_by_all(stock, r"holds 1 tensors .* no place for, model\.layers\.0\.self_attn\.q_proj\.weight_scale_inv")


def test_what_is_quantized_is_not_read_layer_by_layer(stock: Path) -> None:
    edit_config(stock, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    edit_weights(stock, **{"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(UserError, match=r"stock is quantized \(fp8\), .*leave --offload out"):
        open_offloaded(str(stock), device="cpu")


def mxfp4_value(code: int) -> float:
    """A number of 4 bits by its definition: a sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    return (-1) ** (code >> 3) * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def with_experts_in_mxfp4(teacher: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save a gpt-oss whose experts are random numbers in MXFP4, as published; return it with these numbers."""
    config = teacher.config
    config.intermediate_size = 32
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator, packed = torch.Generator().manual_seed(0), {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in {"gate_up_proj": (64, 64), "down_proj": (32, 64)}.items():
            codes = torch.randint(16, (4, outputs, inputs // 32, 32), generator=generator)
            scales = torch.randint(122, 126, (4, outputs, inputs // 32), generator=generator)
            key = f"model.layers.{layer}.mlp.experts.{name}"
            packed[f"{key}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            packed[f"{key}_scales"] = scales.to(torch.uint8)
            numbers = torch.tensor([mxfp4_value(code) for code in codes.flatten().tolist()], dtype=torch.float64)
            weight = (numbers.view_as(codes) * 2.0 ** (scales[..., None] - 127)).flatten(2).mT
            teacher.get_parameter(key).data.copy_(weight)  # (experts, inputs, outputs)
    teacher.save_pretrained(folder)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    edit_weights(folder, **packed)
    kept = {k: x for k, x in load_file(folder / "model.safetensors").items() if f"{k}_blocks" not in packed}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return teacher.eval()


def test_experts_in_mxfp4_are_read_whole_and_layer_by_layer(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    wanted = with_experts_in_mxfp4(tiny_teacher("gpt_oss"), tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    loaded, _ = load_model(str(tmp_path / "teacher"), device="cpu", dtype="float32")
    assert torch.equal(logits(loaded, ids), logits(wanted, ids))
    opened, layers = open_offloaded(str(tmp_path / "teacher"), device="cpu", dtype="float32")
    with layers.visiting(opened.model.layers[1], 1):
        found, given = opened.model.layers[1].state_dict(), wanted.model.layers[1].state_dict()
        assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    (tmp_path / "text.txt").write_text(" ".join(f"{n * n} is the square of {n}." for n in range(200)))
    for offload in (False, True):
        asked = ConvertConfig(
            d_qk=8, d_vo=8, window=8, text=(str(tmp_path / "text.txt"),), tokens=512, block_size=64, offload=offload
        )
        convert_checkpoint(str(tmp_path / "teacher"), tmp_path / f"{offload}", asked, device="cpu", dtype="float32")
    students = [load_model(str(tmp_path / f"{offload}"), device="cpu")[0] for offload in (False, True)]
    assert not any(hasattr(student.config, "quantization_config") for student in students)
    torch.testing.assert_close(logits(students[1], ids), logits(students[0], ids), rtol=0, atol=1e-4)
    edit = load_file(tmp_path / "teacher" / "model.safetensors")
    edit.pop("model.layers.1.mlp.experts.down_proj_scales")
    save_file(edit, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*, model\.layers\.1\.mlp\.experts\.down_proj"):
        open_offloaded(str(tmp_path / "teacher"), device="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(stock: Path, value: float) -> None:
    edit_weights(stock, **{"model.norm.weight": torch.full((64,), value)})
    refused_by_all(stock, r"model\.norm\.weight holds values that are not finite")


def test_weights_of_another_shape_are_refused(stock: Path) -> None:
    edit_weights(stock, **{"lm_head.weight": torch.zeros(64, 260)})
    refused(stock, "mismatch")
    with pytest.raises(UserError, match=r"lm_head\.weight is of shape \(64, 260\); the architecture takes \(260, 64\)"):
        open_offloaded(str(stock), device="cpu")


@pytest.mark.parametrize(
    ("settings", "core"),
    [
        ({"model_max_length": "long"}, {}),
        ({"decoder": None}, {}),
        ({}, {"normalizer": {"type": "Replace", "pattern": {"Regex": "(.|\n)"}, "content": ""}}),
        ({}, {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]",
                        "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}}),
    ],
)  # fmt: skip
def test_tokenizers_that_would_fail_later_are_refused(
    stock: Path, settings: dict[str, Any], core: dict[str, Any]
) -> None:
    for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", core)):
        (stock / name).write_text(json.dumps(json.loads((stock / name).read_text()) | changes))
    refused(stock, "can't load .*stock|its tokenizer makes no tokens")


@pytest.mark.parametrize("entries", [{"num_labels": 10**9}, {"num_hidden_layers": 10**9, "model_type": "qwen3"}])
def test_a_config_of_a_billion_lists_is_refused_before_they_are_made(stock: Path, entries: dict[str, Any]) -> None:
    edit_config(stock, **entries)
    began = time.monotonic()
    refused_by_all(stock, f"its config can't be right: {next(iter(entries))}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("tokens", [{"eos_token_id": "2"}, {"eos_token_id": []}, {"pad_token_id": 10**30}])
def test_a_generation_config_names_tokens(stock: Path, tokens: dict[str, Any]) -> None:
    (stock / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3], "pad_token_id": -1}))
    assert load_model(str(stock), device="cpu")[0].generation_config.eos_token_id == [0, 3]
    (stock / "generation_config.json").write_text(json.dumps(tokens))
    refused(stock, f"its generation config can't be right: {next(iter(tokens))}")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_pipes_among_the_files_are_refused(stock: Path, name: str) -> None:
    (stock / name).unlink(missing_ok=True)
    os.mkfifo(stock / name)
    refused_by_all(stock, f"{name} is no regular file")


def test_adapters_beside_the_weights_are_refused(stock: Path) -> None:
    (stock / "adapter_config.json").write_text("{}")
    refused_by_all(stock, "holds an adapter")


def test_pickles_are_not_read(stock: Path) -> None:
    torch.save(load_file(stock / "model.safetensors"), stock / "pytorch_model.bin")
    (stock / "model.safetensors").unlink()
    refused_by_all(stock, r"holds no model\.safetensors; pickles .* may run code")


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "{}/elsewhere.safetensors", "sub/x.safetensors", 3, []])
def test_an_index_names_files_beside_it(stock: Path, tmp_path: Path, where: object) -> None:
    (stock / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    name = where.format(tmp_path) if isinstance(where, str) else where
    names = load_file(tmp_path / "elsewhere.safetensors")
    (stock / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    refused_by_all(stock, "names no files beside it")


CODE = {"AutoConfig": "code.XConfig", "AutoModelForCausalLM": "code.X", "AutoTokenizer": ["code.T", "code.T"]}


def test_code_in_a_folder_is_not_run_nor_asked_about_nor_passed_on(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stock / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name in ("config.json", "tokenizer_config.json"):
        path = stock / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": CODE}))
    teacher, tokenizer = load_model(str(stock), device="cpu")
    student = convert(teacher, preset="paper", d_qk=8, d_vo=8)
    save_checkpoint(student, tokenizer, tmp_path / "student", record={})
    export_stock(student, tokenizer, tmp_path / "exported", record={})
    for folder in (tmp_path / "student", tmp_path / "exported"):
        assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    edit_config(stock, model_type="stranger")
    refused(stock, "can't load")
    with pytest.raises(UserError):
        describe(str(stock))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "kernels-community/flash-attn2"}, "names a kernel to download"),
        ({"transformers_weights": "../other.safetensors"}, "has transformers_weights"),
        ({"is_encoder_decoder": True}, "has is_encoder_decoder"),
        ({"output_attentions": True}, "has output_attentions"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_key_value_heads": 3}, "can't be right: 4 query heads, 3 KV heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "much"}, "rms_norm_eps"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": {}}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**30}}, "can't load"),
        ({"hidden_act": "tangent"}, "can't load .*tangent"),
        ({"dtype": "int8"}, "dtype: .*16 bits"),
        ({"latent": {"d_qk": 4}}, "has a latent spec, but llama models have none"),
    ],
)
def test_configs_that_cant_be_right_are_refused(stock: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(stock, **changes)
    refused(stock, message)
    with pytest.raises(UserError, match=message):
        describe(str(stock))


@pytest.mark.parametrize(
    "record",
    [
        '{"steps": 3}',
        '{"steps": [{"x": 1}]}',
        '{"steps": [{"verb": "heal", "seconds": "1"}]}',
        '{"fingerprints": [1]}',
        "[]",
        "[" * 100_000,
        "\xff",
        '{"teacher": {}}',
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, record: str) -> None:
    (tmp_path / "kvlatent.json").write_text(record, encoding="latin-1")
    with pytest.raises(UserError, match=r"kvlatent\.json is damaged: "):
        record_of(str(tmp_path))
