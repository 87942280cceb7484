"""Bytes predicted from a config are those of live tensors, for layers that grow and for those that slide."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from kvlatent.evaluation.bench import filled_cache, n_max_of
from kvlatent.model.cache import allocated_bytes, cache_bytes
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.sizes import cache_parts, contexts_told, layer_caches, most_tokens, predicted_cache_bytes

HYBRID = ["gemma3_text", "olmo3", "mistral"]
"""Teachers of which one layer, or both, slides over 6 tokens."""


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("kind", ["stock", "graft", "best", "windowed"])
@torch.no_grad()
def test_predicted_bytes_are_those_of_the_live_cache(
    name: str, kind: str, tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel]
) -> None:
    teacher = tiny_teacher(name)
    model = {"stock": lambda: teacher, "graft": lambda: graft(teacher)}.get(kind, lambda: tiny_student(name, kind))()
    for tokens in (1, 4, 5, 6, 8, 9, 80, 120):
        ids = torch.randint(260, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        cache = model(ids, use_cache=True).past_key_values
        assert cache_bytes(cache) == predicted_cache_bytes(model.config, batch=2, tokens=tokens, element_size=4)
        parts = cache_parts(layer_caches(model.config, 4), tokens)
        assert parts["keys"] + parts["values"] == parts["global_layers"] + parts["sliding_layers"] == parts["bytes"]


@pytest.mark.parametrize(("name", "kind"), [("gemma3_text", "stock"), ("gemma3_text", "best"), ("olmo3", "windowed")])
def test_the_longest_context_fits_and_one_more_token_does_not(
    name: str, kind: str, tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_teacher(name) if kind == "stock" else tiny_student(name, kind)
    weights = sum(x.nbytes for x in model.parameters())
    found = n_max_of(model, memory=weights + 400_000, batch=2)
    assert weights < found["bytes"] <= weights + 400_000
    layers, grows = layer_caches(model.config, 4), spec_of(model) is not None
    assert found["context"] == most_tokens(layers, memory=400_000, batch=2, grows=grows)
    longer = 2 * sum(layer.allocated(found["context"] + 1, grows=grows) for layer in layers)
    assert longer > 400_000
    if kind == "stock":  # ours that slide may reserve less than they ever do
        assert allocated_bytes(filled_cache(model, batch=2, tokens=found["context"] + 1)) == longer


def test_where_no_layer_grows_any_context_fits(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    found = n_max_of(tiny_teacher("mistral"), memory=2**24, batch=1)
    assert found["context"] is None and found["bytes"] <= 2**24


def test_contexts_end_with_the_positions(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    config = tiny_teacher("llama").config
    assert contexts_told(config) == (256,)
    config.max_position_embeddings = 32768
    assert contexts_told(config) == (1024, 8192, 32768)
