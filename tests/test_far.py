"""Far gain against plain loops, the teacher without far text, retrieval by models that copy, and `eval --far`."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvlatent import cli
from kvlatent.compress.convert import convert
from kvlatent.errors import UserError
from kvlatent.evaluation import far
from kvlatent.evaluation.needle import score_answer, score_answers
from kvlatent.evaluation.perplexity import Perplexity, perplexity
from kvlatent.evaluation.report.text import models_table, summary_table
from kvlatent.evaluation.retrieval import RETRIEVAL_TESTS, retrieval, retrieval_prompts, retrieval_questions
from kvlatent.model.compatibility import CACHE

VOCABULARY = 260


def losses(rows: list[list[float]]) -> Perplexity:
    return Perplexity(token_nll=torch.tensor(rows, dtype=torch.float64), bytes=100)


def random_losses(seed: int) -> Perplexity:
    return losses((3 * torch.rand(4, 50, generator=torch.Generator().manual_seed(seed))).tolist())


# --- far gain


def test_far_scores_match_a_loop_over_tokens() -> None:
    teacher, near, student = (random_losses(seed) for seed in range(3))
    gain = lost = tokens = 0.0
    for row in range(4):
        for column in range(50):
            t, n, s = (float(x.token_nll[row, column]) for x in (teacher, near, student))
            if n - t >= 0.5:
                gain, lost, tokens = gain + n - t, lost + s - t, tokens + 1
    scores = far.far_scores(teacher, near, student)
    assert scores["far_gain_kept"] == pytest.approx(1 - lost / gain)
    assert scores["far_perplexity_ratio"] == pytest.approx(math.exp(lost / tokens))
    assert (scores["far_tokens"], scores["far_share"]) == (tokens, tokens / 200)
    json.dumps(scores, allow_nan=False)


def test_a_teacher_keeps_all_far_gain_and_one_that_forgets_none() -> None:
    teacher, near = random_losses(0), random_losses(1)
    whole, none = (far.far_scores(teacher, near, model) for model in (teacher, near))
    assert (whole["far_gain_kept"], whole["far_gain_kept_stderr"], whole["far_perplexity_ratio"]) == (1, 0, 1)
    assert (none["far_gain_kept"], none["far_gain_kept_stderr"]) == (pytest.approx(0), pytest.approx(0))
    assert none["far_perplexity_ratio"] > math.exp(0.5)


def test_the_error_of_the_share_is_that_of_resampled_blocks() -> None:
    torch.manual_seed(0)
    teacher = losses((2 * torch.rand(60, 40)).tolist())
    near = Perplexity(token_nll=teacher.token_nll + 2 * torch.rand(60, 40, dtype=torch.float64), bytes=1)
    harder = torch.rand(60, 1, dtype=torch.float64)  # what is lost differs from block to block
    student = Perplexity(token_nll=teacher.token_nll + harder * torch.rand(60, 40, dtype=torch.float64), bytes=1)
    resampled = []
    for _ in range(300):
        blocks = torch.randint(60, (60,))
        chosen = (Perplexity(token_nll=x.token_nll[blocks], bytes=1) for x in (teacher, near, student))
        resampled.append(far.far_scores(*chosen)["far_gain_kept"])
    error = far.far_scores(teacher, near, student)["far_gain_kept_stderr"]
    assert error == pytest.approx(torch.tensor(resampled).std().item(), rel=0.2)
    one = far.far_scores(*(Perplexity(token_nll=x.token_nll[:1], bytes=1) for x in (teacher, near, student)))
    assert one["far_gain_kept_stderr"] is None


def test_without_tokens_that_need_far_text_there_is_no_share() -> None:
    teacher = random_losses(0)
    assert far.far_scores(teacher, teacher, random_losses(1)) == {"far_tokens": 0, "far_share": 0}


@pytest.mark.parametrize("name", ["llama", "mistral", "olmo3", "gemma2"])
def test_near_only_losses_are_those_of_a_text_cut_short(
    name: str, tiny_teacher: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one layer, a token that sees the newest tokens only can't tell that there were others."""
    monkeypatch.setattr(far, "NEAR", 8)
    monkeypatch.setattr(far, "SINKS", 0)
    teacher = tiny_teacher(name)
    teacher.model.layers = teacher.model.layers[:1]
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(2))
    measured = far.near_only_perplexity(teacher, ids, text_bytes=60, batch_size=2)
    for at in (5, 12, 18):
        cut = perplexity(teacher, ids[:, max(0, at - 7) : at + 2], text_bytes=60, batch_size=3)
        torch.testing.assert_close(measured.token_nll[:, at], cut.token_nll[:, -1], rtol=1e-4, atol=1e-4)


