"""Whether a converted chat model still follows instructions, and what healing it with chats does.

    kvlatent run recipes/paper-vs-best.yaml --out RUN
    python benchmarks/instruct.py RUN --out instruct [--student best] [--tokens 3072]

The teacher answers prompts on subjects and in forms of ours; its answers, sampled at temperature 0.8, are the chats
to heal with (losses on the answers alone). Judged are, on prompts about other subjects: the KL from the teacher on its
own greedy answers, how often the student's likeliest token is the teacher's, and greedy answers by rules that a program
can check (`FORMS`). Students: the run's unhealed one, healed on the run's own training text, healed on as many tokens
of chats, the run's healed one, and that one healed on the chats. The folder --out keeps the chats (JSON lines, as
`kvlatent heal --text` takes them), the answers and results.json; what is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvlatent.data.blocks import encode_chat, load_blocks, token_blocks
from kvlatent.evaluation.perplexity import compare, perplexity
from kvlatent.files import replaced
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.healing.losses import kl_loss
from kvlatent.model.checkpoints import load_model

BLOCK, NEW_TOKENS = 256, 64

TRAINING_SUBJECTS = """
bread, volcanoes, chess, the moon, bicycles, honey bees, the Roman Empire, photosynthesis, money, whales, the printing
press, glass, earthquakes, tea, electricity, the heart, forests, maps, the violin, trains, vaccines, deserts, coffee,
recycling, the alphabet, dinosaurs, gardening, satellites, swimming, rivers, friendship, the stock market, robots,
winter, poetry, the brain, cheese, bridges, cats, running, the ocean, democracy, salt, telescopes, football, sleep,
painting, the Internet
""".replace("\n", " ").split(",")

HELD_OUT_SUBJECTS = ("lighthouses", "the piano", "gravity", "penguins", "chocolate", "the Great Wall")

TRAINING_FORMS = (
    "Explain {} to a child.",
    "What should everyone know about {}?",
    "Why do people care about {}? Answer in one sentence.",
    "Give me five ideas for a talk about {}.",
    "Write a short story about {}.",
    "List four facts about {}.",
    "What are the pros and cons of {}?",
    "Write an email to a friend about {}.",
)

FORMS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "list of three": (
        "List three facts about {}, numbered 1 to 3.",
        lambda text: re.findall(r"^\s*(\d+)[.)]", text, re.M) == ["1", "2", "3"],
    ),
    "one sentence": (
        "Describe {} in exactly one sentence.",
        lambda text: len(re.findall(r"[.!?](?=\s|$)", text)) == 1,
    ),
    "under 40 words": ("Tell me about {} in fewer than 40 words.", lambda text: 0 < len(text.split()) < 40),
    "names it": ("Write a title for an essay about {}.", lambda text: 0 < len(text.split()) < 20),
    "bullets": (
        "Give me a bulleted list about {}. Start every line with a dash.",
        lambda text: sum(line.lstrip().startswith("-") for line in text.splitlines()) >= 2,
    ),
    "letter": ("Write a letter about {} that begins with Dear.", lambda text: text.lstrip().startswith("Dear")),
}
"""Prompts whose answers a program can judge. An answer that was cut off at `NEW_TOKENS` is judged as it stands."""


def chat_prompt(prompt: str) -> list[dict[str, str]]:
    """A conversation that waits for its first answer."""
    return [{"role": "user", "content": prompt}]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], *, temperature: float = 0.0, batch: int = 48) -> list[str]:
    """The model's answers, greedy or sampled; with the end-of-turn token if they reach it."""
    texts = []
    for at in range(0, len(prompts), batch):
        written = [
            tokenizer.apply_chat_template(chat_prompt(p), tokenize=False, add_generation_prompt=True)
            for p in prompts[at : at + batch]
        ]
        tokens = tokenizer(written, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        out = model.generate(**tokens, max_new_tokens=NEW_TOKENS, **({"do_sample": False} | sampling))
        texts += tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1] :])
    end = tokenizer.eos_token
    return [text.split(end)[0] + end if end in text else text for text in texts]


