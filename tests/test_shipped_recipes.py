"""The recipes we ship: all sizes fit the real models, headers sum up right, and tiny models go their whole way."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from kvlatent.cli import recipe as pipeline
from kvlatent.compress.config import PlanConfig
from kvlatent.compress.preview import plan_checkpoint
from kvlatent.evaluation import far
from kvlatent.evaluation.config import NEAR_ONLY
from kvlatent.model.checkpoints import RECORD, load_model
from kvlatent.model.loading import bare_model, load_config

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES, OF_THE_PAPER = sorted(FOLDER.glob("*.yaml")), sorted(FOLDER.glob("paper/*.yaml"))
SCALE = 64
"""What tokens are divided by for tiny models."""
LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "bfloat16"}
REAL: dict[str, dict[str, Any]] = {
    "smollm2": LLAMA | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-2-7b-hf": LLAMA | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    },
    "meta-llama/Meta-Llama-3-8B": LLAMA | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "meta-llama/Llama-3.1-8B": LLAMA | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Qwen/Qwen3-8B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "dtype": "bfloat16",
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "dtype": "bfloat16",
    },
    "gemma-3-12b-text": {
        "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 3840, "intermediate_size": 15360,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "sliding_window": 1024, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "dtype": "bfloat16",
    },
}  # fmt: skip
"""Configs as on the hub, by the name of the model."""


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def stub(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A model's folder without weights."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("path", RECIPES + OF_THE_PAPER, ids=lambda path: path.stem)
def test_all_sizes_fit_the_real_model(
    path: Path, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read(path)
    gigabytes = re.search(r"(\d+)gb", path.stem)
    monkeypatch.setattr(pipeline, "memory_of", lambda _: int(gigabytes[1]) * 10**9 if gigabytes else 16 * 10**9)
    recipe["model"] = str(stub(REAL[recipe["model"]], byte_tokenizer, tmp_path / "model"))

    class AllChecked(Exception):
        pass

    def prepare(*_: Any) -> None:
        raise AllChecked

    monkeypatch.setattr(pipeline, "_prepare_folder", prepare)
    with pytest.raises(AllChecked):
        pipeline.run(write(recipe, tmp_path / "r.yaml"), tmp_path / "run", dtype="bfloat16" if gigabytes else "float32")
    bench = recipe["bench"]
    assert bench["context"] + bench["new_tokens"] <= REAL[read(path)["model"]]["max_position_embeddings"]


@pytest.mark.parametrize(
    "path", [path for path in RECIPES + OF_THE_PAPER if "gb" in path.stem], ids=lambda path: path.stem
)
def test_headers_sum_up_right(path: Path, tmp_path: Path) -> None:
    recipe = read(path)
    (tmp_path / "config.json").write_text(json.dumps(REAL[recipe["model"]]))
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    config = load_config(str(tmp_path))
    weights = bare_model(config, "it").num_parameters()
    assert f"embeddings = {weights / 1e9:.2f} G" in header
    assert f"teacher float32 4 x {weights / 1e9:.2f} = {4 * weights / 1e9:.1f}" in header
    assert re.search(rf"teacher (in )?bfloat16,? {2 * weights / 1e9:.1f}", header)
    first, changes = recipe["students"][0], {}
    if first["preset"] == "paper":  # the same bytes as a budget on dims alone
        first |= {"budget": (first["d_qk"] + first["d_vo"]) / 256}
        changes = {"bits": 16, "window": 0, "sinks": 0}
    told = plan_checkpoint(str(tmp_path), Path("none.png"), PlanConfig(budget=first["budget"], **changes))
    teacher, student = told["teacher_cache_bytes"], told["cache_bytes"]
    assert student <= first["budget"] * teacher
    assert f"of {told['context']:,} tokens {teacher / 1e9:.2f} GB, the student's {student / 1e9:.2f}" in header
    for total, of in re.findall(r"(?:Sum|: )(\d+) of (\d+)\.", header):
        assert int(total) < int(of) == int(re.search(r"(\d+)gb", path.stem)[1])  # type: ignore[index]
    assert max(map(len, path.read_text().splitlines())) <= 126


def test_the_text_model_of_gemma_is_taken_out_as_the_header_says(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    seeing = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=seeing.to_dict(), **tokens)
    monkeypatch.chdir(tmp_path)
    Gemma3ForConditionalGeneration(config).save_pretrained("google/gemma-3-12b-pt")
    both = Gemma3ForConditionalGeneration.from_pretrained("google/gemma-3-12b-pt", dtype="bfloat16").eval()
    byte_tokenizer.save_pretrained("google/gemma-3-12b-pt")
    header = (FOLDER / "gemma3-12b-8x80gb.yaml").read_text()
    lines = header[header.index("#   import torch") :].split("\n#\n")[0]
    exec(re.sub(r"(?m)^#   ", "", lines), {})
    alone = load_model("gemma-3-12b-text", dtype="bfloat16")[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, both(ids).logits)


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """The config in small: its ratio of heads, its windows and positions for text cut as short."""
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    head_dim = max(16, config.get("head_dim", 128) // 8)
    sizes = {
        "vocab_size": 260, "hidden_size": 64 if 64 % (2 * groups) == 0 else 96, "intermediate_size": 96,
        "num_hidden_layers": 2, "head_dim": head_dim,
        "num_attention_heads": 2 * groups, "num_key_value_heads": 2, "initializer_range": 0.2, "dtype": "float32",
        "max_position_embeddings": config["max_position_embeddings"] // SCALE,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    small = config | sizes
    if "sliding_window" in config:
        small |= {"sliding_window": config["sliding_window"] // SCALE, "query_pre_attn_scalar": head_dim}
        small["layer_types"] = ["sliding_attention", "full_attention"]
        del small["sliding_window_pattern"]
    if "num_experts" in config:
        small |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if "original_max_position_embeddings" in (rope := config.get("rope_scaling", {})):
        before = rope["original_max_position_embeddings"] // SCALE
        small["rope_scaling"] = rope | {"original_max_position_embeddings": before}
    return small


def shortened(recipe: dict[str, Any], root: Path) -> dict[str, Any]:
    """The recipe with all its tokens over `SCALE`, on text of ours, and two steps of healing."""

    def over(tokens: int) -> int:
        return -(-tokens // SCALE)

    recipe = json.loads(json.dumps(recipe))
    recipe["block_size"] = over(recipe["block_size"])
    for name in ("calibration", "training", "held_out"):
        if name in recipe:
            text = recipe[name]
            text["text"] = [str(root / ("other.txt" if name == "held_out" else "train.txt"))]
            text |= {key: over(text[key]) for key in ("tokens", "block_size") if key in text}
    if "context" in recipe:
        recipe["context"] = over(recipe["context"])
    smaller = 4 if recipe["model"] == "smollm2" else 8  # heads
    block = recipe.get("training", {}).get("block_size", recipe["block_size"])
    for student in recipe["students"]:
        if student["preset"] == "best" and student.get("window") != 0:
            student |= {"window": 2, "sinks": 1}
        if "d_qk" in student:
            student |= {key: max(4, student[key] // smaller) for key in ("d_qk", "d_vo")}
        if "heal" in student:
            step = student["heal"].get("batch_size", 2) * student["heal"].get("accumulate", 1) * block
            tokens = {key: 2 * step for key in ("stage1_tokens", "stage2_tokens") if student["heal"].get(key)}
            student["heal"] |= tokens | {"lora_rank": 2, "lora_alpha": 16}
    recipe["bench"] |= {key: over(recipe["bench"][key]) for key in ("context", "new_tokens")}
    recipe["generate"] |= {"max_new_tokens": over(recipe["generate"]["max_new_tokens"])}
    return recipe


MODELS = {read(path)["model"] + path.stem.split("-")[0]: path for path in reversed(RECIPES)}
"""A recipe of every model; those for other numbers of GPUs have the same steps."""
SMALL = [path for path in OF_THE_PAPER if "gb" not in path.stem]
"""Those for GPUs have students of the same kinds."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] if path.stem.startswith(("llama2", "llama3-")) else []
        )
        for path in MODELS.values()
    ]
    + [pytest.param(path, id=path.stem, marks=pytest.mark.slow if "table1" not in path.stem else ()) for path in SMALL],
)  # Llama 2 and 3 do what Llama 3.1 does
def test_a_tiny_model_goes_the_whole_way(
    path: Path, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "LEAST_FAR_BLOCK", 512 // SCALE)
    monkeypatch.setattr(far, "NEAR", 2)
    monkeypatch.setattr(far, "SINKS", 1)
    recipe = read(path)
    folder = stub(tiny(REAL[recipe["model"]]), byte_tokenizer, tmp_path / "teacher")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for seed, name in enumerate(("train.txt", "other.txt")):
        rng = random.Random(seed)
        (tmp_path / name).write_text(" ".join(str(rng.randrange(1000)) for _ in range(12000)))
    small = shortened(recipe, tmp_path) | {"model": str(folder)}
    results = pipeline.run(write(small, tmp_path / "small.yaml"), tmp_path / "run")
    labels = ["teacher", NEAR_ONLY]
    for student in recipe["students"]:
        name = student.get("name", student["preset"])
        labels += [f"{name}, no training", *([f"{name}, healed"] if "heal" in student else [])]
    assert list(results["evaluate"]["models"]) == labels
    teacher, student = results["bench"]["rows"]
    assert student["cache_bytes"] < teacher["cache_bytes"] and student["context"] == small["bench"]["context"]
    assert len(results["generations"]) == len(recipe["generate"]["prompts"])
    assert (tmp_path / "run" / "report.html").is_file()
    first = recipe["students"][0]
    steps = json.loads((tmp_path / "run" / "model" / RECORD).read_text())["steps"]
    if "heal" in first and results["spec"]["k_codes"] and "learning_rate" not in first["heal"]:
        assert steps[-1]["learning_rate"] == 2e-5
