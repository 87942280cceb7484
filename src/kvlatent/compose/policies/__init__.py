"""Policies by name: one file each."""

from __future__ import annotations

from kvlatent.compose.policies.pyramid_infer import PyramidInfer
from kvlatent.compose.policies.snapkv import SnapKV
from kvlatent.compose.policies.streaming import StreamingLLM
from kvlatent.compose.policies.tova import TOVA
from kvlatent.compose.policy import Policy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (StreamingLLM, SnapKV, TOVA, PyramidInfer)}
