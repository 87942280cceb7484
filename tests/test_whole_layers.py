"""A budget leaves layers whole that forget, and spends what they leave on those that grow."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_budget import probed
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.compress import budget
from kvlatent.compress.convert import convert
from kvlatent.errors import UserError
from kvlatent.model.cache import LatentCache, RollingLayer, cache_bytes
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.sizes import left_whole, predicted_cache_bytes, window_bytes
from kvlatent.model.window import ALL_FAR, Near
from kvlatent.model.window_cache import WindowLayer

HYBRID = {"gemma3_text": (0,), "olmo3": (0,), "mistral": ()}
"""Layers left whole of two; in mistral both slide, and so both are reduced."""
NEAR = Near(3, 1)


def planned(teacher: PreTrainedModel, ids: Tensor, share: float, near: Near, bits: int | None) -> Any:
    statistics = probed(teacher, ids, near)
    return statistics, budget.plan(teacher, statistics, share, bits=bits)


def converted(teacher: PreTrainedModel, plan: Any, **source: Any) -> PreTrainedModel:
    return convert(teacher, **plan.reduction, **source)


@pytest.fixture(scope="module")
def gemma(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> PreTrainedModel:
    """A student of a quarter with codes, a window and a whole layer."""
    teacher = tiny_teacher("gemma3_text")
    statistics, plan = planned(teacher, ids, 0.25, NEAR, None)
    return converted(teacher, plan, statistics=statistics).requires_grad_(False)


@pytest.mark.parametrize(("near", "bits"), [(NEAR, None), (NEAR, 16), (ALL_FAR, None)])
@pytest.mark.parametrize("name", HYBRID)
@torch.no_grad()
def test_a_planned_student_has_the_bytes_of_its_budget_at_the_counted_context(
    name: str, near: Near, bits: int | None, tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher(name)
    assert left_whole(teacher.config) == HYBRID[name]
    if name == "mistral":
        teacher.config.sliding_window = 160  # so that some of it is beyond the window and what cropping needs
    statistics, plan = planned(teacher, ids, 0.5, near, bits)
    assert plan.whole_layers == HYBRID[name]
    for layer in plan.whole_layers:
        assert (plan.d_qk[layer], plan.d_vo[layer], plan.bits[0][layer]) == (16, 16, 16)
        assert plan.qk_loss[layer] == plan.vo_loss[layer] == 0 and not statistics.probes[:, layer].any()
    student = converted(teacher, plan, statistics=statistics, window=near.window, sinks=near.sinks)
    text = torch.randint(260, (1, 256), generator=torch.Generator().manual_seed(0))
    held = [cache_bytes(model(text, use_cache=True).past_key_values) for model in (student, teacher)]
    if plan.k_codes:  # a budget is of 16 bits
        held[1] //= 2
        held[0] -= sum(predicted_whole(student)) // 2
    step = 256 * 2 * 2 * 4 * 2  # of dims, for keys or for values
    assert held[0] <= 0.5 * held[1] < held[0] + step
    spec = spec_of(student)
    assert spec is not None
    for tokens in (2, 5, 7, 100, 256):
        cache = student(text[:, :tokens], use_cache=True).past_key_values
        assert cache_bytes(cache) == predicted_cache_bytes(student.config, batch=1, tokens=tokens, element_size=4)


def predicted_whole(student: PreTrainedModel) -> tuple[int, int]:
    """Bytes of what isn't codes: whole layers, and the tokens met whole elsewhere."""
    spec = spec_of(student)
    assert spec is not None
    sliding = 5 * 2 * 2 * 16 * 4 * len(spec.whole_layers)
    return sliding, window_bytes(student.config, 4)


