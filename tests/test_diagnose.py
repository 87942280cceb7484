"""Entropy of attention against stock attention weights and the module's own output, words in and out of order."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import WORDS as VOCABULARY
from commands import answer, write_text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.compress.checkpoints import target_of
from kvlatent.compress.config import ConvertConfig
from kvlatent.compress.convert import convert_as
from kvlatent.errors import UserError
from kvlatent.evaluation.diagnose import (
    WORDS,
    Diagnosis,
    attention_entropy,
    attention_logits,
    spans_of,
    told,
    word_order,
)
from kvlatent.evaluation.perplexity import Perplexity
from kvlatent.model.graft import graft


def ids_of(seq: int, blocks: int = 2) -> Tensor:
    return torch.randint(260, (blocks, seq), generator=torch.Generator().manual_seed(0))


# --- entropy


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "smollm3", "mistral-mha", "gemma2", "gpt_oss"])
def test_entropy_is_that_of_stock_attention_weights(name: str, tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher, ids = tiny_teacher(name), ids_of(20)
    teacher.set_attn_implementation("eager")
    weights = torch.stack(teacher(ids, output_attentions=True).attentions).double()  # (layers, blocks, heads, 20, 20)
    weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), dim=-1)  # of learned sinks
    entropy = torch.zeros(2, 4, dtype=torch.float64)
    for layer in range(2):
        for head in range(4):
            for p in weights[layer, :, head].flatten().tolist():
                entropy[layer, head] -= p * math.log(p) if p > 0 else 0.0
    found = attention_entropy(tiny_teacher(name), ids)
    torch.testing.assert_close(found, entropy / ids.numel(), rtol=1e-4, atol=1e-5)


STUDENTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"d_qk": 8, "d_vo": 8, "window": 0}),
    ("llama", {"d_qk": 8, "d_vo": 16, "window": 0, "heads_per_latent": 1}),
    ("llama", {"preset": "paper", "d_qk": 8, "d_vo": 4}),
    ("llama", {"d_qk": 8, "d_vo": 6, "window": 5, "sinks": 2}),
    ("qwen3", {"d_qk": 8, "d_vo": 8, "window": 5, "sinks": 2, "bits": 4}),
    ("gemma3_text", {"d_qk": 8, "d_vo": 8, "window": 3, "sinks": 1}),
    ("mistral", {"d_qk": 4, "d_vo": 4, "window": 3, "sinks": 0}),
    ("gemma2", {"d_qk": 8, "d_vo": 8, "window": 5, "sinks": 2, "bits": 4}),
    ("gpt_oss", {"d_qk": 8, "d_vo": 8, "window": 0}),
    ("gpt_oss", {"d_qk": 8, "d_vo": 8, "window": 5, "sinks": 2}),
]


@pytest.mark.parametrize(("name", "asked"), STUDENTS)
@torch.no_grad()
def test_logits_and_values_give_what_the_module_gives(
    name: str, asked: dict[str, Any], tiny_teacher: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What entropy is taken of is the attention that a student really pays, biases of far logits included."""
    monkeypatch.setattr("kvlatent.evaluation.diagnose.ROWS", 7)
    teacher, paper = tiny_teacher(name), asked.get("preset") == "paper"
    source = {} if paper else {"text": ("some",)}
    request = target_of(teacher.config, ConvertConfig(block_size=1024, **source, **asked)).request
    student = convert_as(request, teacher, **({} if paper else {"ids": ids_of(64), "batch_size": 2}))
    module = student.model.layers[1].self_attn
    if module.far_bias is not None:
        torch.nn.init.normal_(module.far_bias)
    checked = []

    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, None]) -> None:
        p = torch.cat(list(attention_logits(module, *args, **kwargs)), dim=2).softmax(-1)
        p = p if module.sinks is None else p[..., :-1]
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        _, k, v = module.queries_keys_values(hidden, cos, sin, kwargs.get("position_ids"))

        def of_heads(x: Tensor) -> Tensor:
            return x.repeat_interleave(module.q_heads // x.shape[1], dim=1)

        if module.window:
            at = torch.arange(p.shape[-1])
            far = (at[:, None] - at >= module.window) & (at >= module.near.sinks)
            maps = module.far_maps()
            out = p.masked_fill(far, 0) @ of_heads(v) + p.masked_fill(~far, 0) @ of_heads(maps.seen(k, v)[1]) @ maps.o
        else:
            out = p @ of_heads(v)
            out = out if module.o_map is None else out @ module.o_map
        torch.testing.assert_close(module.o_proj(out.transpose(1, 2).flatten(2)), output[0], rtol=1e-4, atol=1e-4)
        checked.append(module)

    for layer in student.model.layers:
        layer.self_attn.register_forward_hook(check, with_kwargs=True)
    student(ids_of(24), use_cache=False)
    assert len(checked) == 2


def test_entropy_of_heads_that_collapse_or_no_longer_choose(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    model, ids = tiny_teacher("llama"), ids_of(30)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    model.model.layers[1].self_attn.q_proj.weight.mul_(1e4)
    found = attention_entropy(model, ids)
    alike = sum(math.log(n) for n in range(1, 31)) / 30
    torch.testing.assert_close(found[0], torch.full((4,), alike, dtype=torch.float64))
    assert found[1].max() < 0.02
    whole = attention_entropy(graft(model), ids)
    torch.testing.assert_close(whole, found)


# --- word order


def sentences(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def test_spans_are_words_of_the_text_in_two_orders(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = sentences(0)
    ids = torch.tensor(byte_tokenizer(text)["input_ids"][:2000]).view(10, 200)
    spans = spans_of(byte_tokenizer, ids, seed=1)
    assert len(spans) == 64 and spans == spans_of(byte_tokenizer, ids, seed=1) != spans_of(byte_tokenizer, ids, seed=2)
    for span in spans:
        prefix, true, permuted = (byte_tokenizer.decode(x) for x in (span.prefix, span.true, span.permuted))
        assert prefix + true in text and len(span.prefix) <= 100
        assert len(true.split()) == WORDS and sorted(true.split()) == sorted(permuted.split())
    assert sum(span.true != span.permuted for span in spans) >= 60  # a word may stand twice
    with pytest.raises(UserError, match="order of words; no block of the text has more than 5"):
        spans_of(byte_tokenizer, ids[:, :12], seed=0)


@torch.no_grad()
def test_margins_are_sums_of_log_probabilities(
    tiny_teacher: Callable[[str], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_teacher("llama")
    ids = torch.tensor(byte_tokenizer(sentences(3))["input_ids"][:400]).view(4, 100)
    spans = spans_of(byte_tokenizer, ids, seed=0)[:5]
    found = word_order(model, spans)
    for span, margin, preferred in zip(spans, found["margin"], found["true_preferred"], strict=True):
        sums = []
        for words in (span.true, span.permuted):
            log_probs = model(torch.tensor([span.prefix + words])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_probs[len(span.prefix) + i - 1, token]) for i, token in enumerate(words)))
        assert margin == pytest.approx(sums[0] - sums[1], abs=1e-4)
        assert preferred == (margin > 0)


# --- results


def test_a_diagnosis_is_told_beside_the_teachers() -> None:
    def diagnosis(entropy: list[list[float]], margins: list[float], nll: float) -> Diagnosis:
        score = Perplexity(token_nll=torch.full((2, 3), nll, dtype=torch.float64), bytes=10)
        order = {"true_preferred": [float(m > 0) for m in margins], "margin": margins}
        return Diagnosis(
            entropy=torch.tensor(entropy, dtype=torch.float64),
            word_order=order,
            by_source={"a": score},
            layers=range(9),
        )

    teacher = diagnosis([[1.0, 2.0], [3.0, 4.0]], [1.0, 2.0, 3.0, 4.0], 1.0)
    student = diagnosis([[1.0, 2.0], [0.5, 4.5]], [1.0, -1.0, 1.0, -1.0], 1.5)
    found = told(student, teacher)
    assert found["entropy"] == 2 and found["entropy_by_head"] == [[1, 2], [0.5, 4.5]]
    assert found["entropy_change"] == {"mean_size": 0.75, "largest": {"change": -2.5, "layer": 1, "head": 0}}
    assert found["word_order"]["true_preferred"] == 0.5 and found["word_order"]["margin"] == 0
    assert found["word_order"]["margin_stderr"] == pytest.approx(math.sqrt(4 / 3 / 4))
    assert found["ratio_by_source"]["a"]["perplexity_ratio"] == pytest.approx(math.exp(0.5))
    assert "entropy_change" not in told(teacher)


def test_eval_diagnoses_beside_the_teacher(
    folder: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = write_text(tmp_path / "more.txt", seed=5)
    argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--text", f"{folder}/other.txt", str(more)]
    argv += ["--tokens", "1024", "--block-size", "64", "--diagnose"]
    result = answer(capsys, argv)
    mine, teachers = result["diagnose"], result["against"]["diagnose"]
    assert mine["word_order"]["spans"] == teachers["word_order"]["spans"] == 64
    assert [len(heads) for heads in mine["entropy_by_head"]] == [4, 4]
    assert mine["entropy_change"]["mean_size"] > 0
    assert list(mine["ratio_by_source"]) == [f"{folder}/other.txt", str(more)]
    for source, ratio in mine["ratio_by_source"].items():
        apart = mine["perplexity_by_source"][source] / teachers["perplexity_by_source"][source]
        assert ratio["perplexity_ratio"] == pytest.approx(apart)
    paired = result["paired"]["word_order"]["margin"]
    difference = mine["word_order"]["margin"] - teachers["word_order"]["margin"]
    assert paired["difference"] == pytest.approx(difference) and paired["stderr"] > 0
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "diagnose word order true preferred" in said and "word_order margin:" in said
    assert "entropy of attention differs by" in said and f"perplexity ratio on {more}: " in said


def test_a_source_that_was_trained_on_is_refused_alone_too(
    folder: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--block-size", "64", "--diagnose"]
    assert cli.main([*argv, "--text", f"{folder}/other.txt", f"{folder}/train.txt", "--tokens", "128"]) == 2
    assert "evaluate on other text" in capsys.readouterr().err
    for missing in (argv, [*argv[:2], "--text", f"{folder}/other.txt", "--diagnose"]):
        assert cli.main(missing) == 2
    assert "give --text and --against" in capsys.readouterr().err


def test_a_run_shows_its_diagnosis(
    folder: Path,
    tmp_path: Path,
) -> None:
    recipe = {
        "title": "Tiny", "model": f"{folder}/teacher", "block_size": 64, "diagnose": True,
        "calibration": {"text": [f"{folder}/train.txt"], "tokens": 512},
        "held_out": {"text": [f"{folder}/other.txt"], "tokens": 512},
        "students": [{"budget": 0.5, "window": 0}], "bench": {"context": 16, "batch": 1, "new_tokens": 2},
        "generate": {"prompts": ["river stone"], "max_new_tokens": 4},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert cli.main(["run", str(tmp_path / "r.yaml"), "--out", f"{tmp_path}/run"]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["diagnose"]
    assert list(found) == ["teacher", "student"] and "ratio_by_source" in found["student"]
    page = (tmp_path / "run" / "report.html").read_text()
    for shown in ("<h2>Diagnosis</h2>", "Entropy of attention", "Change of entropy by head", "True order preferred"):
        assert shown in page
    assert f"{found['student']['word_order']['margin']:,.2f}" in page
    assert f'<th scope="row">{folder}/other.txt</th>' in page
