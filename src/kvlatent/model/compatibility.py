"""Where releases of transformers differ, and the refusal of what none of them is known to pass.

Modules of ours stand in for modules of transformers, which calls them with arguments by name. A name that we don't know
may carry what the result depends on, such as the cache under its new name: it is an error, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from kvlatent.errors import UserError

TESTED = ("5.19", "5.24")
"""Oldest and newest release of transformers that the contract tests ran on.

`make test-oldest` was with torch 2.7.0, accelerate 1.10.0, peft 0.18.0, datasets 4.0.0 and gguf 0.17.0; `make
test-latest` with torch 2.14.1, accelerate 1.15.0, peft 0.21.2, datasets 5.2.0 and gguf 0.19.0.
"""
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
        "use_cache", "token_type_ids", "num_items_in_batch",
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


def is_tested() -> bool:
    """Whether the installed release of transformers lies in the tested range."""
    oldest, newest = (Version(release).release for release in TESTED)
    return oldest <= Version(transformers.__version__).release[:2] <= newest


@torch.no_grad()
def check_itself(model: PreTrainedModel) -> None:
    """Compare a few tokens cached with uncached, and whole with left-padded.

    Raises:
        UserError: They differ, so the installed release of transformers does something that kvlatent doesn't know.
    """
    latent = model.config.latent
    near = latent.get("window", 0) + latent.get("sinks", 0)  # some tokens more, or none is far
    ids = torch.arange(1, near + 9, device=model.device)[None] % model.config.vocab_size
    whole = model(ids, use_cache=False).logits
    output = model(ids[:, :-3], use_cache=True)
    pieces = [output.logits]
    for token in ids[:, -3:].split(1, dim=1):
        output = model(token, use_cache=True, **{CACHE: output[CACHE]})
        pieces.append(output.logits)
    padding = torch.zeros_like(ids[:, :3])
    mask = torch.cat((padding, torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(
        torch.cat((padding, ids), dim=1), attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    for what, logits in (("with its cache", torch.cat(pieces, dim=1)), ("with left padding", padded[:, 3:])):
        if not _close(logits, whole):
            raise UserError(
                f"with transformers {transformers.__version__}, this model computes something else {what}; kvlatent is "
                f"tested with {TESTED[0]} to {TESTED[1]}: install one of these"
            )


def _close(got: Tensor, wanted: Tensor) -> bool:
    """Whether logits are equal but for the rounding of any dtype."""
    return bool((got - wanted).abs().max() <= 0.05 * wanted.abs().max())
