"""StreamingLLM (arXiv:2309.17453): the first tokens and the newest, whatever they say.

Here they keep the positions that they have in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvlatent.compose.policy import Policy


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keep the first 4 tokens and the newest, in prefill and while decoding."""

    name: ClassVar[str] = "streaming"
    sinks: ClassVar[int] = 4
    steps: ClassVar[bool] = True
