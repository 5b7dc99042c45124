"""GET /tasks/{id}/events over the real server: nothing is missed, and many listeners cost what one does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from contract.errors import ErrorCode, JobFailure
from contract.result import Progress, Stage
from shim.access import CONNECTION_LIMITS, OPEN_TO_ALL, Access, ConnectionLimits, parse_api_keys
from shim.api import events as events_api
from shim.app import create_app
from shim.http.server import Connection
from shim.queue.reader import JobRow
from storage.bucket import Bucket
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, Bench, result, runpod_bench, sql_bench

STAGES = (Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.UPSCALING, Stage.DECODING, Stage.STORING)
OOM = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
SECONDS = 60


@dataclass
class Event:
    id: int
    data: dict[str, Any]

    @property
    def seen(self) -> tuple[str, int]:
        """The stage with its progress, or how the task ended."""
        if self.data["status"] == "processing":
            return self.data["stage"], self.data["progress"]
        return self.data["status"], 100


class Stream:
    """A client that reads the events of one task."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()
        self.comments = 0

    async def next(self) -> Event:
        """The next event. Raises StopAsyncIteration at the end."""
        fields: dict[str, str] = {}
        with anyio.fail_after(SECONDS):
            async for line in self._lines:
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    assert fields["event"] == "status"
                    return Event(int(fields["id"]), json.loads(fields["data"]))
        raise StopAsyncIteration

    async def rest(self) -> list[Event]:
        found = []
        with contextlib.suppress(StopAsyncIteration):
            while True:
                found.append(await self.next())
        return found

    async def until(self, *seen: Any) -> list[Event]:
        found = [await self.next()]
        while found[-1].seen != seen:
            found.append(await self.next())
        return found


async def eventually(what: str, look: Callable[[], bool]) -> None:
    for _ in range(20 * SECONDS):
        if look():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(what)


@dataclass
class Site:
    bench: Bench
    address: str

    @asynccontextmanager
    async def listening(self, task_id: str, last_id: int | str | None = None, **headers: str) -> AsyncIterator[Stream]:
        if last_id is not None:
            headers["Last-Event-ID"] = str(last_id)
        async with (
            httpx.AsyncClient(base_url=self.address, timeout=SECONDS) as http,
            http.stream("GET", f"/tasks/{task_id}/events", headers=headers) as response,
        ):
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            yield Stream(response)

    async def progress(self, task_id: str, progress: int, stage: Stage) -> None:
        await self.bench.dispatcher.record_progress("w1", task_id, Progress(progress=progress, stage=stage))

    async def complete(self, task_id: str) -> None:
        await self.bench.dispatcher.complete("w1", task_id, result(task_id).model_dump(mode="json"))

    async def status(self, task_id: str) -> Any:
        async with httpx.AsyncClient(base_url=self.address) as http:
            return (await http.get(f"/status/{task_id}")).json()


@asynccontextmanager
async def running(
    url: str,
    access: Access = OPEN_TO_ALL,
    connection: type[Connection] = Connection,
    limits: ConnectionLimits = CONNECTION_LIMITS,
) -> AsyncIterator[Site]:
    async with sql_bench(url) as bench:
        await bench.worker()
        app = create_app(bench.queue, Bucket(NOWHERE), access=access)
        async with serving(app, connection, limits=limits) as address:
            yield Site(bench, address)


@pytest.fixture
async def site(database_url: str) -> AsyncIterator[Site]:
    async with running(database_url) as made:
        yield made


# What a listener reads


async def test_a_listener_reads_every_change_until_the_end(site: Site) -> None:
    ahead, task_id = [(await site.bench.queue.submit(JOB)).task_id for _ in range(2)]
    async with site.listening(task_id) as stream:
        first = await stream.next()
        assert first.data == await site.status(task_id)
        assert first.data["queue_position"] == 2
        await site.bench.queue.cancel(ahead)
        assert (await stream.next()).data["queue_position"] == 1
        await site.bench.take()
        await site.progress(task_id, 10, Stage.DENOISING)
        last = (await stream.until("denoising", 10))[-1]
        assert last.data == await site.status(task_id)
        await site.progress(task_id, 20, Stage.DENOISING)
        assert (await stream.next()).seen == ("denoising", 20)
        await site.complete(task_id)
        end = await stream.rest()
    assert [event.seen for event in end] == [("completed", 100)]
    assert end[0].data == await site.status(task_id)


