"""Perplexity against a float64 loop, paired comparison, the needle's alignment, and the lm-eval adapter."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvlatent.errors import UserError
from kvlatent.evaluation import perplexity as evaluate
from kvlatent.evaluation.needle import needle
from kvlatent.evaluation.perplexity import Perplexity, compare, perplexity
from kvlatent.evaluation.tasks import kept_above_chance, lm_eval_tasks, paired, paired_test
from kvlatent.model import layers

VOCABULARY = 260


def tiny(seed: int = 0, *, kind: type[LlamaForCausalLM] = LlamaForCausalLM, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": 0,
            **changes,
        }
    )
    return kind(config).eval()


def blocks(count: int = 5, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, size), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: nothing to download, and every text has an encoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {character: index + 1 for index, character in enumerate(alphabet)}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<eos>", pad_token="<eos>")


def naive_nll(model: LlamaForCausalLM, ids: torch.Tensor) -> list[list[float]]:
    rows = []
    with torch.no_grad():
        for block in ids:
            logits = model(input_ids=block[None]).logits[0].double()
            row = []
            for position in range(len(block) - 1):
                scores = logits[position]
                normaliser = math.log(sum(math.exp(score) for score in scores.tolist()))
                row.append(normaliser - scores[block[position + 1]].item())
            rows.append(row)
    return rows


def test_perplexity_matches_naive_float64_loop() -> None:
    model, ids = tiny(), blocks()
    measured = perplexity(model, ids, text_bytes=320, batch_size=2)
    expected = naive_nll(model, ids)
    total = sum(map(sum, expected))
    assert measured.tokens == 5 * 15
    assert measured.nll == pytest.approx(total, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(total / 75), rel=1e-6)
    assert measured.block_nll.tolist() == pytest.approx([sum(row) / 15 for row in expected], rel=1e-6)


def test_perplexity_by_position_is_of_the_tokens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "SHORT", 3)
    model, ids = tiny(), blocks()
    nll = torch.tensor(naive_nll(model, ids), dtype=torch.float64).mean(0)  # of tokens 1 to 15
    found = perplexity(model, ids, text_bytes=320, batch_size=2).by_position
    assert list(found) == ["0-3", "3-6", "6-12", "12-16"]
    wanted = [nll[:2], nll[2:5], nll[5:11], nll[11:]]
    assert list(found.values()) == pytest.approx([math.exp(part.mean()) for part in wanted], rel=1e-6)
    monkeypatch.setattr(evaluate, "SHORT", 16)
    assert list(perplexity(model, ids, text_bytes=320, batch_size=2).by_position) == ["0-16"]


def test_perplexity_does_not_depend_on_batches_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), blocks()
    whole = perplexity(model, ids, text_bytes=320, batch_size=5)
    monkeypatch.setattr(layers, "POSITIONS_PER_CHUNK", 7)
    torch.testing.assert_close(
        perplexity(model, ids, text_bytes=320, batch_size=3).block_nll, whole.block_nll, rtol=1e-6, atol=0
    )


def test_full_logits_of_a_block_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "POSITIONS_PER_CHUNK", 7)
    model, rows = tiny(), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: rows.append(output.shape[:-1].numel()))
    perplexity(model, blocks(), text_bytes=320, batch_size=2)
    assert max(rows) == 7
    assert sum(rows) == 5 * 15


def test_uniform_model_has_perplexity_of_vocabulary_size() -> None:
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, blocks(), text_bytes=160, batch_size=2)
    assert measured.perplexity == pytest.approx(VOCABULARY)
    # 80 tokens, all charged alike, stand for 160 bytes.
    assert measured.bits_per_byte == pytest.approx(math.log2(VOCABULARY) * 80 / 160)
    assert measured.perplexity_stderr == pytest.approx(0, abs=1e-3)


def test_perplexity_ignores_dropout_and_leaves_the_mode() -> None:
    model = tiny(attention_dropout=0.5).train()
    first = perplexity(model, blocks(), text_bytes=320, batch_size=2)
    assert model.training
    assert first.nll == perplexity(model, blocks(), text_bytes=320, batch_size=2).nll


def test_model_compared_with_itself_has_ratio_one_and_no_error() -> None:
    measured = perplexity(tiny(), blocks(), text_bytes=320, batch_size=2)
    assert compare(measured, measured) == (1.0, 0.0)


def measured_as(block_nll: list[float]) -> Perplexity:
    return Perplexity(token_nll=torch.tensor(block_nll, dtype=torch.float64)[:, None].expand(-1, 9), bytes=100)


def test_compare_is_the_perplexity_ratio_with_the_paired_error() -> None:
    teacher, student = measured_as([1.0, 3.0, 2.0]), measured_as([1.1, 3.3, 2.2])
    ratio, error = compare(teacher, student)
    assert ratio == pytest.approx(student.perplexity / teacher.perplexity)
    assert error == pytest.approx(ratio * 0.1 / math.sqrt(3))  # differences 0.1, 0.3, 0.2


def test_one_block_tells_no_error() -> None:
    assert compare(measured_as([1.0]), measured_as([2.0])).stderr is None
    assert measured_as([1.0]).perplexity_stderr is None


def test_compare_refuses_other_blocks() -> None:
    with pytest.raises(UserError, match="same text and block size"):
        compare(measured_as([1.0]), measured_as([1.0, 2.0]))


@pytest.mark.parametrize(
    ("ids", "text_bytes", "message"),
    [
        (torch.zeros(0, 16, dtype=torch.long), 9, "at least 1 block"),
        (torch.zeros(3, 1, dtype=torch.long), 9, "at least 2 tokens"),
        (blocks(), 0, "at least 1 byte"),
        (torch.full((1, 4), VOCABULARY), 9, "tokenizer"),
        (torch.zeros(1, 2049, dtype=torch.long), 9, "max_position_embeddings"),
    ],
)
def test_perplexity_refuses_what_it_cannot_measure(ids: torch.Tensor, text_bytes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(tiny(), ids, text_bytes=text_bytes, batch_size=2)


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_models_without_probabilities_are_refused(scale: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight *= scale
    with pytest.raises(UserError, match=r"a token of the text costs .* nats"):
        perplexity(model, blocks(), text_bytes=9, batch_size=2)


class Oracle(LlamaForCausalLM):
    """Reads the next token off its own input: right wherever the scoring is aligned."""

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> CausalLMOutputWithPast:
        following = input_ids.roll(-1, dims=1)[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=100.0 * torch.nn.functional.one_hot(following, VOCABULARY))


def test_needle_scores_an_oracle_as_perfect(tokenizer: PreTrainedTokenizerFast) -> None:
    scores = needle(tiny(kind=Oracle), tokenizer, context=400, trials=7, seed=0)
    assert (scores["context"], scores["trials"]) == (400, 7)
    assert scores["exact_match"] == 1.0
    assert scores["code_log_probability"] == pytest.approx(0, abs=1e-6)
    assert [of_bin["trials"] for of_bin in scores["by_depth"]] == [2, 2, 1, 1, 1]
    assert [of_bin["depth"] for of_bin in scores["by_depth"]][::4] == [[0.0, 0.2], [0.8, 1.0]]
    json.dumps(scores)


def test_needle_scores_a_uniform_model_at_chance(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = needle(model, tokenizer, context=300, trials=2, seed=0)
    assert scores["exact_match"] == 0.0
    # Six byte tokens: a space and five digits.
    assert scores["code_log_probability"] == pytest.approx(-6 * math.log(VOCABULARY), rel=1e-5)


def test_needle_prompts_fill_the_context_and_repeat_with_the_seed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], list[int]]] = []

    def record(_model: LlamaForCausalLM, prompt: list[int], answer: list[int], *, cache: None) -> tuple[bool, float]:
        seen.append((prompt, answer))
        return False, 0.0

    monkeypatch.setattr("kvlatent.evaluation.needle.score_answer", record)
    needle(tiny(), tokenizer, context=600, trials=10, seed=3)
    needle(tiny(1), tokenizer, context=600, trials=10, seed=3)
    assert seen[:10] == seen[10:]
    places = []
    for prompt, answer in seen[:10]:
        text, code = tokenizer.decode(prompt), tokenizer.decode(answer).strip()
        assert len(code) == 5 and text.count(code) == 1
        assert 480 < len(prompt) + len(answer) <= 600
        places.append(text.index(code))
    assert places[0] < places[2] < places[4]


def test_needle_refuses_contexts_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="facts and question alone"):
        needle(tiny(), tokenizer, context=20, trials=1, seed=0)
    with pytest.raises(UserError, match="max_position_embeddings"):
        needle(tiny(), tokenizer, context=5000, trials=1, seed=0)


def test_paired_test_is_mcnemar_for_right_or_wrong() -> None:
    # 6 disagreements, 1 against 5: 2 * (1 + 6) / 64.
    a, b = [1, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]
    assert paired_test(a, b).difference == 0.5
    assert paired_test(a, b).p_value == pytest.approx(14 / 64)
    assert paired_test(b, a) == (-0.5, paired_test(a, b).stderr, paired_test(a, b).p_value)
    assert paired_test(a, a) == (0.0, 0.0, 1.0)


def test_paired_test_is_normal_for_other_values() -> None:
    tested = paired_test([0.0] * 4, [1.0, 2.0, 1.0, 2.0])
    assert tested.difference == 1.5
    assert tested.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert tested.p_value == pytest.approx(math.erfc(1.5 / tested.stderr / math.sqrt(2)))
    with pytest.raises(UserError, match="same 2 or more samples"):
        paired_test([1.0], [1.0, 0.0])


def test_kept_share_is_the_quotient_of_what_is_above_chance() -> None:
    teacher, student = [1.0] * 75 + [0.0] * 25, [1.0] * 65 + [0.0] * 25 + [1.0] * 5 + [0.0] * 5
    kept, error = kept_above_chance(teacher, student, 0.5)
    assert kept == pytest.approx((0.70 - 0.5) / (0.75 - 0.5))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, (4000, 100), generator=generator)
    resampled = (torch.tensor(student)[drawn].mean(1) - 0.5) / (torch.tensor(teacher)[drawn].mean(1) - 0.5)
    assert error == pytest.approx(resampled.std().item(), rel=0.15)
    assert kept_above_chance(teacher, teacher, 0.5) == (1.0, 0.0)
    assert kept_above_chance([1.0] * 55 + [0.0] * 45, student, 0.5) == (None, None)  # 0.05 ± 0.05: nothing to keep


def test_paired_says_what_is_kept_where_chance_is_known() -> None:
    right, wrong = {"acc": [1.0, 1.0, 1.0, 0.0] * 10}, {"acc": [1.0, 1.0, 0.0, 0.0] * 10}
    found = paired({"a": wrong, "b": wrong}, {"a": right, "b": right}, {"a": {"acc": 0.25}})
    assert found["a"]["acc"]["kept"] == pytest.approx(0.5)
    assert found["a"]["acc"]["difference"] == found["b"]["acc"]["difference"] == -0.25
    assert "kept" not in found["b"]["acc"]


def test_missing_lm_eval_is_explained(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs lm_eval, .*pip install 'kvlatent\[eval\]'"):
        lm_eval_tasks(tiny(), tokenizer, ["piqa"])


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    samples = [{"query": "ab", "choices": ["c", "d"], "gold": index % 2} for index in range(6)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    path = tmp_path / "letters.yaml"
    path.write_text(
        f"""task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/samples.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
    )
    return path