def test_near_only_tokens_see_the_first_ones_too() -> None:
    mask = far.near_only_mask(300)[0, 0]
    assert mask[299].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(172, 300)]
    assert mask[2].nonzero().flatten().tolist() == [0, 1, 2]
    assert far.near_only_mask(300, sliding=10)[0, 0, 299].nonzero().flatten().tolist() == list(range(290, 300))


# --- retrieval


class Copier(LlamaForCausalLM):
    """Continues as the text did after the longest stretch like its last tokens; sees `reach` tokens back."""

    reach = 10**6

    def forward(self, input_ids: Tensor, logits_to_keep: int, **given: Any) -> CausalLMOutputWithPast:
        row = given.get(CACHE, list[int]())
        row += input_ids[0].tolist()
        guesses = [self._guess(row[max(0, end - self.reach) : end]) for end in range(1, len(row) + 1)[-logits_to_keep:]]
        logits = 100.0 * torch.nn.functional.one_hot(torch.tensor([guesses]), VOCABULARY)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: row})

    @staticmethod
    def _guess(row: list[int]) -> int:
        best, guess = 0, 0
        for at in range(1, len(row)):
            alike = 0
            while alike < at and row[at - 1 - alike] == row[-1 - alike]:
                alike += 1
            if alike >= best:
                best, guess = alike, row[at]
        return guess


@pytest.fixture(scope="module")
def copier(tiny_teacher: Callable[[str], PreTrainedModel]) -> Copier:
    return Copier(tiny_teacher("llama").config.__class__(**tiny_teacher("llama").config.to_dict() | POSITIONS)).eval()


POSITIONS = {"max_position_embeddings": 4096}