async def test_ids_grow(site: Site) -> None:
    task_id = (await site.bench.queue.submit(JOB)).task_id
    async with site.listening(task_id) as stream:
        ids = [(await stream.next()).id]
        await site.bench.take()
        for progress in range(10, 50, 10):
            await site.progress(task_id, progress, Stage.DENOISING)
            ids += [event.id for event in await stream.until("denoising", progress)]
    assert ids == sorted(set(ids))
    async with site.listening(task_id, ids[-1]) as stream:
        assert (await stream.next()).id > ids[-1]


async def test_a_new_preview_is_an_event(site: Site) -> None:
    """Even if the percentage stays, and with another address each time."""
    task_id = (await site.bench.queue.submit(JOB)).task_id
    await site.bench.take()
    async with site.listening(task_id) as stream:
        await stream.next()
        urls = []
        for jpeg in (b"one", b"two"):
            report = Progress(progress=10, stage=Stage.DENOISING).model_copy(update={"preview": jpeg})
            await site.bench.dispatcher.record_progress("w1", task_id, report)
            urls.append((await stream.next()).data["preview_url"])
        assert urls[0] != urls[1]


async def test_an_ended_task_has_one_event(site: Site) -> None:
    task_id = (await site.bench.queue.submit(JOB)).task_id
    await site.bench.queue.cancel(task_id)
    async with site.listening(task_id) as stream:
        events = await stream.rest()
    assert [(event.data["status"], event.data["error_code"]) for event in events] == [("failed", "CANCELLED")]


async def test_a_listener_that_is_cut_off_at_every_event_misses_no_stage(site: Site) -> None:
    """Each connection reads one event. The task goes through its stages in between."""
    task_id = (await site.bench.queue.submit(JOB)).task_id
    last_id: int | None = None
    seen: list[str] = []

    async def read(count: int | None = None) -> None:
        nonlocal last_id
        async with site.listening(task_id, last_id) as stream:
            for event in [await stream.next() for _ in range(count)] if count else await stream.rest():
                assert last_id is None or event.id > last_id
                last_id = event.id
                seen.append(event.data.get("stage", event.data["status"]))

    await read(1)
    await site.bench.take()
    for number, stage in enumerate(STAGES):
        await site.progress(task_id, 10 * number, stage)
        if number % 2:
            await read(2)
    await site.bench.dispatcher.fail("w1", task_id, OOM)
    assert await site.bench.queue.retry(task_id)
    assert await site.bench.take() == task_id
    await site.progress(task_id, 90, Stage.STORING)
    await site.complete(task_id)
    await read()
    missing = list(dict.fromkeys(seen))
    assert missing == ["queued", *STAGES, "failed", "completed"]
    assert seen.count("failed") == 1, "the first attempt's end is read, and the stream goes on after it"
    assert seen[-4:] == ["queued", "queued", "storing", "completed"]


@pytest.mark.parametrize("last_id", ["999999999999999", "x", "-1", "1" * 40])
async def test_an_id_that_the_task_has_not_reached_is_ignored(site: Site, last_id: str) -> None:
    task_id = (await site.bench.queue.submit(JOB)).task_id
    async with site.listening(task_id, last_id) as stream:
        assert (await stream.next()).id == 1_000_000


async def test_changes_that_another_server_makes_are_read(postgres: Any) -> None:
    url = postgres.create_database()
    async with running(url) as site, sql_bench(url) as other:
        listening = asyncio.create_task(site.bench.database.listen())
        await eventually("LISTEN", lambda: site.bench.database.poll_interval > 5)
        task_id = (await site.bench.queue.submit(JOB)).task_id
        async with site.listening(task_id) as stream:
            await stream.next()
            with anyio.fail_after(5):  # notified: a poll would come after ten seconds
                await other.dispatcher.take("w1")
                await stream.next()
                progress = Progress(progress=10, stage=Stage.DENOISING)
                await other.dispatcher.record_progress("w1", task_id, progress)
                assert (await stream.next()).seen == ("denoising", 10)
                await other.queue.cancel(task_id)
                assert [event.seen for event in await stream.rest()] == [("failed", 100)]
        listening.cancel()


async def test_in_front_of_runpod_the_task_is_polled(tmp_path: Path) -> None:
    async with runpod_bench(f"sqlite:///{tmp_path}/queue.db") as bench:
        await bench.worker()
        bench.queue._clock = asyncio.get_running_loop().time  # type: ignore[attr-defined] # its cache expires
        async with serving(create_app(bench.queue, Bucket(NOWHERE))) as address:
            site = Site(bench, address)
            task_id = (await bench.queue.submit(JOB)).task_id
            async with site.listening(task_id) as stream:
                assert (await stream.next()).seen == ("queued", 0)
                await bench.take()
                await site.progress(task_id, 40, Stage.DENOISING)
                event = (await stream.until("denoising", 40))[-1]
            await bench.dispatcher.fail("w1", task_id, OOM)
            async with site.listening(task_id, event.id) as stream:
                end = (await stream.rest())[-1]
            assert (end.data["error_code"], end.id > event.id) == ("OOM_ERROR", True)