@pytest.mark.slow
def test_lm_eval_task_runs_on_a_model_in_memory(tokenizer: PreTrainedTokenizerFast, task_file: Path) -> None:
    pytest.importorskip("lm_eval")
    scores = lm_eval_tasks(tiny(), tokenizer, [str(task_file)], limit=4)
    assert scores["letters"].metrics["acc"] == 0.5  # one of two equal prompts, whichever the model prefers
    assert scores["letters"].metrics["acc_stderr"] > 0
    assert scores["letters"].samples["acc"] in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert scores["letters"].chance == {"acc": 0.5}


@pytest.mark.slow
def test_nothing_is_guessed_where_the_answer_is_written_or_ranked_alone(
    tokenizer: PreTrainedTokenizerFast, task_file: Path
) -> None:
    pytest.importorskip("lm_eval")
    asked = task_file.read_text().replace("multiple_choice", "loglikelihood").replace("doc_to_target: gold", "")
    last = 'doc_to_target: "{{choices[gold]}}"\nmetric_list:\n  - metric: acc\n  - metric: perplexity\n'
    task_file.write_text(asked.split("metric_list")[0] + last)
    score = lm_eval_tasks(tiny(), tokenizer, [str(task_file)], limit=4)["letters"]
    assert {"acc", "perplexity"} <= {*score.samples} and score.chance == {"acc": 0.0}


@pytest.mark.slow
def test_unusable_tasks_are_explained(tokenizer: PreTrainedTokenizerFast, task_file: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="knows no task nonsense"):
        lm_eval_tasks(tiny(), tokenizer, ["nonsense"], limit=4)
    with pytest.raises(UserError, match="no task file"):
        lm_eval_tasks(tiny(), tokenizer, ["nonsense.yaml"], limit=4)
    (task_file.parent / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        lm_eval_tasks(tiny(), tokenizer, [str(task_file)], limit=4)
