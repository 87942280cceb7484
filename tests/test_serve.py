"""The launcher with engines that only pretend: signals handed on, nothing left running, one line for what is wrong."""

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kvlatent import cli
from kvlatent.errors import UserError
from kvlatent.serving import guard, launch
from kvlatent.serving.bodies import Served
from kvlatent.serving.config import ServeConfig

FAKE_ENGINE = """
import http.server, os, signal, socketserver, subprocess, sys, time
engine, notes, kind = sys.argv[1:]
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(notes, "w").write(f"{os.getpid()} {helper.pid}\\n")
if kind == "broken":
    sys.exit("no such luck")
def stop(number, frame):
    open(notes, "a").write(signal.Signals(number).name + "\\n")
    if kind == "polite":
        os._exit(0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
class Health(http.server.BaseHTTPRequestHandler):
    began = time.monotonic()
    def do_GET(self):
        if self.path == "/slow":
            time.sleep(2)
        self.send_response(200 if time.monotonic() - self.began > 0.5 else 503)
        self.end_headers()
        self.wfile.write(b"done")
    def log_message(self, *arguments):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    pass
Server(engine, Health).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVED = Served(context=256, vocabulary=320)
Run = Callable[..., dict[str, Any]]


def fake(tmp_path: Path, kind: str) -> list[str]:
    """The command of an engine that is polite, stubborn or broken; it notes its processes and signals in `notes`."""
    return [sys.executable, "-c", FAKE_ENGINE, str(tmp_path / "e.sock"), str(tmp_path / "notes"), kind]


@pytest.fixture
def run(tmp_path: Path, port: int) -> Run:
    """`run_server` with a fake engine."""
    where: dict[str, Any] = {"host": "127.0.0.1", "port": port, "engine": tmp_path / "e.sock", "served": SERVED}
    return lambda kind, announce: launch.run_server(fake(tmp_path, kind), **where, announce=announce)


def notes(tmp_path: Path) -> tuple[list[int], list[str]]:
    processes, *signals = (tmp_path / "notes").read_text().splitlines()
    return [int(process) for process in processes.split()], signals


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def gone(processes: list[int]) -> bool:
    """Whether they end, within the time a killed process may take to vanish."""
    until = time.monotonic() + 10
    while any(map(running, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(running, processes))


def press(number: signal.Signals, *, times: int = 1) -> None:
    """Send a signal to this process, soon."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.6)

    threading.Timer(0.1, send).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_engine_and_nothing_is_left(
    number: signal.Signals, run: Run, port: int, tmp_path: Path
) -> None:
    urls: list[str] = []

    def announced(url: str) -> None:
        urls.append(url)
        press(number)

    before = signal.getsignal(number)
    result = run("polite", announced)
    processes, signals = notes(tmp_path)
    assert urls == [f"http://127.0.0.1:{port}/v1"] == [result["url"]]
    assert result["start_seconds"] >= 0.5
    assert signals == [launch.FORWARDED[number].name]
    assert gone(processes)
    assert signal.getsignal(number) is before
    launch.bound("127.0.0.1", port).close()


def test_a_second_signal_kills_an_engine_that_does_not_stop(run: Run, tmp_path: Path) -> None:
    began = time.monotonic()
    run("stubborn", lambda _: press(signal.SIGINT, times=2))
    processes, signals = notes(tmp_path)
    assert signals == ["SIGINT"]
    assert time.monotonic() - began < launch.PATIENCE
    assert gone(processes)


