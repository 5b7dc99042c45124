"""Hostile clients on real sockets: each gets a documented response in time, or its connection is closed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from shim.access import CONNECTION_LIMITS, Access, ConnectionLimits, parse_api_keys
from shim.app import create_app
from shim.errors import STATUS
from shim.http.server import MAX_HEAD, MAX_HEADERS, MAX_PIPELINED, Connection
from shim.queue.sql import SqlQueue
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.queues import JOB, Bench, result, sql_bench
from tests.support.s3_servers import new_bucket

#: Seconds until each case must have ended.
DEADLINE = 10.0
PROMPT = "A paper boat on a rainy street"


class ShortLimits(Connection):
    """The same limits, with times that a test can wait for."""

    head_seconds = 0.5
    body_seconds = 0.8
    stall_seconds = 0.5


FEW = ConnectionLimits(total=8, reserve=2, per_address=8)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A TCP connection that sends raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        """Send, even if the server has closed the connection: its response can still be read."""
        try:
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()
        except ConnectionError:
            pass

    async def answer(self, method: bytes = b"GET") -> Answer | None:
        """The next response; None if the connection ends first."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        status, *lines = head.decode("latin-1").rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if status.startswith("HTTP/1.1 100"):
            return await self.answer(method)
        length = 0 if method == b"HEAD" else int(headers.get("content-length", 0))
        body = await self.reader.readexactly(length)
        if headers.get("transfer-encoding") == "chunked":
            body = await self.reader.read()
        return Answer(int(status.split()[1]), headers, body)

    async def closed(self) -> bool:
        """Whether the connection ends without another byte; waits until it does."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@dataclass
class Server:
    bench: Bench
    bucket: Bucket
    host: str
    port: int

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with asyncio.timeout(DEADLINE):
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                yield Client(reader, writer)
            finally:
                writer.close()

    async def ask(self, *parts: bytes) -> Answer | None:
        async with self.client() as client:
            await client.send(*parts)
            return await client.answer(parts[0].partition(b" ")[0])

    async def queued(self) -> dict[str, Any]:
        """The input that a worker gets for the waiting task, which is then cancelled."""
        delivery = await self.bench.dispatcher.take("w1")
        assert delivery is not None
        await self.bench.queue.cancel(delivery.task_id)
        job_input: dict[str, Any] = delivery.input
        return job_input

    async def finished(self, video: bytes) -> str:
        """A task whose video is in the bucket."""
        accepted = await self.ask(post(BODY))
        assert accepted is not None
        task_id: str = json.loads(accepted.body)["task_id"]
        await self.bench.take()
        output = result(task_id).model_copy(update={"file_size": len(video)})
        await asyncio.to_thread(self.bucket.put_bytes, video, layout.video_key(task_id), content_type="video/mp4")
        await self.bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))
        return task_id

    async def is_healthy(self) -> bool:
        answer = await self.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return answer is not None and answer.status == 200


@pytest.fixture(scope="module")
def bucket_settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@asynccontextmanager
async def running(
    directory: Path, bucket: Bucket, connection: type[Connection], limits: ConnectionLimits = CONNECTION_LIMITS
) -> AsyncIterator[Server]:
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3", max_queue_size=100) as bench:
        await bench.worker()
        async with serving(create_app(bench.queue, bucket), connection, limits=limits) as address:
            host, _, port = address.removeprefix("http://").partition(":")
            yield Server(bench, bucket, host, int(port))


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory, bucket_settings: BucketSettings) -> AsyncIterator[Server]:
    async with running(tmp_path_factory.mktemp("queue"), Bucket(bucket_settings), Connection) as made:
        yield made


@pytest.fixture
async def server(shared: Server) -> Server:
    """The module's server with an empty queue."""
    assert isinstance(shared.bench.queue, SqlQueue)
    await shared.bench.queue.purge()
    return shared


@pytest.fixture
async def with_short_limits(tmp_path: Path, bucket_settings: BucketSettings) -> AsyncIterator[Server]:
    async with running(tmp_path, Bucket(bucket_settings), ShortLimits, FEW) as made:
        yield made


def assert_documented(answer: Answer | None, *statuses: int) -> None:
    """Asserts that the response has the documented shape and no traceback."""
    assert answer is not None
    assert answer.status in statuses, answer
    assert b"Traceback" not in answer.body
    assert "server" not in answer.headers
    if answer.status >= 400 and answer.body:
        error = json.loads(answer.body)
        assert set(error) == {"error", "error_code"}
        assert {str(code): status for code, status in STATUS.items()}[error["error_code"]] == answer.status


