"""The guard in front of an engine that only pretends: what is refused, what passes through at once, how it ends."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvlatent.serving import guard
from kvlatent.serving.bodies import Served
from kvlatent.serving.guard import Guard, guarded

HELLO = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: 2\r\n\r\nhi"
SERVED = Served(context=256, vocabulary=320)
LARGEST = 2**16 + 32 * SERVED.context
"""Bytes of a body for that context."""


class Engine:
    """Listens on a Unix socket, keeps what each connection sent, and answers it with `answer`, called with it."""

    def __init__(self, path: Path) -> None:
        self.requests: list[bytes] = []
        self.answer: Callable[[socket.socket], None] = lambda connection: connection.sendall(HELLO)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                threading.Thread(target=self.answered, args=(connection,), daemon=True).start()

    def answered(self, connection: socket.socket) -> None:
        with connection:
            received = connection.recv(2**16)
            head = received.split(b"\r\n\r\n")[0]
            lengths = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            while len(received) < len(head) + 4 + sum(lengths):
                received += connection.recv(2**16)
            self.requests.append(received)
            self.answer(connection)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(tmp_path / "e.sock")
    yield made
    made.listener.close()


@pytest.fixture
def listener() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    return made


@pytest.fixture
def door(engine: Engine, listener: socket.socket, tmp_path: Path) -> Iterator[Guard]:
    with guarded(listener, host="my-own-name", engine=tmp_path / "e.sock", served=SERVED) as made:
        yield made


@pytest.fixture
def client(door: Guard, listener: socket.socket) -> Iterator[socket.socket]:
    until = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(listener.getsockname(), timeout=20) as made:
                yield made
            return
        except ConnectionRefusedError:  # its thread has just started
            assert time.monotonic() < until


def everything(client: socket.socket) -> bytes:
    received = b""
    while part := client.recv(2**16):
        received += part
    return received


def request(*headers: str, line: str = "POST /v1/completions HTTP/1.1", host: str = "localhost") -> bytes:
    return "\r\n".join([line, f"Host: {host}", *headers, "", ""]).encode()


def status(answer: bytes) -> int:
    """Of an answer in which the guard says why it refused."""
    head, _, body = answer.partition(b"\r\n\r\n")
    code = int(head.split()[1])
    assert json.loads(body)["error"]["code"] == code
    return code


def test_a_request_arrives_and_its_answer_lets_no_other_origin_read(client: socket.socket, engine: Engine) -> None:
    client.sendall(request("Content-Length: 2", "Connection: keep-alive", "X-Own: a b", "Expect: 100-continue"))
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"{}")
    assert everything(client) == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
    [received] = engine.requests
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nX-Own: a b\r\nConnection: close"
    assert received == head + b"\r\n\r\n{}"


def test_each_part_of_an_answer_comes_at_once(client: socket.socket, engine: Engine) -> None:
    seen = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        assert seen.wait(10)
        connection.sendall(b"3\r\ntwo\r\n0\r\n\r\n")

    engine.answer = answer
    client.sendall(request())
    first = b""
    while not first.endswith(b"one\r\n"):
        first += client.recv(100)
    assert b"Transfer-Encoding: chunked" in first
    seen.set()
    assert everything(client) == b"3\r\ntwo\r\n0\r\n\r\n"


@pytest.mark.parametrize("host", ["localhost", "LocalHost:9000", "127.0.0.1:8000", "[::1]:8000", "My-own-name:80"])
def test_names_of_this_machine_are_let_in(host: str, client: socket.socket) -> None:
    client.sendall(request(f"Origin: http://{host}", host=host))
    assert everything(client).endswith(b"\r\n\r\nhi")


LONG = "x" * guard.LARGEST_HEAD


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (request(host="evil.example"), 421),
        (request(host="localhost.evil.example:8000"), 421),
        (request(host="127.0.0.1@evil.example"), 421),
        (request(host="192.0.2.1"), 421),
        (request(host=""), 421),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (request("Host: localhost"), 400),
        (request("Origin: https://evil.example"), 403),
        (request("Origin: null"), 403),
        (request("Origin: http://127.0.0.1:80@evil.example"), 403),
        (request(f"Content-Length: {LARGEST + 1}"), 413),
        (request("Transfer-Encoding: chunked"), 411),
        (request("Content-Length: 1", "Content-Length: 2"), 400),
        (request("Content-Length: -1"), 400),
        (request("Content-Length: +1"), 400),
        (request(f"X-Long: {LONG}"), 431),
        (request(line=f"GET /{LONG} HTTP/1.1"), 431),
        (request(line="GET http://evil.example/ HTTP/1.1"), 400),
        (request(line="GET / HTTP/2.0"), 400),
        (request("Folded: one", " two"), 400),
        (request("Name : value"), 400),
        (request("Bare: one\nTwo: three"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_what_an_engine_should_not_get_is_refused(
    sent: bytes, code: int, client: socket.socket, engine: Engine
) -> None:
    client.sendall(sent)
    assert status(everything(client)) == code
    assert engine.requests == []


def test_a_body_that_would_kill_an_engine_is_refused(client: socket.socket, engine: Engine) -> None:
    body = b'{"chat_template_kwargs":%s%s}' % (b"[" * 30_000, b"]" * 30_000)
    client.sendall(request(f"Content-Length: {len(body)}") + body)
    assert status(everything(client)) == 400
    assert engine.requests == []


def test_whoever_sends_a_long_body_anyway_reads_why_it_is_refused(client: socket.socket, engine: Engine) -> None:
    client.sendall(request("Content-Length: 60000000"))
    client.sendall(bytes(60_000_000))
    assert status(everything(client)) == 413
    assert engine.requests == []


def test_a_body_of_the_largest_size_passes(client: socket.socket, engine: Engine) -> None:
    body = b'{"prompt":"%s"}' % (b"x" * (LARGEST - 13))
    client.sendall(request(f"Content-Length: {len(body)}") + body)
    assert everything(client).endswith(b"hi")
    assert engine.requests[0].endswith(b"\r\n\r\n" + body)


def test_long_bodies_wait_for_each_other(
    client: socket.socket, engine: Engine, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LARGEST_BODIES", 100)
    first, second = (b'{"prompt":"%s"}' % (each * 47) for each in (b"1", b"2"))
    client.sendall(request("Content-Length: 60"))
    time.sleep(0.2)
    with socket.create_connection(listener.getsockname(), timeout=20) as other:
        other.sendall(request("Content-Length: 60") + second)
        time.sleep(0.2)
        assert engine.requests == []
        client.sendall(first)
        assert everything(client).endswith(b"hi")
        assert everything(other).endswith(b"hi")
    assert [each[-60:] for each in engine.requests] == [first, second]


def test_too_many_clients_are_refused(
    client: socket.socket, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_CONNECTIONS", 1)
    with socket.create_connection(listener.getsockname(), timeout=20) as other:
        assert status(everything(other)) == 503
    client.sendall(request())
    assert everything(client).endswith(b"hi")


@pytest.mark.parametrize(("limit", "sent"), [("HEAD_SECONDS", b"GET / HTT"), ("STALLED_SECONDS", b"")])
def test_slow_clients_are_refused(
    limit: str, sent: bytes, engine: Engine, door: Guard, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, limit, 0.3)
    monkeypatch.setattr(guard, "LINGER_SECONDS", 0.3)
    time.sleep(0.2)
    with socket.create_connection(listener.getsockname(), timeout=5) as client:
        client.sendall(sent or request("Content-Length: 5") + b"body")
        assert status(everything(client)) == 408
    assert engine.requests == []


def test_the_engine_learns_that_a_client_has_left(client: socket.socket, engine: Engine, door: Guard) -> None:
    left = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nbegun")
        assert connection.recv(1) == b""
        left.set()

    engine.answer = answer
    client.sendall(request())
    assert client.recv(10)
    assert door.busy
    client.close()
    assert left.wait(10)


def test_an_engine_that_is_not_there_or_breaks_off_is_an_answer_too(
    client: socket.socket, engine: Engine, listener: socket.socket, tmp_path: Path
) -> None:
    engine.answer = lambda connection: None
    client.sendall(request())
    assert status(everything(client)) == 502
    (tmp_path / "e.sock").unlink()
    with socket.create_connection(listener.getsockname(), timeout=20) as other:
        other.sendall(request())
        assert status(everything(other)) == 503


def test_other_addresses_than_loopback_go_by_any_name(engine: Engine, tmp_path: Path) -> None:
    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    with guarded(listener, host="0.0.0.0", engine=tmp_path / "e.sock", served=SERVED):
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=20) as client:
            client.sendall(request("Origin: http://box.example", host="box.example"))
            assert everything(client).endswith(b"hi")


def test_after_it_stops_listening_a_begun_answer_ends_and_no_other_begins(
    client: socket.socket, engine: Engine, door: Guard, listener: socket.socket
) -> None:
    go_on = threading.Event()

    def answer(connection: socket.socket) -> None:
        assert go_on.wait(10)
        connection.sendall(HELLO)

    engine.answer = answer
    address = listener.getsockname()
    with socket.create_connection(address, timeout=20) as waiting:
        client.sendall(request())
        while not engine.requests:
            time.sleep(0.01)
        door.stop_listening()
        time.sleep(0.2)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        waiting.sendall(request())
        assert status(everything(waiting)) == 503
    assert door.busy
    go_on.set()
    assert everything(client).endswith(b"hi")
    until = time.monotonic() + 10
    while door.busy and time.monotonic() < until:
        time.sleep(0.01)
    assert not door.busy


def test_an_answer_is_in_flight_until_the_system_has_the_last_of_it() -> None:
    client, ours = socket.socketpair()
    theirs, engine = socket.socketpair()
    client.settimeout(20)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)

    def read(size: int) -> None:
        while size > 0:
            size -= len(client.recv(2**16))

    async def passed_on() -> None:
        _, to_client = await asyncio.open_connection(sock=ours)
        answer, to_engine = await asyncio.open_connection(sock=theirs)
        engine.sendall(HELLO + bytes(40_000))  # less than what asyncio holds back by default
        engine.shutdown(socket.SHUT_WR)
        passing = asyncio.ensure_future(guard._pass_on(b"", answer, to_engine, to_client))
        assert not (await asyncio.wait({passing}, timeout=0.5))[0]
        await asyncio.to_thread(read, 40_000)
        await asyncio.wait_for(passing, 20)
        to_client.close()
        to_engine.close()

    with client, engine:
        asyncio.run(passed_on())