def make_chats(teacher: Any, tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """Prompts and the teacher's sampled answers, at least `tokens` tokens of them."""
    prompts = [form.format(subject.strip()) for form in TRAINING_FORMS for subject in TRAINING_SUBJECTS]
    random.Random(0).shuffle(prompts)
    torch.manual_seed(0)
    chats: list[dict[str, Any]] = []
    size = at = 0
    while size < tokens * 1.1:  # packing leaves a few out
        part = prompts[at : at + 48]
        assert part, "not enough prompts"
        at += 48
        for prompt, answer in zip(part, answers(teacher, tokenizer, part, temperature=0.8), strict=True):
            text = answer.split(tokenizer.eos_token)[0].strip()
            if text:
                messages = [*chat_prompt(prompt), {"role": "assistant", "content": text}]
                chats.append({"messages": messages})
                size += len(encode_chat(tokenizer, messages)[0]) + 1
    return chats


@torch.no_grad()
def nearness(student: Any, teacher: Any, tokenizer: Any, chats: list[dict[str, Any]]) -> dict[str, float]:
    """KL from the teacher and agreement of the likeliest token, over the answers' tokens, then over chats."""
    kls, agreed = [], []
    for chat in chats:
        ids, counted = (torch.tensor(x) for x in encode_chat(tokenizer, chat["messages"]))
        before = counted.nonzero()[:, 0] - 1  # the positions that predict the answer
        ours, theirs = (m.model(ids[None], use_cache=False).last_hidden_state[0, before] for m in (student, teacher))
        kls.append(kl_loss(ours, student.lm_head.weight, theirs, teacher.lm_head.weight).item())
        same = student.lm_head(ours).argmax(-1) == teacher.lm_head(theirs).argmax(-1)
        agreed.append(same.float().mean().item())
    error = statistics.stdev(kls) / len(kls) ** 0.5
    return {"kl": statistics.mean(kls), "kl_stderr": error, "agreement": statistics.mean(agreed)}


def follows(texts: list[str], end: str) -> dict[str, float]:
    """Share of answers, as many of each form in turn, that keep it, of all forms, and that end their turn."""
    size = len(texts) // len(FORMS)
    kept = {}
    for number, (name, (_, rule)) in enumerate(FORMS.items()):
        part = texts[number * size : (number + 1) * size]
        kept[name] = sum(rule(text.split(end)[0].strip()) for text in part) / size
    return kept | {"all forms": statistics.mean(kept.values()), "ends": statistics.mean(end in x for x in texts)}


def main() -> None:
    """Make chats, heal, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of `kvlatent run` with an unhealed student and text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--student", default="best", help="of the run's")
    parser.add_argument("--tokens", type=int, default=3072, help="of chats, and of plain text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    start = args.run / args.student / "start"
    healed = next(x for x in (args.run / args.student / "model", args.run / "model") if x.is_dir())
    teacher_name = json.loads((start / "kvlatent.json").read_text())["teacher"]
    teacher, tokenizer = load_model(teacher_name, device="cpu", dtype="float32")
    end = tokenizer.eos_token
    file, judged_file, results_file = (args.out / x for x in ("chats.jsonl", "held_out.jsonl", "results.json"))
    if not file.exists():
        with replaced(file) as partial:
            chats = make_chats(teacher, tokenizer, args.tokens)
            partial.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    prompts = [form.format(subject) for form, _ in FORMS.values() for subject in HELD_OUT_SUBJECTS]
    if not judged_file.exists():
        texts = answers(teacher, tokenizer, prompts)
        rows = [[*chat_prompt(p), {"role": "assistant", "content": x.split(end)[0].strip()}]
                for p, x in zip(prompts, texts, strict=True)]  # fmt: skip
        results["teacher"] = {"kl": 0.0, "kl_stderr": 0.0, "agreement": 1.0, "text_ratio": 1.0, **follows(texts, end)}
        results_file.write_text(json.dumps(results, indent=2))
        judged_file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    judged = [json.loads(line) for line in judged_file.read_text().splitlines()]
    held_out = load_blocks(args.run / "text" / "held_out.safetensors")
    score: dict[str, Any] = {"text_bytes": held_out.bytes, "batch_size": 2}  # the number of bytes cancels in a ratio
    reference: list[Any] = []

    plain = load_blocks(args.run / "text" / "training.safetensors").ids
    chat = token_blocks([str(file)], tokenizer, block_size=BLOCK, tokens=args.tokens, seed=0)

    def trained(folder: Path, ids: Any, marks: Any) -> Any:
        student = load_model(str(folder), device="cpu", dtype="float32")[0]
        config = HealConfig(stage2_tokens=args.tokens, batch_size=1, save_minutes=1e9)
        with tempfile.TemporaryDirectory() as work:
            return heal(student, teacher, ids, Path(work, "work"), config, answers=marks)

    students: dict[str, Callable[[], Any]] = {
        "unhealed": lambda: load_model(str(start), device="cpu", dtype="float32")[0],
        f"unhealed + {args.tokens} of text": lambda: trained(start, plain, None),
        f"unhealed + {args.tokens} of chats": lambda: trained(start, chat.ids, chat.answers),
        "the run's healed": lambda: load_model(str(healed), device="cpu", dtype="float32")[0],
        f"the run's healed + {args.tokens} of chats": lambda: trained(healed, chat.ids, chat.answers),
    }
    for name, make in students.items():
        if name in results:
            continue
        if not reference:
            reference.append(perplexity(teacher, held_out.ids[:4], **score))
        student = make().eval()
        texts = answers(student, tokenizer, prompts)
        ratio = compare(reference[0], perplexity(student, held_out.ids[:4], **score)).perplexity_ratio
        results[name] = {**nearness(student, teacher, tokenizer, judged), "text_ratio": ratio, **follows(texts, end)}
        results[name]["answers"] = texts
        results_file.write_text(json.dumps(results, indent=2))
    print(
        "| model | KL on chats, nats | same likeliest token | perplexity ratio on text | forms kept | ends its turn |"
    )
    print("|---|--:|--:|--:|--:|--:|")
    for name, x in results.items():
        print(
            f"| {name} | {x['kl']:.3f} ± {x['kl_stderr']:.3f} | {x['agreement']:.0%} | {x['text_ratio']:.2f} "
            f"| {x['all forms']:.0%} | {x['ends']:.0%} |"
        )
    print("\n| model | " + " | ".join(FORMS) + " |\n|---|" + "--:|" * len(FORMS))
    for name, x in results.items():
        print(f"| {name} | " + " | ".join(f"{x[form]:.0%}" for form in FORMS) + " |")


if __name__ == "__main__":
    main()
