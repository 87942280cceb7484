"""The efficiency columns of the paper's Table 2 for the shapes of Llama-3-8B and Llama-2-7B, on random weights.

    OMP_NUM_THREADS=2 python benchmarks/table2.py [--layers 2] [--batch 1 16] [--memory 24] [--out FILE.json]

Cache and n_max (longest context of a batch in the stated memory, beside the weights) are those of all 32 layers in
bfloat16, by arithmetic. TPOT is measured in float32 with `--layers` layers and a small vocabulary, since a CPU's memory
holds no more: 2,048 tokens of synthetic cache, then decode steps, all dims and the stock model in turns.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvlatent.evaluation.bench import benchmark
from kvlatent.model.graft import graft, spec_of
from kvlatent.model.models import set_spec
from kvlatent.model.spec import LatentSpec

SIZES = {
    "Llama-3-8B": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "Llama-2-7B": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
}
DIMS = [(128, 128), (64, 128), (128, 64), (64, 64), (32, 64), (64, 32), (32, 32), (16, 16)]
LAYERS, CONTEXT, NEW_TOKENS = 32, 2048, 8


def with_dims(teacher: PreTrainedModel, d_qk: int, d_vo: int) -> PreTrainedModel:
    """The teacher on our classes with other dims; its new attention weights are as they come."""
    model = graft(teacher, share=True)
    spec = spec_of(model)
    assert spec is not None
    layers = len(spec.d_qk)
    changes = {"d_qk": (d_qk,) * layers, "d_vo": (d_vo,) * layers, "inv_freq": spec.inv_freq[: d_qk // 2]}
    set_spec(model, LatentSpec.from_dict(spec.to_dict() | changes))
    return model.eval()


def weights_of(sizes: dict[str, int], d_qk: int, d_vo: int) -> int:
    """Parameters of the full model with 32 query heads."""
    hidden, kv_heads = 4096, sizes["num_key_value_heads"]
    attention = hidden * (32 + kv_heads) * (d_qk + d_vo)
    return LAYERS * (attention + 3 * hidden * sizes["intermediate_size"]) + 2 * hidden * sizes["vocab_size"]


def main() -> None:
    """Measure every shape, dims and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--memory", type=float, default=24, help="GiB")
    parser.add_argument("--shapes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        sizes = SIZES[shape]
        config = LlamaConfig(
            **sizes | {"vocab_size": 1024}, hidden_size=4096, num_attention_heads=32, head_dim=128,
            num_hidden_layers=arguments.layers, max_position_embeddings=8192,
        )  # fmt: skip
        torch.manual_seed(0)
        teacher = LlamaForCausalLM(config).eval()
        models = {"stock": teacher} | {f"{d_qk}, {d_vo}": with_dims(teacher, d_qk, d_vo) for d_qk, d_vo in DIMS}
        for batch in arguments.batch:
            sizes_now = {"context": CONTEXT, "batch": batch, "new_tokens": NEW_TOKENS, "repeats": 2}
            measured = benchmark(models, **sizes_now, synthetic=True, seed=0)
            for row, (d_qk, d_vo) in zip(measured, [(128, 128), *DIMS], strict=True):
                per_token = 2 * LAYERS * sizes["num_key_value_heads"] * (d_qk + d_vo)
                left = arguments.memory * 2**30 - 2 * weights_of(sizes, d_qk, d_vo)
                full = {"cache_mib": per_token * CONTEXT * batch / 2**20, "n_max": int(left / (per_token * batch))}
                rows.append(row | {"shape": shape, "layers": arguments.layers, "full": full})
                print(
                    f"{shape} batch {batch} ({row['model']}): cache {full['cache_mib']:.0f} MiB, "
                    f"n_max {full['n_max']:,}; "
                    f"{arguments.layers} layers: TPOT {row['tpot_ms']:.1f} ms {row['tpot_ms_range']}, "
                    f"roofline {row['roofline_share']:.0%}",
                    flush=True,
                )
        del models, teacher
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
