"""PyramidInfer: its schedule, and its prefill against a plain loop."""

import copy
import math
from typing import Any

import pytest
import torch
from composed import CLOSE, Models, logits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from kvlatent.compose.policies.pyramid_infer import PyramidInfer, newest, schedule, solved_decay
from kvlatent.errors import UserError
from kvlatent.model.layers import hooks


@given(
    tokens=st.integers(1, 3000), layers=st.integers(2, 40), keep=st.floats(0.1, 0.99),
)  # fmt: skip
def test_the_decay_is_solved_for_the_share(tokens: int, layers: int, keep: float) -> None:
    recent, decay = newest(tokens, keep), solved_decay(tokens, layers, keep)
    kept = schedule(tokens, decay, layers, recent)
    assert kept[0] == tokens and kept == sorted(kept, reverse=True) and min(kept) >= min(max(64, recent + 4), tokens)
    least = schedule(tokens, -64.0, layers, recent)
    wanted = max(keep * tokens * layers, sum(least))
    assert sum(least) <= sum(kept) <= wanted < sum(schedule(tokens, decay + 1e-9, layers, recent)) or kept == least


def test_the_schedule_is_that_of_the_paper() -> None:
    left, wanted = 1000, []
    for layer in range(8):
        share = 0.9 + 0.1 * (1 + math.cos(math.pi * layer / 8)) / 2
        left = 201 + int((left - 201) * share)
        wanted.append(left)
    assert schedule(1000, 0.9, 8, 201) == wanted


@pytest.mark.parametrize(("n", "keep"), [(120, 0.8), (320, 0.5)])
def test_pyramid_infer_is_its_plain_loop(models: Models, text: Tensor, n: int, keep: float) -> None:
    config = copy.deepcopy(models("stock").config)
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).double().eval().requires_grad_(False), text.reshape(1, -1)[:, :n]
    cache = PyramidInfer(keep=keep).cache(model)
    found = logits(model, ids, cache)[0]
    hidden, columns = model.model.embed_tokens(ids), list(range(n))
    recent = int(n * min(0.2, 0.4 * keep)) + 1
    kept = schedule(n, solved_decay(n, 5, keep), 5, recent)
    if n == 120:
        assert kept == sorted(set(kept), reverse=True), "every layer but the first drops some"
    else:
        assert kept[-1] == recent + 4, "the sinks alone are left of earlier tokens"
    for layer, left in zip(model.model.layers, kept, strict=True):
        cos, sin = model.model.rotary_emb(hidden, torch.tensor([columns]))
        mask = torch.ones(len(columns), len(columns), dtype=torch.bool).tril()[None, None]
        seen = list[Any]()
        model.set_attn_implementation("eager")
        with hooks(iter([layer.self_attn.register_forward_hook(lambda m, a, out, to=seen: to.append(out))])):
            lowest = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
            hidden = layer(hidden, attention_mask=lowest, position_embeddings=(cos, sin))
        model.set_attn_implementation("sdpa")
        maps, scores = seen[0][1][0].mean(0), {}
        for j in range(4, len(columns) - recent):
            rows = range(len(columns) - recent, len(columns))
            scores[j] = sum((1 + 0.2 * i / (recent - 1)) * float(maps[row, j]) for i, row in enumerate(rows)) / recent
        best = sorted(scores, key=lambda j: -scores[j])[: left - recent - 4]
        stays = sorted([0, 1, 2, 3, *best, *range(len(columns) - recent, len(columns))])
        columns, hidden = [columns[j] for j in stays], hidden[:, stays]
        held = cache.layers[layer.self_attn.layer_idx]
        assert held.slots == len(columns) == left
    assert cache.kept() == {"kept_share": sum(kept) / (5 * n)}
    wanted = model.lm_head(model.model.norm(hidden))[0]
    torch.testing.assert_close(found[columns], wanted, **CLOSE)  # RoPE is float32 here
    dropped = [t for t in range(n) if t not in columns]
    assert dropped and bool(found[dropped].isnan().all()), "positions that no layer computed have no logits"


@pytest.mark.parametrize("kind", ["stock", "window"])
def test_pyramid_infer_reduces_what_it_writes_block_by_block(models: Models, text: Tensor, kind: str) -> None:
    model, window = models(kind), 5 if kind == "window" else 0
    cache = PyramidInfer(keep=0.7).cache(model)
    logits(model, text[:, :100], cache)
    before = [layer.slots for layer in cache.layers]
    for step, token in enumerate(text[:, :60].split(1, dim=1)):
        logits(model, token, cache)
        blocks = max(0, (step + 1 - window - 16) // 16)
        stay = [int(16 * 0.9), int(16 * 0.9 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))]
        assert [x.slots for x in cache.layers] == [
            b + step + 1 - blocks * (16 - s) for b, s in zip(before, stay, strict=True)
        ]


def test_pyramid_infer_takes_no_model_with_sliding_layers(tiny_teacher: Models) -> None:
    with pytest.raises(UserError, match="pyramid-infer takes tokens from all later layers"):
        PyramidInfer().cache(tiny_teacher("gemma3_text"))