# Access


async def test_a_listener_needs_a_key(tmp_path: Path) -> None:
    key = "alices-key-0123456789"
    async with running(f"sqlite:///{tmp_path}/queue.db", Access(parse_api_keys(key))) as site:
        task_id = (await site.bench.queue.submit(JOB)).task_id
        async with httpx.AsyncClient(base_url=site.address) as http:
            assert (await http.get(f"/tasks/{task_id}/events")).status_code == 401
        async with site.listening(task_id, **{"X-API-Key": key}) as stream:
            assert (await stream.next()).seen == ("queued", 0)


# Many listeners, and slow ones


async def test_500_listeners_of_a_task_cost_one_query_a_change(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = (await site.bench.queue.submit(JOB)).task_id
    await site.bench.take()
    reads = 0
    read = type(site.bench.database.reader).job

    async def counted(reader: Any, asked: str) -> JobRow | None:
        nonlocal reads
        reads += 1
        return await read(reader, asked)

    host, port = site.address.removeprefix("http://").split(":")
    request = f"GET /tasks/{task_id}/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    clients = []
    for _ in range(500):
        clients.append(await asyncio.open_connection(host, int(port)))
        clients[-1][1].write(request)

    async def all_read(text: str) -> None:
        with anyio.fail_after(SECONDS):
            await asyncio.gather(*(reader.readuntil(text.encode()) for reader, _ in clients))

    await all_read('"stage":"queued"')
    monkeypatch.setattr(type(site.bench.database.reader), "job", counted)
    for progress in (10, 20, 30, 40):
        await site.progress(task_id, progress, Stage.DENOISING)
        await all_read(f'"progress":{progress},')
    assert reads <= 5, "one for each change, and at most one that was under way"
    await site.complete(task_id)
    await all_read('"status":"completed"')
    assert reads <= 6
    with anyio.fail_after(SECONDS):
        for reader, _ in clients:
            assert (await reader.read()).endswith(b"0\r\n\r\n")
            break
    for _, writer in clients:
        writer.close()


async def test_a_reader_ends_with_its_last_listener(site: Site) -> None:
    task_id = (await site.bench.queue.submit(JOB)).task_id
    before = len(asyncio.all_tasks())
    async with site.listening(task_id) as stream:
        await stream.next()
        async with site.listening(task_id) as second:
            await second.next()
        await site.bench.take()
        await stream.next()
    await eventually("the reader's end", lambda: not site.bench.database._watches._events)
    await eventually("no task is left", lambda: len(asyncio.all_tasks()) <= before)


async def test_silence_is_filled_with_comments(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_api, "_KEEP_ALIVE", 0.1)
    task_id = (await site.bench.queue.submit(JOB)).task_id
    async with site.listening(task_id) as stream:
        await stream.next()
        waiting = asyncio.create_task(stream.next())
        await eventually("three comments", lambda: stream.comments >= 3)
        await site.bench.take()
        await waiting


# The connection


async def test_a_stream_gives_up_its_connection_for_a_request(tmp_path: Path) -> None:
    """The stream ends as it should, and its client goes on from the last id."""
    limits = ConnectionLimits(total=1, reserve=0, patience=0.0)
    async with running(f"sqlite:///{tmp_path}/queue.db", limits=limits) as site:
        task_id = (await site.bench.queue.submit(JOB)).task_id
        async with site.listening(task_id) as stream:
            event = await stream.next()
            assert (await site.status(task_id))["status"] == "processing"
            assert await stream.rest() == [], "closed, and no error"
        async with site.listening(task_id, event.id) as stream:
            assert (await stream.next()).id == event.id + 1


async def test_streams_end_when_the_server_stops(tmp_path: Path) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.db") as bench:
        await bench.worker()
        task_id = (await bench.queue.submit(JOB)).task_id
        async with contextlib.AsyncExitStack() as clients:
            async with serving(create_app(bench.queue, Bucket(NOWHERE))) as address:
                site = Site(bench, address)
                streams = [await clients.enter_async_context(site.listening(task_id)) for _ in range(3)]
                for stream in streams:
                    await stream.next()
                stopping = asyncio.get_running_loop().time()
            assert asyncio.get_running_loop().time() - stopping < 0.9, "before the grace of 1 s is over"
            for stream in streams:
                assert await stream.rest() == []
