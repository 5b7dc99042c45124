"""`hunyuan serve`: from settings to a listening server with its bucket and workers, and back down with no orphan."""

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import Any, Final, TypeVar

import uvloop

from contract import log_fields as logs
from contract import tracing
from contract.retry import RetryPolicy
from contract.settings import warnings_of_unknown_variables
from contract.worker_environment import ENDPOINT_ID
from shim.access import ConnectionLimits
from shim.api.platform import Platform
from shim.api.status import status_of
from shim.app import DISTRIBUTION, create_app
from shim.host.bucket import OpenBucket, open_bucket
from shim.host.data_directory import locked_data_directory
from shim.host.errors import StartError, settings_errors
from shim.host.local_worker import LocalWorker, model_environment
from shim.host.retention import Retention, delete_expired_images, delete_if_any
from shim.host.secret_file import secret_file
from shim.host.supervisor import Supervised, supervising
from shim.http.server import HttpServer
from shim.metrics import Metrics
from shim.queue.base import JobQueue, QueueError, QueueUnavailableError
from shim.queue.database import Database
from shim.queue.dispatch import Dispatcher
from shim.queue.instance import Instance
from shim.queue.job import JobSnapshot
from shim.queue.orphans import Orphans
from shim.queue.outbox import Outbox
from shim.queue.runpod import RunPodQueue
from shim.queue.sql import SqlQueue
from shim.queue.sweep import sweep_forever, tidy_bucket_forever
from shim.queue.webhooks import Webhooks
from shim.rewrite import Rewriter
from shim.settings import ShimSettings
from shim.tasks import StoredImages, StoredVideos, Tasks
from storage.bucket import Bucket

#: How long the start retries a database that does not answer.
_DATABASE_START: Final = RetryPolicy(first=1.0, longest=1.0, total=30.0)
#: Seconds that open downloads have to finish when the server stops.
_CONNECTION_GRACE: Final = 10

T = TypeVar("T")
log = logging.getLogger(__name__)


def main(**overrides: Any) -> None:
    """Serves until SIGINT or SIGTERM. `overrides` replace the environment variables of the same names.

    Raises:
        StartError: a setting is wrong, the port is taken, or another server uses the same data directory.
    """
    with settings_errors():
        settings = ShimSettings(**overrides)
    logs.configure(settings)
    tracing.configure(settings, "hunyuan-server", version(DISTRIBUTION))
    for warning in warnings_of_unknown_variables():
        log.warning("%s", warning)
    if settings.model_path is None and settings.runpod_endpoint_id is None:
        log.warning(
            "HUNYUAN_MODEL_PATH is not set: serving the DEMO MODEL, which draws only simple objects. "
            "Set it to a HunyuanVideo-1.5 checkpoint directory or hub id."
        )
    if settings.is_open_to_all:
        log.warning(
            "listening on all addresses of this machine without an API key: anyone who reaches port %d may use the "
            "server. Set HUNYUAN_API_KEYS, or HUNYUAN_HOST=127.0.0.1.",
            settings.port,
        )
    uvloop.run(_serve(settings))


async def _serve(settings: ShimSettings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked_data_directory(settings))
        listener = stack.enter_context(_listen(settings))
        metrics = Metrics(data_directory=settings.directory)
        store = await stack.enter_async_context(open_bucket(settings, metrics))
        serve = _serve_local if settings.runpod_endpoint_id is None else _serve_runpod
        await serve(settings, listener, store, metrics, stopping)


async def _serve_runpod(
    settings: ShimSettings, listener: socket.socket, store: OpenBucket, metrics: Metrics, stopping: asyncio.Event
) -> None:
    """The server alone: RunPod has the queue and runs the workers."""
    endpoint_id, api_key = settings.runpod_endpoint()
    queue = RunPodQueue(
        endpoint_id=endpoint_id,
        api_key=api_key.get_secret_value(),
        base_url=str(settings.runpod_base_url),
        max_queue_size=settings.max_queue_size,
        profile=settings.profile,
        observer=metrics,
    )
    try:
        log.info("jobs go to RunPod endpoint %s", endpoint_id)
        async with (
            _listening(_http_server(settings, queue, store, metrics), listener) as server,
            _background(*_retention(settings, queue, store.bucket)) as background,
        ):
            await _run_until(stopping, [server, *background])
            log.info("stopping")
    finally:
        await queue.close()