@pytest.mark.parametrize("test", RETRIEVAL_TESTS)
def test_a_model_that_copies_retrieves_and_one_that_forgets_does_not(
    test: str, copier: Copier, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = retrieval(copier, byte_tokenizer, test, context=800, trials=6, seed=0).scores()
    assert found["exact_match"] == 1 and found["exact_match_stderr"] == 0
    assert found["log_probability"] == pytest.approx(0, abs=1e-6)
    assert (found["pairs"], found["trials"]) == ({"key_value": 25, "needles": 4}[test], 6)
    assert found["questions"] == {"key_value": 6 * 8, "needles": 6 * 4}[test]
    monkeypatch.setattr(Copier, "reach", 128)  # what is asked for lies further back
    forgot = retrieval(copier, byte_tokenizer, test, context=800, trials=6, seed=0).scores()
    assert forgot["exact_match"] < 0.5 and forgot["log_probability"] < -10
    json.dumps(forgot, allow_nan=False)


@pytest.mark.parametrize("questions", [1, 4])
@pytest.mark.parametrize(("test", "context"), [("key_value", 1000), ("needles", 1000), ("needles", 2500)])
def test_prompts_fill_the_context_ask_what_is_far_and_repeat_with_the_seed(
    test: str, context: int, questions: int, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    how: dict[str, Any] = {"context": context, "trials": 8, "seed": 3, "questions": questions}
    prompts = list(retrieval_prompts(byte_tokenizer, test, **how))
    assert prompts == list(retrieval_prompts(byte_tokenizer, test, **how))
    assert len(prompts) == 8 and {len(asked) for asked in prompts} == {questions}
    places = []
    for asked in prompts:
        facts = set()
        for prompt, answer in asked:
            text, code = byte_tokenizer.decode(prompt), byte_tokenizer.decode(answer).strip()
            assert context - 100 < len(prompt) + len(answer) <= context
            *told, question = text.split("The code of ")
            name = question.removesuffix(" is")
            assert [fact.split(".")[0] for fact in told if fact.startswith(f"{name} is ")] == [f"{name} is {code}"]
            assert len(told) - 1 == (4 if test == "needles" else context // 32)
            facts.add(text[: -len(f"The code of {question}")])
            places.append(text.index(f"The code of {name} is {code}"))
            assert len(text) - places[-1] > 128
        assert len(facts) == 1  # what is told is the same for all of its questions
    assert places[0] < places[-1] and len(set(places[:questions])) == questions


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_questions_of_one_text_are_answered_as_if_asked_alone(
    family: str, tiny_teacher: Callable[[str], PreTrainedModel]
) -> None:
    generator = torch.Generator().manual_seed(0)
    told, *ends = (
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (120, 5, 9, 5, 1)
    )
    asked = [([*told, *end], answer) for end, answer in zip(ends, ([7], [8, 9], [3, 4, 5], [6]), strict=True)]
    teacher = tiny_teacher(family)
    ids = torch.randint(3, VOCABULARY, (4, 64), generator=generator)
    dims: dict[str, Any] = {"d_qk": 8, "d_vo": 4, "ids": ids, "window": 6, "sinks": 2}
    groups = (((16, 4),),) * 2
    codes = dims | {"d_vo": 8, "k_codes": groups, "v_codes": groups}
    for model in (teacher, convert(teacher, **dims), convert(teacher, **codes)):
        with torch.no_grad():
            alone = [score_answer(model, *each) for each in asked]
            found = score_answers(model, asked)
        assert [right for right, _ in found] == [right for right, _ in alone]
        assert [nats for _, nats in found] == pytest.approx([nats for _, nats in alone], abs=1e-4)


def test_many_pairs_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvlatent.evaluation.retrieval.filled_prompts", lambda _tokenizer, text, questions, **_: (text([]), *questions)
    )
    for pairs in (4, 32, 64, 256, 1024):
        how: dict[str, Any] = {"context": 0, "depths": [0.2, 0.5], "rng": random.Random(0)}
        facts, *asked = retrieval_questions(None, pairs, **how)  # type: ignore[arg-type]
        assert len({fact.split(" is ")[0] for fact in facts}) == len(facts) == pairs
        told = [[facts.index(f"{question} {code}.") for question, code in asked]]
        assert len({*told[0]}) == 2
    with pytest.raises(UserError, match="names for 1024 pairs"):
        retrieval_questions(None, 1025, context=0, depths=[0.5], rng=random.Random(0))  # type: ignore[arg-type]


def test_retrieval_refuses_what_it_cannot_ask(copier: Copier, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    for context, trials, said in ((800, 0, "1 trial"), (256, 1, "over 256"), (5000, 1, "positions")):
        with pytest.raises(UserError, match=said):
            retrieval(copier, byte_tokenizer, "needles", context=context, trials=trials, seed=0)


# --- on the command line and in tables


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Two random models with positions enough, and a text."""
    root = tmp_path_factory.mktemp("far")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = tiny_teacher("llama").config
        config.max_position_embeddings = 1024
        config.initializer_range = 0.5  # strong enough opinions for far text to matter
        type(tiny_teacher("llama"))(config).save_pretrained(root / name)
        byte_tokenizer.save_pretrained(root / name)
    rng = random.Random(0)
    (root / "text.txt").write_text(" ".join(rng.choice(["river", "stone", "bread", "lamp"]) for _ in range(900)))
    return root


def test_eval_far_judges_teacher_near_only_teacher_and_student(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--text", f"{folder}/text.txt"]
    argv += ["--tokens", "2048", "--block-size", "512", "--far"]
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    teacher, near_only = told["against"], told["near_only"]
    assert (teacher["far_gain_kept"], teacher["perplexity_ratio"]) == (1, 1)
    assert near_only["far_gain_kept"] == pytest.approx(0) and near_only["perplexity_ratio"] != 1
    assert told["far_tokens"] == near_only["far_tokens"] > 0
    assert told["far_gain_kept"] < 1 and told["far_gain_kept_stderr"] > 0
    assert told["perplexity_ratio"] == pytest.approx(told["perplexity"] / teacher["perplexity"])
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("teacher  ", "teacher, near only", "student"))]
    assert len(rows) == 3 and "100.0 %" in rows[0] and "0.0 %" in rows[1]
    assert f"{told['far_tokens']} of this text" in printed


def test_eval_retrieval_stands_beside_the_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", f"{folder}/student", "--against", f"{folder}/teacher", "--retrieval", "--trials", "2"]
    argv += ["--retrieval-contexts", "640", "960", "8192"]
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["key_value 640", "key_value 960", "needles 640", "needles 960"]
    assert list(told["retrieval"]) == list(told["against"]["retrieval"]) == list(told["paired"]) == names
    mine, theirs = (x["retrieval"]["needles 960"]["log_probability"] for x in (told, told["against"]))
    paired = told["paired"]["needles 960"]["log_probability"]
    assert paired["difference"] == pytest.approx(mine - theirs) and paired["stderr"] > 0
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "needles 960 exact match" in printed and "needles 960 log_probability" in printed


def test_tables_and_summary_show_far_gain_beside_averages() -> None:
    teacher, near, student = (random_losses(seed) for seed in range(3))
    labels = {"teacher": teacher, "teacher, near only": near, "best, healed": student}
    from kvlatent.evaluation.evaluate import scores_of

    models = {label: scores_of(score, teacher, near) for label, score in labels.items()}
    kept = f"{100 * models['best, healed']['far_gain_kept']:.1f} %"
    table = models_table(models)
    assert kept in table and "far gain kept" in table.splitlines()[0]
    summary = summary_table({"evaluate": {"models": models}, "spec": {"preset": "best"}})
    headline, rows = summary.split("\n\n")[:2]
    assert headline.endswith(f"and {kept} of its far gain")
    assert any(row.startswith("Far gain kept") and kept in row for row in rows.splitlines())
    assert "far gain" not in summary_table({"evaluate": {"models": {k: {"perplexity": 2.0} for k in models}}})
