"""`hunyuan serve`: from settings to a listening server with its bucket and workers, and back down with no orphan."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio.to_thread
import uvloop
from pydantic import ValidationError

from contract import log_fields as logs
from contract.job import DEMO_MODEL
from contract.settings import explain
from shim.api.platform import Platform
from shim.app import create_app
from shim.gpu import local_gpus
from shim.host.gateway import EmbeddedBucket
from shim.host.secret_file import secret_file
from shim.host.supervisor import Launch, LocalError, Supervised
from shim.host.worker_environment import ENDPOINT_ID, worker_environment
from shim.http.server import App, HttpServer
from shim.metrics import Metrics
from shim.queue.base import QueueError, QueueUnavailableError
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.runpod import RunPodQueue
from shim.queue.sql import SqlQueue
from shim.queue.sweep import sweep_forever
from shim.settings import ShimSettings, child_environment
from shim.tasks import StoredVideos
from storage.bucket import Bucket
from storage.errors import StorageDeniedError, StorageError
from storage.settings import BucketSettings, bucket_settings

#: What a worker exits with when its settings are wrong: starting it again would change nothing.
_BAD_SETTINGS: Final = 2
#: What it exits with when its model can't be loaded, or its bucket refuses.
_NO_MODEL: Final = 3
_GATEWAY_GRACE: Final = 10.0
#: Seconds that a database which does not answer is waited for at the start, and how often it is asked.
_DATABASE_PATIENCE: Final = 30.0
_DATABASE_RETRY: Final = 1.0
#: Seconds that the bucket gets for each answer.
_STORE_TIMEOUT: Final = 10.0
#: Seconds that open downloads get when the server stops.
_CONNECTION_GRACE: Final = 10

T = TypeVar("T")
log = logging.getLogger(__name__)


class StartError(Exception):
    """The server can't start; the message names the setting and what it takes."""


