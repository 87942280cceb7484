"""Thousands of damaged, odd and hostile inputs, each given to a command that reads it: what becomes of them.

    python benchmarks/mutations.py --count 5000 --failures failures
    python benchmarks/mutations.py --only 1234

Every input is a tiny file or folder with one or a few changes that follow from its number, so `--only` makes it again
and shows all that is said of it. A command either works or says in one line why it doesn't, with exit code 2. What
isn't allowed: a traceback, another exit code, several lines, more than 60 seconds, more than 2 GB resident, code that
came with an input and ran, numbers that are not finite in an answer, and temporary files that stay.

Prints a table by kind of input, after Ctrl-C of those tried until then; exit code 1 if something that isn't allowed has
happened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tiny
from changes import change_file, change_json, change_tensors, changed_bytes
from hostile import (
    COMMON,
    CONFIG,
    GENERATION,
    MORE,
    NAMES,
    NESTED,
    NUMBERS,
    OPTIONS,
    RAN,
    ROWS,
    STRINGS,
    TEMPLATES,
    TOKENIZER,
    YAML,
)

STUDENTS = ["student", "portable", "coded"]


# --- kinds of input --------------------------------------------------------------------------------------------------


class Place:
    """The inputs to change, where to put what is changed, and the choices."""

    def __init__(self, root: Path, work: Path, rng: random.Random) -> None:
        self.root, self.work, self.rng = root, work, rng

    def copy(self, name: str, to: str = "") -> Path:
        """A copy of an input."""
        source, target = self.root / name, self.work / (to or name)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
        return target

    def model(self) -> Path:
        """A copy of a teacher or a student."""
        return self.copy(self.rng.choice(["teacher", *STUDENTS]))

    def read(self, model: Path, only: str = "") -> list[str]:
        """A command that reads a model."""
        text = ["--text", f"{self.root}/other.txt"]
        some = [*text, "--tokens", "64", "--block-size", "32"]
        whose = model.name if model.name in STUDENTS else "teacher"
        commands = {
            "info": ["info", model],
            "doctor": ["doctor", model],
            "eval": ["eval", model, *some, "--json"],
            "generate": ["generate", model, "--prompt", "river and " * 8, "--max-new-tokens", "3"],
            "chat": ["generate", model, "--prompt", "river", "--max-new-tokens", "2", "--chat"],
            "stock": ["export", model, "--to", "stock", "--out", "out"],
            "gguf": ["export", model, "--to", "gguf", "--out", "out.gguf"],
        }
        if whose == "teacher":
            commands |= {
                "convert": ["convert", model, *some, *tiny.DIMS, *tiny.NEAR, "--out", "out"],
                "paper": ["convert", model, *tiny.DIMS, "--preset", "paper", "--out", "out"],
                "calibrate": ["calibrate", model, *some, *tiny.NEAR, "--out", "out"],
                "offload": ["calibrate", model, *some, *tiny.NEAR, "--out", "out", "--offload"],
                "prompt": ["compress-prompt", model, "--prompt", f"{self.root}/short.txt", "--json"],
                "heal to": ["heal", self.root / "portable", "--teacher", model, *text, *tiny.HEALING, "--out", "out"],
            }
        else:
            commands["heal"] = ["heal", model, "--teacher", self.root / "teacher", *text, *tiny.HEALING, "--out", "out"]
        return list(map(str, commands[self.rng.choice(only.split() or [*commands, "info", "eval"])]))


def evil(model: Path) -> None:
    """Put code into a model's folder."""
    code = f"import os\nos.system('touch {RAN}')\nclass Evil: pass\n"
    (model / "evil.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)


def config(at: Place) -> tuple[list[str], str]:
    """config.json."""
    model = at.model()
    evil(model)
    return at.read(model), change_json(at.rng, model / "config.json", CONFIG)


def spec(at: Place) -> tuple[list[str], str]:
    """The latent spec in a config, and kvlatent.json."""
    model = at.copy(at.rng.choice(STUDENTS))
    if at.rng.random() < 0.5:
        return at.read(model, "info heal stock eval"), change_json(at.rng, model / "kvlatent.json")
    return at.read(model), change_json(at.rng, model / "config.json", key="latent")


def weights(at: Place) -> tuple[list[str], str]:
    """model.safetensors, and what may lie beside it."""
    model = at.model()
    if at.rng.random() < 0.1:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + RAN.encode() + b"'\ntR.")
        return at.read(model), "a pickle in place of model.safetensors"
    return at.read(model), change_tensors(at.rng, model / "model.safetensors")


