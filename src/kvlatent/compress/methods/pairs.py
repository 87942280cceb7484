"""`pairs-model`, `pairs-layer`, `pairs`: the rotary pairs with the most logit energy, at their own frequencies.

The criterion is that of A³ (https://arxiv.org/abs/2505.12942) and of MHA2MLA's 2-norm
(https://arxiv.org/abs/2502.14837): s_gj = Σ_{i in g} E‖q_ij‖² · E‖k_gj‖² is the expected squared logit of pair j alone
if phases are random. The largest are chosen for the model, for each layer, or for each KV head. Exact where the other
pairs are silent.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kvlatent.compress.linear_algebra import pair_scores
from kvlatent.compress.maps import QKReduction, keep_pairs
from kvlatent.compress.method import Decision, Heads, Layer, Method
from kvlatent.compress.methods import stride


def plan_for_model(heads: Heads) -> Decision:
    """The pairs with the largest sum of scores over all heads of all layers."""
    assert heads.statistics is not None
    scores = sum(pair_scores(x.mean("q"), x.mean("k")).sum(0) for x in heads.statistics.layers)
    assert isinstance(scores, Tensor)
    pairs = scores.topk(heads.d_qk[0] // 2).indices.sort().values
    return Decision(inv_freq=tuple(heads.inv_freq[j] for j in pairs), shared=pairs)


def plan_for_heads(heads: Heads) -> Decision:
    """Every KV head holds the frequencies of its own pairs."""
    return Decision(inv_freq=heads.inv_freq, per_head_frequencies=True)


def reduce(layer: Layer, _decision: Decision, *, whole_layer: bool = False) -> QKReduction:
    """Keep the pairs that this layer's statistics say carry the most."""
    q, k = layer.moment("q"), layer.moment("k")
    return loudest_pairs(q, k, layer.d_qk, whole_layer=whole_layer)


def loudest_pairs(q_cov: Tensor, k_cov: Tensor, d_qk: int, *, whole_layer: bool = False) -> QKReduction:
    """Keep the rotary pairs that carry the most logit energy, at their original frequencies.

    Args:
        q_cov: (q_heads, head_dim, head_dim).
        k_cov: (kv_heads, head_dim, head_dim).
        d_qk: Dims kept.
        whole_layer: All heads keep the same pairs, those with the largest sum of scores; otherwise each KV head its
            own.
    """
    kv_heads, head_dim = k_cov.shape[:2]
    scores = pair_scores(q_cov, k_cov)
    if whole_layer:
        scores = scores.sum(0, keepdim=True).expand(kv_heads, -1)
    pairs = scores.topk(d_qk // 2, dim=-1).indices.sort(-1).values
    return keep_pairs(pairs, head_dim, group_size=q_cov.shape[0] // kv_heads, per_head_frequencies=True)


PAIRS_MODEL = Method(
    name="pairs-model", plan=plan_for_model, reduce=stride.reduce, needs_statistics=True, one_frequency_list=True
)
PAIRS_LAYER = Method(name="pairs-layer", plan=plan_for_heads, reduce=partial(reduce, whole_layer=True))
PAIRS = Method(name="pairs", plan=plan_for_heads, reduce=reduce)