def run(settings: ShimSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        StartError: a setting is wrong, the port is taken, or another server uses the same data.
    """
    logs.configure(settings)
    uvloop.run(_serve(settings))


@dataclass(frozen=True)
class _Store:
    """The bucket, and how a worker that we start reaches it."""

    bucket: Bucket
    environment: Mapping[str, str]


async def _serve(settings: ShimSettings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        async with AsyncExitStack() as stack:
            stack.enter_context(_data_directory(settings))
            listener = stack.enter_context(_listener(settings))
            metrics = Metrics(data_directory=settings.directory)
            store = await stack.enter_async_context(_store(settings, metrics))
            if settings.runpod_endpoint_id is not None:
                await _serve_runpod(settings, listener, store, metrics, stopping)
            else:
                await _serve_local(settings, listener, store, metrics, stopping)
    except LocalError as exc:
        raise StartError(str(exc)) from exc


async def _serve_runpod(
    settings: ShimSettings, listener: socket.socket, store: _Store, metrics: Metrics, stopping: asyncio.Event
) -> None:
    """The shim alone: RunPod keeps the queue and runs the workers."""
    endpoint_id, api_key = settings.runpod_endpoint()
    queue = RunPodQueue(
        endpoint_id=endpoint_id,
        api_key=api_key.get_secret_value(),
        base_url=str(settings.runpod_base_url),
        max_queue_size=settings.max_queue_size,
        observer=metrics,
    )
    try:
        log.info("jobs go to RunPod endpoint %s", endpoint_id)
        app = create_app(queue, store.bucket, metrics=metrics, public_url=_public_url(settings), access=settings.access)
        async with _listening(app, listener) as server:
            await _until(stopping, [server])
    finally:
        await queue.close()


async def _serve_local(
    settings: ShimSettings, listener: socket.socket, store: _Store, metrics: Metrics, stopping: asyncio.Event
) -> None:
    """The shim, its queue, and the workers of this machine."""
    if settings.model_path is None:
        log.warning(
            "HUNYUAN_MODEL_PATH is not set: serving the DEMO MODEL, whose videos show nothing real. "
            "Set it to a HunyuanVideo-1.5 checkpoint directory or hub id."
        )
    token = _token(settings)
    instance = secret_file(settings.directory / "instance", lambda: secrets.token_hex(4))
    database = await _database(settings)
    try:
        queue = SqlQueue(database, max_queue_size=settings.max_queue_size, observer=metrics)
        videos = StoredVideos(store.bucket)
        dispatcher = Dispatcher(
            database,
            find_result=videos.find_result,
            discard=videos.discard,
            max_attempts=settings.max_attempts,
            history_ttl=settings.history_ttl,
            observer=metrics,
        )
        # An earlier life's: they ended with it.
        await _answered(lambda: dispatcher.release_workers(f"{instance}-"))
        platform = Platform(queue, dispatcher, endpoint_id=ENDPOINT_ID, token=token)
        app = create_app(
            queue,
            store.bucket,
            metrics=metrics,
            public_url=_public_url(settings),
            routers=[platform.router],
            access=settings.access,
        )
        base_url = f"http://{_reachable(listener)}/v2"
        slots = [
            _WorkerSlot(f"{instance}-{index}", index, settings, store, dispatcher, base_url, token)
            for index in range(settings.workers)
        ]
        workers = [
            Supervised(f"worker {index}", slot.launch, metrics.supervise(f"worker {index}"))
            for index, slot in enumerate(slots)
        ]
        async with _listening(app, listener) as server:
            keepers = [asyncio.create_task(worker.run()) for worker in workers]
            chores = [asyncio.create_task(sweep_forever(dispatcher)), asyncio.create_task(database.listen())]
            try:
                await _until(stopping, [server, *chores, *keepers])
            finally:
                platform.drain()
                await asyncio.gather(*(worker.stop(settings.shutdown_grace) for worker in workers))
                await asyncio.gather(*keepers, return_exceptions=True)
                for chore in chores:
                    chore.cancel()
                platform.stop()
    finally:
        await database.close()


async def _database(settings: ShimSettings) -> Database:
    """The queue's database."""
    named = settings.database_url
    url = named.get_secret_value() if named is not None else f"sqlite:///{settings.directory}/queue.sqlite3"
    return await _answered(lambda: Database.open(url, worker_timeout=settings.worker_timeout))


async def _answered(ask: Callable[[], Awaitable[T]]) -> T:
    """What the database says; one that does not answer yet is waited for."""
    deadline = time.monotonic() + _DATABASE_PATIENCE
    while True:
        try:
            return await ask()
        except (ValueError, QueueError) as exc:
            if not isinstance(exc, QueueUnavailableError) or time.monotonic() > deadline:
                raise StartError(f"HUNYUAN_DATABASE_URL: {exc}") from exc
            log.warning("waiting for the queue's database: %s", exc)
        await asyncio.sleep(_DATABASE_RETRY)


class _WorkerSlot:
    """A worker's lives, each under an id of its own: its predecessor's jobs are not its jobs."""

    def __init__(
        self,
        name: str,
        index: int,
        settings: ShimSettings,
        store: _Store,
        dispatcher: Dispatcher,
        base_url: str,
        token: str,
    ) -> None:
        self._name = name
        self._dispatcher = dispatcher
        self._base_url = base_url
        self._token = token
        self._worker_id = ""
        self._environment = {
            **store.environment,
            "HUNYUAN_MODEL_PATH": settings.model_path or DEMO_MODEL,
            "PYTHONUNBUFFERED": "1",
        }
        gpus = len(local_gpus())
        if settings.workers > 1 and gpus > 1:
            self._environment["CUDA_VISIBLE_DEVICES"] = str(index % gpus)

    async def launch(self) -> Launch:
        """The next life."""
        await self._forget()  # again, if it failed at the end of the last one
        self._worker_id = f"{self._name}-{secrets.token_hex(4)}"
        environment = {
            **self._environment,
            **worker_environment(self._base_url, ENDPOINT_ID, self._worker_id, self._token),
        }
        return Launch([sys.executable, "-m", "handler"], child_environment(**environment), self._ended)

    async def _ended(self, code: int, asked: bool) -> None:
        if code == _BAD_SETTINGS:
            raise StartError("the worker refused its settings; its lines above name them")
        if code != _NO_MODEL:  # else what it said of itself stays to be seen until its next life
            await self._forget(blameless=asked)

    async def _forget(self, *, blameless: bool = False) -> None:
        try:
            await self._dispatcher.release_worker(self._worker_id, count_attempt=not blameless)
        except QueueUnavailableError as exc:
            log.warning("worker %s: its lease must lapse before others take up its task: %s", self._worker_id, exc)


@contextmanager
def _data_directory(settings: ShimSettings) -> Iterator[None]:
    """Hold the data directory: one server at a time owns its queue and its bucket."""
    try:
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (settings.directory / "lock").open("w")
    except OSError as exc:
        raise StartError(f"HUNYUAN_DATA_DIR: {settings.directory} can't be used: {exc.strerror}") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StartError(f"HUNYUAN_DATA_DIR: another server uses {settings.directory}") from exc
        yield


def _listener(settings: ShimSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as exc:
        where = f"HUNYUAN_HOST {settings.host}, HUNYUAN_PORT {settings.port}"
        raise StartError(f"{where}: can't listen there: {exc.strerror or exc}") from exc


def _reachable(listener: socket.socket) -> str:
    """host:port under which this machine's own processes reach the listener."""
    host, port, *_ = listener.getsockname()
    loopback = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - recognised, not bound
    return f"{loopback.get(host, f'[{host}]' if ':' in host else host)}:{port}"


@asynccontextmanager
async def _store(settings: ShimSettings, metrics: Metrics) -> AsyncIterator[_Store]:
    """The bucket that the environment names, else the embedded one for as long as the server runs."""
    try:
        named = bucket_settings()
    except ValidationError as exc:
        raise StartError(explain(exc)) from exc
    if named is not None:
        yield _Store(await _checked(named, metrics), {})
        return
    if settings.runpod_endpoint_id is not None:
        raise StartError("BUCKET_ENDPOINT_URL: needed with RUNPOD_ENDPOINT_ID, and the same bucket as the endpoint's")
    embedded = EmbeddedBucket(settings.directory / "bucket")
    await embedded.format()
    gateway = Supervised("S3 gateway", embedded.launch, metrics.supervise("S3 gateway"))
    keeper = asyncio.create_task(gateway.run())
    try:
        await embedded.wait_until_listening()
        await anyio.to_thread.run_sync(Bucket(embedded.settings).create)
        yield _Store(_prompt(embedded.settings, metrics), embedded.environment())
    finally:
        await gateway.stop(_GATEWAY_GRACE)
        await keeper


async def _checked(named: BucketSettings, metrics: Metrics) -> Bucket:
    """The bucket, asked once: wrong keys stop the start, a store that is away does not."""
    bucket = _prompt(named, metrics)
    try:
        await anyio.to_thread.run_sync(bucket.check)
    except StorageDeniedError as exc:
        raise StartError(str(exc)) from exc
    except StorageError as exc:
        log.error("going on without the bucket until it answers: %s", exc)
    return bucket


def _prompt(settings: BucketSettings, metrics: Metrics) -> Bucket:
    """A bucket for those who wait for an answer: "not available" soon, rather than the answer late."""
    return Bucket(settings, timeout=_STORE_TIMEOUT, attempts=2, observe=metrics.s3_request)


def _token(settings: ShimSettings) -> str:
    """The key of the endpoints under /v2: as set, else made once and kept."""
    if settings.platform_token is not None:
        return settings.platform_token.get_secret_value()
    return secret_file(settings.directory / "platform-token", lambda: secrets.token_urlsafe(32))


def _public_url(settings: ShimSettings) -> str | None:
    return str(settings.public_url) if settings.public_url is not None else None


@asynccontextmanager
async def _listening(app: App, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Serve `app` until the block ends; requests under way are finished within their grace."""
    server = HttpServer(app, grace=_CONNECTION_GRACE)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    log.info("listening on http://%s", _reachable(listener))
    try:
        yield task
    finally:
        server.should_exit = True
        await task


async def _until(stopping: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the signal to stop, or for a task that ends before it, whose error is raised."""
    signalled = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({signalled, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        signalled.cancel()
    log.info("stopping")