def index(at: Place) -> tuple[list[str], str]:
    """model.safetensors.index.json and its files."""
    model = at.copy("sharded")
    file = model / "model.safetensors.index.json"
    if at.rng.random() < 0.3:
        shard = at.rng.choice(sorted(model.glob("*.safetensors")))
        return at.read(model), at.rng.choice([change_tensors, change_file])(at.rng, shard)
    if at.rng.random() < 0.4:
        tree = json.loads(file.read_text())
        name = at.rng.choice(sorted(tree["weight_map"]))
        outside = f"{at.root}/sharded/{tree['weight_map'][name]}"
        tree["weight_map"][name] = at.rng.choice(
            [outside, f"../../{outside}", "x.safetensors", "", "evil.bin", ".", "config.json"]
        )
        file.write_text(json.dumps(tree))
        return at.read(model), f"{file.name}: {name} in {tree['weight_map'][name]}"
    return at.read(model), change_json(at.rng, file)


def tokenizer(at: Place) -> tuple[list[str], str]:
    """tokenizer.json and tokenizer_config.json."""
    model = at.model()
    evil(model)
    file = model / at.rng.choice(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"])
    if not file.exists():
        file = model / "tokenizer.json"
    return at.read(model), change_json(at.rng, file, TOKENIZER)


def generation(at: Place) -> tuple[list[str], str]:
    """generation_config.json."""
    model = at.model()
    evil(model)
    reads = "generate eval stock gguf" + (" convert calibrate" if model.name == "teacher" else " heal")
    return at.read(model, reads), change_json(at.rng, model / "generation_config.json", GENERATION)


def templates(at: Place) -> tuple[list[str], str]:
    """Chat templates, also changed ones, with a prompt or with chats as text."""
    model, template = at.model(), at.rng.choice(TEMPLATES)
    if at.rng.random() < 0.3:
        template = changed_bytes(at.rng, tiny.TEMPLATE.encode())[0].decode(errors="replace")
    (model / "chat_template.jinja").write_text(template, errors="surrogatepass")
    chats = at.work / "chats.jsonl"
    chat = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone bread lamp " * 5}]
    chats.write_text("\n".join([json.dumps({"messages": chat})] * 20))
    command = at.read(model, "chat" if model.name != "teacher" else "chat chat calibrate convert")
    return [str(chats) if part.endswith("other.txt") else part for part in command], f"template {template[:60]!r}"


def statistics(at: Place) -> tuple[list[str], str]:
    """Statistics files."""
    file, teacher = at.copy("stats"), f"{at.root}/teacher"
    commands = [
        ["convert", teacher, "--stats", f"{file}", *tiny.DIMS, "--out", "out"],
        ["convert", teacher, "--stats", f"{file}", "--budget", "0.5", "--out", "out"],
        ["calibrate", teacher, "--merge", f"{file}", f"{at.root}/stats", "--out", "out"],
        ["plan", teacher, "--stats", f"{file}", "--budget", "0.4", "--out", "out.png"],
    ]
    return at.rng.choice(commands), (change_tensors if at.rng.random() < 0.85 else change_file)(at.rng, file)


def recipes(at: Place) -> tuple[list[str], str]:
    """Recipes, for a new run or for one that is there."""
    file, out = at.work / "tiny.yaml", at.work / "run"
    data = json.loads((at.root / "tiny.yaml").read_text())
    if at.rng.random() < 0.92:
        at.copy("run")
    if at.rng.random() < 0.2:
        how = at.rng.choice(YAML)
        file.write_text(how if at.rng.random() < 0.5 else json.dumps(data)[:-1] + f", {how}}}", errors="surrogatepass")
        how = how[:40]
    else:
        file.write_text(json.dumps(data))
        extra = dict[str, list[Any]](seed=NUMBERS, title=STRINGS, context=NUMBERS, block_size=NUMBERS, evil=[1])
        extra |= {"model": [*STRINGS, f"{at.root}/student"], "license": STRINGS}
        how = change_json(at.rng, file, extra)
    return ["run", str(file), "--out", str(out)], how


def runs(at: Place) -> tuple[list[str], str]:
    """Run folders, read by report and by run, which goes on."""
    run = at.copy("run")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".html")
    shallow = [path for path in files if path.suffix == ".json" and path.parent.name in ("run", "evaluate")]
    file = at.rng.choice(at.rng.choice([files, shallow, shallow]))
    how = (
        change_json(at.rng, file)
        if file.suffix in (".json", ".jsonl") and file.stat().st_size
        else change_tensors(at.rng, file)
        if file.suffix == ".safetensors"
        else change_file(at.rng, file)
    )
    if at.rng.random() < 0.2:
        return ["report", str(run), "--out", "page.html"], how
    for name in at.rng.sample(["results.json", "bench.json", "generations.json", "report.html"], at.rng.randrange(2)):
        (run / name).unlink(missing_ok=True)
    return ["run", str(at.root / "tiny.yaml"), "--out", str(run)], how


