"""llama.cpp's own tools on our files: perplexity by llama-perplexity beside ours, also of what llama-quantize makes,
and of caches in 8 and 4 bits.

    python benchmarks/llama_perplexity.py LLAMA_CPP/build/bin smollm2 student

The first argument is the folder with the two tools; students are portable. One JSON object per file. llama-perplexity
reads chunks of 512 tokens and judges the second half of each; so do we, in float32, on the same text.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.data.corpora import read_corpus
from kvlatent.model.checkpoints import load_model
from kvlatent.serving.export.gguf import export_gguf

CHUNK, CHUNKS, CHARACTERS = 512, 4, 20_000


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """As llama-perplexity does it."""
    ids = torch.tensor(tokenizer(text)["input_ids"][: CHUNK * CHUNKS]).view(CHUNKS, CHUNK)
    half, nll = CHUNK // 2, []
    for block in ids:
        logits = model(block[None]).logits[0, half:-1].float()
        nll.append(torch.nn.functional.cross_entropy(logits, block[half + 1 :]))
    return torch.stack(nll).mean().exp().item()


def by_llama_cpp(tools: Path, path: Path, text: Path, cache: str) -> dict[str, float]:
    """The last line of the tool's report, and the MiB of its cache; of two types, as in `q8_0/q4_0`, keys' is first."""
    keys, _, values = cache.partition("/")
    command = [str(tools / "llama-perplexity"), "-m", str(path), "-f", str(text), "-c", str(CHUNK)]
    command += [
        "--chunks",
        str(CHUNKS),
        "-b",
        str(CHUNK),
        "-t",
        "2",
        "-fa",
        "on",
        "-ctk",
        keys,
        "-ctv",
        values or keys,
        "-lv",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    told = done.stdout + done.stderr
    [found] = re.findall(r"Final estimate: PPL = ([\d.]+)", told)
    sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", told)
    return {"llama.cpp": float(found), "cache_mib": sum(map(float, sizes))}


def main(tools: Path, *names: str) -> None:
    """Compare every model in every type."""
    text = "\n\n".join(read_corpus("wikipedia"))[:CHARACTERS]
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "text").write_text(text)
            model, tokenizer = load_model(name, device="cpu", dtype="float32")
            ours = perplexity(model, tokenizer, text)

            def report(
                path: Path, kind: str, cache: str = "f16", ours: float = ours, name: str = name, folder: Path = folder
            ) -> None:
                theirs = by_llama_cpp(tools, path, folder / "text", cache)
                found = {"model": name, "file": kind, "mb": round(path.stat().st_size / 1e6), "cache": cache} | theirs
                ratio = round(theirs["llama.cpp"] / ours, 5)
                print(json.dumps(found | {"ours": round(ours, 4), "ratio": ratio}), flush=True)

            for kind in ("f32", "f16", "bf16", "q8_0"):
                export_gguf(model, tokenizer, folder / kind, file_type=kind)
                report(folder / kind, kind)
            for cache in ("q8_0", "q8_0/q4_0", "q4_0"):
                report(folder / "f16", "f16", cache)
            for kind in ("Q8_0", "Q4_K_M"):
                subprocess.run(
                    [tools / "llama-quantize", folder / "f16", folder / kind, kind], check=True, capture_output=True
                )
                report(folder / kind, f"f16, by llama-quantize to {kind}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
