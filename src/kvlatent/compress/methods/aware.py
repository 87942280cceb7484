"""`aware`: every r-th rotary pair, rotating by the paper's frequency-aware list instead of its own frequency.

KV-Latent (https://arxiv.org/abs/2507.11273), Eq. 5 for the rows and Eq. 11 for the list: the highest-frequency quarter
is dropped and the lowest-frequency quarter sampled twice as densely. Nearly every pair then turns at a speed that its
weights were not trained for; healing has to make up for it.
"""

from __future__ import annotations

from kvlatent.compress.method import Decision, Heads, Method
from kvlatent.compress.methods import stride
from kvlatent.errors import UserError
from kvlatent.model.rope import frequency_aware_exponents, inverse_frequencies


def check(head_dim: int, d_qk: int) -> None:
    """Refuse a d_qk that doesn't divide head_dim or has no whole quarters."""
    stride.check(head_dim, d_qk)
    frequency_aware_exponents(d_qk)


def plan(heads: Heads) -> Decision:
    """The pairs of `stride`, and the paper's list."""
    return Decision(inv_freq=paper_frequencies(heads), shared=stride.pairs_of(heads))


def paper_frequencies(heads: Heads) -> tuple[float, ...]:
    """The paper's list (Eq. 11). Where the model scales its RoPE, its entries are looked up in the teacher's own list.

    Raises:
        UserError: RoPE is scaled and the list has entries between those of the teacher's.
    """
    d_qk, own = heads.d_qk[0], heads.inv_freq
    exponents, rope = frequency_aware_exponents(d_qk), heads.config.rope_parameters
    if rope["rope_type"] == "default":
        return inverse_frequencies(exponents, d=d_qk, theta=rope["rope_theta"])
    places = [exponent * len(own) / d_qk for exponent in exponents]
    if not all(place.is_integer() for place in places):
        raise UserError(
            f"the paper's list for d_qk {d_qk} is undefined under this model's {rope['rope_type']} RoPE scaling: "
            f"take a d_qk that divides {len(own)}, or another preset"
        )
    return tuple(own[int(place)] for place in places)


AWARE = Method(name="aware", check=check, plan=plan, reduce=stride.reduce, calibrated=False, one_frequency_list=True)
