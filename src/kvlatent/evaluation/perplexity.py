"""How good a model is: perplexity on packed text, a needle in filler and lm-eval tasks, all comparable in pairs."""

import importlib
import importlib.util
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvlatent.errors import UserError

POSITIONS_PER_CHUNK = 512  # a 150k vocabulary in float32 then needs 0.3 GB of logits, whatever the block size
SHORT = 512  # tokens of a short context
DEPTH_BINS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Perplexity:
    """Negative log-likelihood of packed text under one model."""

    nll: float
    """Total over all predicted tokens, in nats."""
    tokens: int
    """Predicted tokens: every token but the first of each block, which has no context to be predicted from."""
    bytes: int
    """UTF-8 bytes of the text behind all tokens, the first of each block included."""
    block_nll: Float[Tensor, "blocks"]
    """Mean over the predicted tokens of each block, in nats; float64, on the CPU."""
    position_nll: Float[Tensor, "block_size-1"]
    """Mean over blocks of each predicted position, likewise."""

    @property
    def perplexity(self) -> float:
        """`exp` of the mean nats per predicted token."""
        return math.exp(self.nll / self.tokens)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of `perplexity` with blocks as the independent samples; None for one block."""
        error = _standard_error(self.block_nll)
        return None if error is None else self.perplexity * error

    @property
    def by_position(self) -> dict[str, float]:
        """Perplexity of the first `SHORT` tokens of blocks, of the next as many, of the next twice as many, and so on.

        A student may be good at the start of a context and bad far into it, which a mean over short blocks can't show.
        """
        bounds, block_size = [0, SHORT], len(self.position_nll) + 1
        while bounds[-1] < block_size:
            bounds.append(2 * bounds[-1])
        bounds[-1] = block_size
        return {  # the first token is not predicted
            f"{start}-{end}": math.exp(self.position_nll[max(0, start - 1) : end - 1].mean())
            for start, end in itertools.pairwise(bounds)
        }

    @property
    def bits_per_byte(self) -> float:
        """Mean bits per predicted token, times the tokens per byte of the whole text.

        The byte length of the unpredicted first tokens is not known here, so each of them is charged the mean of the
        predicted ones; numerator and denominator then cover the same text.
        """
        tokens_per_byte = (self.tokens + len(self.block_nll)) / self.bytes
        return self.nll / self.tokens / math.log(2) * tokens_per_byte


class PerplexityRatio(NamedTuple):
    """Student perplexity over teacher perplexity; 1.0 is no loss."""

    perplexity_ratio: float
    stderr: float | None
    """Standard error of the ratio; None for one block."""


class PairedTest(NamedTuple):
    """Two models on the same samples."""

    difference: float
    """Mean of `b - a`."""
    stderr: float
    p_value: float
    """Two-sided, for the hypothesis that neither model is better."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One lm-eval task under one model."""

    metrics: dict[str, float]
    """Every metric and its standard error: `acc`, `acc_stderr`, ..."""
    samples: dict[str, list[float]]
    """Each metric of each sample, in document order; `paired_test` takes two such lists."""


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, ids: Int[Tensor, "blocks block_size"], *, text_bytes: int, batch_size: int
) -> Perplexity:
    """Measure how well a model predicts packed text.

    Tokens see only their own block. Log-probabilities are float32 whatever the model's dtype, sums are float64, and
    logits exist for `POSITIONS_PER_CHUNK` positions at a time.

    Args:
        model: On any device; left in the mode (training or not) it came in.
        ids: Packed text, on any device.
        text_bytes: UTF-8 bytes of the text that all of `ids` stands for.
        batch_size: Blocks per forward pass; changes speed and memory, not the result.

    Raises:
        UserError: No text, blocks too short or longer than the model's positions, or ids outside its vocabulary.
    """
    _check_blocks(model, ids, text_bytes=text_bytes, batch_size=batch_size)
    blocks, block_size = ids.shape
    block_nll = torch.empty(blocks, dtype=torch.float64)
    position_nll = torch.zeros(block_size - 1, dtype=torch.float64)
    progress = tqdm(total=ids.numel(), desc="perplexity", unit="tokens", unit_scale=True)
    with _evaluation_mode(model), progress:
        for start in range(0, blocks, batch_size):
            batch = ids[start : start + batch_size].to(model.device)
            nll = _token_nll(model, batch).cpu().double()
            block_nll[start : start + len(batch)] = nll.mean(dim=1)
            position_nll += nll.sum(dim=0) / blocks
            progress.set_postfix(perplexity=f"{block_nll[: start + len(batch)].mean().exp():.2f}", refresh=False)
            progress.update(batch.numel())
    predicted = block_size - 1
    return Perplexity(
        nll=block_nll.sum().item() * predicted,
        tokens=blocks * predicted,
        bytes=text_bytes,
        block_nll=block_nll,
        position_nll=position_nll,
    )


