"""The command line: a file per command, whose dataclass is its arguments and whose `run` calls what does the work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from kvlatent.cli.bench import Bench
from kvlatent.cli.calibrate import Calibrate
from kvlatent.cli.compress_prompt import CompressPrompt
from kvlatent.cli.convert import Convert
from kvlatent.cli.doctor import Doctor
from kvlatent.cli.eval import Eval
from kvlatent.cli.explore import Explore
from kvlatent.cli.export import Export
from kvlatent.cli.generate import Generate
from kvlatent.cli.heal import Heal
from kvlatent.cli.info import Info
from kvlatent.cli.options import Command
from kvlatent.cli.plan import Plan
from kvlatent.cli.report import Report
from kvlatent.cli.rope_plot import RopePlot
from kvlatent.cli.run import Run
from kvlatent.cli.serve import Serve
from kvlatent.cli.sweep import Sweep
from kvlatent.errors import UserError
from kvlatent.kernels.allocator import freed_memory_kept
from kvlatent.signals import Stopped, stopping

COMMANDS: dict[str, Callable[..., Command]] = {
    "info": Info,
    "calibrate": Calibrate,
    "plan": Plan,
    "convert": Convert,
    "heal": Heal,
    "eval": Eval,
    "bench": Bench,
    "generate": Generate,
    "compress-prompt": CompressPrompt,
    "export": Export,
    "doctor": Doctor,
    "serve": Serve,
    "report": Report,
    "run": Run,
    "sweep": Sweep,
    "rope-plot": RopePlot,
    "explore": Explore,
}
"""Commands in the order of the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for what the user can put right, 128 + a signal that ended it."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing fails at exit
        return 1


def _main(argv: Sequence[str] | None) -> int:
    command: Command | None = None
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        command.common.check()
        # Whatever libraries print is not the answer.
        memory = contextlib.nullcontext() if command.spares_memory else freed_memory_kept()
        with contextlib.redirect_stdout(sys.stderr), memory:
            from transformers.utils import logging

            logging.disable_progress_bar()  # of weight loading; ours stay
            warnings.simplefilter("ignore", FutureWarning)  # libraries about each other
            with stopping():
                result = command.run()
        if os.environ.get("RANK", "0") != "0":  # a launcher started several processes: the first one speaks
            return 0
        answer = json.dumps(result, indent=2, ensure_ascii=False) if command.common.json else command.table(result)
    except UserError as error:
        return _refused(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return _refused(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt as stop:
        how = "nothing was done" if command is None else command.how_to_resume()
        print(f"kvlatent: interrupted; {how}", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)  # as shells count
    encoding = sys.stdout.encoding or "utf-8"
    print(answer.encode(encoding, "backslashreplace").decode(encoding))  # names may be any bytes, and terminals ASCII
    return 0


def _refused(why: str) -> int:
    """Say in one line why a command can't be done; the names in it may be of any length."""
    print(f"kvlatent: {' '.join(why.split())[:1000]}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> Any:
    """The command that the arguments name; wrong ones end the process with exit code 2, --help with 0."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="kvlatent",
        description="A smaller KV cache for pretrained LLMs: fewer key and value dims per head, healed and measured.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def help_text(command: str | None = None) -> str:
    """What `kvlatent [command] --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        parse([*([] if command is None else [command]), "--help"])
    return text.getvalue()
