"""The columns of a job's webhook, as the queue's other transactions change them. `shim.queue.webhooks` sends it."""

from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, case, func, literal, null

from shim.queue.job import WebhookState
from shim.queue.schema import jobs

#: Seconds after the end of its task after which a webhook is not retried: longer than the schedule of the standard.
MAX_AGE: Final = 4 * 24 * 3600.0


def webhook_columns(url: str | None) -> dict[str, Any]:
    """The columns of a new job with this webhook."""
    if url is None:
        return {}
    return {"webhook_url": url, "webhook_host": urlsplit(url).netloc[:300], "webhook": stored(WebhookState())}


def due_if_any(now: float) -> dict[str, Any]:
    """The changes of a job that ends now."""
    return {"webhook_due_at": case((jobs.c.webhook_url.is_not(None), now), else_=null())}


def begun_again() -> dict[str, Any]:
    """The changes of an ended job that is queued again. A webhook that is not delivered yet is dropped."""
    initial = literal(stored(WebhookState()), jobs.c.webhook.type)
    return {"webhook_due_at": None, "webhook": case((jobs.c.webhook_url.is_not(None), initial), else_=null())}


def has_no_pending_webhook(now: float) -> ColumnElement[bool]:
    """Selects the jobs whose webhook no server will send. One that is long overdue has no server that sends any."""
    return func.coalesce(jobs.c.webhook_due_at, 0.0) < now - MAX_AGE


def stored(state: WebhookState) -> Any:
    """The state as its column has it."""
    return state.model_dump(mode="json")