def get(path: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: example", *headers]
    return b"\r\n".join([*lines, b"", b""])


def post(body: bytes, *headers: bytes, media_type: bytes = b"application/json") -> bytes:
    length = b"Content-Length: %d" % len(body)
    return get(b"/generate", b"Content-Type: " + media_type, length, *headers, method=b"POST") + body


def prompt_of(body: str) -> bytes:
    return post(b'{"duration": 5, "resolution": "720p", "prompt": "' + body.encode() + b'"}')


# Paths


TRAVERSALS = [
    b"../../etc/passwd",
    b"..%2f..%2fetc%2fpasswd",
    b"%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    b"%2e%2e/%2e%2e/etc/passwd",
    b"%252e%252e%252f%252e%252e%252fetc%252fpasswd",
    b"..\\..\\etc\\passwd",
    b"..%5c..%5cetc%5cpasswd",
    b"%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    b"....//....//etc/passwd",
    b"/etc/passwd",
    b"//etc/passwd",
    b"%00",
    b"x%00",
    b"x%0d%0aSet-Cookie:a=b",
    b"%ff%fe",
    b"%",
    b"%zz",
    b"x;y",
    b"x?y",
    b"~root",
    b"CON",
    b"." * 200,
    b"a" * 20_000,
    "видео".encode(),
    b"%F0%9F%A6%8A",
    b"%E2%80%AE4pm",
    b"*",
    b"x#fragment",
]


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: repr(name[:40]))
async def test_no_path_reaches_another_file(server: Server, name: bytes) -> None:
    for path in (b"/videos/" + name + b".mp4", b"/videos/" + name, b"/status/" + name, b"/" + name):
        answer = await server.ask(get(path))
        assert_documented(answer, 400, 404)
        assert answer is not None
        assert b"root:x:" not in answer.body
        assert "set-cookie" not in answer.headers
    assert await server.is_healthy()


# Prompts: which are valid, and that a valid one arrives unchanged


@pytest.mark.parametrize(
    ("body", "characters"),
    [
        ("e\\u0301" * 5, 10),  # combining marks count: characters are code points
        ("\\u00e9" * 10, 10),
        ("e\u0301" * 250, 500),
        ("\u00e9" * 500, 500),
        ("\U0001f98a" * 10, 10),
        ("\U0001f98a" * 500, 500),
        ("\\ud83e\\udd8a" * 10, 10),  # a pair of surrogates is one character
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467" * 2, 10),
        ("\u05d0\u202e\u05d1\u202c\u05d2" * 2, 10),
        ("\u200b" * 10, 10),
        ("a\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308", 10),
        ("\\u0001" * 10, 10),
        ("x" + "\\t" * 8 + "y", 10),
        ("\\ufeff" + "x" * 9, 10),
        ("\ufffe" * 10, 10),
        ("\\ud7ff\\ue000" * 250, 500),
        ("\u2028" + "x" * 10 + "\u2028", 10),
        ("' OR 1=1; --", 12),
        ("{{7*7}}${7*7}%s%n", 17),
        ("<script>alert(1)</script>", 25),
        ("$(reboot) `id` | cat", 20),
    ],
)
async def test_any_text_of_10_to_500_characters_is_a_prompt(server: Server, body: str, characters: int) -> None:
    assert_documented(await server.ask(prompt_of(body)), 202)
    job_input = await server.queued()
    assert job_input["prompt"] == json.loads(f'"{body}"', strict=False).strip()
    assert len(job_input["prompt"]) == characters


@pytest.mark.parametrize(
    "body",
    [
        *("\u0301" * 9, "\u00e9" * 9, "\U0001f98a" * 9, "\u00e9" * 501, "\U0001f98a" * 501, "e\u0301" * 251),
        *("\\u0000" * 10, "nul\\u0000 in a prompt", " " * 10, "\\u2003" * 20, "\\n" * 10),
    ],
)
async def test_text_of_another_length_or_with_a_nul_is_not_a_prompt(server: Server, body: str) -> None:
    answer = await server.ask(prompt_of(body))
    assert_documented(answer, 400)
    assert answer is not None
    assert json.loads(answer.body)["error_code"] == "INVALID_PROMPT"


