"""Static shapes: the same tokens as with a cache that grows, and a decode step that is compiled once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from kvlatent.model.cache import FixedLayer, StaticLatentCache, allocated_bytes, cache_bytes
from kvlatent.model.graft import spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.spec import LatentSpec

PLAIN = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def rows(batch: int, tokens: int, dim: int, seed: int) -> Tensor:
    return torch.randn(batch, 2, tokens, dim, generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Three prompts of 7, 4 and 1 tokens, padded on the left."""
    mask = torch.arange(7) >= torch.tensor([0, 3, 6])[:, None]
    return {"input_ids": torch.where(mask, ids[:3, :7], 0), "attention_mask": mask.long()}


def test_content_equals_that_of_transformers() -> None:
    ours, stock = FixedLayer(20), StaticLayer(20)
    assert ours.get_mask_sizes(5) == (5, 0)
    prefill = rows(3, 5, 4, 0), rows(3, 5, 6, 1)
    keys, values = ours.update(*prefill)
    stock.update(*prefill)
    assert torch.equal(keys, prefill[0]) and torch.equal(values, prefill[1])  # not the unused capacity
    at = ours.keys.data_ptr(), ours.values.data_ptr()
    for seed, tokens in enumerate((1, 3, 1)):
        assert ours.get_mask_sizes(tokens) == stock.get_mask_sizes(tokens) == (20, 0)
        new = rows(3, tokens, 4, seed), rows(3, tokens, 6, seed + 9)
        for got, wanted in zip(ours.update(*new), stock.update(*new), strict=True):
            assert torch.equal(got, wanted)
    for layer in (ours, stock):
        layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(ours.keys, stock.keys) and torch.equal(ours.values, stock.values)
    assert int(ours.get_seq_length()) == 10
    assert (ours.keys.data_ptr(), ours.values.data_ptr()) == at


def test_cropped_tokens_are_written_over() -> None:
    layer = FixedLayer(8)
    kept, dropped, new = (rows(1, tokens, 4, tokens) for tokens in (4, 3, 2))
    for states in (kept, dropped):
        layer.update(states, states)
    layer.crop(-3)
    layer.update(new, new)
    assert int(layer.get_seq_length()) == 6
    assert torch.equal(layer.keys[:, :, :6], torch.cat((kept, new), dim=2))
    layer.crop(-100)
    assert int(layer.get_seq_length()) == 0
    with pytest.raises(ValueError, match="crop takes minus the number of tokens"):
        layer.crop(2)


def test_a_layer_that_was_reset_starts_afresh() -> None:
    layer = FixedLayer(8)
    layer.update(rows(1, 3, 4, 0), rows(1, 3, 6, 1))
    layer.reset()
    new = rows(1, 2, 4, 2)
    assert layer.get_mask_sizes(2) == (2, 0)
    assert layer.update(new, new[..., :2].repeat(1, 1, 1, 3))[0] is new
    assert int(layer.get_seq_length()) == 2 and layer.keys[:, :, 2:].count_nonzero() == 0


def test_a_prompt_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 tokens don't fit into a cache for 8"):
        FixedLayer(8).update(rows(1, 9, 4, 0), rows(1, 9, 4, 0))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_capacity_and_content_are_counted_separately(
    tiny_student: Callable[..., PreTrainedModel], name: str, ids: Tensor
) -> None:
    student = tiny_student(name)
    cache = StaticLatentCache(student.config, max_cache_len=40)
    assert cache_bytes(cache) == 0
    with torch.no_grad():
        student(ids[:2, :10], past_key_values=cache)
    assert cache_bytes(cache) == 2 * 2 * 2 * 10 * (8 + 4) * 4  # layers, batch, heads, tokens, dims, bytes
    assert allocated_bytes(cache) == 4 * cache_bytes(cache)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_static_caches_give_the_same_tokens_under_padding_and_beams(
    tiny_student: Callable[..., PreTrainedModel], name: str, beams: int, ids: Tensor
) -> None:
    student = tiny_student(name)
    prompts = padded(ids)
    wanted = student.generate(**prompts, num_beams=beams, **PLAIN)
    got = student.generate(**prompts, num_beams=beams, cache_implementation="static", **PLAIN)
    own = StaticLatentCache(student.config, max_cache_len=30)
    passed = student.generate(**prompts, num_beams=beams, past_key_values=own, **PLAIN)
    assert torch.equal(got.sequences, wanted.sequences) and torch.equal(passed.sequences, wanted.sequences)
    assert passed.past_key_values is own
    kind = StaticSlidingWindowLayer if name == "mistral" else FixedLayer
    assert all(type(layer) is kind for cache in (got.past_key_values, own) for layer in cache.layers)


def test_every_layer_has_room_of_its_own_widths(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        set_spec(student, LatentSpec.from_dict(spec_of(student).to_dict() | {"d_qk": [6, 10], "d_vo": [3, 16]}))
    wanted = student.generate(ids[:2, :9], **PLAIN)
    got = student.generate(ids[:2, :9], cache_implementation="static", **PLAIN)
    assert torch.equal(got.sequences, wanted.sequences)
    shapes = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in got.past_key_values.layers]
    assert shapes == [(12, 6), (20, 32)]  # of a latent that two heads share