async def _serve_local(
    settings: ShimSettings, listener: socket.socket, store: OpenBucket, metrics: Metrics, stopping: asyncio.Event
) -> None:
    """The server, its queue, and the workers of this machine."""
    token = _platform_token(settings)
    instance_id = secret_file(settings.directory / "instance", lambda: secrets.token_hex(4), form="[0-9a-f]{8}")
    async with AsyncExitStack() as stack:
        # 1. Open the queue.
        database = await open_database(settings)
        stack.push_async_callback(database.close)
        instance = await _retry_database(lambda: _claim_instance(settings, instance_id))
        stack.push_async_callback(instance.release)
        queue = SqlQueue(database, max_queue_size=settings.max_queue_size, observer=metrics, webhooks=settings.webhooks)
        videos = StoredVideos(store.bucket)
        dispatcher = _dispatcher(settings, database, videos, metrics)
        outbox = Outbox(database, videos)

        # 2. Serve the documented API, and RunPod's worker protocol under /v2.
        platform = Platform(queue, dispatcher, outbox, endpoint_id=ENDPOINT_ID, token=token)
        http_server = _http_server(settings, queue, store, metrics, [platform.router])
        server = await stack.enter_async_context(_listening(http_server, listener))
        stack.callback(platform.stop)

        # 3. Wait for the bucket, and requeue the tasks of the workers that exited with the last run of this server.
        await _run_until(stopping, [server, store.started])
        if stopping.is_set():
            return
        await _retry_database(lambda: dispatcher.release_workers(f"{instance.instance_id}-"))

        # 4. Requeue the tasks of lost workers, tidy up the bucket, listen for notifications, send webhooks, and stay
        #    the one instance.
        tidying = tidy_bucket_forever(database, outbox, Orphans(database, videos))
        retention = _retention(settings, queue, store.bucket)
        webhooks = _webhooks(settings, database, f"http://{_local_address(listener)}", metrics)
        background = await stack.enter_async_context(
            _background(sweep_forever(dispatcher), tidying, database.listen(), instance.keep(), *retention, *webhooks)
        )

        # 5. Run the workers. At the end they are given no more jobs, and then stopped.
        base_url = f"http://{_local_address(listener)}/v2"
        workers = []
        for index in range(settings.workers):
            environment = {**store.environment, **model_environment(settings, index)}
            worker = LocalWorker(f"{instance.instance_id}-{index}", dispatcher, base_url, token, environment)
            workers.append(Supervised(f"worker {index}", worker.launch, metrics.supervise(f"worker {index}")))
        supervisions = await stack.enter_async_context(supervising(workers, settings.shutdown_grace))
        stack.callback(platform.drain)
        await _run_until(stopping, [server, *background, *supervisions])
        log.info("stopping")


def _http_server(
    settings: ShimSettings, queue: JobQueue, store: OpenBucket, metrics: Metrics, routers: Sequence[Any] = ()
) -> HttpServer:
    public_url = str(settings.public_url) if settings.public_url is not None else None
    app = create_app(
        queue,
        store.bucket,
        metrics=metrics,
        public_url=public_url,
        routers=routers,
        access=settings.access,
        provider=settings.provider,
        rewriter=_rewriter(settings),
    )
    limits = ConnectionLimits(per_address=settings.max_connections_per_address)
    return HttpServer(app, grace=_CONNECTION_GRACE, limits=limits)


def _rewriter(settings: ShimSettings) -> Rewriter | None:
    """The chat model that rewrites prompts, if HUNYUAN_REWRITE_BASE_URL names one."""
    if settings.rewrite_base_url is None or settings.rewrite_model is None:
        return None
    key = settings.rewrite_api_key.get_secret_value() if settings.rewrite_api_key is not None else None
    return Rewriter(str(settings.rewrite_base_url), settings.rewrite_model, key)


def _retention(settings: ShimSettings, queue: JobQueue, bucket: Bucket) -> Sequence[Coroutine[Any, Any, None]]:
    """Deletes expired images, and old videos if HUNYUAN_VIDEO_TTL is set."""
    images = delete_expired_images(StoredImages(bucket))
    if settings.video_ttl is None:
        return (images,)
    videos = StoredVideos(bucket)
    delete = partial(delete_if_any, Tasks(queue, videos))
    return images, Retention(videos, timedelta(seconds=settings.video_ttl), delete).run_forever()


