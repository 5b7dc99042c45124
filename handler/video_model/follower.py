"""`python -m handler.video_model.follower PARENT_PID SOCKET`: a rank that renders what rank 0 renders.

It never decodes, stores or reports: see `handler.video_model.ranks`.
"""

import logging
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from contract import log_fields as logs
from handler.machine import die_with_parent
from handler.video_model.base import ModelError, ModelOutOfMemoryError, RenderCancelledError
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_rank
from handler.video_model.parallel import Parallel
from handler.video_model.ranks import Beginning, Ended, GiveUp, Order, Verdict

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Loads the model and renders jobs until rank 0 ends."""
    parent_pid, socket = map(int, arguments)
    die_with_parent(parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when to stop
        signal.signal(number, signal.SIG_IGN)
    rank_0 = Connection(socket)
    beginning: Beginning = rank_0.recv()
    settings, rank = beginning.settings, beginning.rank
    logs.configure(settings, rank=str(rank), **({"worker_id": settings.worker_id} if settings.worker_id else {}))
    parallel = Parallel(rank, settings.gpus_per_job, beginning.directory, backend=beginning.backend)
    try:
        model = load_rank(settings, parallel)
    except ModelError as exc:
        rank_0.send(Ended(str(exc)))
        signal.pause()  # until rank 0, which may still load, has read why, and kills this process
        raise
    rank_0.send(Ended())
    inbox = _Inbox(rank_0, parallel)
    while True:
        rank_0.send(_render(model, parallel, inbox.next_order(), inbox))


class _Inbox:
    """What rank 0 sends, in order. A thread reads it, because a call that waits for another rank must end on GiveUp."""

    def __init__(self, rank_0: Connection, parallel: Parallel) -> None:
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._rank_0 = rank_0
        self._parallel = parallel
        Thread(target=self._read, daemon=True).start()

    def next_order(self) -> Order:
        """Drops what is left over from a job that this rank gave up."""
        while not isinstance(message := self._messages.get(), Order):
            pass
        return message

    def is_set(self) -> bool:
        """See `Cancellation`: rank 0's verdict before this step."""
        message = self._messages.get()
        if isinstance(message, GiveUp):
            raise RuntimeError("another rank has failed")
        assert isinstance(message, Verdict)  # noqa: S101 - rank 0 sends nothing else during a job
        return message.is_cancelled

    def _read(self) -> None:
        try:
            while True:
                message = self._rank_0.recv()
                if isinstance(message, GiveUp):
                    self._parallel.abort()
                self._messages.put(message)
        except (EOFError, OSError):
            os._exit(0)


def _render(model: PipelineModel, parallel: Parallel, order: Order, inbox: _Inbox) -> Ended:
    """Renders the latents of a job, which rank 0 has, too. Never raises: rank 0 decides what follows."""
    try:
        parallel.join(order.attempt)
        model.render_latents(order.job_input, image=order.image, seed=order.seed, cancelled=inbox)
    except RenderCancelledError:
        return Ended()
    except Exception as exc:  # noqa: BLE001 - reported to rank 0, which logs it
        traceback.clear_frames(exc.__traceback__)  # its frames hold the process groups
        parallel.leave()
        model.release_memory()
        return Ended(f"{type(exc).__name__}: {exc}", isinstance(exc, ModelOutOfMemoryError))
    return Ended()


if __name__ == "__main__":
    main(sys.argv[1:])