def test_a_window_that_the_room_does_not_exceed_needs_no_rolling(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    student = tiny_student("mistral")
    student.config.sliding_window = 31
    wanted = student.generate(ids[:1, :9], **PLAIN)
    own = StaticLatentCache(student.config, max_cache_len=30)
    got = student.generate(ids[:1, :9], past_key_values=own, **PLAIN)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(type(layer) is FixedLayer for layer in own.layers)


def test_a_prompt_in_chunks_gives_the_same_tokens(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    wanted = student.generate(ids[:2, :20], **PLAIN)
    got = student.generate(ids[:2, :20], cache_implementation="static", prefill_chunk_size=8, **PLAIN)
    assert torch.equal(got.sequences, wanted.sequences)


def test_a_conversation_goes_on_in_the_same_cache(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    cache = StaticLatentCache(student.config, max_cache_len=40)
    with torch.no_grad():
        for piece in (ids[:2, :9], ids[:2, 9:10], ids[:2, 10:16]):
            logits = student(piece, past_key_values=cache).logits
        wanted = student(ids[:2, :16]).logits[:, -6:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_assisted_decoding_crops_a_static_cache(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student, assistant = tiny_student("llama"), tiny_student("llama")
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    wanted = student.generate(ids[:1, :9], **PLAIN)
    own = StaticLatentCache(student.config, max_cache_len=40)
    got = student.generate(ids[:1, :9], past_key_values=own, assistant_model=assistant, **PLAIN)
    assert torch.equal(got.sequences, wanted.sequences)


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.nodes: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.nodes.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    def __deepcopy__(self, memo: dict) -> "Counter":
        return self  # transformers copies its settings


def compiled(backend: Any, mode: str | None = None) -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=mode)
    config._compile_all_devices = True
    return config


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("llama", "best"),
        ("qwen3", "portable"),
        pytest.param("llama", "portable", marks=pytest.mark.slow),
        pytest.param("qwen3", "best", marks=pytest.mark.slow),
        pytest.param("qwen2", "paper", marks=pytest.mark.slow),
    ],
)
def test_the_decode_step_is_one_graph_compiled_once(
    tiny_student: Callable[..., PreTrainedModel], name: str, preset: str, ids: Tensor
) -> None:
    student = tiny_student(name, preset)
    prompts = padded(ids)
    wanted = student.generate(**prompts, **PLAIN).sequences
    counters.clear()
    backend = Counter()
    settings = {"cache_implementation": "static", "compile_config": compiled(backend), "max_cache_len": 32}
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = student.generate(**prompts, **settings, **PLAIN).sequences
        again = student.generate(ids[3:6, :9], **settings, **PLAIN).sequences  # another prompt, another length
    assert torch.equal(got, wanted)
    assert torch.equal(again, student.generate(ids[3:6, :9], **PLAIN).sequences)
    assert len(backend.nodes) == 1 and not counters["graph_break"]
    assert "kvlatent.decode_attention.default" in backend.nodes[0]


@pytest.mark.usefixtures("compilable")
def test_a_loop_of_ones_own_compiles_once(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student, backend = tiny_student("llama"), Counter()
    cache = StaticLatentCache(student.config, max_cache_len=40)
    step = torch.compile(student, backend=backend, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        logits = student(ids[:2, :12], past_key_values=cache).logits[:, -1:]
        for at in range(12, 15):
            logits = torch.cat((logits, step(ids[:2, at : at + 1], past_key_values=cache).logits), dim=1)
        wanted = student(ids[:2, :15]).logits[:, 11:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(backend.nodes) == 1 and "kvlatent.decode_attention.default" in backend.nodes[0]


@pytest.mark.slow
@pytest.mark.usefixtures("compilable")
def test_a_sliding_window_is_compiled_a_few_times_but_not_per_step(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    """transformers' layer counts its tokens in Python and changes its way when the window is full."""
    student = tiny_student("mistral")
    backend, longer = Counter(), PLAIN | {"max_new_tokens": 20}
    wanted = student.generate(ids[:2, :3], **longer).sequences
    got = student.generate(
        ids[:2, :3], cache_implementation="static", compile_config=compiled(backend), **longer
    ).sequences
    assert torch.equal(got, wanted)
    assert len(backend.nodes) == 3


@pytest.mark.slow
@pytest.mark.usefixtures("compilable")
def test_the_decode_step_compiles_to_machine_code(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    prompts = padded(ids)
    wanted = student.generate(**prompts, **PLAIN).sequences
    settings = {"cache_implementation": "static", "compile_config": compiled("inductor", "default")}
    assert torch.equal(student.generate(**prompts, **settings, **PLAIN).sequences, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_generate_replays_the_decode_step_as_a_cuda_graph(
    tiny_student: Callable[..., PreTrainedModel], name: str, ids: Tensor
) -> None:
    student = tiny_student(name).to("cuda")
    prompts = {key: value.to("cuda") for key, value in padded(ids).items()}
    wanted = student.generate(**prompts, **PLAIN).sequences
    counters.clear()
    got = student.generate(**prompts, cache_implementation="static", **PLAIN).sequences  # compiles by itself
    assert torch.equal(got, wanted)
    assert counters["inductor"]["cudagraph_skips"] == 0 and not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same_tokens(
    tiny_student: Callable[..., PreTrainedModel], kind: str, ids: Tensor
) -> None:
    student = tiny_student("llama").to("cuda")
    prompts = {key: value.to("cuda") for key, value in padded(ids).items()}
    wanted = student.generate(**prompts, **PLAIN).sequences
    got = student.generate(**prompts, cache_implementation=kind, disable_compile=True, **PLAIN).sequences
    assert torch.equal(got, wanted)
