"""A worker process of this machine."""

import logging
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from contract.job import DEMO_MODEL
from contract.log_fields import bound
from contract.worker import WorkerExit
from contract.worker_environment import ENDPOINT_ID, worker_environment
from shim.api.gpu import local_gpus
from shim.host.errors import StartError
from shim.host.supervisor import Launch
from shim.queue.base import QueueUnavailableError
from shim.queue.dispatch import Dispatcher
from shim.settings import ShimSettings

log = logging.getLogger(__name__)


def model_environment(settings: ShimSettings, index: int) -> dict[str, str]:
    """The model of worker number `index`, and its GPUs where several workers share several of them."""
    environment = {"HUNYUAN_MODEL_PATH": settings.model_path or DEMO_MODEL, "PYTHONUNBUFFERED": "1"}
    gpus = len(local_gpus())
    if settings.workers > 1 and gpus > 1:
        first = index * settings.gpus_per_job
        own = range(first, first + settings.gpus_per_job)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu % gpus) for gpu in own)
    return environment


@dataclass
class LocalWorker:
    """Launches one worker again and again. Each process has its own worker id: it owns none of the earlier one's jobs.

    `base_url` ends in /v2; `environment` names the model and the bucket.
    """

    name: str
    dispatcher: Dispatcher
    base_url: str
    token: str
    environment: Mapping[str, str]
    worker_id: str = ""

    async def launch(self) -> Launch:
        """The command and environment of the next process."""
        await self._release()  # a second time, in case the database was unavailable when the last process exited
        self.worker_id = f"{self.name}-{secrets.token_hex(4)}"
        platform = worker_environment(self.base_url, ENDPOINT_ID, self.worker_id, self.token)
        return Launch([sys.executable, "-m", "handler"], {**self.environment, **platform}, self._on_exit)

    async def _on_exit(self, code: int, requested: bool) -> None:
        if code == WorkerExit.BAD_SETTINGS:
            raise StartError("the worker rejected its settings; its log lines above name them")
        if code != WorkerExit.NO_MODEL_OR_BUCKET:  # /health and /ready show that report until the next process starts
            await self._release(count_attempt=not requested)

    async def _release(self, *, count_attempt: bool = True) -> None:
        """Requeues the worker's task now; without this it waits until the worker's lease expires."""
        try:
            await self.dispatcher.release_worker(self.worker_id, count_attempt=count_attempt)
        except QueueUnavailableError as exc:
            with bound(worker_id=self.worker_id):
                log.warning(
                    "the worker exited while the queue's database is unavailable; its task is requeued when its lease "
                    "expires (HUNYUAN_WORKER_TIMEOUT): %s",
                    exc,
                )
