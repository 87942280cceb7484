"""SpindleKV: shares by layer, code words against plain loops, keys before RoPE."""

from collections.abc import Callable

import pytest
import torch
from composed import BEFORE_ROPE, CLOSE, Models, logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlatent.compose.codebook import Codebook, leaders
from kvlatent.compose.coded_layer import CodedLayer, turned
from kvlatent.compose.policies.spindle import SpindleKV, shares
from kvlatent.errors import UserError
from kvlatent.model.graft import spec_of


def test_the_line_over_layers_has_its_mean() -> None:
    for mean in (0.03, 0.05, 0.2, 0.525, 0.7, 1.0):
        found = shares(mean, 30)
        assert sum(found) / 30 == pytest.approx(mean) and 0.0 <= min(found) <= max(found) <= 1 + 1e-9
        if mean > 0.05:
            assert (found[0], found[-1]) == pytest.approx(
                (2 * mean - 0.05, 0.05) if mean <= 0.525 else (1, 2 * mean - 1)
            )
    assert shares(0.04, 3) == [0.04] * 3 and shares(0.6, 1) == [0.6]


@given(seed=st.integers(0, 200), slots=st.integers(1, 12))
def test_leaders_are_those_of_a_plain_loop(seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, slots, 2, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, slots, generator=generator) < 0.8
    found = leaders(vectors, valid, least=0.9)
    for row in range(2):
        left, wanted = {i for i in range(slots) if valid[row, i]}, list(range(slots))
        unit = [v / v.norm() for v in vectors[row]]
        near = {i: {j for j in left if j == i or float(unit[i] @ unit[j]) >= 0.9} for i in left}
        while left:
            best = min(left, key=lambda i: (-len(near[i] & left), i))
            for j in near[best] & left:
                wanted[j] = best
            left -= near[best]
        assert found[row].tolist() == wanted


def test_planted_duplicates_are_one_word_and_magnitudes_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(2, 3, 5, 64, generator=generator)  # five directions of each set, far from each other
    which = torch.randint(5, (2, 3, 40), generator=generator)
    size = torch.rand(2, 3, 40, generator=generator) * 9 + 1
    vectors = words.gather(2, which[..., None].expand(-1, -1, -1, 64))
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * size[..., None]
    codebook = Codebook(vectors, None, least=0.98)
    assert len(codebook.words) == sum(len(set(x.tolist())) for x in which.flatten(0, 1))
    torch.testing.assert_close(codebook.magnitude, vectors.norm(dim=-1), rtol=0, atol=0)
    torch.testing.assert_close(codebook.read(), vectors)
    codebook.join(vectors[:, :, :1] * 3)
    assert torch.equal(codebook.index[:, :, -1], codebook.index[:, :, 0])
    torch.testing.assert_close(codebook.read()[:, :, -1], 3 * vectors[:, :, 0])
    before, new = len(codebook.words), torch.randn(2, 3, 2, 64, generator=generator)
    codebook.join(new)
    assert len(codebook.words) == before + 12
    torch.testing.assert_close(codebook.read()[:, :, -2:], new)
    codebook.take(torch.tensor([41, 42]).expand(2, 3, -1))
    assert len(codebook.words) == len(codebook.owner) == 12
    torch.testing.assert_close(codebook.read(), new)


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "glm4", "granite", "llama-yarn", "smollm3", "cohere", "portable", "paper"]
)
def test_keys_before_rope_are_those_that_rope_turns(
    tiny_teacher: Models, tiny_student: Callable[..., PreTrainedModel], text: Tensor, name: str
) -> None:
    model = tiny_student("llama", name) if name in BEFORE_ROPE else tiny_teacher(name)
    observer = SpindleKV(keep=0.9).cache(model).hooks.observer
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache, positions in zip(caches, (torch.zeros(1, 9), torch.arange(9)[None]), strict=True):
        logits(model, text[:1, :9], cache, position_ids=positions.long())
    still, rotated = (cache.layers[0].keys for cache in caches)  # layer 0 has seen no other layer
    places = torch.arange(9).expand(1, still.shape[1], -1)
    scaling = spec_of(observer.model).rope_scaling  # of keys at position 0 too
    torch.testing.assert_close(turned(observer, 0, still, places), scaling * rotated, **CLOSE)
    torch.testing.assert_close(turned(observer, 0, rotated, places, back=True) * scaling, still, **CLOSE)


def test_keys_whose_rope_depends_on_the_length_are_not_turned_back(tiny_teacher: Models) -> None:
    with pytest.raises(UserError, match=r"spindle turns keys back .* depend on this model's input's length"):
        SpindleKV(keep=0.9).cache(tiny_teacher("llama-dynamic"))


@pytest.mark.parametrize("kind", BEFORE_ROPE)
def test_a_codebook_that_merges_nothing_is_the_cache_without_one(
    models: Models, text: Tensor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = models(kind).double()
    monkeypatch.setattr(SpindleKV, "similar", (1.1, 1.1))
    coded = SpindleKV(keep=0.5).cache(model)
    monkeypatch.setattr(SpindleKV, "similar", None)
    plain = SpindleKV(keep=0.5).cache(model)
    for piece in text[:, :110].split([100, 1, 1, 8], dim=1):
        wanted = logits(model, piece, plain)
        torch.testing.assert_close(logits(model, piece, coded).double(), wanted.double(), rtol=1e-3, atol=1e-4)
    assert [layer.slots for layer in coded.layers] == [layer.slots for layer in plain.layers]


def test_repeated_text_takes_few_words(models: Models, text: Tensor) -> None:
    model = models("stock")
    again, once = text[:1, :10].repeat(1, 12), text[:1]
    words = []
    for ids in (again, once):
        cache = SpindleKV(keep=0.9).cache(model)
        logits(model, ids, cache)
        layer = cache.layers[0]
        assert isinstance(layer, CodedLayer) and layer.coded is not None
        words.append([len(codebook.words) for codebook in layer.coded])
    assert words[0] == [20, 20], "ten tokens in two heads: keys of the first layer are equal before RoPE"
    assert min(words[1]) > 40


@pytest.mark.parametrize("kind", ["best", "window"])
def test_spindle_takes_no_student_whose_keys_are_reduced_behind_rope(models: Models, kind: str) -> None:
    with pytest.raises(UserError, match="spindle merges keys as they are before RoPE"):
        SpindleKV().cache(models(kind))
