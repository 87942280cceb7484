"""Perplexity and bytes of a model whose cache is quantized to 8 and 4 bits.

    python benchmarks/quantized_cache.py STUDENT [--text package:wikipedia] [--tokens 8192] [--block-size 1024]

A block is fed 32 tokens at a time, so that all but its newest tokens are read back from codes; in full precision the
same way for comparison. Bytes are those of the live cache at the end of a block, scales and full-precision window
included, and what the same cache would take at the length of `--long`, against the unconverted model's in bfloat16.
"""

import argparse
import json
import math

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvlatent.data.sources import read_text
from kvlatent.model.cache import LatentCache, cache_bytes
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE
from kvlatent.model.graft import head_dim_of
from kvlatent.model.loading import load_tokenizer
from kvlatent.model.quantized import QuantizedCache

CHUNK = 32


@torch.no_grad()
def nll(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Negative log-likelihoods (blocks, block_size - 1), fed chunk by chunk."""
    found = []
    for piece in ids.split(CHUNK, dim=1):
        found.append(model(piece, **{CACHE: cache}).logits)
    return torch.nn.functional.cross_entropy(
        torch.cat(found, dim=1)[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    )


@torch.no_grad()
def bytes_at(model: PreTrainedModel, tokens: int, bits: int) -> int:
    """Bytes of a bfloat16 model's quantized cache of one sequence."""
    cache = QuantizedCache(model.config, bits=bits)
    latent, heads = model.config.latent, model.config.num_key_value_heads
    for index, dims in enumerate(zip(latent["d_qk"], latent["d_vo"], strict=True)):
        cache.update(*(torch.zeros(1, heads, tokens, d, dtype=torch.bfloat16) for d in dims), index)
    return cache_bytes(cache)


def main() -> None:
    """Measure full precision, 8 and 4 bits on the same blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="*", default=["package:wikipedia"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--long", type=int, default=8192)
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model, device="cpu", dtype="float32")
    blocks = read_text(
        arguments.text,
        load_tokenizer(arguments.model),
        tokens=arguments.tokens,
        block_size=arguments.block_size,
        seed=0,
    )
    config = model.config
    original = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * arguments.long
    rows: list[dict[str, float | str]] = []
    plain = None
    for name, bits in (("full precision", None), ("8 bits", 8), ("4 bits", 4)):
        losses = []
        for ids in blocks.ids.split(4):
            cache = LatentCache(config) if bits is None else QuantizedCache(config, bits=bits)
            losses.append(nll(model, ids, cache))
        loss = torch.cat(losses).mean(dim=1)
        plain = loss if plain is None else plain
        row: dict[str, float | str] = {
            "cache": name,
            "perplexity": math.exp(loss.mean()),
            "ratio": math.exp((loss - plain).mean()),
            "ratio_stderr": math.exp((loss - plain).mean()) * float((loss - plain).std()) / math.sqrt(len(loss)),
        }
        if bits is not None:
            row["share_of_original_bfloat16"] = bytes_at(model, arguments.long, bits) / original
        rows.append(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
