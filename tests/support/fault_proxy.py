"""A TCP proxy on loopback that breaks in the ways networks and servers do, switched on and off while it runs.

It stands between a server (S3, PostgreSQL, the shim) and its clients, in a thread of its own, so that sync and async
tests use it alike. With `http=True` it also reads requests, and can answer them in the server's place as S3 does when
it is busy or refuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPMessage, parse_headers
from typing import Any, Final, Self

_PIECE: Final = 16 * 1024
#: SO_LINGER for 0 s: close() sends RST in place of FIN.
_RESET: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Faults:
    """The faults; none by default. "Up" is from the client to the server.

    A change holds for open connections, too: but for `reset_on_accept`, and limits count from a connection's start.
    """

    #: Nobody listens, and what was connected is reset.
    refuse: bool = False
    #: Connections are accepted and reset.
    reset_on_accept: bool = False
    #: A connection is reset once so many bytes have gone through it.
    reset_up_after: int | None = None
    reset_down_after: int | None = None
    #: A connection is closed, as if all were well, after so many bytes from the server.
    truncate_after: int | None = None
    #: Nothing is forwarded and nothing is closed.
    stall: bool = False
    #: Seconds for which each piece of up to 16 KiB is held.
    latency: float = 0.0
    #: Bytes a second, in each direction of each connection.
    bandwidth: float | None = None

    def drawn(self, chance: random.Random) -> Faults:
        """The same faults with random limits, at most these."""
        return replace(
            self,
            reset_up_after=_at_most(self.reset_up_after, chance),
            reset_down_after=_at_most(self.reset_down_after, chance),
            truncate_after=_at_most(self.truncate_after, chance),
        )


def _at_most(limit: int | None, chance: random.Random) -> int | None:
    return None if limit is None else chance.randint(0, limit)


@dataclass
class _Answer:
    """An S3 error for the next `times` requests that match."""

    status: int
    code: str
    times: int
    method: str | None
    target: str

    def matches(self, method: str, target: str) -> bool:
        return self.times > 0 and self.method in (None, method) and self.target in target

    def response(self, method: str) -> bytes:
        body = f"<Error><Code>{self.code}</Code><Message>by the fault proxy</Message></Error>".encode()
        head = (
            f"HTTP/1.1 {self.status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == "HEAD" else body)


class _EndedError(Exception):
    """The connection must end now."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset


@dataclass(eq=False)
class _Connection:
    """A client's connection, the proxy's connection to the server, and this connection's random faults."""

    from_client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    from_server: asyncio.StreamReader
    to_server: asyncio.StreamWriter
    faults: Faults | None
    passed_up: int = 0
    passed_down: int = 0

    def end(self, *, reset: bool) -> None:
        for writer in (self.to_client, self.to_server):
            _end(writer, reset=reset)


