"""The one door to an engine: an HTTP proxy that lets through what a client of ours may ask, within limits.

Engines take bodies of any size and requests of any web page that is open in a browser of this machine. They therefore
listen on a Unix socket that only their user can reach, and the guard on the address that clients are told. It reads a
request as a whole, refuses it or hands it on, and passes the answer through as it comes, one request per connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path

from kvlatent.errors import UserError
from kvlatent.serving.bodies import Served, check_body

LARGEST_HEAD = 16 * 2**10
"""Bytes of a request's line and headers."""
LARGEST_BODY = 2 * 2**20
"""Bytes of a request's body; a prompt of 128k tokens has about 0.5 MB."""
BODY_BYTES, BODY_BYTES_PER_TOKEN = 2**16, 32
"""What a body may have for its form and for each token of the context, some five times what prompts have."""
LARGEST_BODIES = 2 * 2**20
"""Bytes of the bodies of all requests in flight; others wait, since llama.cpp takes 80 times as much to read them."""
MOST_CONNECTIONS = 256
"""Clients at once, each with a file descriptor for itself and one to the engine."""
HEAD_SECONDS = 10.0
"""Time that a client has for line and headers."""
STALLED_SECONDS = 60.0
"""Time that it has for its body, and for each part of the answer."""
LINGER_SECONDS = 5.0
"""Time that a refused client has to finish sending and read why; closed earlier, it would see a reset alone."""

_LINE = re.compile(r"[A-Z]{1,20} /[\x21-\x7e]* HTTP/1\.[01]")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@]+))(?::[0-9]{0,5})?")
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "proxy-authorization", "proxy-connection", "te", "upgrade"}
"""Headers of a request that are between a client and us."""

Headers = list[tuple[str, str]]


