"""RunPod's protocol over our own queue: the unmodified SDK worker and the SDK's client both talk to this server.

Paths and shapes are those of RunPod's endpoint API (https://docs.runpod.io/serverless/endpoints/operations) and of
the worker loop in runpod-python 1.12 (serverless/modules).
"""

import asyncio
import hmac
from typing import Final

from fastapi import APIRouter, Depends, Request

from shim.api.runpod_client import ClientApi
from shim.api.runpod_worker import LONG_POLL_SECONDS, WorkerApi
from shim.errors import ApiError, ServerErrorCode
from shim.http.access_log import bind_path_ids
from shim.http.admission import TRUST_CONNECTION
from shim.queue.dispatch import Dispatcher
from shim.queue.outbox import Outbox
from shim.queue.sql import SqlQueue

#: Seconds that a long poll lasts while the server drains.
_DRAINING_LONG_POLL: Final = 0.5


class Platform:
    """Both sides of RunPod's protocol for one endpoint, behind its token. `router` is the app's to include."""

    def __init__(
        self,
        queue: SqlQueue,
        dispatcher: Dispatcher,
        outbox: Outbox,
        *,
        endpoint_id: str,
        token: str,
        hold: float = LONG_POLL_SECONDS,
    ) -> None:
        if not token.strip():
            raise ValueError("the platform's token is empty: any request without a key would match it")
        self._token = token.encode()
        self._stopped = asyncio.Event()
        self._worker_api = WorkerApi(dispatcher, self._stopped, hold)
        self.router = APIRouter(
            prefix=f"/v2/{endpoint_id}",
            dependencies=[Depends(self._authorize), Depends(bind_path_ids)],
            include_in_schema=False,
        )
        # Not by include_router: a nested router's routes lose the prefix in logs and metrics.
        client_api = ClientApi(queue, dispatcher, outbox, self._stopped)
        for method, path, route in (*self._worker_api.routes, *client_api.routes):
            self.router.add_api_route(path, route, methods=[method])

    def drain(self) -> None:
        """Hand out no more jobs. Long polls become short: a worker that stops waits for the end of its own."""
        self._worker_api.drain(_DRAINING_LONG_POLL)

    def stop(self) -> None:
        """End every long poll now, because the server is about to close its connections."""
        self.drain()
        self._stopped.set()

    async def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self._token):
            text = "send the value of HUNYUAN_PLATFORM_TOKEN as Authorization: Bearer TOKEN"
            raise ApiError(ServerErrorCode.UNAUTHORIZED, f"the platform's key is missing or wrong: {text}")
        if trust := getattr(request.state, TRUST_CONNECTION, None):
            trust()
