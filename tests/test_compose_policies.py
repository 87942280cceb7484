"""Policies: scores and schedules against plain loops, decoding against masks over the whole cache, ragged batches
against sequences alone, bytes against live tensors; on original models and on students."""

import copy
import gc
from typing import Any

import pytest
import torch
from composed import BEFORE_ROPE, CLOSE, Models, logits, padded
from hypothesis import given
from hypothesis import strategies as st
from test_window import windowed
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlatent.compose.coded_layer import CodedLayer
from kvlatent.compose.evicting import PolicyCache
from kvlatent.compose.layers import EvictingLayer, EvictingWindowLayer, to_the_right
from kvlatent.compose.policies import POLICIES
from kvlatent.compose.policies.expected_attention import ExpectedAttention
from kvlatent.compose.policies.pyramid_infer import PyramidInfer
from kvlatent.compose.policies.snapkv import SnapKV
from kvlatent.compose.policies.spindle import SpindleKV
from kvlatent.compose.policies.streaming import StreamingLLM
from kvlatent.compose.policies.tova import TOVA
from kvlatent.compose.policy import LEAST, Policy, chosen
from kvlatent.errors import UserError
from kvlatent.model.cache import cache_bytes
from kvlatent.model.compatibility import CACHE
from kvlatent.model.layers import hooks
from kvlatent.model.window_cache import WindowLayer

PLAIN: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
KINDS = ["stock", "best", "window", "codes"]
PAIRS = [(policy, kind) for policy in POLICIES.values() for kind in (KINDS if policy is not SpindleKV else BEFORE_ROPE)]
each_pair = pytest.mark.parametrize(("policy", "kind"), PAIRS, ids=lambda x: getattr(x, "name", x))


# --- what stays


@given(st.data())
def test_what_stays_is_the_newest_the_first_and_the_best(data: st.DataObject) -> None:
    slots, heads = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2))
    worth = torch.tensor(data.draw(st.permutations(range(heads * slots)))).view(1, heads, slots).float()
    pads, last = data.draw(st.integers(0, slots - 1)), data.draw(st.integers(0, 4))
    first, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, slots))
    valid = (torch.arange(slots) >= pads)[None]
    kept = chosen(worth, valid, [count], first=[first], last=[last])[0]
    for head in range(heads):
        order = list(range(slots - 1, max(pads, slots - last) - 1, -1))
        order += [slot for slot in range(pads, min(pads + first, slots)) if slot not in order]
        order += sorted((s for s in range(pads, slots) if s not in order), key=lambda s: -float(worth[0, head, s]))
        if pads + first <= slots - last or count == 0:  # else some are both
            assert set(kept[head].nonzero()[:, 0].tolist()) == set(order[:count])
    assert kept.sum(-1).tolist() == [min(count, slots - pads)] * heads


def test_kept_slots_move_to_the_right() -> None:
    kept = torch.tensor([[[1, 0, 1, 1], [0, 1, 1, 1]], [[0, 0, 1, 0], [0, 0, 0, 1]]]).bool()
    slots, valid = to_the_right(kept)
    assert slots[0].tolist() == [[0, 2, 3], [1, 2, 3]] and slots[1, :, -1].tolist() == [2, 3]
    assert valid is not None and valid.tolist() == [[True] * 3, [False, False, True]]
    assert to_the_right(kept[:1])[1] is None


@pytest.mark.parametrize("slot", [[[0], [0]], [[8], [3]], [[4, 0], [7, 8]]])
def test_a_slot_that_goes_leaves_the_others_as_they_are(slot: list[list[int]]) -> None:
    def text(tokens: int) -> Tensor:
        return torch.rand(2, 2, tokens, 3, generator=torch.Generator().manual_seed(tokens))

    layer, held = EvictingLayer(), text(9)
    for new in (text(9), text(1), text(2)):
        layer.announced = True
        layer.update(new, 2 * new)
        if new.shape[2] < 9:
            held = torch.cat((held, new), dim=2)
            stays = torch.arange(held.shape[2]) != torch.tensor(slot).expand(-1, 2)[..., None]
            held = held[stays].view(2, 2, -1, 3)
            layer.drop(torch.tensor(slot))
        assert torch.equal(layer.keys, held) and torch.equal(layer.values, 2 * held)
        assert layer.slots == held.shape[2]


