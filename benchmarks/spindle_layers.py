"""Where SpindleKV saves: in deep layers by eviction, in shallow ones by code words.

    python benchmarks/spindle_layers.py smollm2 --out docs/spindle.svg

For every layer, after prefills of `--blocks` texts: the share of tokens that stay, the share of their keys and values
that are code words of their own, and the bytes of all that is held over those of all tokens in a 16-bit cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from kvlatent import policy
from kvlatent.compose.coded_layer import CodedLayer
from kvlatent.data.sources import read_text
from kvlatent.model.checkpoints import load_model
from kvlatent.model.compatibility import CACHE
from kvlatent.model.layers import evaluation_mode


def shares(layer: CodedLayer, tokens: int) -> list[float]:
    """Tokens kept, keys and values that are words, and bytes, each as a share."""
    assert layer.coded is not None and layer.positions is not None
    heads, kept, dim = layer.positions.shape[1], layer.slots, layer.coded[0].words.shape[1]
    held = [layer.positions, *layer.coded[0].tensors(), *layer.coded[1].tensors()]
    size = sum(x.numel() * (2 if x.is_floating_point() else x.itemsize) for x in held)
    return [kept / tokens, *(len(x.words) / (heads * kept) for x in layer.coded), size / (2 * 2 * heads * tokens * dim)]


def main() -> None:
    """Measure, print the mean shares, and draw them by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--text", nargs="+", default=["package:wikipedia"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()

    model, tokenizer = load_model(asked.model, dtype="float32")
    ids = read_text(
        asked.text, tokenizer, tokens=asked.blocks * asked.context, block_size=asked.context, seed=0,
        vocab_size=model.config.vocab_size,
    ).ids  # fmt: skip
    figure = Figure(figsize=(8, 7), layout="constrained")
    kept, words, size = figure.subplots(3, sharex=True)
    for color, keep in enumerate(asked.keep):
        found = list[list[list[float]]]()  # by block, layer and share
        for block in ids.split(1):
            cache = policy("spindle", keep=keep).cache(model)
            with evaluation_mode(model), torch.no_grad():
                model(block, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            found.append([shares(layer, asked.context) for layer in cache.layers])
        tokens, keys, values, held = torch.tensor(found).mean(0).T.tolist()
        print(f"{keep:g}: tokens {sum(tokens) / len(tokens):.3f}, bytes {sum(held) / len(held):.3f}")
        for name, row in {"tokens": tokens, "keys": keys, "values": values, "bytes": held}.items():
            print(f"  {name:6}", " ".join(f"{x:.2f}" for x in row))
        kept.plot(tokens, color=f"C{color}", label=f"{keep:g} of the tokens")
        words.plot(keys, color=f"C{color}", label="keys" if color == 0 else None)
        words.plot(values, color=f"C{color}", linestyle="--", label="values" if color == 0 else None)
        size.plot(held, color=f"C{color}")
    for axes, label in (
        (kept, "Tokens kept"),
        (words, "Code words\nper vector kept"),
        (size, "Bytes, of those\nof all tokens"),
    ):
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15)
    kept.legend(frameon=False)
    words.legend(frameon=False)
    size.set_xlabel("Layer")
    figure.savefig(asked.out)


if __name__ == "__main__":
    main()
