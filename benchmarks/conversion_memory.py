"""Conversion of a model in memory and of one that comes a layer at a time: peak memory by depth, and time.

    python benchmarks/conversion_memory.py --layers 4 8 16 32

Random Llamas with layers of Llama-3-8B's shapes (218M weights each, bfloat16 on disk) and a small vocabulary, an
eighth of the bytes by `--d-qk 32 --d-vo 32 --bits 4`. Every case is a command of its own; what is told is the largest
anonymous memory of its process, sampled, since pages of mapped files are the system's to drop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
"""Llama-3-8B's, but for the vocabulary."""


def write_model(folder: Path, layers: int, shape: dict[str, object]) -> None:
    """A random model, one file per layer, never whole in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, num_hidden_layers=1)
    names: dict[str, str] = {}
    for index in range(layers):
        torch.manual_seed(index)
        with torch.no_grad():
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        tensors = {
            name.replace("layers.0", f"layers.{index}"): value.contiguous()
            for name, value in model.state_dict().items()
            if "layers.0" in name or index == 0
        }
        file = f"model-{index}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        del model, tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config.num_hidden_layers, config.architectures = layers, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(models.BPE({byte: i for i, byte in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)


def peak_of(command: list[str]) -> tuple[float, float]:
    """GB of anonymous memory at most, and seconds, of a command."""
    began, most = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            most = max([most, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.02)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read()[-500:].decode(errors="replace"))
    return most / 1e9, time.monotonic() - began


def main() -> None:
    """Convert every depth each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--in-memory", type=int, nargs="*", default=[4], help="depths to convert in memory too")
    parser.add_argument("--tokens", type=int, default=512, help="one block of so many")
    parser.add_argument("--budget", type=float, help="spend a budget, which wants statistics and probes, instead")
    parser.add_argument("--hidden", type=int, help="another hidden size, to try the script")
    parser.add_argument("--work", type=Path, help="where models go, on a real disk; a temporary folder by default")
    asked = parser.parse_args()
    shape = dict(SHAPE)
    if asked.hidden is not None:
        shape |= {"hidden_size": asked.hidden, "intermediate_size": 2 * asked.hidden, "head_dim": 128}
    dims = ["--d-qk", "32", "--d-vo", "32", "--bits", "4"] if asked.budget is None else ["--budget", str(asked.budget)]
    print("layers  way               peak GB  seconds")
    for layers in asked.layers:
        with tempfile.TemporaryDirectory(dir=asked.work) as folder:
            model, text = Path(folder, "model"), Path(folder, "text.txt")
            write_model(model, layers, shape)
            text.write_text("".join(f"The square of {n} is {n * n}, and {n + 1} comes next. " for n in range(2000)))
            for way in ("one at a time", "in memory"):
                if way == "in memory" and layers not in asked.in_memory:
                    continue
                command = [sys.executable, "-m", "kvlatent", "convert", str(model), "--out", str(Path(folder, way))]
                command += [*dims, "--text", str(text), "--tokens", str(asked.tokens), "--device", "cpu"]
                command += ["--block-size", str(asked.tokens)]
                peak, seconds = peak_of(command + (["--offload"] if way == "one at a time" else []))
                print(f"{layers:6d}  {way:<16s}  {peak:7.2f}  {seconds:7.0f}", flush=True)


if __name__ == "__main__":
    main()