@torch.no_grad()
def test_whole_layers_are_the_teachers_and_cache_as_its_do(
    gemma: PreTrainedModel, tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    teacher = tiny_teacher("gemma3_text")
    theirs = graft(teacher).model.layers[0].self_attn.state_dict()
    ours = gemma.model.layers[0].self_attn.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    cache = LatentCache(gemma.config)
    gemma(ids[:2], past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [RollingLayer, WindowLayer]
    assert cache.layers[0].keys.shape == (2, 2, 5, 16)


@pytest.mark.parametrize("implementation", [None, "static"])
@torch.no_grad()
def test_cached_decoding_is_uncached_decoding(gemma: PreTrainedModel, ids: Tensor, implementation: str | None) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = gemma.generate(ids[:2], use_cache=False, **settings)
    kind = {} if implementation is None else {"cache_implementation": implementation, "disable_compile": True}
    torch.testing.assert_close(gemma.generate(ids[:2], **settings, **kind), whole)


@torch.no_grad()
def test_a_short_context_is_the_teachers(
    gemma: PreTrainedModel, tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor
) -> None:
    short = ids[:3, : sum(NEAR)]
    torch.testing.assert_close(gemma(short).logits, tiny_teacher("gemma3_text")(short).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("near", [NEAR, ALL_FAR])
@torch.no_grad()
def test_a_student_converted_in_order_loads_as_it_was_saved(
    near: Near, tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    teacher = tiny_teacher("olmo3")
    plan = planned(teacher, ids, 0.5, near, None)[1]
    student = converted(teacher, plan, ids=ids, window=near.window, sinks=near.sinks)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids[:2]).logits, student(ids[:2]).logits)
    assert spec_of(loaded) == spec_of(student)


def test_plan_and_convert_say_what_stays_whole(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_teacher("gemma3_text").save_pretrained(tmp_path / "teacher")
    byte_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(" ".join(f"{n * n} is the square of {n}." for n in range(400)))
    text = ["--text", f"{tmp_path}/text.txt", "--tokens", "512", "--block-size", "32", "--window", "3", "--sinks", "1"]
    argv = [f"{tmp_path}/teacher", "--budget", "0.25", *text]
    assert cli.main(["plan", *argv, "--out", f"{tmp_path}/plan.svg"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"1 layers with a sliding window stay whole, .*: 1\.9% of the teacher's cache of 256 tokens", said)
    assert said.splitlines()[1].endswith("whole") and not said.splitlines()[2].endswith("whole")
    assert cli.main(["convert", *argv, "--out", f"{tmp_path}/student"]) == 0
    assert re.search(r"whole layers +0", capsys.readouterr().out)
    assert "1 layers as the teacher's" in (tmp_path / "student" / "README.md").read_text()
    assert cli.main(["plan", *argv[:1], "--budget", "0.02", *text, "--out", f"{tmp_path}/small.svg"]) == 2
    said = capsys.readouterr().err
    assert "1 layers that stay whole, since they slide over 6 tokens, and a window of 3 tokens and 1 sinks" in said
    assert cli.main(["doctor", f"{tmp_path}/student"]) == 0
    assert cli.main(["info", f"{tmp_path}/student"]) == 0


def test_what_can_not_stay_whole_is_refused(tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor) -> None:
    teacher = tiny_teacher("mistral")
    with pytest.raises(UserError, match="together, or none"):
        convert(teacher, d_qk=16, d_vo=16, whole_layers=(0,), ids=ids, window=0)
    with pytest.raises(UserError, match="some of the 2 layers"):
        convert(teacher, d_qk=16, d_vo=16, whole_layers=(0, 1), ids=ids, window=0)
    with pytest.raises(UserError, match="reduces all layers or none"):
        convert(tiny_teacher("llama"), preset="portable", d_qk=8, d_vo=8, whole_layers=(0,), ids=ids)
    with pytest.raises(UserError, match="have all 16 dims"):
        convert(tiny_teacher("llama"), d_qk=8, d_vo=8, whole_layers=(0,), ids=ids, window=0)
    with pytest.raises(UserError, match="nothing is far beside a window of 5"):
        budget.far_share(teacher.config, 0.5, Near(5, 1))