@pytest.mark.parametrize(
    "body",
    [
        *("\\ud800" * 10, "lone \\ud83e surrogate", "\\udd8a\\ud83e" * 5, "\\ud800x\\udfff xxxxxxx"),
        *("\x00" * 10, "raw\x01control character", "bad \\x escape here", "half \\u12 escape"),
    ],
)
async def test_invalid_unicode_is_not_a_prompt(server: Server, body: str) -> None:
    answer = await server.ask(prompt_of(body))
    assert_documented(answer, 400)
    assert answer is not None
    assert json.loads(answer.body)["error_code"] in ("INVALID_REQUEST", "INVALID_PROMPT")


# Bodies


def with_duration(value: bytes) -> bytes:
    return b'{"prompt": "' + PROMPT.encode() + b'", "duration": ' + value + b"}"


@pytest.mark.parametrize(
    "body",
    [
        *(b"[" * 30_000, b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        *(b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", b'{"image": ' + b'{"a":' * 9_000),
        *(with_duration(value) for value in (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"5e0", b"5.0")),
        *(with_duration(value) for value in (b"9" * 10_000, b"-" + b"9" * 10_000, b"05", b"+5", b"0x5", b"'5'")),
        *(with_duration(value) for value in (b"5,", b"5}}", b"5} trailing", b"5 // why", b"1E" + b"9" * 60_000)),
        *(b"\xef\xbb\xbf" + json.dumps(JOB.wire()).encode(), json.dumps(JOB.wire()).encode("utf-16")),
        *(json.dumps(JOB.wire()).encode("utf-32"), b'{"prompt": "\xc3\x28 is not UTF-8 at all"}', b"\0" * 100),
        *(b'{"prompt": "\xed\xa0\x80 is a surrogate"}', b"%PDF-1.4", b"<xml/>", b"prompt=A+paper+boat+on+a+street"),
        *(b'{"__proto__": {"a": 1}, "prompt": "' + PROMPT.encode() + b'"}', b'{"prompt": {"$ne": null}}'),
        b'{"prompt": "' + PROMPT.encode() + b'", "guidance_scale": ' + b"1" * 5_000 + b"}",
        b'{"prompt": "' + PROMPT.encode() + b'", "seed": 1' + b"0" * 5_000 + b"}",
        b'{"prompt": "' + PROMPT.encode() + b'", "' + b"k" * 60_000 + b'": 1}',
    ],
    ids=lambda body: repr(body[:40]),
)
async def test_a_hostile_body_is_400(server: Server, body: bytes) -> None:
    answer = await server.ask(post(body))
    assert_documented(answer, 400)
    assert answer is not None
    assert len(answer.body) < 1000, "what was sent is not sent back"


async def test_the_last_of_two_fields_with_one_name_is_checked_and_queued(server: Server) -> None:
    body = b'{"prompt": "short", "prompt": "' + PROMPT.encode() + b'", "duration": 99, "duration": 6}'
    assert_documented(await server.ask(post(body)), 202)
    job_input = await server.queued()
    assert (job_input["prompt"], job_input["duration"]) == (PROMPT, 6)
    swapped = b'{"prompt": "' + PROMPT.encode() + b'", "prompt": "short"}'
    assert_documented(await server.ask(post(swapped)), 400)


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        *((media_type, 202) for media_type in (b"application/json", b"Application/JSON; charset=UTF-8")),
        *((media_type, 202) for media_type in (b"application/json;charset=latin-1", b"application/json ; x=y")),
        *((media_type, 400) for media_type in (b"text/json", b"application/xml", b"multipart/form-data; boundary=x")),
        *((media_type, 400) for media_type in (b"", b"application/json, text/plain", b"application/jsonp", b"\xff")),
        *((media_type, 400) for media_type in (b"text/plain", b"application/x-www-form-urlencoded", b"a" * 10_000)),
    ],
)
async def test_only_a_json_content_type_is_accepted(server: Server, media_type: bytes, status: int) -> None:
    body = json.dumps(JOB.wire()).encode()
    assert_documented(await server.ask(post(body, media_type=media_type)), status)


# HTTP


