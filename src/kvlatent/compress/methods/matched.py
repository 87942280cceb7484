"""`matched`: the rotary pairs that own the paper's frequency-aware list, so that no pair changes its speed.

Ours, after KV-Latent (https://arxiv.org/abs/2507.11273), Eq. 11: where 2·d_qk divides head_dim, the list for d_qk is a
subset of the teacher's frequencies.
"""

from __future__ import annotations

import torch

from kvlatent.compress.method import Decision, Heads, Method
from kvlatent.compress.methods import stride
from kvlatent.errors import UserError
from kvlatent.model.rope import frequency_aware_exponents


def check(head_dim: int, d_qk: int) -> None:
    """Refuse a d_qk whose list isn't among the teacher's frequencies."""
    frequency_aware_exponents(d_qk)
    if head_dim % (2 * d_qk):
        raise UserError(f"no pairs own the paper's list unless 2·d_qk divides head_dim {head_dim}; got d_qk {d_qk}")


def plan(heads: Heads) -> Decision:
    """The owners of the list, at their own frequencies."""
    d_qk = heads.d_qk[0]
    pairs = torch.tensor(frequency_aware_exponents(d_qk)) * heads.head_dim // (2 * d_qk)
    return Decision(inv_freq=tuple(heads.inv_freq[j] for j in pairs), shared=pairs)


MATCHED = Method(
    name="matched", check=check, plan=plan, reduce=stride.reduce, calibrated=False, one_frequency_list=True
)
