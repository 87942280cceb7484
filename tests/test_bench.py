"""Cache bytes measured from the tensors equal the prediction, and the rows of a benchmark are complete."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from kvlatent.compress.convert import convert
from kvlatent.errors import UserError
from kvlatent.evaluation.bench import benchmark, filled_cache, n_max_of, weight_bytes
from kvlatent.model.cache import allocated_bytes, cache_bytes
from kvlatent.model.graft import dims_by_layer, spec_of
from kvlatent.model.sizes import predicted_cache_bytes
from kvlatent.model.spec import LatentSpec, bytes_per_token
from kvlatent.model.window_cache import LEFT

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_cache_bytes_equal_the_prediction(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    with torch.no_grad():
        cache = model(input_ids=torch.randint(64, (3, 10)), use_cache=True).past_key_values
    predicted = predicted_cache_bytes(model.config, batch=3, tokens=10, element_size=dtype.itemsize)
    assert cache_bytes(cache) == predicted == 2 * 2 * (8 + 8) * 3 * 10 * dtype.itemsize


@settings(max_examples=30)
@given(
    dims=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
)
def test_cache_bytes_count_keys_and_values_of_differing_widths(
    dims: list[tuple[int, int]], kv_heads: int, batch: int, tokens: int
) -> None:
    cache = DynamicCache()
    for layer, (d_qk, d_vo) in enumerate(dims):
        shape = (batch, kv_heads, tokens)
        cache.update(torch.zeros(*shape, d_qk).half(), torch.zeros(*shape, d_vo).half(), layer)
    d_qk_list, d_vo_list = [d_qk for d_qk, _ in dims], [d_vo for _, d_vo in dims]
    assert cache_bytes(cache) == batch * tokens * bytes_per_token(d_qk_list, d_vo_list, kv_heads, 2)


def test_empty_cache_holds_nothing() -> None:
    assert cache_bytes(DynamicCache()) == cache_bytes(DynamicCache(config=tiny().config)) == 0


def test_quantized_cache_is_refused_rather_than_undercounted() -> None:
    class Quantized:
        layers = (type("Layer", (), {"keys": None, "values": None, "_quantized_keys": None})(),)

    with pytest.raises(TypeError, match="quantized"):
        cache_bytes(Quantized())  # type: ignore[arg-type]


def test_dims_by_layer_read_stock_and_student_configs() -> None:
    assert dims_by_layer(LlamaConfig(**SIZES)) == ((8, 8), (8, 8))
    assert dims_by_layer(LlamaConfig(**SIZES, head_dim=16)) == ((16, 16), (16, 16))
    assert dims_by_layer(LlamaConfig(**SIZES, latent={"d_qk": [4, 6], "d_vo": [2, 8]})) == ((4, 6), (2, 8))


def test_benchmark_rows_are_complete() -> None:
    rows = benchmark(
        {"teacher": tiny(), "student": tiny(head_dim=4)}, context=20, batch=3, new_tokens=4, seed=0, repeats=2
    )
    assert [row["model"] for row in rows] == ["teacher", "student"]
    for row, head_dim in zip(rows, (8, 4), strict=True):
        assert row["cache_bytes_per_token"] == 2 * 2 * 2 * head_dim * 4
        assert row["cache_bytes"] == row["cache_bytes_predicted"] == 3 * 24 * row["cache_bytes_per_token"]
        for name in ("ttft_ms", "tpot_ms"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high
        assert row["tokens_per_s"] == pytest.approx(3000 / row["tpot_ms"])
        assert row["peak_memory_bytes"] > 10 * 2**20
        assert (row["context"], row["batch"], row["new_tokens"], row["dtype"]) == (20, 3, 4, "float32")
    assert " ".join(sorted(rows[0])) == (
        "bandwidth_gb_per_s batch cache_bytes cache_bytes_allocated cache_bytes_per_token cache_bytes_predicted "
        "context dtype model new_tokens peak_memory_bytes roofline_ms roofline_share synthetic tokens_per_s tpot_ms "
        "tpot_ms_range ttft_ms ttft_ms_range window_bytes"
    )
    json.dumps(rows)


def test_models_take_turns_after_one_warm_up() -> None:
    calls: list[str] = []
    models = {"a": tiny(), "b": tiny()}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.append(name))
    benchmark(models, context=4, batch=1, new_tokens=1, repeats=2, seed=0)
    assert calls == ["a", "a", "b", "b"] * 3  # a prefill and a decode step per turn


def test_sliding_window_layers_count_what_they_hold() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    (row,) = benchmark({"teacher": model}, context=20, batch=1, new_tokens=2, repeats=1, seed=0)
    assert row["cache_bytes"] == row["cache_bytes_predicted"] == 7 * row["cache_bytes_per_token"]
    (row,) = benchmark({"teacher": model}, context=3, batch=1, new_tokens=2, repeats=1, seed=0)
    assert row["cache_bytes"] == 5 * row["cache_bytes_per_token"]


def test_full_width_cache_of_a_claimed_student_is_an_error() -> None:
    claimed = LatentSpec(
        preset="portable", head_dim=8, d_qk=(4, 4), d_vo=(4, 4), qk_map="folded", inv_freq=(1.0, 0.1),
        per_head_frequencies=False, scale=0.5,
    )  # fmt: skip
    model = tiny(latent=claimed.to_dict())
    with pytest.raises(RuntimeError, match=r"holds 1280 bytes, but 640 were predicted"):
        benchmark({"student": model}, context=4, batch=1, new_tokens=1, repeats=1, seed=0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="exceed the 128 positions of teacher"):
        benchmark({"teacher": tiny()}, context=120, batch=1, new_tokens=9, seed=0)
    with pytest.raises(UserError, match="batch must be at least 1"):
        benchmark({"teacher": tiny()}, context=12, batch=0, new_tokens=9, seed=0)


def test_synthetic_caches_skip_the_prefill_and_hold_as_much(tiny_student: Callable[..., PreTrainedModel]) -> None:
    (row,) = benchmark(
        {"s": tiny_student("llama")}, context=9, batch=2, new_tokens=2, repeats=1, synthetic=True, seed=0
    )
    assert row["ttft_ms"] is None and row["ttft_ms_range"] is None and row["synthetic"]
    assert row["cache_bytes"] == 2 * 11 * 2 * 2 * (8 + 4) * 4 <= row["cache_bytes_allocated"]


def test_roofline_counts_weights_and_cache_at_copy_bandwidth() -> None:
    model = tiny()
    (row,) = benchmark({"m": model}, context=5, batch=2, new_tokens=2, repeats=1, seed=0)
    embedding = 64 * 32 * 4  # not tied: a step reads one row of it
    moved = sum(x.nbytes for x in model.parameters()) - embedding + row["cache_bytes"]
    assert weight_bytes(model) + row["cache_bytes"] == moved
    assert row["roofline_ms"] == pytest.approx(1000 * moved / (row["bandwidth_gb_per_s"] * 1e9))
    assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["tpot_ms"])


def test_tied_embeddings_are_read_once() -> None:
    model = tiny(tie_word_embeddings=True)
    assert weight_bytes(model) == sum(x.nbytes for x in model.parameters())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grows", [True, False])
def test_n_max_is_the_longest_context_that_fits(
    tiny_student: Callable[..., PreTrainedModel], batch: int, grows: bool
) -> None:
    model = tiny_student("llama") if grows else tiny()
    weights = sum(x.nbytes for x in model.parameters())
    memory = weights + 300_000
    found = n_max_of(model, memory=memory, batch=batch)
    assert found["context"] > 50 and weights < found["bytes"] <= memory
    longer = allocated_bytes(filled_cache(model, batch=batch, tokens=found["context"] + 1))
    assert weights + longer > memory
    assert n_max_of(model, memory=weights - 1, batch=batch)["context"] == 0


# --- students with a window


@pytest.fixture
def student(tiny_teacher: Callable[[str], PreTrainedModel], ids: torch.Tensor) -> Callable[..., PreTrainedModel]:
    """A conversion with a window of 6 tokens and 2 sinks, from 2 layers of 2 KV heads of 16 dims to 8 and 4."""
    return lambda name: convert(tiny_teacher(name), d_qk=8, d_vo=4, ids=ids, window=6, sinks=2)


FAR, WHOLE = 2 * 2 * (8 + 4) * 4, 2 * 2 * 32 * 4
"""Bytes of a token as latents and whole."""


@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize(("context", "near", "far"), [(3, 5, 0), (6, 8, 0), (7, 8, 1), (18, 8, 12)])
def test_bytes_of_a_window_are_counted_whole_and_of_the_rest_as_latents(
    student: Callable[..., PreTrainedModel], synthetic: bool, context: int, near: int, far: int
) -> None:
    model = student("llama")
    (row,) = benchmark({"s": model}, context=context, batch=3, new_tokens=2, repeats=1, synthetic=synthetic, seed=0)
    assert row["cache_bytes"] == row["cache_bytes_predicted"] == 3 * (near * WHOLE + far * FAR)
    spec = spec_of(model)
    assert spec is not None and row["cache_bytes"] == 3 * spec.cache_bytes(2, 4, context + 2)
    assert (row["cache_bytes_per_token"], row["window_bytes"]) == (FAR, 8 * WHOLE)
    moved = weight_bytes(model) + row["cache_bytes"]
    assert row["roofline_ms"] == pytest.approx(1000 * moved / (row["bandwidth_gb_per_s"] * 1e9))


def test_a_sliding_window_limits_the_latents_beside_a_window(student: Callable[..., PreTrainedModel]) -> None:
    model = student("mistral")  # which slides over 6 tokens
    for context, far in ((20, 14), (90, 6 - 1 + 64 - 6)):
        (row,) = benchmark({"s": model}, context=context, batch=1, new_tokens=2, repeats=1, seed=0)
        assert row["cache_bytes"] == row["cache_bytes_predicted"] == 8 * WHOLE + far * FAR


def test_a_synthetic_cache_is_one_that_decoding_goes_on_with(student: Callable[..., PreTrainedModel]) -> None:
    model = student("llama")
    prompt = torch.randint(260, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        real = model(input_ids=prompt, use_cache=True).past_key_values
    made = filled_cache(model, batch=2, tokens=20)
    for mine, its in zip(made.layers, real.layers, strict=True):
        assert (mine.length, mine.latents_from, mine.left_from) == (its.length, its.latents_from, its.left_from)
        for a, b in zip((*mine.whole, *mine.left), (*its.whole, *its.left), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
        assert [x.shape for x in mine.far.held()] == [x.shape for x in its.far.held()]
        assert all(x.abs().sum() > 0 for x in (*mine.whole, *(buffer.held() for buffer in mine.far.parts)))


@pytest.mark.parametrize("extra", [0, 10_000, 400_000])
def test_n_max_counts_the_window_and_its_slack(student: Callable[..., PreTrainedModel], extra: int) -> None:
    model = student("llama")
    weights, taken_at_once = sum(x.nbytes for x in model.parameters()), 2 * (8 + LEFT) * WHOLE
    memory = weights + taken_at_once + extra
    found = n_max_of(model, memory=memory, batch=2)
    assert weights < found["bytes"] <= memory
    assert found["context"] >= 8
    longer = allocated_bytes(filled_cache(model, batch=2, tokens=found["context"] + 1))
    assert weights + longer > memory
    assert n_max_of(model, memory=weights + taken_at_once - 1, batch=2)["context"] == 0