def compare(teacher: Perplexity, student: Perplexity) -> PerplexityRatio:
    """Return the student's perplexity relative to the teacher's on the same blocks.

    The log ratio is the mean over blocks of the difference of the two models' mean nll. Pairing cancels how hard each
    block is for both, so its standard error, from the spread of these differences, is far smaller than that of either
    perplexity. It assumes independent blocks and a normal mean, and becomes the ratio's by the delta method:
    `stderr = ratio * stderr(log ratio)`.

    Raises:
        UserError: The two were not measured on the same blocks.
    """
    if (teacher.tokens, teacher.bytes) != (student.tokens, student.bytes) or len(teacher.block_nll) != len(
        student.block_nll
    ):
        raise UserError(
            "perplexities are compared block by block, so both need the same text and block size; "
            f"got {len(teacher.block_nll)} and {len(student.block_nll)} blocks "
            f"of {teacher.tokens} and {student.tokens} predicted tokens"
        )
    log_ratios = student.block_nll - teacher.block_nll
    ratio = math.exp(log_ratios.mean().item())
    error = _standard_error(log_ratios)
    return PerplexityRatio(ratio, None if error is None else ratio * error)


@torch.no_grad()
def needle(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int, trials: int, seed: int
) -> dict[str, Any]:
    """Ask for a 5-digit code that was mentioned once at a random depth of filler text.

    One forward pass over prompt and right answer gives both scores: greedy decoding would write the code exactly when
    every token of it is the most likely one after the right tokens before it. The log-probability is of the whole code,
    in nats, and informs about models too small to answer: guessing digits gives `5 * ln(1 / 10) = -11.5`.

    Args:
        model: On any device.
        tokenizer: The model's.
        context: Tokens of the prompt and answer together; a few fewer are used, since filler comes in sentences.
        trials: Prompts to try; depths are spread evenly over `DEPTH_BINS` bins.
        seed: Chooses codes, depths and filler; the same seed gives two models the same prompts.

    Returns:
        `context`, `trials`, `exact_match` (a fraction), `code_log_probability` (mean), and `by_depth`: per bin its
        `depth` as `[from, to]` (0 is the start of the prompt), `trials`, `exact_match`, `code_log_probability`.

    Raises:
        UserError: `context` is too short for needle and question or too long for the model, or `trials` < 1.
    """
    if trials < 1:
        raise UserError(f"the needle test needs at least 1 trial; got {trials}")
    _check_positions(model, context)
    rng = random.Random(seed)
    scores: list[list[tuple[bool, float]]] = [[] for _ in range(DEPTH_BINS)]
    with _evaluation_mode(model):
        for trial in tqdm(range(trials), desc="needle", unit="prompts"):
            bin_index = trial % DEPTH_BINS
            depth = (bin_index + rng.random()) / DEPTH_BINS
            prompt, answer = _needle_prompt(tokenizer, context=context, depth=depth, rng=rng)
            scores[bin_index].append(_score_answer(model, prompt, answer))
    by_depth = [
        {"depth": [index / DEPTH_BINS, (index + 1) / DEPTH_BINS], "trials": len(of_bin), **_mean_scores(of_bin)}
        for index, of_bin in enumerate(scores)
        if of_bin
    ]
    everything = [score for of_bin in scores for score in of_bin]
    return {"context": context, "trials": trials, **_mean_scores(everything), "by_depth": by_depth}


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None,
    include_path: Path | None,
) -> dict[str, TaskScore]:
    """Run lm-eval tasks on a model in memory.

    lm-eval loads the task data; set `HF_HUB_OFFLINE=1` and `HF_DATASETS_OFFLINE=1` to keep it to local files.

    Args:
        model: On any device.
        tokenizer: The model's.
        tasks: Names of tasks or groups, or paths of task files ending in `.yaml`.
        limit: Samples per task, from the first; None for all.
        include_path: Folder with more task files, found by their `task` name.

    Raises:
        UserError: lm-eval isn't installed, a task is unknown, or its data can't be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluation tasks need lm-eval, which isn't installed: pip install lm-eval==0.4.13")
    lm_eval = importlib.import_module("lm_eval")
    hflm = importlib.import_module("lm_eval.models.huggingface").HFLM
    task_manager = importlib.import_module("lm_eval.tasks").TaskManager

    files = {task: Path(task) for task in tasks if task.endswith(".yaml")}
    names = [_task_name(files[task]) if task in files else task for task in tasks]
    folders = dict.fromkeys(str(path.parent.resolve()) for path in files.values())
    if include_path is not None:
        folders[str(include_path)] = None
    # Reading the thousands of tasks that come with lm-eval takes many seconds.
    manager = task_manager(include_path=list(folders), include_defaults=len(files) < len(tasks))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}: name one it lists, or a .yaml task file")

    try:
        outcome = lm_eval.simple_evaluate(
            model=hflm(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype=torch.float32),
            tasks=names,
            task_manager=manager,
            limit=limit,
        )
    except (ConnectionError, FileNotFoundError) as error:  # what datasets raises offline or for a wrong data_files
        raise UserError(f"the data of {', '.join(names)} can't be loaded: {str(error).splitlines()[0]}") from error
    return {
        name: TaskScore(metrics=_metrics(result), samples=_sample_metrics(outcome["samples"].get(name, [])))
        for name, result in outcome["results"].items()
    }


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Test whether two models differ on the same samples.

    For right-or-wrong samples (0 or 1) this is McNemar's exact test, a sign test on the samples where they disagree;
    for other values it is a normal approximation on the paired differences.

    Raises:
        UserError: The sequences differ in length or have fewer than 2 samples.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"a paired test needs the same 2 or more samples of both models; got {len(a)} and {len(b)}")
    differences = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    difference = differences.mean().item()
    error = _standard_error(differences)
    assert error is not None
    if {*a, *b} <= {0.0, 1.0}:
        losses, wins = int((differences < 0).sum()), int((differences > 0).sum())
        tail = sum(math.comb(losses + wins, k) for k in range(min(losses, wins) + 1))
        p_value = min(1.0, 2 * tail / 2 ** (losses + wins))
    elif error == 0:
        p_value = 1.0 if difference == 0 else 0.0
    else:
        p_value = math.erfc(abs(difference) / error / math.sqrt(2))
    return PairedTest(difference, error, p_value)


def _check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Raise a UserError if a sequence of `tokens` has more positions than the model was made for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(f"{tokens} tokens are more than the model's {limit} positions (max_position_embeddings)")


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_blocks(model: PreTrainedModel, ids: Tensor, *, text_bytes: int, batch_size: int) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UserError(f"perplexity needs at least 1 block of at least 2 tokens; got shape {tuple(ids.shape)}")
    if text_bytes < 1:
        raise UserError(f"the text behind the tokens must have at least 1 byte; got {text_bytes}")
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1; got {batch_size}")
    if int(ids.max()) >= model.config.vocab_size or int(ids.min()) < 0:
        raise UserError(
            f"token ids go from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
            f"{model.config.vocab_size}: tokenize with the model's own tokenizer"
        )
    _check_positions(model, ids.shape[1])


def _token_nll(
    model: PreTrainedModel, ids: Int[Tensor, "batch block_size"], **kwargs: Any
) -> Float[Tensor, "batch block_size-1"]:
    """Return nats per predicted token in float32, holding full-vocabulary logits of one chunk at a time."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
    lm_head = model.get_output_embeddings()
    chunks = zip(hidden.split(POSITIONS_PER_CHUNK), ids[:, 1:].flatten().split(POSITIONS_PER_CHUNK), strict=True)
    nll = [F.cross_entropy(lm_head(states).float(), targets, reduction="none") for states, targets in chunks]
    return torch.cat(nll).view(len(ids), -1)


