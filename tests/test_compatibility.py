"""Nothing that a library passes to a module of ours is swallowed, and the cache comes in under each of its names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.model import compatibility
from kvlatent.model.attention import LatentAttention
from kvlatent.model.compatibility import CACHE, CACHE_NAMES, WITHOUT_EFFECT


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


@torch.no_grad()
def test_eager_and_sdpa_give_the_same_logits_under_padding(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    for name in ("llama", "mistral"):
        tiny_student(name).save_pretrained(tmp_path / name)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :7] = 0
        found = []
        for implementation in ("sdpa", "eager"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation=implementation).eval()
            found.append(model(ids[:2, :12], attention_mask=mask).logits[mask.bool()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "sdpa_paged", "paged|eager"])
def test_implementations_with_other_masks_are_refused_at_load(
    tiny_student: Callable[..., PreTrainedModel], tmp_path: Path, implementation: str
) -> None:
    tiny_student("mistral").save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)


@torch.no_grad()
def test_an_implementation_set_later_is_refused_when_it_is_used(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    student = tiny_student("llama")
    student.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="not as flex_attention"):
        student.model.layers[0].self_attn(**attention_input(student, ids[:1]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_weights_are_refused(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, implementation: str
) -> None:
    student = tiny_student("llama")
    student.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="output_attentions"):
        student(ids[:1], output_attentions=True)
    if implementation == "eager":
        student.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions"):
            student(ids[:1])
    assert len(student_outputs(student, ids)) == 3


def student_outputs(student: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    student.config.output_attentions = False
    return student(ids[:1], output_hidden_states=True).hidden_states


@torch.no_grad()
def test_a_cache_of_the_teacher_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    cache = tiny_teacher("qwen2")(ids[:1], use_cache=True)[CACHE]
    with pytest.raises(UserError, match=r"2 keys of 16 dims, where this model caches 2 of 8"):
        tiny_student("qwen2", "paper")(ids[:1], **{CACHE: cache})


@pytest.mark.parametrize("preset", ["paper", "best"])  # of best a latent of two heads is as wide as a head was
def test_prefix_tuning_is_refused_with_the_reason(
    preset: str, tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=5, task_type=TaskType.CAUSAL_LM)
    tuned = get_peft_model(tiny_student("llama", preset), config)
    with pytest.raises(UserError, match="prefix tuning"):
        tuned(input_ids=ids[:2], labels=ids[:2])


def lose(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let attention lose these arguments, as when a release passes them under other names."""
    attend = LatentAttention.forward

    def forgetful(self: LatentAttention, *args: object, **kwargs: object) -> object:
        return attend(self, *args, **{name: value for name, value in kwargs.items() if name not in names})

    monkeypatch.setattr(LatentAttention, "forward", forgetful)


@pytest.mark.parametrize(
    ("lost", "what"), [((), None), (CACHE_NAMES, "with its cache"), (("attention_mask",), "with left padding")]
)
def test_a_release_that_was_not_tested_is_checked_at_load(
    tiny_student: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: tuple[str, ...],
    what: str | None,
) -> None:
    tiny_student("qwen3").save_pretrained(tmp_path)
    lose(monkeypatch, *lost)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # a tested release is not checked
    monkeypatch.setattr(compatibility, "TESTED", ("5.1", "5.2"))
    if what is None:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        with pytest.raises(UserError, match=f"transformers {transformers.__version__}.*{what}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