# --- what is computed from what stays


@each_pair
def test_a_policy_that_keeps_all_changes_nothing(models: Models, text: Tensor, policy: type[Policy], kind: str) -> None:
    model, cache = models(kind), None
    cache, plain = policy(keep=1.0).cache(model), DynamicCache(config=model.config) if kind == "stock" else None
    for piece in text[:, :50].split([30, 1, 1, 8, 10], dim=1):
        with torch.no_grad():
            out = model(piece, use_cache=True, **{CACHE: plain})
        plain = out[CACHE]
        torch.testing.assert_close(logits(model, piece, cache), out.logits, **CLOSE)
    assert cache_bytes(cache) == cache_bytes(plain) and cache.kept()["kept_share"] == 1
    given = model.generate(text[:, :50], past_key_values=policy(keep=1.0).cache(model), **PLAIN)
    assert torch.equal(given, model.generate(text[:, :50], **PLAIN))


@pytest.mark.parametrize("policy", [StreamingLLM, SnapKV, TOVA, ExpectedAttention])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo3", "smollm3", "phi3", "gemma3_text", "ministral3"])
def test_decoding_is_attention_to_what_stays_at_its_own_positions(
    tiny_teacher: Models, text: Tensor, policy: type[Policy], name: str
) -> None:
    model, n = tiny_teacher(name).double(), 100
    cache, plain = policy(keep=0.5).cache(model), DynamicCache(config=model.config)
    wanted = logits(model, text[:, :n], plain)
    torch.testing.assert_close(logits(model, text[:, :n], cache), wanted, **CLOSE)
    kept = {}
    for index in cache.acts_on:
        whole, held = plain.layers[index].keys, cache.layers[index].keys
        same = (whole[:, :, None] - held[:, :, :, None]).abs().amax(-1) < 1e-6  # (batch, heads, held, n)
        assert held.shape[2] == 50 and bool((same.sum(-1) == 1).all())
        kept[index] = same.any(2)

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        if module.layer_idx not in kept:
            return None
        stays = kept[module.layer_idx].repeat_interleave(2, dim=1)
        new = torch.ones(3, 4, 3, 3, dtype=torch.bool).tril()
        mask = torch.cat((stays[:, :, None].expand(-1, -1, 3, -1), new), dim=-1)
        return args, kwargs | {"attention_mask": mask}

    with hooks(layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.layers):
        wanted = logits(model, text[:, n : n + 3], plain)
    torch.testing.assert_close(logits(model, text[:, n : n + 3], copy.deepcopy(cache)), wanted, **CLOSE)
    if not policy.steps:
        steps = [logits(model, token, cache) for token in text[:, n : n + 3].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize(
    ("policy", "kind", "how"),
    [(policy, kind, {}) for policy, kind in PAIRS]
    + [(policy, "codes", {"do_sample": True, "top_k": 20}) for policy in (SnapKV, PyramidInfer)]
    + [(policy, kind, {"num_beams": 2}) for policy, kind in ((TOVA, "stock"), (SnapKV, "codes"))],
    ids=str,
)
def test_sequences_in_a_batch_are_as_alone(
    models: Models, text: Tensor, policy: type[Policy], kind: str, how: dict[str, Any]
) -> None:
    model, lengths = models(kind).double(), [120, 85, 17]
    batch = padded(text, lengths)
    if "do_sample" in how:  # rows draw from one generator: compare logits, on the tokens drawn
        torch.manual_seed(0)
        out = model.generate(
            **batch, past_key_values=policy(keep=0.4).cache(model), **PLAIN | how,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row, length in enumerate(lengths):
            cache = policy(keep=0.4).cache(model)
            alone = [logits(model, batch["input_ids"][row : row + 1, -length:], cache)[0, -1]]
            for token in out.sequences[row, max(lengths) : -1]:
                alone.append(logits(model, token.view(1, 1), cache)[0, -1])
            found = torch.stack(out.logits, dim=1)[row]
            torch.testing.assert_close(found.double(), torch.stack(alone), rtol=1e-3, atol=1e-3)
        return
    found = model.generate(**batch, past_key_values=policy(keep=0.4).cache(model), **PLAIN | how)
    for row, length in enumerate(lengths):
        alone = batch["input_ids"][row : row + 1, -length:]
        wanted = model.generate(alone, past_key_values=policy(keep=0.4).cache(model), **PLAIN | how)
        assert torch.equal(found[row, max(lengths) - length :], wanted[0])


@each_pair
def test_bytes_are_those_of_the_tensors_held(models: Models, text: Tensor, policy: type[Policy], kind: str) -> None:
    model = models(kind)
    for batch in ({"input_ids": text}, padded(text, [120, 85, 17])):
        cache, lengths = policy(keep=0.4).cache(model), batch.get("attention_mask", torch.ones(3, 120)).sum(1).tolist()
        logits(model, batch["input_ids"], cache, **{k: x for k, x in batch.items() if k != "input_ids"})
        held = tokens = 0
        for layer in cache.layers:
            flags = 0 if layer.visible is None else layer.visible.nbytes
            valid = layer.valid()
            if isinstance(layer, WindowLayer):
                held += sum(x[:, :, : layer.near].nbytes for x in layer.whole) + flags
                held += sum(part.held().nbytes for part in layer.far.parts)
                tokens += sum(min(7, int(n)) for n in lengths)
                tokens += layer.far.length * 3 if valid is None else int(valid.sum())
            else:
                own = (layer.keys, layer.values)
                if isinstance(layer, CodedLayer):
                    assert layer.coded is not None and layer._keys is layer._values is None
                    own = (layer.positions, *layer.coded[0].tensors(), *layer.coded[1].tensors())
                held += sum(x.nbytes for x in own) + flags
                tokens += layer.keys.shape[2] * 3 if valid is None else int(valid.sum())
        assert cache_bytes(cache) == held
        told, near = cache.kept(), sum(min(7, int(n)) for n in lengths) if kind in ("window", "codes") else 0
        assert told["kept_share"] == pytest.approx(tokens / len(cache.layers) / sum(lengths))
        if near:
            far = tokens / len(cache.layers) - near
            wanted = {"kept_far_share": far / (sum(lengths) - near), "kept_far_tokens": far / 3}
            assert told == pytest.approx({"kept_share": told["kept_share"]} | wanted)
        if policy not in (PyramidInfer, SpindleKV):  # a share of what the layer doesn't hold in any case
            free = [int(n) - near // 3 for n in lengths]
            kept = near + sum(min(n, max(LEAST, round(0.4 * n))) for n in free)
            assert tokens == kept * len(cache.layers)


@pytest.mark.parametrize("kind", ["stock", "window"])
def test_budgets_of_fixed_size_hold_while_decoding(models: Models, text: Tensor, kind: str) -> None:
    model = models(kind)
    for policy in (StreamingLLM, TOVA):
        cache = policy(keep=0.3).cache(model)
        model.generate(text[:, :100], past_key_values=cache, **PLAIN | {"max_new_tokens": 20})
        assert [layer.held_tokens()[0] for layer in cache.layers] == [round(0.3 * (100 - cache.layers[0].near))] * 2
        short = policy(keep=0.3).cache(model)
        model.generate(text[:, :5], past_key_values=short, **PLAIN | {"max_new_tokens": 30})
        assert [layer.held_tokens()[0] for layer in short.layers] == [LEAST, LEAST]
    grows = SnapKV(keep=0.4).cache(model)
    model.generate(text[:, :100], past_key_values=grows, **PLAIN | {"max_new_tokens": 21})
    assert [layer.held_tokens()[0] for layer in grows.layers] == [round(0.4 * (100 - grows.layers[0].near)) + 20] * 2


@pytest.mark.parametrize("kind", ["stock", "window", "codes"])
def test_tova_ranks_once_for_several_tokens_in_a_batch_as_alone(
    models: Models, text: Tensor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ranked: list[int] = []
    rank = TOVA.rank
    monkeypatch.setattr(TOVA, "rank", lambda self, received: (ranked.append(len(received)), rank(self, received))[1])
    model, lengths = models(kind).double(), [120, 90]
    batch, policy = padded(text[:2], lengths), TOVA(keep=0.8)
    ids, steps = batch["input_ids"], text[2, :8].expand(2, -1)
    caches = [policy.cache(model) for _ in range(3)]
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # maps come after RoPE
    found = [logits(model, position_ids=places, cache=caches[0], **batch)[:, -1:]]
    alone = [[logits(model, ids[row : row + 1, -n:], caches[1 + row])[:, -1:]] for row, n in enumerate(lengths)]
    for at, token in enumerate(steps.split(1, dim=1)):
        seen = torch.cat((batch["attention_mask"], torch.ones(2, at + 1, dtype=torch.long)), dim=1)
        found.append(logits(model, token, caches[0], attention_mask=seen, position_ids=places[:, -1:] + at + 1))
        for row, cache in enumerate(caches[1:]):
            alone[row].append(logits(model, token[row : row + 1], cache))
            full = round(0.8 * (lengths[row] - cache.layers[0].near))
            together = full // 32
            held = full - together + 1 + at % together
            assert together > 1 and {layer.held_tokens()[0] for layer in cache.layers} == {held}
            assert {layer.held_tokens()[row] for layer in caches[0].layers} == {held}
    of_alone = 1 + 3 + 1 + 4 if kind == "stock" else 1 + 4 + 1 + 4  # prompts, and of 8 steps each third or second
    assert ranked.count(1) == of_alone * len(caches[0].layers)
    torch.testing.assert_close(torch.cat(found, 1), torch.cat([torch.cat(x, 1) for x in alone]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["olmo3", "gemma3_text"])
def test_layers_with_a_sliding_window_stay_as_they_are(tiny_teacher: Models, text: Tensor, name: str) -> None:
    model, batch = windowed(tiny_teacher(name), codes=True), padded(text[:2], [100, 60])
    cache = SnapKV(keep=0.5).cache(model)
    found = model.generate(**batch, past_key_values=cache, **PLAIN)
    assert cache.acts_on == [1] and cache.layers[0].far.length > 0
    for row, length in enumerate((100, 60)):
        alone = batch["input_ids"][row : row + 1, -length:]
        wanted = model.generate(alone, past_key_values=SnapKV(keep=0.5).cache(model), **PLAIN)
        assert torch.equal(found[row, 100 - length :], wanted[0])


@pytest.mark.parametrize(
    ("policy", "kind"), [(SnapKV, "stock"), (TOVA, "window"), (SnapKV, "codes"), (SpindleKV, "stock")], ids=str
)
def test_later_prefills_keep_their_share_of_all_tokens_in_a_batch_as_alone(
    models: Models, text: Tensor, policy: type[Policy], kind: str
) -> None:
    model, lengths, more = models(kind).double(), [70, 40], text[:2, 70:]
    batch = padded(text[:2], lengths)
    cache, found = policy(keep=0.5).cache(model), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for piece in (None, *more.split([1, 47, 2], dim=1)):
        if piece is not None:
            ids, mask = piece, torch.cat((mask, torch.ones_like(piece)), dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found.append(logits(model, ids, cache, attention_mask=mask, position_ids=positions))
    assert cache.get_seq_length() == 120
    if policy is not SpindleKV:
        near = cache.layers[0].near
        wanted = [round(0.5 * (length + 50 - near)) for length in lengths]
        assert [layer.held_tokens() for layer in cache.layers] == [wanted, wanted]
    for row, length in enumerate(lengths):
        alone = policy(keep=0.5).cache(model)
        pieces = (batch["input_ids"][row : row + 1, -length:], *more[row : row + 1].split([1, 47, 2], dim=1))
        for piece, whole in zip(pieces, found, strict=True):
            wanted_logits = logits(model, piece, alone)[0]
            torch.testing.assert_close(whole[row, -piece.shape[1] :], wanted_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("policy", "kind"), [(PyramidInfer, "codes"), (SpindleKV, "stock"), (TOVA, "window")])
def test_a_cache_that_was_reset_is_as_new(models: Models, text: Tensor, policy: type[Policy], kind: str) -> None:
    model, found = models(kind), list[Tensor]()
    cache = policy(keep=0.4).cache(model)
    for batch in (padded(text, [120, 85, 17]), {"input_ids": text[:1, :100]}, padded(text, [120, 85, 17])):
        found.append(model.generate(**batch, past_key_values=cache, **PLAIN))
        cache.reset()
        assert cache_bytes(cache) == 0 and cache.kept()["kept_share"] == 1
    assert torch.equal(found[0], found[2])


def test_a_conversation_goes_on_in_the_same_cache(models: Models, text: Tensor) -> None:
    model = models("stock")
    cache = SnapKV(keep=0.5).cache(model)
    first = model.generate(text[:1, :80], past_key_values=cache, **PLAIN)
    longer = torch.cat((first, text[:1, 80:]), dim=1)
    out = model.generate(longer, past_key_values=cache, **PLAIN)
    assert out.shape[1] == longer.shape[1] + 6 and cache.get_seq_length() == out.shape[1] - 1
    assert [layer.slots for layer in cache.layers] == [round(longer.shape[1] / 2) + 5] * 2


# --- what can't be


def test_hooks_go_with_the_cache(models: Models, text: Tensor) -> None:
    model = models("stock")
    first, cache = SnapKV().cache(model), SnapKV().cache(model)
    twin = copy.deepcopy(cache)
    del first, cache
    gc.collect()
    logits(model, text[:, :100], twin)
    assert twin.layers[0].slots == 50
    del twin
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def refused(model: PreTrainedModel, text: Tensor, why: str) -> None:
    """Ask for what can't be, named by a part of the reason."""
    two, cache = padded(text[:2], [50, 40]), SnapKV().cache(model)
    if why == "left padding alone":
        logits(model, text[:2, :50], cache, attention_mask=two["attention_mask"].flip(1))
    elif why == "no packed texts":
        packed = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        packed[..., 10:, :10] = False
        logits(model, text[:1, :20], cache, attention_mask=packed)
    elif why == "padding inside a text":
        logits(model, two["input_ids"], cache, attention_mask=two["attention_mask"])
        more = torch.cat((two["attention_mask"], torch.tensor([[1, 1], [0, 1]])), dim=1)
        logits(model, text[:2, :2], cache, attention_mask=more)
    elif why == "hides some of them":
        logits(model, text[:1, :50], cache)
        mask = torch.ones(1, 51, dtype=torch.long).index_fill(1, torch.tensor([7]), 0)
        logits(model, text[:1, :1], cache, attention_mask=mask)
    elif why == "another model":
        logits(copy.deepcopy(model), text, SnapKV().cache(copy.deepcopy(model)))
    elif why == "assisted decoding":
        model.generate(text[:1], past_key_values=cache, prompt_lookup_num_tokens=3, **PLAIN)
    elif why == "no beams":
        model.generate(text, past_key_values=SpindleKV().cache(model), num_beams=2, **PLAIN)
    elif why == "no gradient":
        model.requires_grad_(True)(text, **{CACHE: cache})
    elif why == "not as flash_attention_2":
        other = copy.deepcopy(model)
        other.config._attn_implementation = "flash_attention_2"
        SnapKV().cache(other)
    else:
        SnapKV(keep=0.0)


@pytest.mark.parametrize(
    "why",
    [
        "left padding alone", "no packed texts", "padding inside a text", "hides some of them", "another model",
        "assisted decoding", "no beams", "no gradient", "not as flash_attention_2", "above 0",
    ],
)  # fmt: skip
def test_what_cant_be_combined_is_refused(models: Models, text: Tensor, why: str) -> None:
    kind = ValueError if why == "assisted decoding" else UserError  # which transformers 5.24 refuses before we do
    with pytest.raises(kind, match=f"(?i){why}"):
        refused(models("stock"), text, why)


def test_layers_are_of_the_kind_that_a_model_caches(models: Models) -> None:
    for kind, layer in (("stock", EvictingLayer), ("portable", EvictingLayer), ("codes", EvictingWindowLayer)):
        assert all(type(x) is layer for x in SnapKV().cache(models(kind)).layers)
    assert PolicyCache(SnapKV(), models("stock")).kept() == {"kept_share": 1}
