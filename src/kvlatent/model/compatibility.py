"""Where releases of transformers differ, and the refusal of what none of them is known to pass.

Modules of ours stand in for modules of transformers, which calls them with arguments by name. A name that we don't know
may carry what the result depends on, such as the cache under its new name: it is an error, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import transformers
from transformers.models.llama.modeling_llama import LlamaModel

TESTED = ("5.19", "5.24")
"""Oldest and newest release of transformers that the contract tests ran on (`make test-oldest`, `make test-latest`)."""
CACHE_NAMES = ("cache", "past_key_values")
"""What releases call the argument and the output that hold the cache: `cache` since 5.24, `past_key_values` before."""
CACHE = next((name for name in CACHE_NAMES if name in inspect.signature(LlamaModel.forward).parameters), "")
"""The name of the two in the installed release."""
if not CACHE:
    raise ImportError(
        f"transformers {transformers.__version__} passes the cache under a name that kvlatent doesn't know"
    )

WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "use_cache", "token_type_ids", "num_items_in_batch",
        "output_hidden_states", "output_router_logits",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
    }
)  # fmt: skip
"""Arguments that transformers 5.19 to 5.24 hands down to every attention module and its SDPA attention doesn't read:
what the body has used already, what only losses and outputs ask for, and packing, which the mask says too."""


def refuse_unknown(module: object, names: Iterable[str]) -> None:
    """Raise `TypeError` for the first of these argument names, which `module` was given and doesn't know."""
    for name in names:
        raise TypeError(
            f"{type(module).__name__} was given the argument {name!r}, which it doesn't know. transformers "
            f"{transformers.__version__} is installed; kvlatent is tested with {TESTED[0]} to {TESTED[1]}"
        )