class FaultProxy:
    """Forwards a port of loopback to `upstream`, a host and a port, for as long as the block runs."""

    def __init__(self, upstream: tuple[str, int], *, http: bool = False) -> None:
        self._upstream = upstream
        self._http = http
        self._faults = Faults()
        self._answers: list[_Answer] = []
        self._stall_at: tuple[str, str] | None = None
        self._draw: Callable[[], Faults | None] = lambda: None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")
        self._socket = _bound(0)
        self.port: int = self._socket.getsockname()[1]
        #: How often each fault has hit: by its name in `Faults`, or by the code of the S3 error.
        self.hits: Counter[str] = Counter()
        #: "METHOD target" of each request that came, with `http=True`.
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """The proxy's address for HTTP clients."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def faults(self) -> Faults:
        """The current faults. An assignment takes effect before it returns."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._call(self._set(faults))

    @contextmanager
    def broken(self, **changes: Any) -> Iterator[None]:
        """`faults` with these changes within the block, and as before after it."""
        before = self._faults
        self.faults = replace(before, **changes)
        try:
            yield
        finally:
            self.faults = before

    def answer(self, status: int, code: str, *, times: int, method: str | None = None, target: str = "") -> None:
        """Answer the next `times` requests of `method` whose target contains `target` with that S3 error."""
        assert self._http, "only with http=True are requests read"
        self._answers.append(_Answer(status, code, times, method, target))

    def stall_at(self, method: str, target: str) -> None:
        """Stall as soon as a request of `method` comes whose target ends with `target`; it waits in the proxy."""
        assert self._http, "only with http=True are requests read"
        self._stall_at = (method, target)

    def break_at_random(self, chance: random.Random, share: float, kinds: Sequence[Faults]) -> None:
        """Let each new connection suffer one of `kinds` with a probability of `share`; limits vary up to those given.

        The seed of `chance` decides all, in the order in which connections come.
        """
        self._draw = lambda: chance.choice(kinds).drawn(chance) if chance.random() < share else None

    def heal(self) -> None:
        """End every fault."""
        self._answers.clear()
        self._stall_at = None
        self._draw = lambda: None
        self.faults = Faults()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)

    async def _set(self, faults: Faults) -> None:
        refused, self._faults = self._faults.refuse, faults
        if faults == Faults():
            for connection in self._connections:
                connection.faults = None
        if faults.refuse and not refused:
            # Bound, but not listening: connections are refused and the port stays ours.
            self._socket = _bound(self.port)
            self._server.close()
            for connection in self._connections:
                self.hits["refuse"] += 1
                connection.end(reset=True)
        elif refused and not faults.refuse:
            await self._listen()

    async def _close(self) -> None:
        self._server.close()
        self._socket.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:  # asyncio's own, which accept, among them
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close their sockets in the loop's next round

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        drawn = self._draw()
        if (drawn or self._faults).reset_on_accept:
            self.hits["reset_on_accept"] += 1
            _end(to_client, reset=True)
            return
        try:
            from_server, to_server = await asyncio.open_connection(*self._upstream)
        except (OSError, asyncio.CancelledError):
            _end(to_client, reset=True)
            return
        connection = _Connection(from_client, to_client, from_server, to_server, drawn)
        self._connections.add(connection)
        reset = False
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._requests(connection) if self._http else self._up(connection))
                directions.create_task(self._down(connection))
        except* _EndedError as ended:
            reset = any(isinstance(exc, _EndedError) and exc.reset for exc in ended.exceptions)
        except* OSError:
            reset = True  # one side failed, so the other is reset
        finally:
            self._connections.discard(connection)
            connection.end(reset=reset)

    async def _up(self, connection: _Connection) -> None:
        while piece := await connection.from_client.read(_PIECE):
            await self._pass_up(connection, piece)
        with contextlib.suppress(OSError):
            connection.to_server.write_eof()  # half closed: the response may still arrive

    async def _down(self, connection: _Connection) -> None:
        while piece := await connection.from_server.read(_PIECE):
            faults = await self._hold(connection, piece)
            passed = connection.passed_down
            connection.passed_down += len(piece)
            for name, limit in (
                ("truncate_after", faults.truncate_after),
                ("reset_down_after", faults.reset_down_after),
            ):
                if limit is not None and connection.passed_down > limit:
                    await _write(connection.to_client, piece[: max(limit - passed, 0)])
                    self.hits[name] += 1
                    raise _EndedError(reset=name != "truncate_after")
            await _write(connection.to_client, piece)
        raise _EndedError(reset=False)

    async def _pass_up(self, connection: _Connection, piece: bytes) -> None:
        limit = (await self._hold(connection, piece)).reset_up_after
        passed = connection.passed_up
        connection.passed_up += len(piece)
        if limit is not None and connection.passed_up > limit:
            await _write(connection.to_server, piece[: max(limit - passed, 0)])
            self.hits["reset_up_after"] += 1
            raise _EndedError(reset=True)
        await _write(connection.to_server, piece)

    async def _hold(self, connection: _Connection, piece: bytes) -> Faults:
        """Wait as long as the piece is to be held; the faults that hold for it then."""
        held = False
        while (faults := connection.faults or self._faults).stall:
            if not held:
                self.hits["stall"] += 1
            held = True
            await asyncio.sleep(0.01)
        await asyncio.sleep(faults.latency + (len(piece) / faults.bandwidth if faults.bandwidth else 0.0))
        return faults

    async def _requests(self, connection: _Connection) -> None:
        """As `_up` for HTTP/1.1 with Content-Length, but for the requests that are answered here."""
        while True:
            try:
                head = await connection.from_client.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                with contextlib.suppress(OSError):
                    connection.to_server.write_eof()
                return
            line, _, rest = head.partition(b"\r\n")
            method, target, _ = line.decode().split(" ")
            headers = parse_headers(io.BytesIO(rest))
            if self._stall_at is not None and method == self._stall_at[0] and target.endswith(self._stall_at[1]):
                self._stall_at, self._faults = None, replace(self._faults, stall=True)
            self.requests.append(f"{method} {target}")
            answer = next((answer for answer in self._answers if answer.matches(method, target)), None)
            if answer is None:
                await self._pass_up(connection, head)
                async for piece in _body(connection.from_client, headers):
                    await self._pass_up(connection, piece)
                continue
            answer.times -= 1
            self.hits[answer.code] += 1
            if headers["Expect"] is None:  # else the client waits before it sends the body
                async for _ in _body(connection.from_client, headers):
                    pass
            await _write(connection.to_client, answer.response(method))
            raise _EndedError(reset=False)


async def _body(reader: asyncio.StreamReader, headers: HTTPMessage) -> AsyncIterator[bytes]:
    assert headers["Transfer-Encoding"] is None, "only bodies with Content-Length are understood"
    left = int(headers["Content-Length"] or 0)
    while left and (piece := await reader.read(min(left, _PIECE))):
        left -= len(piece)
        yield piece


async def _write(writer: asyncio.StreamWriter, piece: bytes) -> None:
    writer.write(piece)
    await writer.drain()


def _end(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if not reset:
        writer.close()
        return
    with contextlib.suppress(OSError):  # the connection has ended
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # the port is bound again before it is released
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.bind(("127.0.0.1", port))
    return made
