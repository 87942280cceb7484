"""Every way of generating with a student with a window: the tokens, or logits, of a run without a cache."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import logits
from test_static_cache import Counter, compiled
from test_window import windowed
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from kvlatent.errors import UserError
from kvlatent.model.cache import LatentCache, StaticLatentCache, allocated_bytes, cache_bytes
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.fixed_window import FixedWindowLayer
from kvlatent.model.graft import spec_of
from kvlatent.model.sizes import predicted_cache_bytes
from kvlatent.model.window_cache import AHEAD, SLACK, WindowLayer

PLAIN: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
CLOSE = {"rtol": 1e-3, "atol": 5e-4}
each_family = pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])


@pytest.fixture(params=[(False, 16), (True, 8)], ids=["numbers", "codes"])
def student(
    tiny_teacher: Callable[[str], PreTrainedModel], request: pytest.FixtureRequest
) -> Callable[..., PreTrainedModel]:
    codes, bits = request.param
    return lambda name, window=5, sinks=2: windowed(tiny_teacher(name), window, sinks, codes=codes, window_bits=bits)


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Three prompts of 11, 7 and 1 tokens, padded on the left."""
    mask = torch.arange(11) >= torch.tensor([0, 4, 10])[:, None]
    return {"input_ids": torch.where(mask, ids[:3, :11], 0), "attention_mask": mask.long()}


def stepwise(model: PreTrainedModel, ids: Tensor, steps: list[int], cache: Any) -> Tensor:
    return torch.cat([logits(model, piece, past_key_values=cache) for piece in ids.split(steps, dim=1)], dim=1)


# --- ways of choosing tokens


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@each_family
def test_tokens_are_those_without_a_cache(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, how: dict[str, Any]
) -> None:
    model, found = student(name), []
    static = [] if name == "mistral" else [{"cache_implementation": "static"}]  # refused; see below
    for options in ({"use_cache": False}, {}, *static):
        torch.manual_seed(7)
        found.append(model.generate(**padded(ids), **PLAIN | how | options))
    assert all(torch.equal(got, found[0]) for got in found[1:])


@each_family
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_assisted_decoding_gives_the_greedy_tokens(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, kind: str
) -> None:
    model, longer = student(name), PLAIN | {"max_new_tokens": 24}
    if name == "mistral" and kind == "static":
        pytest.skip("refused; see below")
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompt = ids[:1, :6].repeat(1, 3)
    wanted = model.generate(prompt, use_cache=False, **longer)
    for how in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant, "num_assistant_tokens": 7}):
        cache = StaticLatentCache(model.config, max_cache_len=60) if kind == "static" else LatentCache(model.config)
        assert torch.equal(model.generate(prompt, past_key_values=cache, **how, **longer), wanted), how


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 4), (5, 0), (6, 3), (9, 20), (200, 4)])
def test_windows_and_sinks_of_any_size_and_prompts_of_one_token(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, window: int, sinks: int
) -> None:
    """Around the sliding window of 6 that mistral has, and beyond the text."""
    model = student(name, window, sinks)
    text = ids[:2]
    whole = logits(model, text, use_cache=False)
    for steps in ([1] * 12 + [12], [3, 1, 10, 1, 1, 8]):
        torch.testing.assert_close(stepwise(model, text, steps, LatentCache(model.config)), whole, **CLOSE)
        if name != "mistral":
            fixed = StaticLatentCache(model.config, max_cache_len=30)
            torch.testing.assert_close(stepwise(model, text, steps, fixed), whole, **CLOSE)
    one = ids[:2, :1]
    assert torch.equal(model.generate(one, **PLAIN), model.generate(one, use_cache=False, **PLAIN))


# --- padding


@each_family
@pytest.mark.parametrize("steps", [[24], [2, 2, 2] + [1] * 18, [8, 1, 7, 8]], ids=str)
def test_padding_anywhere_and_a_row_of_nothing_else_are_as_without_a_cache(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, steps: list[int]
) -> None:
    """Left padding longer than the first pieces; a hole among the first tokens; padding up to the last piece."""
    model, text = student(name), ids[:4]
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1, :7] = mask[2, 1:4] = mask[3, :17] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = logits(model, text, attention_mask=mask, position_ids=positions, use_cache=False)
    caches = [LatentCache(model.config)]
    if name != "mistral":
        caches.append(StaticLatentCache(model.config, max_cache_len=30))
    for cache in caches:
        parts, end = [], 0
        for step in steps:
            start, end = end, end + step
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            parts.append(logits(model, text[:, start:end], past_key_values=cache, **given))
        got = torch.cat(parts, dim=1)
        torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], **CLOSE)