def states(at: Place) -> tuple[list[str], str]:
    """The state of an unfinished healing."""
    folder = at.copy("unfinished")
    file = at.rng.choice(
        sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors"))
    )
    if file.suffix == ".safetensors":
        how = change_tensors(at.rng, file)
    else:
        how = change_json(at.rng, file) if file.suffix in (".json", ".jsonl") else change_file(at.rng, file)
    return [*tiny.healing(at.root, f"{folder}/out"), "--save-minutes", "0", "--resume"], how


def ggufs(at: Place) -> tuple[list[str], str]:
    """GGUF files."""
    file = at.copy("teacher.gguf")
    data, how = changed_bytes(at.rng, file.read_bytes(), at.rng.choice([32, 1000, 12_000, None]))
    file.write_bytes(data)
    return at.read(file, "info eval convert generate"), how


def texts(at: Place) -> tuple[list[str], str]:
    """Texts: .txt, .jsonl, .parquet."""
    kind = at.rng.choice([".txt", ".jsonl", ".jsonl", ".parquet"])
    file = at.work / f"text{kind}"
    rows = [ROWS[0]] * at.rng.choice([0, 1, 40]) + [at.rng.choice(ROWS) for _ in range(at.rng.choice([1, 3]))]
    at.rng.shuffle(rows)
    how = f"{kind} {str(rows)[:80]}"
    if kind == ".txt":
        file.write_text(
            at.rng.choice(["river stone " * 300, "", " \n", "\ufeffa b " * 200, "a" * 500_000, "\0" * 9999, "ü" * 9999])
        )
    elif kind == ".jsonl":
        junk = at.rng.choice(
            ["", "", "{", "[" * NESTED, "1" * 5000, '{"text": "' + "x " * 99_999 + '"}', "NaN", '{"text": NaN}']
        )
        file.write_text("\n".join([*map(json.dumps, rows), junk]), errors="surrogatepass")
    else:
        columns = {
            key: [row.get(key) for row in rows if isinstance(row, dict)]
            for key in at.rng.choice([["text"], ["messages"], ["text", "messages"], ["x"]])
        }
        try:
            table = pyarrow.table(columns)
        except (pyarrow.ArrowException, UnicodeError):
            table = pyarrow.table({"text": pyarrow.array([b"\xff\xfe"] * 30, pyarrow.binary())})
        pyarrow.parquet.write_table(table, file)
    if at.rng.random() < 0.35:
        how = f"{kind} {change_file(at.rng, file)}"
    read = at.read(at.root / at.rng.choice(["teacher", "student"]), "eval")
    if at.rng.random() < 0.6:
        read = at.read(at.root / "teacher", "calibrate convert offload")
    return [str(file) if part.endswith("other.txt") else part for part in read], how


def prompts(at: Place) -> tuple[list[str], str]:
    """What `compress-prompt` shortens: text and conversations, also by odd templates."""
    model, kind = at.copy("teacher"), at.rng.choice([".txt", ".json", ".json"])
    file = at.work / f"prompt{kind}"
    if kind == ".txt":
        words = " ".join(tiny.WORDS * 2)
        file.write_text(
            at.rng.choice([words, "", "river", "\0" * 99, "ü" * 99, "a" * 500_000, "<eos>" * 40, words + "\ufffd"])
        )
    else:
        turns = [{"role": role, "content": " ".join(tiny.WORDS)} for role in ("user", "assistant", "user")]
        file.write_text(json.dumps(turns))
    how = f"prompt{kind}"
    if at.rng.random() < 0.3:
        (model / "chat_template.jinja").write_text(at.rng.choice(TEMPLATES), errors="surrogatepass")
        how += ", odd template"
    if at.rng.random() < 0.7:
        how += f", {(change_json if kind == '.json' else change_file)(at.rng, file)}"
    some = ["--keep=0.3", "--keep=1e-9", "--keep=1", "--keep=nan", "--stages=3", "--stages=1000", "--spread", "--json",
            "--protect=river", "--protect=x", "--protect=\n", "--protect=river stone", "--dtype=float16"]  # fmt: skip
    more = at.rng.sample(some, at.rng.randrange(4))
    return ["compress-prompt", str(model), "--prompt", str(file), *more], f"{how} {' '.join(more)}"


def shapes(at: Place) -> tuple[list[str], str]:
    """A config.json without a model, of which bytes are told and frequencies drawn."""
    file = at.work / "config.json"
    file.write_bytes((at.root / at.rng.choice(["teacher", *STUDENTS]) / "config.json").read_bytes())
    how = change_json(at.rng, file, CONFIG)
    bits, fit = at.rng.choice([[], ["--bits=2"], ["--bits=16"]]), ["--memory=0.01", "--batch", "1", "3"]
    commands = [
        ["info", file, *at.rng.choice([[], fit, ["--context", "16", "99999999"]]), "--json"],
        ["plan", file, "--budget", "0.3", *bits, *at.rng.choice([[], fit]), "--out", "plan.png", "--json"],
        ["rope-plot", "--model", file, "--dims", "8", "--distance", "64"],
        ["doctor", file],
    ]
    return list(map(str, at.rng.choice(commands))), how