class _Refused(Exception):
    """A request that isn't handed on, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Guard:
    """A guard at its door; made by `guarded`."""

    def __init__(self, listener: socket.socket, host: str, engine: Path, served: Served) -> None:
        self._listener, self._engine, self._served = listener, engine, served
        self._largest_body = min(LARGEST_BODY, BODY_BYTES + BODY_BYTES_PER_TOKEN * served.context)
        self._names = {host.lower()} if ipaddress.ip_address(listener.getsockname()[0]).is_loopback else None
        self._stopping = asyncio.Event()
        self._closed = asyncio.Event()
        self._room = asyncio.Condition()
        self._loop = asyncio.new_event_loop()
        self._connections = self._in_flight = self._body_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return self._in_flight > 0

    def stop_listening(self) -> None:
        """Take no further request; those in flight go on."""
        self._loop.call_soon_threadsafe(self._stopping.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._listener, limit=LARGEST_HEAD)
        await self._stopping.wait()
        server.close()
        await self._closed.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _close(self) -> None:
        self._stopping.set()
        self._closed.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > MOST_CONNECTIONS:
                writer.write(_refusal(_Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients at once")))
                return
            try:
                await self._request(reader, writer)
            except _Refused as refused:
                writer.write(_refusal(refused))
                if writer.can_write_eof():
                    writer.write_eof()
                await asyncio.wait_for(_until_gone(reader), LINGER_SECONDS)
        except (OSError, EOFError, asyncio.TimeoutError):  # the client or the engine has gone, or is too slow
            pass
        except asyncio.CancelledError:  # we end
            writer.transport.abort()
            raise
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), STALLED_SECONDS)
            writer.transport.abort()
            self._connections -= 1

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request, and hand it on.

        Raises:
            _Refused: It isn't handed on.
            OSError, EOFError, asyncio.TimeoutError: The client has gone, or is too slow to read.
        """
        try:
            line, headers = _parsed(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_SECONDS))
        except asyncio.LimitOverrunError:
            why = f"line and headers have more than {LARGEST_HEAD} bytes"
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, why) from None
        except asyncio.TimeoutError:
            raise _Refused(HTTPStatus.REQUEST_TIMEOUT, f"no headers in {HEAD_SECONDS:.0f} seconds") from None
        self._check_sender(headers)
        length = _length(headers, self._largest_body)
        if self._stopping.is_set():
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is ending")
        self._in_flight += 1
        try:
            async with self._room_for(length):
                if any(value.lower() == "100-continue" for value in _values(headers, "expect")):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                try:
                    body = await asyncio.wait_for(reader.readexactly(length), STALLED_SECONDS)
                except asyncio.TimeoutError:
                    raise _Refused(HTTPStatus.REQUEST_TIMEOUT, f"no body in {STALLED_SECONDS:.0f} seconds") from None
                _check(line, body, self._served)
                kept = [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]
                await self._hand_on(_joined(line, kept) + body, reader, writer)
        finally:
            self._in_flight -= 1

    @asynccontextmanager
    async def _room_for(self, length: int) -> AsyncIterator[None]:
        """Wait until a body of so many bytes can be taken, and take it until the block ends."""
        async with self._room:
            await self._room.wait_for(lambda: self._body_bytes + length <= LARGEST_BODIES)
            self._body_bytes += length
        try:
            yield
        finally:
            self._body_bytes -= length
            async with self._room:
                self._room.notify_all()

    def _check_sender(self, headers: Headers) -> None:
        """Refuse what a web page sends: under a name of its own that it has pointed to us, or across origins.

        On other than loopback addresses any name may be right.
        """
        hosts = _values(headers, "host")
        if len(hosts) != 1:
            raise _Refused(HTTPStatus.BAD_REQUEST, "a request has one Host header")
        if self._names is None:
            return
        if not self._is_ours(hosts[0]):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "Host is not a name of this machine's loopback")
        for origin in _values(headers, "origin"):
            if not self._is_ours(origin.partition("://")[2]):
                raise _Refused(HTTPStatus.FORBIDDEN, "requests of other origins' web pages are refused")

    def _is_ours(self, authority: str) -> bool:
        match = _AUTHORITY.fullmatch(authority)
        name = (match[1] or match[2]).lower() if match else ""
        if name == "localhost" or name in (self._names or ()):
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(name).is_loopback
        return False

    async def _hand_on(self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send a request to the engine and its answer to the client, until one of them has left."""
        try:
            answer, engine = await asyncio.open_unix_connection(self._engine)
        except OSError:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the engine is not ready") from None
        passing = asyncio.ensure_future(_pass_on(request, answer, engine, writer))
        leaving = asyncio.ensure_future(_until_gone(reader))
        try:
            await asyncio.wait({passing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            for task in (passing, leaving):
                task.cancel()
            await asyncio.gather(passing, leaving, return_exceptions=True)
            engine.transport.abort()


async def _pass_on(
    request: bytes, answer: asyncio.StreamReader, engine: asyncio.StreamWriter, writer: asyncio.StreamWriter
) -> None:
    try:
        engine.write(request)
        await engine.drain()
        line, headers = _parsed(await answer.readuntil(b"\r\n\r\n"), ours=True)
    except (OSError, EOFError, asyncio.LimitOverrunError):
        raise _Refused(HTTPStatus.BAD_GATEWAY, "the engine gave no answer") from None
    writer.transport.set_write_buffer_limits(0)  # an answer is in flight until the system has the last of it
    writer.write(_joined(line, [each for each in headers if not _is_replaced(each[0].lower())]))
    while part := await answer.read(2**16):
        writer.write(part)
        await asyncio.wait_for(writer.drain(), STALLED_SECONDS)


def _is_replaced(name: str) -> bool:
    """Whether a header of an answer is not the engine's to say: web pages of other origins may read nothing."""
    return name in ("connection", "keep-alive") or name.startswith("access-control-")


async def _until_gone(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**16):
        pass


def _parsed(head: bytes, *, ours: bool = False) -> tuple[str, Headers]:
    """First line and headers of a request, or of an answer of our own engine.

    Raises:
        _Refused: They are not what HTTP/1.1 says.
    """
    line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    matches = [_HEADER.fullmatch(each) for each in lines]
    if not (ours or _LINE.fullmatch(line)) or None in matches:
        raise _Refused(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request")
    return line, [(match[1], match[2].strip()) for match in matches if match]


def _joined(line: str, headers: Headers) -> bytes:
    lines = [line, *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _values(headers: Headers, wanted: str) -> list[str]:
    return [value for name, value in headers if name.lower() == wanted]


def _length(headers: Headers, most: int) -> int:
    """Bytes of the body, which may have so many.

    Raises:
        _Refused: Too many, or the request doesn't say how many.
    """
    if _values(headers, "transfer-encoding"):
        raise _Refused(HTTPStatus.LENGTH_REQUIRED, "a body is sent as a whole, with its Content-Length")
    lengths = _values(headers, "content-length") or ["0"]
    if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
        raise _Refused(HTTPStatus.BAD_REQUEST, "Content-Length is one number")
    if int(lengths[0]) > most:
        why = f"the body has more than {most} bytes"
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
    return int(lengths[0])


def _check(line: str, body: bytes, served: Served) -> None:
    if body:
        try:
            check_body(line.split(" ")[1], body, served)
        except UserError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None


def _refusal(refused: _Refused) -> bytes:
    """An answer in the form that OpenAI's clients read."""
    code = refused.status.value
    body = json.dumps({"error": {"message": str(refused), "type": "invalid_request_error", "code": code}}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    return _joined(f"HTTP/1.1 {code} {refused.status.phrase}", headers) + body


@contextmanager
def guarded(listener: socket.socket, *, host: str, engine: Path, served: Served) -> Iterator[Guard]:
    """Stand guard, in a thread, until the block ends.

    Args:
        listener: Bound to the address that clients are told; closed at the end.
        host: What clients call it.
        engine: The Unix socket of the engine, which may not be there yet.
        served: What the engine runs.
    """
    guard = Guard(listener, host, engine, served)
    thread = threading.Thread(target=guard._run, name="guard", daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        guard._loop.call_soon_threadsafe(guard._close)
        thread.join()
        listener.close()