BODY = json.dumps(JOB.wire()).encode()
JSON = b"Content-Type: application/json"


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST") + chunked(BODY, b""), [202]),
        (
            get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST")
            + chunked(*(BODY[i : i + 1] for i in range(len(BODY))), b""),
            [202],
        ),
        (get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"x" * 70_000, b""), [413]),
        (get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST") + b"zz\r\n", [400]),
        (get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST") + b"f" * 20 + b"\r\n", [400]),
        (get(b"/generate", JSON, b"Transfer-Encoding: gzip", method=b"POST") + BODY, [400]),
        (post(BODY, b"Transfer-Encoding: chunked"), [400]),  # used for request smuggling
        (get(b"/generate", JSON, b"Content-Length: 3", b"Content-Length: 4", method=b"POST") + b"{}  ", [400]),
        (get(b"/generate", JSON, b"Content-Length: -1", method=b"POST") + BODY, [400]),
        (get(b"/generate", JSON, b"Content-Length: " + b"9" * 30, method=b"POST") + BODY, [400]),
        (get(b"/generate", JSON, b"Content-Length: five", method=b"POST") + BODY, [400]),
        (get(b"/generate", JSON, b"Content-Length: 10", method=b"POST") + BODY, [400]),  # the rest is not a request
        (get(b"/generate", JSON, b"Content-Length: 0", method=b"POST"), [400]),
        (get(b"/generate", JSON, method=b"POST"), [400]),
        (post(BODY, b"Expect: 100-continue"), [202]),
        (post(BODY, b"Expect: a-miracle"), [202]),
        (post(BODY, b"Content-Encoding: gzip"), [202]),  # the body is JSON and is not decompressed
        (post(BODY, b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk"), [400]),
        (get(b"/health", b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"), [200]),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
        (b"GET /health HTTP/1.0\r\n\r\n", [200]),
        (b"GET /health HTTP/0.9\r\n\r\n", [200]),
        (b"GET /health HTTP/3.0\r\n\r\n", [400]),
        (b"GET /health\r\n\r\n", [200]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, [400]),  # TLS
        (b"\0" * 300, [400]),
        (b"SSH-2.0-OpenSSH_9.9\r\n", [400]),
        (b"GET http://169.254.169.254/latest/meta-data HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
        (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n", [400, 404, 405]),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
        (b"TRACE /health HTTP/1.1\r\nHost: x\r\nX: secret\r\n\r\n", [405]),
        (b"BREW /generate HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
        (b"PROPFIND /videos/x.mp4 HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
        (b"PUT /videos/x.mp4 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", [405]),
        (b"DELETE /status/x HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
        (b"get /health HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
        (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", [400]),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", [400, 200]),
        (b"GET /health HTTP/1.1\r\nX: a\0b\r\n\r\n", [400]),
        (b"GET /health HTTP/1.1\nHost: x\n\n", [400]),
        (b"GET /hea lth HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
        (get(b"/status/x", b"Host: ["), [404]),
        (get(b"/health", b"X-Forwarded-For: ' OR 1=1", b"X-Forwarded-Proto: javascript"), [200]),
        (get(b"/videos/x.mp4", b"Range: bytes=" + b"9" * 5_000 + b"-"), [404]),
        (get(b"/" + b"a" * 40_000), [431]),
        (get(b"/health?" + b"a" * 40_000), [431]),
        (get(b"/health", b"X: " + b"a" * 40_000), [431]),
        (get(b"/health", b"X" * 40_000 + b": a"), [431]),
        (get(b"/health", *(b"X-%d: a" % number for number in range(MAX_HEADERS + 1))), [431]),
        (get(b"/health", *(b"X: a" for _ in range(MAX_HEADERS - 1))), [200]),
        (get(b"/health", b"X: " + b"a" * (MAX_HEAD - 100)), [200]),
    ],
    ids=lambda value: repr(value[:70]) if isinstance(value, bytes) else "",
)
async def test_unusual_http_gets_a_documented_response(
    server: Server, request_bytes: bytes, statuses: list[int]
) -> None:
    assert_documented(await server.ask(request_bytes), *statuses)
    assert await server.is_healthy()


@pytest.mark.parametrize("host", [b"[", b"a b", b"\xff", b"x" * 5_000, b"evil.example/path?", b"", b"%00", b"x:99999"])
async def test_a_host_header_cannot_break_a_video_url(server: Server, host: bytes) -> None:
    task_id = await server.finished(b"")
    request = f"GET /status/{task_id} HTTP/1.1\r\nHost: ".encode() + host + b"\r\n\r\n"
    assert_documented(await server.ask(request), 200, 400)


async def test_a_head_that_never_ends_is_rejected_at_its_limit(server: Server) -> None:
    async with server.client() as client:
        await client.send(b"GET /health HTTP/1.1\r\n", *(b"X: " + b"a" * 1000 + b"\r\n" for _ in range(300)))
        assert_documented(await client.answer(), 431)
        assert await client.closed()
    async with server.client() as client:
        await client.send(b"GET /", *(b"a" * 1000 for _ in range(300)))
        assert_documented(await client.answer(), 431)


async def test_a_body_that_arrives_with_its_head_does_not_count_as_head(server: Server) -> None:
    async with server.client() as client:
        for _ in range(3):
            await client.send(post(BODY.ljust(60_000)))
            assert_documented(await client.answer(), 202)


# Between the head and the end of a body


CHUNKED = get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST")


@pytest.mark.parametrize("trailers", [b"X-A: b\r\n", b"X-A: b\r\nX-C: d\r\n", b"X-A:\r\n"], ids=["one", "two", "empty"])
async def test_a_request_with_trailers_is_rejected(server: Server, trailers: bytes) -> None:
    async with server.client() as client:
        await client.send(CHUNKED + chunked(BODY) + b"0\r\n" + trailers + b"\r\n" + get(b"/health"))
        answer = await client.answer()
        assert_documented(answer, 400)
        assert answer is not None
        assert b"trailers" in answer.body
        assert await client.closed()
    assert (await server.bench.queue.summary()).waiting == 0


async def test_a_trailer_is_no_header_of_a_request(tmp_path: Path, bucket_settings: BucketSettings) -> None:
    key = b"a-key-of-16-characters"
    access = Access(parse_api_keys(key.decode()))
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        await bench.worker()
        async with serving(create_app(bench.queue, Bucket(bucket_settings), access=access)) as address:
            host, _, port = address.removeprefix("http://").partition(":")
            server = Server(bench, Bucket(bucket_settings), host, int(port))
            for trailers in (b"X-API-Key: " + key + b"\r\n", b"X-API-Key: " + key + b"\r\nX: y\r\n"):
                request = CHUNKED + chunked(BODY) + b"0\r\n" + trailers + b"\r\n"
                assert_documented(await server.ask(request), 400, 401)
        assert (await bench.queue.summary()).waiting == 0


@pytest.mark.parametrize(
    "flood",
    [
        b"0\r\n" + b"a:b\r\n" * 400_000,
        b"0\r\n" + b"a" * 2_000_000,
        b"0\r\nx: " + b"a" * 2_000_000,
        b"1;" + b"a" * 2_000_000,
        b"1;a=b\r\nx\r\n" * 200_000,
        b"0" * 2_000_000,
    ],
    ids=["trailers", "trailer name", "trailer value", "extension", "extensions", "size line"],
)
async def test_what_is_around_the_chunks_is_bounded(server: Server, flood: bytes) -> None:
    async with server.client() as client:
        await client.send(CHUNKED, flood)
        assert_documented(await client.answer(), 400)
    assert await server.is_healthy()


async def test_a_body_that_goes_on_after_its_response_ends_the_connection(server: Server) -> None:
    async with server.client() as client:
        await client.send(get(b"/health", b"Content-Length: 1000000000"))
        assert_documented(await client.answer(), 200)
        await client.send(*(bytes(65_536) for _ in range(200)))
        last = await client.answer()
        assert last is None or last.status == 413


# Pipelined requests


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    async with server.client() as client:
        await client.send(get(b"/health") + post(BODY) + get(b"/status/none") + get(b"/nothing"))
        statuses = [answer.status for _ in range(4) if (answer := await client.answer()) is not None]
        assert statuses == [200, 202, 404, 404]


async def test_too_many_pipelined_requests_end_the_connection(server: Server) -> None:
    async with server.client() as client:
        await client.send(get(b"/health") * (MAX_PIPELINED * 40))
        answers = 0
        while (answer := await client.answer()) is not None:
            assert_documented(answer, 200, 400)
            answers += 1
        assert answers <= MAX_PIPELINED + 2
    assert await server.is_healthy()


# Timeouts


async def test_a_connection_that_sends_nothing_is_closed(with_short_limits: Server) -> None:
    async with with_short_limits.client() as client:
        assert_documented(await client.answer(), 408)
        assert await client.closed()


async def drip(client: Client, data: bytes) -> None:
    for byte in data:
        await client.send(bytes([byte]))
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"a" * 1000,
        b"\r\n" * 500,
        b"GET /" + b"a" * 1000,
    ],
)
async def test_a_slow_head_is_rejected(with_short_limits: Server, data: bytes) -> None:
    async with with_short_limits.client() as client:
        dripping = asyncio.create_task(drip(client, data))
        assert_documented(await client.answer(), 408)
        assert await client.closed()
        dripping.cancel()


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_slow_body_is_rejected(with_short_limits: Server, framing: bytes) -> None:
    async with with_short_limits.client() as client:
        await client.send(get(b"/generate", JSON, framing, method=b"POST"))
        dripping = asyncio.create_task(drip(client, b"1\r\n \r\n" * 200))
        answer = await client.answer()
        assert_documented(answer, 408)
        assert await client.closed()
        dripping.cancel()
    assert (await with_short_limits.bench.queue.summary()).waiting == 0


async def test_a_slow_body_after_its_response_ends_the_connection(with_short_limits: Server) -> None:
    async with with_short_limits.client() as client:
        await client.send(get(b"/generate", b"Content-Type: text/plain", b"Content-Length: 100000", method=b"POST"))
        assert_documented(await client.answer(), 400)
        dripping = asyncio.create_task(drip(client, b"x" * 400))
        last = await client.answer()
        assert last is None or last.status == 408
        assert await client.closed()
        dripping.cancel()


async def test_a_second_request_that_stays_incomplete_is_rejected(with_short_limits: Server) -> None:
    for beginning in (b"\r\n", b"G", b"GET /health HTTP/1.1\r\n"):
        async with with_short_limits.client() as client:
            await client.send(get(b"/health"))
            assert_documented(await client.answer(), 200)
            await client.send(beginning)
            assert_documented(await client.answer(), 408)
            assert await client.closed()


async def test_a_slow_but_steady_client_is_served(server: Server) -> None:
    async with server.client() as client:
        for byte in post(BODY):
            await client.send(bytes([byte]))
        assert_documented(await client.answer(), 202)


async def test_a_client_that_disconnects_early_causes_no_traceback(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (post(BODY)[:-10], get(b"/generate", JSON, b"Transfer-Encoding: chunked", method=b"POST") + b"5\r\nab"):
        async with server.client() as client:
            await client.send(data)
    assert await server.is_healthy()
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text
    assert (await server.bench.queue.summary()).waiting == 0


async def test_a_full_server_gives_up_the_oldest_connection_that_waits(
    tmp_path: Path, bucket_settings: BucketSettings
) -> None:
    limits = replace(FEW, patience=0.0)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(tmp_path, Bucket(bucket_settings), ShortLimits, limits))
        idle = [await stack.enter_async_context(server.client()) for _ in range(FEW.total)]
        assert await server.is_healthy()
        assert await idle[0].answer() is None, "the oldest one is closed"
        for client in idle[1:]:
            assert_documented(await client.answer(), 408)


async def test_a_full_server_without_a_waiting_connection_rejects_the_next(with_short_limits: Server) -> None:
    """Eight requests in progress, whose bodies are not complete yet."""
    head = get(b"/generate", JSON, b"Content-Length: 100", method=b"POST")
    async with AsyncExitStack() as stack:
        for _ in range(FEW.total):
            client = await stack.enter_async_context(with_short_limits.client())
            await client.send(head)
        rejected = await with_short_limits.ask(get(b"/health"))
        assert_documented(rejected, 503)
        assert rejected is not None
        assert rejected.headers["retry-after"] == "5"


async def test_a_client_that_does_not_read_is_disconnected(with_short_limits: Server) -> None:
    video = bytes(64 * 1024 * 1024)
    task_id = await with_short_limits.finished(video)
    async with with_short_limits.client() as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(get(f"/videos/{task_id}.mp4".encode()))
        await asyncio.sleep(3 * ShortLimits.stall_seconds)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        try:
            while chunk := await client.reader.read(1 << 20):
                received += len(chunk)
        except ConnectionError:
            pass
        assert received < len(video)


def test_every_limit_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    numbers: dict[str, Any] = {
        "head": f"{Connection.head_seconds:g} s",
        "body": f"{Connection.body_seconds:g} s",
        "stall": f"{Connection.stall_seconds:g} s",
        "connections": str(CONNECTION_LIMITS.total),
        "connections of an address": str(CONNECTION_LIMITS.per_address),
        "reserve": str(CONNECTION_LIMITS.reserve),
        "head size": f"{MAX_HEAD // 1024} KiB",
        "headers": str(MAX_HEADERS),
        "pipelined": str(MAX_PIPELINED),
    }
    for what, number in numbers.items():
        assert re.search(rf"\b{re.escape(number)}\b", page), what
