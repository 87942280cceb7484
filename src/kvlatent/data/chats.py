"""Conversations as text, by templates that come with a model and may be anybody's."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from kvlatent.errors import UserError

Chat = list[dict[str, str]]
"""A conversation: messages with a role (system, user, assistant) and content."""

SECONDS = 10.0
"""A template has to write a conversation; templates are programs, and may loop."""
CHARACTERS = 16_000_000
"""The longest text that one may become."""
MEMORY = 2**30
"""Bytes that this may take."""


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Chat, **options: Any) -> str:
    """What the tokenizer's template makes of a conversation.

    Raises:
        UserError: There is no template, it refuses the conversation, or it takes too long or writes too much.
    """
    if tokenizer.chat_template is None:
        raise UserError("the text holds chats, and the model's tokenizer has no chat template")
    try:
        with _limited():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TimeoutError:
        raise UserError(f"the chat template takes more than {SECONDS:.0f} seconds for a conversation") from None
    except MemoryError:
        raise UserError("the chat template takes too much memory for a conversation") from None
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses a conversation: {str(error)[:300]}") from None
    if len(text) > CHARACTERS:
        raise UserError(f"the chat template makes {len(text):,} characters of a conversation")
    return text


@contextmanager
def _limited() -> Iterator[None]:
    """Limit the time and the memory of the block, as far as the system can.

    Raises:
        TimeoutError: `SECONDS` are over.
        MemoryError: More than `MEMORY` was asked for.
    """

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Linux alone says how much is in use
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            old = resource.getrlimit(resource.RLIMIT_AS)
            if old[0] == resource.RLIM_INFINITY:
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, old)
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGALRM, over)
            stack.callback(signal.signal, signal.SIGALRM, handler)
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
