"""What policies rank by: attention of observed queries against eager maps and plain loops, and their own ranks."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from composed import CLOSE, Models, logits
from reference import soft_capped
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvlatent.compose.attended import Received
from kvlatent.compose.policies.expected_attention import ExpectedAttention
from kvlatent.compose.policies.snapkv import POOL, SnapKV
from kvlatent.compose.policies.spindle import SpindleKV
from kvlatent.compose.policies.tova import TOVA
from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError
from kvlatent.model.families import linear_layers
from kvlatent.model.far_maps import FarMaps
from kvlatent.model.layers import hooks


@dataclass(frozen=True, kw_only=True)
class Spy(Policy):
    """Remembers the attention that slots received from the newest 3 queries, of weights 1, 2 and 3."""

    name: ClassVar[str] = "spy"
    seen: ClassVar[list[Tensor]] = []

    def recent(self, tokens: int, kept: int) -> int:
        return 0

    def observed(self, tokens: int) -> int:
        return 3

    def weights(self, count: int) -> Tensor:
        return 1.0 + torch.arange(count)

    def rank(self, received: Received) -> Tensor:
        self.seen.append(received)
        return received.mean(2)


@pytest.mark.parametrize("eager", [False, True])
def test_received_attention_is_that_of_eager_maps(any_teacher: PreTrainedModel, text: Tensor, eager: bool) -> None:
    ids, layer_types = text[:, :40], getattr(any_teacher.config, "layer_types", None)
    if any_teacher.config.model_type == "mistral" and any_teacher.config.sliding_window:
        with pytest.raises(UserError, match="sliding window"):
            Spy().cache(any_teacher)
        return
    if linear_layers(any_teacher.config):
        with pytest.raises(UserError, match="linear attention"):
            Spy().cache(any_teacher)
        return
    if eager:
        any_teacher.set_attn_implementation("eager")
    Spy.seen.clear()
    logits(any_teacher, ids, Spy(keep=0.5).cache(any_teacher))
    any_teacher.set_attn_implementation("eager")
    with torch.no_grad():
        maps = any_teacher(ids, output_attentions=True).attentions
    maps = [x for i, x in enumerate(maps) if layer_types is None or layer_types[i] == "full_attention"]
    assert len(Spy.seen) == len(maps)
    for found, wanted in zip(Spy.seen, maps, strict=True):
        wanted = sum(weight * wanted[:, :, -4 + weight] for weight in (1, 2, 3))
        torch.testing.assert_close(found, wanted.unflatten(1, (2 if found.shape[1] == 2 else 4, -1)), **CLOSE)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["window", "codes"])
def test_received_attention_of_far_tokens_is_that_of_plain_loops(
    models: Models, text: Tensor, kind: str, special: bool
) -> None:
    model, ids = models(kind).double(), text[:1, :40]
    for layer in model.model.layers if special else ():
        layer.self_attn.cap, layer.self_attn.sinks = 0.7, torch.nn.Parameter(torch.linspace(-1, 1, 4).double())
    Spy.seen.clear()
    cache = Spy(keep=0.5).cache(model)
    seen: list[tuple[Tensor, Tensor, FarMaps]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        q, k, _ = module.queries_keys_values(kwargs["hidden_states"], *kwargs["position_embeddings"])
        maps = module.far_maps()
        seen.append((q[0, :, -3:], maps.met(maps.held(k))[0], maps))

    with hooks(layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers):
        logits(model, ids, cache)
    n, window, sinks = 40, 5, 2
    for index, (q, k, maps) in enumerate(seen):
        attention = model.model.layers[index].self_attn
        scale, cap = attention.scale, attention.cap
        far_k = maps.read(*maps.stored(k[None], k[None]))[0][0, 0]
        found = Spy.seen[index][0, 0]
        for head in range(4):
            wanted = torch.zeros(n - window - sinks, dtype=torch.float64)
            for weight in (1, 2, 3):
                at, query = n - 4 + weight, q[head, weight - 1]
                terms = {}
                for t in range(at + 1):
                    if sinks <= t < n - window:
                        terms[t] = soft_capped(scale * (query @ maps.q[head]) @ far_k[t], cap)
                        terms[t] = terms[t] + (0 if maps.bias is None else maps.bias[head, 0])
                    else:
                        terms[t] = soft_capped(scale * query @ k[head // 2, t], cap)
                total = sum(math.exp(x) for x in terms.values())
                total += attention.sinks[head].exp().item() if special else 0
                for t in range(sinks, n - window):
                    wanted[t - sinks] += weight * math.exp(terms[t]) / total
            torch.testing.assert_close(found[head].double(), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["stock", "portable", "window", "gemma3_text"])
def test_queries_that_ask_from_further_on_are_those_of_tokens_that_stand_there(
    models: Models, tiny_teacher: Models, text: Tensor, kind: str
) -> None:
    model = tiny_teacher(kind) if kind == "gemma3_text" else models(kind)
    observer, given = Spy().cache(model).hooks.observer, list[tuple[Tensor, dict[str, Any]]]()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append((kwargs["hidden_states"], kwargs))

    index = [t == "full_attention" for t in getattr(model.config, "layer_types", ["full_attention"])].index(True)
    attention = model.model.layers[index].self_attn
    for start in (0, 70):
        with hooks(iter([attention.register_forward_pre_hook(note, with_kwargs=True)])):
            logits(model, text[:, :20], DynamicCache(config=model.config), position_ids=start + torch.arange(20)[None])
    (hidden, here), (_, there) = given
    moved, wanted = observer.queries(index, hidden, here, 9, ahead=70), observer.queries(index, hidden, there, 9)
    torch.testing.assert_close(moved, wanted, **CLOSE)
    assert not torch.allclose(observer.queries(index, hidden, here, 9), wanted)


def test_expected_attention_is_that_of_turned_queries_and_of_the_newest_where_it_stands(
    models: Models, text: Tensor
) -> None:
    model, n = models("stock"), 100
    plain = DynamicCache(config=model.config)
    logits(model, text[:1, :n], plain)
    cache = ExpectedAttention(keep=0.3).cache(model)
    logits(model, text[:1, :n], cache)
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(text[:1, :n]))
    q = attention.q_proj(hidden).view(n, 4, 16).transpose(0, 1)
    causal = torch.ones(n, n).tril().bool()

    def attended(head: int, ahead: int) -> Tensor:
        """Maps of the two query heads that share a head of keys, summed."""
        cos, sin = model.model.rotary_emb(hidden, ahead + torch.arange(n)[None])
        turned = q * cos[0] + torch.cat((-q[..., 8:], q[..., :8]), dim=-1) * sin[0]
        logits = turned[2 * head : 2 * head + 2] @ keys[head].T * 16**-0.5
        return logits.masked_fill(~causal, -torch.inf).softmax(-1).sum(0)

    keys = plain.layers[0].keys[0]
    for head in range(2):
        worth = (attended(head, 128).mean(0) + attended(head, 0)[-1])[: n - 15]
        stays = sorted([*worth.topk(15).indices.tolist(), *range(n - 15, n)])
        torch.testing.assert_close(cache.layers[0].keys[0, head], keys[head, stays])


def test_snapkv_pools_what_heads_of_a_group_receive() -> None:
    received = torch.rand(1, 2, 2, 20, generator=torch.Generator().manual_seed(0))
    found = SnapKV().rank(received)
    for head in range(2):
        mean = [float(received[0, head, :, t].mean()) for t in range(20)]
        for t in range(20):
            assert float(found[0, head, t]) == pytest.approx(max(mean[max(0, t - POOL // 2) : t + POOL // 2 + 1]))


@pytest.mark.parametrize("policy", [SnapKV, ExpectedAttention, SpindleKV])
def test_newest_tokens_leave_half_of_a_small_budget_to_what_they_attend_to(
    models: Models, text: Tensor, policy: type[Policy]
) -> None:
    model, n = models("stock"), 100
    cache, plain = policy(keep=0.2).cache(model), DynamicCache(config=model.config)
    logits(model, text[:1, :n], plain)
    logits(model, text[:1, :n], cache)
    kept = round(n * (2 * 0.2 - 0.05)) if policy is SpindleKV else round(n * 0.2)
    assert kept // 2 < 32, "less than the queries that choose"
    keys, held = plain.layers[0].keys[0], cache.layers[0].keys[0]
    places = (keys[:, None] - held[:, :, None]).norm(dim=-1).argmin(-1)
    assert held.shape[1] == kept
    for head in places.tolist():
        assert set(range(n - kept // 2, n)) <= set(head) and min(head) < n - 32, head


def test_tova_takes_the_mean_over_all_heads() -> None:
    received = torch.rand(1, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TOVA().rank(received)[0, 0], received[0].flatten(0, 1).mean(0))
