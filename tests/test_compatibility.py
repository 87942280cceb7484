"""Nothing that a library passes to a module of ours is swallowed, and the cache comes in under each of its names."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlatent.model.compatibility import CACHE_NAMES, WITHOUT_EFFECT


def attention_input(student: PreTrainedModel, ids: Tensor) -> dict[str, object]:
    x = student.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    return {"hidden_states": x, "position_embeddings": student.model.rotary_emb(x, positions)}


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_attention_fills_the_cache_under_each_of_its_names(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, name: str
) -> None:
    student, cache = tiny_student("llama"), DynamicCache()
    student.model.layers[0].self_attn(**attention_input(student, ids[:2]), **{name: cache})
    assert cache.get_seq_length() == ids.shape[1]


@torch.no_grad()
def test_attention_refuses_an_argument_that_it_does_not_know(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    student = tiny_student("llama")
    with pytest.raises(TypeError, match=rf"'kv_store'.*{transformers.__version__}"):
        student.model.layers[0].self_attn(**attention_input(student, ids[:1]), kv_store=DynamicCache())
    with pytest.raises(TypeError, match="'kv_store'"):  # through the stock body, which hands down what it doesn't know
        student(ids[:1], kv_store=DynamicCache())
    with pytest.raises(ValueError, match="causal"):
        student(ids[:1], is_causal=False)


@torch.no_grad()
def test_arguments_without_effect_change_nothing(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    given = attention_input(student, ids[:2])
    attend = student.model.layers[0].self_attn
    assert torch.equal(attend(**given)[0], attend(**given, **dict.fromkeys(WITHOUT_EFFECT, 1))[0])
