"""Policies by name: one file each."""

from __future__ import annotations

from kvlatent.compose.policies.expected_attention import ExpectedAttention
from kvlatent.compose.policies.pyramid_infer import PyramidInfer
from kvlatent.compose.policies.snapkv import SnapKV
from kvlatent.compose.policies.spindle import SpindleKV
from kvlatent.compose.policies.streaming import StreamingLLM
from kvlatent.compose.policies.tova import TOVA
from kvlatent.compose.policy import Policy
from kvlatent.errors import UserError

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (StreamingLLM, SnapKV, TOVA, ExpectedAttention, PyramidInfer, SpindleKV)
}


def policy(name: str, *, keep: float = 0.5) -> Policy:
    """A policy by its name; `policy(…).cache(model)` is a cache for `model.generate(…, past_key_values=…)`.

    Args:
        name: `streaming`, `snapkv`, `tova`, `expected-attention`, `pyramid-infer` or `spindle`.
        keep: Share of a prompt's tokens that stay; of students with a window, of those beyond window and sinks.

    Raises:
        UserError: There is no such policy, or the share is out of range.
    """
    if name not in POLICIES:
        raise UserError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name](keep=keep)


def policy_of(name: str | None, keep: float | None) -> Policy | None:
    """The policy that a command was given, if any."""
    if name is None:
        return None
    return policy(name) if keep is None else policy(name, keep=keep)