def test_a_row_that_is_all_padding_generates_as_without_a_cache(
    student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    model, prompts = student("llama"), padded(ids)
    prompts["attention_mask"][2] = 0
    got, wanted = (model.generate(**prompts, use_cache=use, **PLAIN) for use in (True, False))
    assert torch.equal(got, wanted)


def test_a_padded_row_continues_as_alone(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model, prompts = student("llama"), padded(ids)
    got = model.generate(**prompts, **PLAIN)
    assert torch.equal(got[1:2, 4:], model.generate(ids[1:2, 4:11], **PLAIN))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_numbers_are_read(
    student: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Any, implementation: str
) -> None:
    model = student("mistral")
    wanted = model.generate(**padded(ids), use_cache=False, **PLAIN)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert torch.equal(loaded.generate(**padded(ids), **PLAIN), wanted)


# --- caches that are given, kept and changed


@each_family
@pytest.mark.parametrize("kind", ["empty", "config", "ours", "static", "stock static"])
def test_a_conversation_goes_on_in_any_cache(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, kind: str
) -> None:
    model = student(name)
    if name == "mistral" and "static" in kind:
        pytest.skip("refused; see below")
    cache = {
        "empty": lambda: DynamicCache(),
        "config": lambda: DynamicCache(config=model.config),
        "ours": lambda: LatentCache(model.config),
        "static": lambda: StaticLatentCache(model.config, max_cache_len=64),
        "stock static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[kind]()
    text = ids[:2, :9]
    for turn in range(2):
        if turn:
            text = torch.cat((text, ids[2:4, :6]), dim=1)
        given = {"attention_mask": torch.ones_like(text), **PLAIN}  # or tokens like the padding would be hidden now
        wanted = model.generate(text, use_cache=False, **given)
        out = model.generate(text, past_key_values=cache, return_dict_in_generate=True, **given)
        assert torch.equal(out.sequences, wanted)
        assert out.past_key_values is cache
        text = out.sequences
    assert all(isinstance(layer, WindowLayer | FixedWindowLayer) for layer in cache.layers)


def test_the_cache_that_comes_back_goes_on(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama")
    out = model.generate(ids[:2, :9], return_dict_in_generate=True, **PLAIN)
    longer = torch.cat((out.sequences, ids[2:4, :3]), dim=1)
    given = {"attention_mask": torch.ones_like(longer), **PLAIN}
    got = model.generate(longer, past_key_values=out.past_key_values, **given)
    assert torch.equal(got, model.generate(longer, use_cache=False, **given))


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_reset_cache_starts_afresh(student: Callable[..., PreTrainedModel], ids: Tensor, kind: str) -> None:
    model = student("llama")
    cache = LatentCache(model.config) if kind == "growing" else StaticLatentCache(model.config, max_cache_len=30)
    for prompts in (padded(ids), {"input_ids": ids[3:6, :10]}):
        got = model.generate(**prompts, past_key_values=cache, **PLAIN)
        assert torch.equal(got, model.generate(**prompts, use_cache=False, **PLAIN))
        cache.reset()
        assert cache.get_seq_length() == 0 and cache_bytes(cache) == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("taken", [3, 17, SLACK])
def test_up_to_64_tokens_are_taken_back_without_loss(
    student: Callable[..., PreTrainedModel], name: str, kind: str, taken: int
) -> None:
    if name == "mistral" and kind == "static":
        pytest.skip("refused; see below")
    model = student(name)
    text = torch.randint(260, (2, 100), generator=torch.Generator().manual_seed(5))
    other = torch.randint(260, (2, 40), generator=torch.Generator().manual_seed(6))
    for held in (taken, taken + 4, 100):  # of few tokens, sinks and window come back as well
        cache = StaticLatentCache(model.config, 160) if kind == "static" else LatentCache(model.config)
        stepwise(model, text[:, :held], [held - 1, 1] if held > 1 else [1], cache)
        cache.crop(-taken)
        assert cache.get_seq_length() == held - taken
        got = stepwise(model, other, [3, 1, 1, 35], cache)
        joined = torch.cat((text[:, : held - taken], other), dim=1)
        torch.testing.assert_close(got, logits(model, joined, use_cache=False)[:, -40:], **CLOSE)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_more_is_refused_and_nothing_is_lost(student: Callable[..., PreTrainedModel], kind: str) -> None:
    model = student("llama")
    text = torch.randint(260, (1, 90), generator=torch.Generator().manual_seed(5))
    cache = StaticLatentCache(model.config, 160) if kind == "static" else LatentCache(model.config)
    stepwise(model, text[:, :80], [80], cache)
    with pytest.raises(ValueError, match=r"at most 64 tokens can be taken back .* last 5 tokens whole; got 65"):
        cache.crop(-65)
    got = stepwise(model, text[:, 80:], [1, 9], cache)
    torch.testing.assert_close(got, logits(model, text, use_cache=False)[:, 80:], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sequences_are_selected_and_repeated(student: Callable[..., PreTrainedModel], ids: Tensor, name: str) -> None:
    model, prompts = student(name), padded(ids)
    mask, positions = prompts["attention_mask"], (prompts["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    cache = LatentCache(model.config)
    logits(model, prompts["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    cache.reorder_cache(torch.tensor([2, 1, 1]))
    rows = torch.tensor([2, 1, 1])  # of the prompts
    more, seen = ids[4:7, :9], torch.cat((mask[rows], torch.ones(3, 9, dtype=torch.long)), dim=1)
    where = (seen.cumsum(-1) - 1).clamp_min(0)
    text = torch.cat((prompts["input_ids"][rows], more), dim=1)
    wanted = logits(model, text, attention_mask=seen, position_ids=where, use_cache=False)[:, 11:]
    parts = []
    for at in range(11, 20):
        given = {"attention_mask": seen[:, : at + 1], "position_ids": where[:, at : at + 1]}
        parts.append(logits(model, text[:, at : at + 1], past_key_values=cache, **given))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_layer_that_was_moved_away_comes_back_whole(
    student: Callable[..., PreTrainedModel], ids: Tensor, kind: str
) -> None:
    """What `cache_implementation="offloaded"` does to layers; the cache that does it needs a GPU."""
    model = student("llama")
    cache = LatentCache(model.config) if kind == "growing" else StaticLatentCache(model.config, max_cache_len=30)
    parts = []
    for piece in ids[:2].split([9, 1, 14], dim=1):
        for layer in cache.layers:
            layer.prefetch()
        parts.append(logits(model, piece, past_key_values=cache))
        for layer in cache.layers:
            layer.offload()
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids[:2], use_cache=False), **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same_tokens(student: Callable[..., PreTrainedModel], ids: Tensor, kind: str) -> None:
    model = student("llama").to("cuda")
    prompts = {key: value.to("cuda") for key, value in padded(ids).items()}
    wanted = model.generate(**prompts, use_cache=False, **PLAIN)
    assert torch.equal(model.generate(**prompts, cache_implementation=kind, disable_compile=True, **PLAIN), wanted)


def test_caches_of_other_models_are_refused(
    student: Callable[..., PreTrainedModel], tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor,
) -> None:  # fmt: skip
    model, teacher, windowless = student("llama"), tiny_teacher("llama"), tiny_student("llama")
    for other in (teacher, windowless):
        with pytest.raises(UserError, match="a cache without one"):
            logits(model, ids[:1], past_key_values=other(ids[:1]).past_key_values)
    with pytest.raises(UserError, match="a student with a window"):
        logits(windowless, ids[:1], past_key_values=model(ids[:1]).past_key_values)


# --- static shapes


def test_static_tensors_never_move_and_are_counted(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama")
    spec, cache = spec_of(model), StaticLatentCache(model.config, max_cache_len=40)
    assert spec is not None and cache_bytes(cache) == 0
    logits(model, ids[:2, :10], past_key_values=cache)
    tensors = [x for layer in cache.layers for x in layer._tensors()]
    places, total = [x.data_ptr() for x in tensors], allocated_bytes(cache)
    stepwise(model, ids[:2, 10:], [1, 1, 9, 1, 2], cache)
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.reset()
    logits(model, ids[:2, :10], past_key_values=cache)
    assert [x.data_ptr() for layer in cache.layers for x in layer._tensors()] == places
    assert cache_bytes(cache) == 2 * spec.cache_bytes(2, model.dtype.itemsize, 10) and allocated_bytes(cache) == total
    with pytest.raises(ValueError, match="41 tokens don't fit into a cache for 40"):
        logits(model, ids[:2, :1].repeat(1, 31), past_key_values=cache)


def test_a_static_cache_beside_a_sliding_window_is_refused(
    student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    with pytest.raises(UserError, match="can't hold both the model's sliding window of 6"):
        student("mistral").generate(ids[:1, :9], cache_implementation="static", **PLAIN)


@pytest.mark.usefixtures("compilable")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_decode_step_is_one_graph_compiled_once(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str
) -> None:
    model, backend = student(name), Counter()
    settings = {"cache_implementation": "static", "compile_config": compiled(backend), "max_cache_len": 32}
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = model.generate(**padded(ids), **settings, **PLAIN)
        again = model.generate(ids[3:6, :9], **settings, **PLAIN)
    assert torch.equal(got, model.generate(**padded(ids), use_cache=False, **PLAIN))
    assert torch.equal(again, model.generate(ids[3:6, :9], use_cache=False, **PLAIN))
    assert len(backend.nodes) == 1
    if model.dtype == torch.float32:
        assert "kvlatent.decode_segment.default" in backend.nodes[0]


@pytest.mark.slow
@pytest.mark.usefixtures("compilable")
def test_the_decode_step_compiles_to_machine_code(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama")
    settings = {"cache_implementation": "static", "compile_config": compiled("inductor", "default")}
    wanted = model.generate(**padded(ids), use_cache=False, **PLAIN)
    assert torch.equal(model.generate(**padded(ids), **settings, **PLAIN), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("compilable")
def test_generate_replays_the_decode_step_as_a_cuda_graph(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama").to("cuda")
    prompts = {key: value.to("cuda") for key, value in padded(ids).items()}
    wanted = model.generate(**prompts, use_cache=False, **PLAIN)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(model.generate(**prompts, cache_implementation="static", **PLAIN), wanted)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_prompt_in_chunks_gives_the_same_tokens(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama")
    wanted = model.generate(ids[:2, :20], use_cache=False, **PLAIN)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids[:2, :20], prefill_chunk_size=8, **options, **PLAIN), wanted)


# --- precision and training


@each_family
def test_bfloat16_is_near_float32(student: Callable[..., PreTrainedModel], ids: Tensor, name: str) -> None:
    model = student(name)
    exact = logits(model, ids[:2], use_cache=False)
    model = model.to(torch.bfloat16)
    uncached = logits(model, ids[:2], use_cache=False)
    cached = stepwise(model, ids[:2], [9] + [1] * 15, LatentCache(model.config))
    assert cached.dtype == torch.bfloat16
    for got in (uncached, cached):
        assert (got.float() - exact).norm() < (0.3 if spec_of(model).k_codes else 0.1) * exact.norm()


@each_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_has_the_gradients_of_one_without_a_cache(
    student: Callable[..., PreTrainedModel], ids: Tensor, name: str, checkpointing: bool
) -> None:
    model = student(name).requires_grad_(True).train()
    assert model.config.use_cache
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = []
    for options in ({"use_cache": False}, {}):
        model.zero_grad()
        model(ids[:2], labels=ids[:2], **options).loss.backward()
        found.append({key: value.grad.clone() for key, value in model.named_parameters()})
    for key, wanted in found[0].items():
        torch.testing.assert_close(found[1][key], wanted, rtol=1e-4, atol=1e-6, msg=key)
        assert wanted.any(), key


def test_packed_documents_are_met_as_without_a_cache(student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    model = student("llama")
    positions = torch.cat((torch.arange(10), torch.arange(14))).expand(2, -1)
    mask = torch.ones(24, 24, dtype=torch.bool).tril()
    mask[10:, :10] = False  # said by a mask: from positions alone transformers reads it without a cache only
    given = {"position_ids": positions, "attention_mask": mask.expand(2, 1, -1, -1)}
    found = [logits(model, ids[:2], use_cache=use, **given) for use in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][:, 10:], logits(model, ids[:2, 10:], use_cache=False), **CLOSE)


def test_tokens_that_come_one_by_one_become_latents_some_at_a_time(
    student: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer at steps of its own; what is held, and taken back, is as if each had left alone."""
    model = student("llama", 64)
    text = torch.randint(260, (2, 180), generator=torch.Generator().manual_seed(5))
    whole, cache = logits(model, text, use_cache=False), LatentCache(model.config)
    counts = list[int]()
    stored = FarMaps.stored

    def counted(maps: FarMaps, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(k.shape[2])
        return stored(maps, k, v)

    monkeypatch.setattr(FarMaps, "stored", counted)
    held, at_steps = 0, list[list[int]]()
    while held < 180:
        counts.clear()
        new = 70 if held == 0 else 1
        got = logits(model, text[:, held : held + new], past_key_values=cache)
        torch.testing.assert_close(got, whole[:, held : held + new], **CLOSE)
        held += new
        sizes = {"batch": 2, "tokens": held, "element_size": model.dtype.itemsize}
        assert cache_bytes(cache) == predicted_cache_bytes(model.config, **sizes)
        at_steps.append([count for count in counts if count])
        if held == 110 and len(at_steps) == 41:
            cache.crop(-20)
            held -= 20
    steps = [counts for counts in at_steps[2:] if counts]
    assert max(map(max, steps)) == AHEAD and len(steps) < 20
    assert any(len(counts) == 1 for counts in steps)  # one layer alone
