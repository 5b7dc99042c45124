"""What is called at each change of a job, for metrics."""

from contract.errors import JobFailure
from contract.result import Manifest
from shim.queue.job import JobState


class JobObserver:
    """Receives each change of a job after it is stored. This one ignores them; subclasses must not raise."""

    def submitted(self) -> None:
        """A job was queued."""

    def started(self, waited: float) -> None:
        """A worker took a job for the first time, `waited` seconds after its submission."""

    def requeued(self) -> None:
        """A job was queued again because its worker was lost."""

    def webhook_attempted(self, state: str) -> None:
        """An attempt at a webhook has ended; `state` is that of the webhook since then, as in WebhookState."""

    def ended(
        self, state: JobState, *, failure: JobFailure | None = None, result: Manifest | None = None, count: int = 1
    ) -> None:
        """`count` jobs reached a terminal state. A COMPLETED job that has no result comes with `failure` NO_VIDEO."""