def _standard_error(samples: Float[Tensor, "samples"]) -> float | None:
    """Return the standard error of the mean, or None where one sample can't tell it."""
    return None if len(samples) < 2 else samples.std(unbiased=True).item() / math.sqrt(len(samples))


def _filler(rng: random.Random) -> str:
    """Return one plain sentence without digits."""
    who = rng.choice(["The gardener", "My neighbour", "A young teacher", "The baker", "Our captain", "An old friend"])
    did = rng.choice(["carried", "painted", "repaired", "borrowed", "counted", "looked after", "forgot about"])
    what = rng.choice(["the wooden boats", "a blue bicycle", "two lamps", "the kitchen chairs", "some apple trees"])
    where = rng.choice(["near the harbour", "behind the school", "in the valley", "at the market", "by the river"])
    when = rng.choice(["before breakfast", "on a rainy day", "late in autumn", "after the concert", "every week"])
    return f"{who} {did} {what} {where} {when}."


def _needle_prompt(
    tokenizer: PreTrainedTokenizerBase, *, context: int, depth: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the answer that should follow it, together at most `context`."""
    code = f"{rng.randrange(10_000, 100_000)}"
    sentence = f"Please remember that the secret code is {code}."
    question = "Now you are asked for the secret code that was mentioned above. The secret code is"

    def encode(filler: list[str]) -> tuple[list[int], list[int]]:
        before = round(depth * len(filler))
        prompt = " ".join([*filler[:before], sentence, *filler[before:], question])
        # Tokenized as one text, then cut where the prompt alone ends, so the answer is spelt as the model knows it.
        alone, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {code}")["input_ids"]
        cut = next((i for i, (x, y) in enumerate(zip(alone, whole, strict=False)) if x != y), len(alone))
        return whole[:cut], whole[cut:]

    bare = sum(map(len, encode([])))
    if bare > context:
        raise UserError(f"needle and question alone need {bare} tokens; got a context of {context}")
    filler: list[str] = []
    room = context - bare
    while room > 0:
        filler.append(_filler(rng))
        room -= len(tokenizer(" " + filler[-1], add_special_tokens=False)["input_ids"])
    prompt, answer = encode(filler)
    while len(prompt) + len(answer) > context:  # the last sentence, as a rule
        filler.pop()
        prompt, answer = encode(filler)
    return prompt, answer


def _score_answer(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> tuple[bool, float]:
    """Return whether greedy decoding gives the answer, and the answer's log-probability in nats."""
    ids = torch.tensor([prompt + answer], device=model.device)
    # One row more than the answer has tokens: each row predicts the next token, and the last row has none to predict.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    targets = ids[0, -len(answer) :]
    log_probability = -F.cross_entropy(logits, targets, reduction="sum").item()
    return bool((logits.argmax(dim=-1) == targets).all()), log_probability


def _mean_scores(scores: list[tuple[bool, float]]) -> dict[str, float]:
    return {
        "exact_match": sum(exact for exact, _ in scores) / len(scores),
        "code_log_probability": sum(log_probability for _, log_probability in scores) / len(scores),
    }


def _task_name(path: Path) -> str:
    """Return the `task` a file defines, without resolving its own tags such as `!function`."""
    if not path.is_file():
        raise UserError(f"no task file {path}")
    found = re.search(r"^task:[ \t]*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise UserError(f"{path} is no lm-eval task file: it has no line `task: NAME`")
    return found[1]


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of lm-eval's `metric,filter` entries; its default filter, `none`, is not worth a name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in result.items()
        if "," in key and isinstance(value, int | float)
    }


def _sample_metrics(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    if not samples:
        return {}
    one_filter = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    ordered = sorted(one_filter, key=lambda sample: int(sample["doc_id"]))
    return {
        metric: [float(sample[metric]) for sample in ordered]
        for metric in ordered[0]["metrics"]
        if isinstance(ordered[0][metric], int | float)
    }
