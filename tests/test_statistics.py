"""Statistics against float64 loops; independent of batching, mergeable, and safe on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.compress.budget import probe
from kvlatent.compress.checkpoints import load_statistics
from kvlatent.compress.maps import own_part
from kvlatent.compress.statistics import NAMES, SINGLE, Statistics, calibrate
from kvlatent.errors import UserError
from kvlatent.model.families import FAMILIES
from kvlatent.model.offload import open_offloaded


def close(first: Statistics, second: Statistics, tolerance: float) -> None:
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.tokens == b.tokens
        for name in {*NAMES} & (a.sums.keys() | b.sums.keys()):  # a layer without attention has none
            error = (a.sums[name] - b.sums[name]).norm() / b.sums[name].norm()
            assert error < tolerance, name


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "llama-yarn", "gemma2", "gpt_oss"])
def test_first_layers_statistics_match_float64_loops(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    teacher = tiny_teacher(name)
    ids = ids[:3, :10]
    statistics = calibrate(teacher, ids, about={}).layers[0]
    layer, rotary = teacher.model.layers[0], teacher.model.rotary_emb
    stock = layer.self_attn
    with torch.no_grad():
        x = layer.input_layernorm(teacher.model.embed_tokens(ids))
        heads = {}
        for part in "qkv":
            states = getattr(stock, f"{part}_proj")(x).unflatten(-1, (-1, 16))
            norm = getattr(stock, f"{part}_norm", None)
            heads[part] = (states if norm is None else norm(states)).transpose(1, 2).double()
    inv_freq, scaling = rotary.inv_freq.tolist(), rotary.attention_scaling
    rotated = {
        part: scaling
        * torch.stack(
            [
                torch.stack(
                    [
                        torch.stack([reference.rotated(token, at, inv_freq) for at, token in enumerate(head)])
                        for head in row
                    ]
                )
                for row in heads[part]
            ]
        )
        for part in "qk"
    }
    window = getattr(teacher.config, "sliding_window", None) if name in ("mistral", "gemma2", "gpt_oss") else None
    cap = getattr(teacher.config, "attn_logit_softcapping", None)
    wanted = reference.moments(
        rotated["q"], rotated["k"], heads["v"], scale=stock.scaling, bias=reference.causal(10, 10, window), cap=cap,
        sinks=getattr(stock, "sinks", None),
    )  # fmt: skip
    for part in "qk":
        wanted[f"{part}_unrotated"] = torch.einsum("bhsd,bhse->hde", heads[part], heads[part])
    assert statistics.tokens == 30
    for part in NAMES:
        torch.testing.assert_close(statistics.sums[part], wanted[part], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(statistics.mean(part), wanted[part] / 30, rtol=1e-4, atol=1e-4)


def test_statistics_do_not_depend_on_the_batch_size(plain_teacher: PreTrainedModel, ids: Tensor) -> None:
    whole = calibrate(plain_teacher, ids, batch_size=12, about={})
    for batch_size in (1, 5):
        close(
            calibrate(plain_teacher, ids, batch_size=batch_size, about={}), whole, 1e-5
        )  # sums are of float32 products


def test_merged_halves_equal_the_whole(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("qwen2")
    first = calibrate(teacher, ids[:5], about={"model": "tiny", "fingerprints": ["b", "a"]})
    second = calibrate(teacher, ids[5:], about={"model": "tiny", "fingerprints": ["c", "a"]})
    whole, merged = calibrate(teacher, ids, about={}), first.merge(second)
    close(merged, whole, 1e-6)
    assert merged.about == {"model": "tiny", "fingerprints": ["a", "b", "c"], "tokens": ids.numel()}
    assert first.layers[0].tokens == 5 * 24  # merging leaves both as they were
    merged.layers.pop()
    with pytest.raises(UserError, match="can't merge statistics of 1 and 2 layers"):
        merged.merge(whole)


def test_later_layers_see_the_teachers_own_hidden_states(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("llama")
    seen: list[Tensor] = []
    attention = teacher.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        teacher(ids)
    handle.remove()
    out = seen[0].unflatten(-1, (4, 16)).double()
    wanted = torch.einsum("bshd,bshe->hde", out, out)
    torch.testing.assert_close(calibrate(teacher, ids, about={}).layers[1].sums["o"], wanted, rtol=1e-4, atol=1e-3)


def test_layers_without_keys_have_no_statistics(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    teacher = tiny_teacher("qwen3_5_text")
    first, second = (calibrate(teacher, part, about={}) for part in ids.split(6))
    merged, whole = first.merge(second), calibrate(teacher, ids, about={})
    assert not merged.layers[0].sums and merged.layers[0].tokens == ids.numel()
    for name in NAMES:
        torch.testing.assert_close(merged.layers[1].sums[name], whole.layers[1].sums[name], rtol=1e-5, atol=1e-4)
    merged.save(tmp_path / "s")
    loaded = load_statistics(tmp_path / "s", teacher.config)
    assert not loaded.layers[0].sums and torch.equal(loaded.layers[1].sums["q"], merged.layers[1].sums["q"])
    teacher.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="holds statistics of another model"):
        load_statistics(tmp_path / "s", teacher.config)


def test_calibration_leaves_the_teacher_alone(plain_teacher: PreTrainedModel, ids: Tensor) -> None:
    before = {name: value.clone() for name, value in plain_teacher.state_dict().items()}
    with torch.no_grad():
        logits = plain_teacher(ids[:1]).logits
        calibrate(plain_teacher, ids[:2], about={})
        assert torch.equal(plain_teacher(ids[:1]).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in plain_teacher.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in plain_teacher.model.layers)


@pytest.mark.parametrize("shard", ["100GB", "40KB"])
@pytest.mark.parametrize("name", ["llama-mha-tied", "llama-yarn", *FAMILIES])
def test_offloaded_layers_give_the_same_statistics_and_probes(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, name: str, shard: str
) -> None:
    teacher = tiny_teacher(name)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size=shard)
    opened, layers = open_offloaded(str(tmp_path / "teacher"), device="cpu", dtype="float32")
    on_disk = [p for n, p in opened.named_parameters() if ".layers." in n]
    assert on_disk and all(p.is_meta for p in on_disk)
    wanted = calibrate(teacher, ids, about={})
    found = calibrate(opened, ids, about={}, offloaded=layers)
    close(found, wanted, 1e-6)
    torch.testing.assert_close(
        probe(opened, found, ids[:2], offloaded=layers), probe(teacher, wanted, ids[:2]), rtol=1e-4, atol=1e-6
    )
    assert all(p.is_meta for n, p in opened.named_parameters() if ".layers." in n)


def test_offloading_needs_whole_safetensors(tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    teacher.config.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        open_offloaded(str(tmp_path / "bare"))
    weights = {name: x for name, x in teacher.state_dict().items() if "layers.1.mlp" not in name}
    save_file(weights, tmp_path / "bare" / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 3 weights of its architecture, model\.layers\.1\.mlp"):
        open_offloaded(str(tmp_path / "bare"), device="cpu")


def test_an_expert_that_is_stored_in_part_is_missed(
    tiny_teacher: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    tiny_teacher("mixtral").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.block_sparse_moe.experts.0.w3.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of .*, model\.layers\.1\.mlp\.experts\.gate_up"):
        open_offloaded(str(tmp_path), device="cpu")


def test_saved_statistics_come_back_exactly(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    statistics = calibrate(tiny_teacher("llama"), ids, about={"model": "tiny", "fingerprints": ["é"]})
    path = tmp_path / "new folder" / "stats.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert loaded.about == statistics.about
    for a, b in zip(loaded.layers, statistics.layers, strict=True):
        assert a.tokens == b.tokens
        assert all(torch.equal(a.sums[name], b.sums[name]) for name in NAMES)
    assert [p.name for p in path.parent.iterdir()] == ["stats.safetensors"]


def test_foreign_missing_and_truncated_files_are_refused(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    foreign, cut, text = (tmp_path / name for name in ("foreign.safetensors", "cut.safetensors", "text.safetensors"))
    save_file({"x": torch.zeros(2)}, foreign)
    text.write_text("not safetensors")
    calibrate(tiny_teacher("llama"), ids[:1], about={}).save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    for path in (foreign, cut, text, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(UserError, match="holds no calibration statistics of kvlatent"):
            Statistics.load(path)


def poisoned(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": "[1]"}, "not those of so many layers"),
        ({"tokens": "[]"}, "not those of so many layers"),
        ({"tokens": "[5, -5]"}, "1: Input should be greater than or equal to 1"),
        ({"tokens": '"ab"'}, "valid array"),
        ({"tokens": "7"}, "valid array"),
        ({"tokens": "[" * 100_000}, ""),
        ({"about": "[]"}, "should be an object"),
        ({"about": '{"text": 3}'}, "text: Input should be a valid array"),
        ({"about": '{"fingerprints": [1]}'}, "fingerprints.0: Input should be a valid string"),
        ({"about": '{"tokens": [{}]}'}, "tokens: Input should be a valid integer"),
        ({"about": '{"near": [3]}'}, "near: List should have at least 2 items"),
        ({"layers.1.q": None}, "not those of so many layers"),
        ({"extra": torch.zeros(2)}, "not those of so many layers"),
        ({"layers.1.q": torch.zeros(4, 8, 8, dtype=torch.float64)}, "layers.1.q has a wrong shape"),
        ({"layers.0.k": torch.zeros(16)}, "layers.0.k has a wrong shape"),
        ({"layers.0.q": torch.zeros(16)}, ""),
        ({"layers.0.o": torch.zeros(4, 16, 16)}, "layers.0.o has a wrong shape or dtype"),
        ({"layers.1.k_unrotated": poisoned}, "layers.1.k_unrotated holds NaN"),
        ({"probes": torch.zeros(2, 3)}, "probes have a wrong shape"),
        (
            {"probes": torch.full((2, 2), torch.nan, dtype=torch.float64)},
            "probes have a wrong shape or dtype, or hold NaN",
        ),
        ({"probes": torch.zeros(2, 2, dtype=torch.uint8)}, "probes have a wrong shape or dtype"),
        ({f"layers.{i}.{name}": None for i in (0, 1) for name in SINGLE}, "of an earlier version"),
    ],
)
def test_damaged_files_give_one_line(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = tmp_path / "stats.safetensors"
    calibrate(tiny_teacher("llama"), ids[:1], about={}).save(path)
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in changes.items():
        if isinstance(value, str):
            meta[name] = value
        else:
            tensors[name] = value(tensors[name]) if callable(value) and not isinstance(value, Tensor) else value
    save_file({name: x for name, x in tensors.items() if x is not None}, path, metadata=meta)
    with pytest.raises(UserError, match="holds no calibration statistics of kvlatent") as refused:
        Statistics.load(path)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "mistral"])
def test_moments_of_heads_side_by_side_hold_those_of_every_head(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    """Head outputs exactly; keys when they count by the attention of one head's queries alone, so with one head."""
    teacher = tiny_teacher(name)
    heads, together = teacher.config.num_key_value_heads, 2
    apart = calibrate(teacher, ids, heads_per_latent=1, about={})
    joined = calibrate(teacher, ids, heads_per_latent=together, about={})
    assert (apart.heads_per_latent, joined.heads_per_latent) == (1, together)
    close(joined, apart, 1e-6)
    for layer in joined.layers:
        outputs = layer.sums["o_grouped"]
        assert outputs.shape == (4, 16 * together, 16 * together)
        for head, part in enumerate(own_part(4, heads, together).tolist()):
            own = slice(16 * part, 16 * (part + 1))
            torch.testing.assert_close(outputs[head, own, own], layer.sums["o"][head])
        keys = layer.sums["k_grouped"]
        assert keys.shape == (heads // together, 16 * together, 16 * together)
        assert (torch.linalg.eigvalsh(keys) > -1e-3).all()


def test_statistics_of_unlike_latents_are_not_merged(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    apart, together = (calibrate(tiny_teacher("llama"), ids, heads_per_latent=m, about={}) for m in (1, 2))
    with pytest.raises(UserError, match="2 and 1 KV heads per latent"):
        together.merge(apart)