def options(at: Place) -> tuple[list[str], str]:
    """Arguments of commands."""
    name = at.rng.choice(list(OPTIONS))
    if name == "run":
        at.copy("run")
    argv = [name, *OPTIONS[name]]
    argv += [at.rng.choice([*MORE.get(name, []), *COMMON]) for _ in range(at.rng.choice([0, 1, 1, 2]))]
    if at.rng.random() < 0.7:
        which = at.rng.randrange(1, len(argv))
        if not argv[which].startswith("--"):
            argv[which] = at.rng.choice([*map(str, NUMBERS), *STRINGS, *NAMES])
        elif at.rng.random() < 0.5:
            del argv[which]

    def filled(match: re.Match[str]) -> str:
        return f"{at.work if match[1] == name == 'run' else at.root}/{match[1]}"

    # As a shell passes them, which knows no zeros.
    argv = [part.replace("\0", "").encode(errors="replace").decode() for part in argv]
    return [re.sub(r"\{(\w[\w.]*)\}", filled, part) for part in argv], "options"


ALL = [
    config, spec, weights, index, tokenizer, generation, templates, statistics, recipes, runs, states, ggufs, texts,
    prompts, shapes, options,
]  # fmt: skip
KINDS: dict[str, Callable[[Place], tuple[list[str], str]]] = {kind.__name__: kind for kind in ALL}


# --- what becomes of them --------------------------------------------------------------------------------------------


def judge(ended: tiny.Ended, work: Path) -> str:
    """What became of an input."""
    lines = [line for line in re.split(r"[\r\n]+", ended.said) if line.startswith("kvlatent: ")]
    left = [
        path.name
        for path in work.rglob(".*")
        if re.search(r"\.partial|-lock$", path.name) and path.parent.name != "state"
    ]
    if (work / RAN).exists():
        return "code run"
    if ended.stopped:
        return {"time": "hang", "memory": "memory"}[ended.stopped]
    if "Traceback (most recent call last)" in ended.said or ended.code not in (0, 2):
        return "traceback"
    if left:
        return "leftover"
    if ended.code == 0:
        return "not finite" if re.search(r'": (NaN|-?Infinity)', ended.answer) else "works"
    usage = "╭─" in ended.said
    return "refused" if (len(lines) == 1 and len(lines[0]) < 1500) or usage else "unclear"


OUTCOMES = ["works", "refused", "traceback", "hang", "memory", "code run", "not finite", "unclear", "leftover"]


def main() -> int:
    """Make, try, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", type=int, help="the number of an input to try alone, showing everything")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--failures", type=Path, help="a folder for what was said of the inputs that went wrong")
    asked = parser.parse_args()
    counts: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    examples: dict[tuple[str, str], str] = {}
    numbers = range(asked.first, asked.first + asked.count) if asked.only is None else [asked.only]
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder, "in")
        root.mkdir()
        tiny.inputs(root)
        for number in numbers:
            name = list(KINDS)[number % len(KINDS)]
            if name not in asked.kinds:
                continue
            work = Path(folder, "work")
            work.mkdir()
            argv, how = KINDS[name](Place(root, work, random.Random(number)))
            ended = tiny.command(argv, work)
            became = judge(ended, work)
            counts[name][became] += 1
            about = (
                f"{number} {name}: {how[:200]}\n  {shlex.join(argv)[:600].replace(folder, '')}\n  exit {ended.code}, "
            )
            about += f"{ended.seconds:.1f} s, {ended.memory / 1e6:.0f} MB, {became}: "
            about = about.encode(errors="backslashreplace").decode()
            if number % 100 == 99:
                print(f"{number + 1} inputs", file=sys.stderr, flush=True)
            if asked.only is not None:
                print(about, ended.said, ended.answer, sep="\n")
            if became not in ("works", "refused"):
                last = [line for line in ended.said.splitlines() if line.strip() and "%|" not in line] or [""]
                examples.setdefault((name, became), about + last[-1][:300])
                if asked.failures:
                    asked.failures.mkdir(parents=True, exist_ok=True)
                    (asked.failures / f"{number}.txt").write_text(
                        f"{about}\n{ended.said[-20_000:]}\n{ended.answer[-2000:]}"
                    )
            for path in Path(folder).glob("work*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(f"{'':12}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    for name, row in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        print(f"{name:12}" + "".join(f"{row[outcome]:11}" for outcome in OUTCOMES))
    print(*examples.values(), sep="\n")
    return int(bool(examples))


if __name__ == "__main__":
    sys.exit(main())
