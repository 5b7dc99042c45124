"""GET /tasks/{task_id}/events: a task's status at each change, as Server-Sent Events.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from shim.api.dependencies import GetServices, Services
from shim.api.documented import error_responses
from shim.api.status import status_of
from shim.http.admission import STREAM_CONNECTION
from shim.queue.base import JobSnapshot

#: Seconds of silence after which a comment is sent, so that proxies keep the connection and a lost client is noticed.
_KEEP_ALIVE: Final = 15.0
#: Milliseconds after which a browser connects again.
_RECONNECT: Final = 3000
#: An event's id is the number of the job's last event times this, plus a count that makes it grow.
_PER_EVENT: Final = 1_000_000
_ID: Final = re.compile(r"[0-9]{1,15}")

router = APIRouter()


@router.get(
    "/tasks/{task_id:path}/events",
    operation_id="get_task_events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The events."},
        **error_responses(401, 404, 500, 503),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The `id` of the last event that the client has: the answer begins after it.",
                "schema": {"type": "string"},
            }
        ]
    },
)
async def events(task_id: str, request: Request, services: GetServices) -> Response:
    """Follow a task as Server-Sent Events: `event: status`, an `id` that grows, and GET /status/{task_id} as `data`.

    The first event comes at once, then one at every change, and a comment every 15 s of silence. The answer ends after
    the event of a completed or failed task; if it ends earlier, connect again. A client that sends Last-Event-ID then
    gets each state and each stage that it has missed. Progress between two events of one stage may be left out, and in
    front of RunPod, which keeps no history, whole stages.
    """
    job = await services.tasks.find(task_id)
    last_id = _last_id(request, job)
    missed = await services.feeds.missed(job, last_id // _PER_EVENT)
    return EventStream(request, services, [*missed, job], last_id)


def _last_id(request: Request, job: JobSnapshot) -> int:
    """The client's last event id; 0 without one, and for one that this job has not reached."""
    text = request.headers.get("last-event-id", "")
    given = int(text) if _ID.fullmatch(text) else 0
    return given if given // _PER_EVENT <= job.last_event else 0


class EventStream(Response):
    """Sends `jobs`, the last of which was just read, and then what becomes of it."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, services: Services, jobs: Sequence[JobSnapshot], last_id: int) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._services = services
        self._jobs = jobs
        self._last_id = last_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends with the task, with the client, or when the server needs the connection."""
        stream: Any = scope.get("state", {}).get(STREAM_CONNECTION, asyncio.Event)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_events(send))
        endings = [asyncio.create_task(stream().wait()), asyncio.create_task(_disconnected(receive))]
        try:
            await asyncio.wait([sending, *endings], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *endings):
                task.cancel()
            await asyncio.wait([sending, *endings])
        if not sending.cancelled():
            sending.result()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        await self._send(send, f"retry: {_RECONNECT}\n\n" + self._text(self._jobs))
        job = self._jobs[-1]
        if job.state.is_terminal:
            return
        async with self._services.feeds.listening(job) as listener:
            while not listener.is_over:
                news = await listener.news(_KEEP_ALIVE)
                await self._send(send, self._text(news) or ":\n\n")

    def _text(self, jobs: Sequence[JobSnapshot]) -> str:
        return "".join(self._event(job) for job in jobs)

    def _event(self, job: JobSnapshot) -> str:
        self._last_id = max(job.last_event * _PER_EVENT, self._last_id + 1)
        data = status_of(job, self._request, self._services).model_dump_json()
        return f"id: {self._last_id}\nevent: status\ndata: {data}\n\n"

    async def _send(self, send: Send, text: str) -> None:
        """Waits while the client reads slowly."""
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