def _webhooks(
    settings: ShimSettings, database: Database, own_url: str, metrics: Metrics
) -> Sequence[Coroutine[Any, Any, None]]:
    """Sends webhooks, if HUNYUAN_WEBHOOK_SECRET is set."""
    if settings.webhooks is None:
        return ()
    if settings.public_url is None:
        log.warning("HUNYUAN_PUBLIC_URL is not set: video_url in webhooks starts with %s", own_url)
    server_url = str(settings.public_url or own_url).rstrip("/")

    def describe(job: JobSnapshot) -> Mapping[str, Any]:
        return status_of(job, server_url).model_dump(mode="json")

    webhooks = Webhooks(database, settings.webhooks, describe, metrics)
    return (webhooks.send_forever(),)


def _dispatcher(settings: ShimSettings, database: Database, videos: StoredVideos, metrics: Metrics) -> Dispatcher:
    return Dispatcher(
        database,
        find_result=videos.find_result,
        max_attempts=settings.max_attempts,
        history_ttl=settings.history_ttl,
        observer=metrics,
    )


async def open_database(settings: ShimSettings) -> Database:
    """The queue's database: HUNYUAN_DATABASE_URL, else a file in the data directory. Raises StartError."""
    return await _retry_database(lambda: Database.open(settings.queue_url, worker_timeout=settings.worker_timeout))


async def _claim_instance(settings: ShimSettings, instance_id: str) -> Instance:
    """The instance id in the data directory, or a new one for this start if another server uses that id."""
    instance = Instance(settings.queue_url, instance_id)
    while not await instance.claim():
        taken, instance = instance, Instance(settings.queue_url, secrets.token_hex(4))
        log.warning(
            "another server uses the instance id %s in %s, so this directory may be a copy of its HUNYUAN_DATA_DIR; "
            "using %s until the next start. Delete the file to get an id of its own",
            taken.instance_id,
            settings.directory / "instance",
            instance.instance_id,
        )
    return instance


async def _retry_database(ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` returns; retried while the queue's database does not answer.

    Raises:
        StartError: the database can't be used, or did not answer for half a minute.
    """

    async def attempt() -> T:  # tenacity awaits coroutine functions only
        return await ask()

    what = "a query of the queue's database (HUNYUAN_DATABASE_URL)"
    try:
        return await _DATABASE_START.async_retrying(QueueUnavailableError, what=what)(attempt)
    except (ValueError, QueueError) as exc:
        raise StartError(f"HUNYUAN_DATABASE_URL: {exc}") from exc


def _listen(settings: ShimSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as exc:
        raise StartError(
            f"HUNYUAN_HOST, HUNYUAN_PORT: can't listen on {settings.host}, port {settings.port}: {exc.strerror or exc}"
        ) from exc


def _local_address(listener: socket.socket) -> str:
    """host:port under which processes of this machine reach the listener."""
    host, port, *_ = listener.getsockname()
    loopback = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
    return f"{loopback.get(host, f'[{host}]' if ':' in host else host)}:{port}"


def _platform_token(settings: ShimSettings) -> str:
    """The key of the endpoints under /v2: HUNYUAN_PLATFORM_TOKEN, else one that is generated once."""
    if settings.platform_token is not None:
        return settings.platform_token.get_secret_value()
    path = settings.directory / "platform-token"
    return secret_file(path, lambda: secrets.token_urlsafe(32), form="[A-Za-z0-9_-]{43}")


@asynccontextmanager
async def _listening(server: HttpServer, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Serves until the block ends, and then finishes the requests in progress."""
    task = asyncio.create_task(server.serve(sockets=[listener]))
    log.info("listening on http://%s", _local_address(listener))
    try:
        yield task
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def _background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    """Runs `coroutines` until the block ends, and then cancels them."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def _run_until(stopping: asyncio.Event, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Returns when `stopping` is set or when one of `tasks` ends, whose error is raised."""
    signalled = asyncio.create_task(stopping.wait())
    try:
        done, _ = await asyncio.wait({signalled, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        signalled.cancel()
