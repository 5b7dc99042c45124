"""Downloads while the bucket fails: the whole video, or an error that every client notices."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import requests
from pydantic import HttpUrl

from shim.app import create_app
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.http_server import serving
from tests.support.queues import JOB, Bench, result, sql_bench
from tests.support.s3_servers import behind, new_bucket
from tests.support.service import eventually

MEGABYTE = 1_000_000
SIZE = 8 * MEGABYTE
VIDEO = os.urandom(SIZE)
SHA256 = hashlib.sha256(VIDEO).hexdigest()


@pytest.fixture(scope="module")
def server(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@dataclass
class Shim:
    """The server over a queue that knows one finished task, whose video is behind the proxy."""

    proxy: FaultProxy
    bench: Bench
    address: str
    task_id: str

    @property
    def url(self) -> str:
        return f"{self.address}/videos/{self.task_id}.mp4"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient(base_url=self.address, timeout=60) as http:
            yield http

    async def assert_whole(self) -> None:
        async with self.client() as http:
            response = await http.get(self.url)
        assert response.status_code == 200
        assert hashlib.sha256(response.content).hexdigest() == SHA256


@pytest.fixture
async def shim(tmp_path: Path, server: BucketSettings) -> AsyncIterator[Shim]:
    with behind(server) as proxy:
        bucket = Bucket(
            server.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}),
            timeout=0.5,
            attempts=1,
        )
        async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
            await bench.worker()
            task_id = (await bench.queue.submit(JOB)).task_id
            await bench.take()
            finished = result(task_id).model_copy(update={"file_size": SIZE, "sha256": SHA256})
            await bench.dispatcher.complete("w1", task_id, finished.model_dump(mode="json"))
            await asyncio.to_thread(
                Bucket(server).put_bytes, VIDEO, layout.video_key(task_id), content_type="video/mp4"
            )
            async with serving(create_app(bench.queue, bucket, store_timeout=0.5)) as address:
                yield Shim(proxy, bench, address, task_id)
                proxy.heal()


# Failures that are retried


@pytest.mark.parametrize("fault", ["truncate_after", "reset_down_after"])
async def test_a_download_that_breaks_repeatedly_is_still_whole(shim: Shim, fault: str) -> None:
    with shim.proxy.broken(
        **{fault: MEGABYTE}, bandwidth=20 * MEGABYTE
    ):  # a reset discards bytes that are not read yet
        await shim.assert_whole()
    assert shim.proxy.hits[fault] >= SIZE // MEGABYTE - 1


async def test_a_range_that_breaks_is_read_on(shim: Shim) -> None:
    async with shim.client() as http:
        with shim.proxy.broken(truncate_after=MEGABYTE):
            response = await http.get(shim.url, headers={"Range": f"bytes=1000-{3 * MEGABYTE}"})
    assert response.status_code == 206
    assert response.content == VIDEO[1000 : 3 * MEGABYTE + 1]
    assert shim.proxy.hits["truncate_after"] >= 2


@pytest.mark.parametrize("faults", [{"refuse": True}, {"stall": True}], ids=["away", "silent"])
async def test_a_download_waits_for_a_bucket_that_is_unavailable_for_a_while(
    shim: Shim, faults: dict[str, Any]
) -> None:
    digest, broken = hashlib.sha256(), False
    shim.proxy.faults = Faults(bandwidth=4 * MEGABYTE)
    async with shim.client() as http, http.stream("GET", shim.url) as response:
        assert response.status_code == 200
        async for chunk in response.aiter_raw():
            digest.update(chunk)
            if not broken:
                broken = True
                shim.proxy.faults = Faults(**faults)
                asyncio.get_running_loop().call_later(1.2, shim.proxy.heal)
    assert digest.hexdigest() == SHA256


# Failures that outlast the retries


def with_httpx(url: str, path: Path) -> bool:
    try:
        with httpx.stream("GET", url, timeout=60) as response, path.open("wb", buffering=0) as file:
            for chunk in response.iter_raw():
                file.write(chunk)
    except httpx.RemoteProtocolError:
        return False
    return True


def with_requests(url: str, path: Path) -> bool:
    try:
        with requests.get(url, stream=True, timeout=60) as response, path.open("wb", buffering=0) as file:
            for chunk in response.iter_content(65_536):
                file.write(chunk)
    except requests.exceptions.ChunkedEncodingError:
        return False
    return True


def with_curl(url: str, path: Path) -> bool:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["curl", "--silent", "--fail", "--no-buffer", "-o", str(path), url], check=False)
    assert done.returncode in (0, 18), "18: a partial file"
    return done.returncode == 0


CLIENTS: dict[str, Callable[[str, Path], bool]] = {"httpx": with_httpx, "requests": with_requests, "curl": with_curl}


async def test_every_client_notices_a_download_that_broke_off(shim: Shim, tmp_path: Path) -> None:
    shim.proxy.faults = Faults(bandwidth=2 * MEGABYTE)
    paths = [tmp_path / name for name in CLIENTS]
    downloads = [
        asyncio.create_task(asyncio.to_thread(download, shim.url, path))
        for download, path in zip(CLIENTS.values(), paths, strict=True)
    ]

    def all_have_begun() -> bool:
        return all(path.exists() and path.stat().st_size > 0 for path in paths)

    await asyncio.to_thread(eventually, "the first bytes at every client", all_have_begun, 20)
    shim.proxy.faults = Faults(refuse=True)
    whole = dict(zip(CLIENTS, await asyncio.gather(*downloads), strict=True))
    assert whole == dict.fromkeys(CLIENTS, False)
    assert all(0 < path.stat().st_size < SIZE for path in paths)
    shim.proxy.heal()
    for name, download in CLIENTS.items():
        assert await asyncio.to_thread(download, shim.url, tmp_path / name)
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == SHA256


# Failures before the first byte


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "faults",
    [{"refuse": True}, {"stall": True}, {"reset_down_after": 0}, {"truncate_after": 50}],
    ids=["away", "silent", "reset", "truncated"],
)
async def test_a_failure_before_the_first_byte_is_503_with_retry_after(
    shim: Shim, faults: dict[str, Any], method: str
) -> None:
    started = time.monotonic()
    async with shim.client() as http:
        with shim.proxy.broken(**faults):
            response = await http.request(method, shim.url)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert time.monotonic() - started < 5
    await shim.assert_whole()


def headers_size(bucket: Bucket, key: str) -> int:
    """Bytes of the bucket's response before the video's first byte."""
    url = urlsplit(bucket.presign(key, public=False))
    request = f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nRange: bytes=0-{SIZE - 1}\r\n\r\n"
    with socket.create_connection((str(url.hostname), url.port or 80), timeout=10) as store:
        store.sendall(request.encode())
        with store.makefile("rb") as answer:
            return sum(len(line) for line in iter(answer.readline, b"\r\n")) + 2


async def test_a_bucket_response_without_a_body_is_503(shim: Shim, server: BucketSettings) -> None:
    size = await asyncio.to_thread(headers_size, Bucket(server), layout.video_key(shim.task_id))
    async with shim.client() as http:
        with shim.proxy.broken(truncate_after=size):
            assert (await http.get(shim.url)).status_code == 503
        with shim.proxy.broken(truncate_after=size + 1):
            assert (await http.get(shim.url, headers={"Range": "bytes=0-0"})).content == VIDEO[:1]


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (403, "AccessDenied")])
async def test_an_error_of_the_bucket_is_503(shim: Shim, status: int, code: str) -> None:
    shim.proxy.answer(status, code, times=1)
    async with shim.client() as http:
        response = await http.get(shim.url)
    assert (response.status_code, response.json()["error_code"]) == (503, "STORAGE_UNAVAILABLE")
    await shim.assert_whole()


# Requests that do not need the bucket


async def test_with_a_silent_bucket_the_queues_tasks_are_answered_and_ready_is_503(shim: Shim) -> None:
    async with shim.client() as http:
        waiting = (await shim.bench.queue.submit(JOB)).task_id
        with shim.proxy.broken(stall=True):
            for task_id, status in ((shim.task_id, "completed"), (waiting, "processing")):
                answer = await http.get(f"/status/{task_id}")
                assert (answer.status_code, answer.json()["status"]) == (200, status)
            assert (await http.get("/health")).status_code == 200
            assert shim.proxy.requests == [], "the store was not asked"
            unknown = await http.get("/status/some-other-task")
            assert (unknown.status_code, unknown.headers["retry-after"]) == (503, "5")
            assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/status/some-other-task")).status_code == 404


async def test_ready_does_not_wait_for_a_slow_bucket(tmp_path: Path, server: BucketSettings) -> None:
    with behind(server) as proxy:
        bucket = Bucket(server.model_copy(update={"endpoint_url": HttpUrl(proxy.url)}), timeout=20, attempts=1)
        async with (
            sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench,
            serving(create_app(bench.queue, bucket)) as address,
        ):
            await bench.worker()
            async with httpx.AsyncClient(timeout=30) as http:
                with proxy.broken(stall=True):
                    started = time.monotonic()
                    assert (await http.get(f"{address}/ready")).status_code == 503
                    assert time.monotonic() - started < 15