def test_patience_with_a_stubborn_engine_ends(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    run("stubborn", lambda _: press(signal.SIGTERM))
    assert gone(notes(tmp_path)[0])


@pytest.mark.parametrize(("drain", "status"), [(30, 200), (0.5, 502)])
def test_requests_in_flight_are_waited_for_so_long(
    drain: float, status: int, run: Run, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others are taken meanwhile."""
    monkeypatch.setattr(launch, "DRAIN", drain)
    answers: list[int] = []
    refused: list[int] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/slow")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.8)
        with socket.socket() as late:
            refused.append(late.connect_ex(("127.0.0.1", port)))
        answers.append(connection.getresponse().status)

    asking = threading.Thread(target=ask)
    run("polite", lambda _: asking.start())
    asking.join()
    assert answers == [status]
    assert refused == [errno.ECONNREFUSED]
    assert notes(tmp_path)[1] == ["SIGTERM"]


def test_an_interrupt_while_the_engine_starts_ends_it(run: Run, tmp_path: Path) -> None:
    press(signal.SIGINT)
    result = run("polite", lambda _: pytest.fail("served"))
    assert result["start_seconds"] is None
    assert not (tmp_path / "notes").exists() or gone(notes(tmp_path)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_an_engine_ends_with_the_process_that_started_it(port: int, tmp_path: Path) -> None:
    code = "import sys, pathlib; from kvlatent.serving import launch; from kvlatent.serving.bodies import Served; "
    code += "launch.run_server(sys.argv[1:], host='127.0.0.1', served=Served(context=256, vocabulary=320),"
    code += f" port={port}, engine=pathlib.Path('{tmp_path}/e.sock'),"
    code += " announce=lambda url: print(url, flush=True))"
    command = [sys.executable, "-c", code, *fake(tmp_path, "polite")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    (engine, helper), _ = notes(tmp_path)
    process.kill()
    process.wait()
    assert gone([engine])
    os.kill(helper, signal.SIGKILL)  # the real ones watch their parent too


def test_an_engine_that_fails_is_reported(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended before it answered with exit code 1"):
        run("broken", lambda _: pytest.fail("served"))
    assert gone(notes(tmp_path)[0])


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set TMPDIR to a shorter folder"):
        launch.engine_socket(tmp_path / ("x" * 100))


# --- which engine, started how ---------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, *packages: str, program: str | None = None) -> None:
    """Pretend that these packages are importable, and where llama-server is."""
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(launch.shutil, "which", lambda _: program)


def test_vllm_comes_before_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", "xllamacpp")
    assert (launch.pick_engine("auto"), launch.pick_engine("llama.cpp")) == ("vllm", "llama.cpp")
    install(monkeypatch, "xllamacpp")
    assert launch.pick_engine("auto") == "llama.cpp"
    install(monkeypatch, program="/usr/bin/llama-server")
    assert launch.pick_engine("auto") == "llama.cpp"


def test_engines_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "xllamacpp")
    with pytest.raises(UserError, match=r"vllm is not installed: pip install 'kvlatent\[vllm\]'"):
        launch.pick_engine("vllm")
    install(monkeypatch)
    with pytest.raises(UserError, match=r"no engine is installed: for vllm, .*; for llama\.cpp, pip install xllamacpp"):
        launch.pick_engine("auto")


def test_commands_pass_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"name": "m", "engine": Path("/run/e.sock"), "context": 512, "seed": 3}
    command = launch.vllm_command("/models/m", dtype="bfloat16", eager=False, **where)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options == {
        "--model": "/models/m", "--served-model-name": "m", "--uds": "/run/e.sock", "--dtype": "bfloat16",
        "--seed": "3", "--max-model-len": "512",
    }  # fmt: skip
    eager = launch.vllm_command("/models/m", dtype="bfloat16", eager=True, **where)
    assert eager == [*command, "--enforce-eager"]
    fp8 = launch.vllm_command("/models/m", dtype="bfloat16", eager=False, cache_type="fp8", **where)
    assert fp8 == [*command, "--kv-cache-dtype", "fp8"]
    install(monkeypatch, program="/usr/bin/llama-server")
    command = launch.llama_cpp_command(Path("m.gguf"), **where)
    assert command[:2] == ["/usr/bin/llama-server", "--jinja"]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options == {
        "--model": "m.gguf", "--alias": "m", "--host": "/run/e.sock", "--seed": "3", "--parallel": "4",
        "--ctx-size": "2048",
    }  # fmt: skip
    quantized = launch.llama_cpp_command(Path("m.gguf"), cache_type="q8_0", **where)
    assert quantized == [*command, "--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]
    mixed = launch.llama_cpp_command(Path("m.gguf"), cache_type="q8_0+q4_0", **where)
    assert mixed == [*command, "--cache-type-k", "q8_0", "--cache-type-v", "q4_0"]
    install(monkeypatch, "xllamacpp")
    assert launch.llama_cpp_command(Path("m.gguf"), **where)[2] == "kvlatent.serving.xllamacpp_server"


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(
    tmp_path: Path, tiny_student: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast
) -> Path:
    tiny_student("llama", "portable", 8, 8).save_pretrained(tmp_path / "student")
    byte_tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_serve_prints_the_url_and_ends_with_0(
    folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "vllm")
    monkeypatch.setattr(launch, "engine_socket", lambda _: tmp_path / "e.sock")
    monkeypatch.setattr(launch, "vllm_command", lambda model, **options: fake(tmp_path, "polite"))
    threading.Timer(0.0, _interrupt_when_healthy, [port]).start()
    assert cli.main(["serve", str(folder), "--port", str(port), "--json"]) == 0
    printed = capsys.readouterr()
    url = f"http://127.0.0.1:{port}/v1"
    assert f"student is served by vllm at {url}; stop with ^C" in printed.err
    answer = json.loads(printed.out)
    assert (answer["model"], answer["engine"], answer["url"]) == ("student", "vllm", url)


def _interrupt_when_healthy(port: int) -> None:
    while not launch.answers(f"http://127.0.0.1:{port}/health"):
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--engine", "vllm"], "vllm is not installed"),
        (["--port", "0"], "a port is a number from 1 to 65535; got 0"),
        (["--context", "257"], "context is 1 to 256 tokens; got 257"),
        (["--host", "192.0.2.1"], "Cannot assign requested address; choose another --host"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, "xllamacpp")
    assert cli.main(["serve", str(folder), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert line in printed.err.splitlines()[-1]


def test_a_port_in_use_is_refused(
    folder: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "vllm")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert cli.main(["serve", str(folder), "--port", str(port)]) == 2
    message = f"kvlatent: can't listen on 127.0.0.1 port {port}: Address already in use; choose another --port\n"
    assert capsys.readouterr().err.endswith(message)


def test_no_model_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", f"{tmp_path}/nothing"]) == 2
    assert "no such folder" in capsys.readouterr().err


# --- llama.cpp, the real one -----------------------------------------------------------------------------------------


def test_layouts_that_llama_cpp_cannot_hold_are_refused_with_the_reason(
    tmp_path: Path,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, "xllamacpp")
    tiny_student("llama", "best", 8, 8).save_pretrained(tmp_path / "best")
    byte_tokenizer.save_pretrained(tmp_path / "best")
    assert cli.main(["serve", f"{tmp_path}/best"]) == 2
    assert "projected after RoPE" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("engine", "instead"), [("auto", "--window 0"), ("llama.cpp", "--preset portable")])
def test_a_student_with_a_window_is_refused_before_an_engine_is_installed(
    tmp_path: Path,
    tiny_student: Callable[..., PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    instead: str,
) -> None:
    install(monkeypatch)
    tiny_student("llama", "windowed").save_pretrained(tmp_path / "student")
    byte_tokenizer.save_pretrained(tmp_path / "student")
    assert cli.main(["serve", f"{tmp_path}/student", "--engine", engine]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "newest 5 tokens whole" in line and instead in line


@contextmanager
def started(command: list[str], log: Path, line: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has written the line to its log; killed at the end if it still runs."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 300  # on a busy machine
        while line not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


REFUSED_BY_THE_GUARD = [({"Host": "evil.example"}, 421), ({"Origin": "https://evil.example"}, 403)]


def test_llama_cpp_serves_a_student(folder: Path, port: int, tmp_path: Path) -> None:
    """From the exported GGUF, in a process of its own as users start it, until SIGTERM and what is in flight."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-m", "kvlatent", "serve", str(folder), "--engine", "llama.cpp", "--port", str(port)]
    with started(command, tmp_path / "log", "is served by llama.cpp") as process:
        for headers, status in REFUSED_BY_THE_GUARD:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers=headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=60)
            assert caught.value.code == status
        assert asked(port, "/detokenize", b'{"tokens":[1000000000]}')[0] == 400
        body = {"prompt": "stone", "max_tokens": 60, "temperature": 0, "stream": True, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            assert not [name for name in response.headers if name.lower().startswith("access-control-")]
            lines = [response.readline()]
            process.send_signal(signal.SIGTERM)
            lines += response.readlines()
        *_, last, done = [line.removeprefix(b"data: ") for line in lines if line.strip()]
        assert done.strip() == b"[DONE]"
        assert json.loads(last)["usage"]["completion_tokens"] == 60
        assert process.wait(timeout=60) == 0
    launch.bound("127.0.0.1", port).close()


def test_llama_cpp_serves_from_a_quantized_cache(
    byte_tokenizer: PreTrainedTokenizerFast, folder: Path, port: int, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        max_position_embeddings=256,
    )  # fmt: skip
    for part in (LlamaForCausalLM(config), byte_tokenizer):
        part.save_pretrained(tmp_path / "wide")
    command = [sys.executable, "-m", "kvlatent", "serve", str(tmp_path / "wide"), "--port", str(port)]
    with started([*command, "--cache-type", "q8_0+q4_0"], tmp_path / "log", "is served by llama.cpp"):
        body = json.dumps({"prompt": "stone", "max_tokens": 9, "temperature": 0, "ignore_eos": True}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 9
    with pytest.raises(UserError, match="in multiples of 32; the model has"):
        launch.serve(ServeConfig(model=str(folder), cache_type="q4_0", port=port))
    for engine, kind in (("vllm", "q8_0"), ("llama.cpp", "fp8")):
        with pytest.raises(UserError, match=f"a cache of type {kind} is .*'s; {engine} doesn't have it"):
            ServeConfig(model=str(folder), engine=engine, cache_type=kind)


def asked(port: int, path: str, body: bytes) -> tuple[int, Any]:
    """Status and content of the answer."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_bodies_take_llama_cpp_little_memory(folder: Path, port: int, tmp_path: Path) -> None:
    """As much as fits into the largest body, from four clients at once; each is refused, and afterwards one is not."""
    pytest.importorskip("xllamacpp")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2**16}))
    room = guard.LARGEST_BODY - 100
    lists = [f'{{"prompt":[{each * (room // len(each))}0]}}' for each in ("[", "0,", "[],", '"a",')]
    requests = [("/v1/completions", body) for body in lists]
    requests.append(("/tokenize", json.dumps({"content": "a<eos>" * (room // 6), "parse_special": True})))
    user = '{"role":"user","content":"a"},'
    for messages, more in (
        (user * (room // len(user)) + user[:-1], ""),
        (f'{{"role":"user","content":"{"a" * (room - 100)}"}}', ""),
        (f'{{"role":"{"a" * (room - 100)}","content":""}}', ""),
        (user[:-1], f',"chat_template_kwargs":{{"a":{"[" * 900_000}{"]" * 900_000}}}'),
        (user[:-1], f',"grammar":"root ::= {"(" * 100_000}0{")" * 100_000}"'),
    ):
        requests.append(("/v1/chat/completions", f'{{"messages":[{messages}],"max_tokens":4{more}}}'))
    command = [sys.executable, "-m", "kvlatent", "serve", str(folder), "--engine", "llama.cpp", "--port", str(port)]
    with started(command, tmp_path / "log", "is served by llama.cpp") as process:
        (engine,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

        def most() -> int:
            return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{engine}/status").read_text())[0]) * 1024

        before = most()
        for path, body in requests:
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda request: asked(port, *request), [(path, body.encode())] * 4))
            assert all(code == answer["error"]["code"] == 400 for code, answer in answers)
            print(f"{body[:40]}…: {before / 1e6:.0f} MB, then {most() / 1e6:.0f} MB")
        assert most() - before < 300e6
        status, answer = asked(port, "/v1/completions", b'{"prompt":"a","max_tokens":4}')
        assert status == 200 and answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_llama_cpp_ends_however_early_it_is_told_to(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    with launch.gguf_of(str(folder), dtype="auto") as gguf:
        command = launch.llama_cpp_command(gguf, name="m", engine=tmp_path / "e.sock", context=256, seed=0)
        assert command[2] == "kvlatent.serving.xllamacpp_server"
        with started(command, tmp_path / "log", "listening on") as process:
            process.send_signal(number)
            assert process.wait(timeout=20) == -number
