"""Ends a render that makes no progress, and the worker if the render does not end.

Progress is a step of the model, a decoded latent frame, frames that ffmpeg takes, bytes that the bucket takes, or the
wait before a retry that the store policy allows. A thread beside the render compares the last progress with the limits,
because the render itself may wait for ffmpeg or for the GPU.
"""

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Final

from contract.job import FPS, JobInput, num_frames
from contract.worker import WorkerExit

#: Seconds without progress outside the model: frames are encoded, or bytes are sent. A request to the bucket may wait
#: 30 s for an answer, four times.
_STALL: Final = 300.0
#: Seconds of a step at 1280x720 and 5 s of video on the slowest GPUs that run the model: 15 PFLOP at 50 TFLOP/s.
_STEP: Final = 300.0
_STEP_PIXELS: Final = 1280 * 720
_STEP_FRAMES: Final = num_frames(5)
#: The most steps of a base model, unless the job says more, and of the super-resolution stages together.
_BASE_STEPS: Final = 50
_UPSCALING_STEPS: Final = 14
#: Seconds of a whole render of the demo model.
_DEMO_RENDER: Final = 3600.0
#: A render may take so many times its calculated seconds: GPUs reach less of their peak than assumed, but not a tenth.
_EXPECTED_TIMES: Final = 10.0
#: Seconds that a render has to end after it was stopped: long enough to write a log line and to delete its files.
_GRACE: Final = 5.0
_POLL_INTERVAL: Final = 0.25
#: Its file descriptor: another thread may hold the lock of `sys.stderr`.
_STDERR: Final = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Seconds: without progress outside the model (`stall`) and inside it (`step`), and for the `render` as a whole."""

    stall: float
    step: float
    render: float

    @classmethod
    def of(cls, job_input: JobInput, *, is_demo: bool) -> "Limits":
        """Generous limits for this job: the slowest GPU must finish, and only a hang must not.

        Attention dominates a large step, so its seconds grow with the square of pixels and frames. A 1080p step of 10 s
        of video is 20 times as long as one of 5 s at 720p: no one limit fits both.
        """
        if is_demo:
            return cls(_STALL, _STALL, _DEMO_RENDER)
        width, height = job_input.size
        length = (FPS * job_input.duration / _STEP_FRAMES) ** 2
        base = max(_STEP * length, _STEP)
        largest = base * max(width * height / _STEP_PIXELS, 1.0) ** 2
        steps = job_input.num_inference_steps or _BASE_STEPS
        return cls(_STALL, largest, steps * base + _UPSCALING_STEPS * largest + 2 * largest)


class Watch:
    """The progress of one job. The render thread calls everything except `check` and `allowed`."""

    def __init__(self, cancelled: Event, stall: float) -> None:
        self._cancelled = cancelled
        self._stall = self._step = stall
        self._kill: Callable[[], None] = _nothing
        self._render_limit = self._render_deadline = float("inf")
        #: The time of the last progress, and the seconds until the next one must come.
        self._progress = time.monotonic(), stall
        #: Why the watchdog has stopped the render; None if it has not.
        self.reason: str | None = None

    @property
    def allowed(self) -> float:
        """Seconds from the last progress until the render is stopped."""
        return self._progress[1]

    def step(self) -> None:
        """The model has made a step, and may take as long as a step takes until the next one."""
        self._progress = time.monotonic(), self._step

    def advance(self, _: object = None) -> None:
        """Frames were encoded, bytes were sent, or a retry waits."""
        self._progress = time.monotonic(), self._stall

    @contextmanager
    def rendering(self, limits: Limits) -> Iterator[None]:
        """Limits the whole block to `limits.render`."""
        self._stall, self._step = limits.stall, limits.step
        self._render_limit, self._render_deadline = limits.render, time.monotonic() + limits.render
        self.step()
        try:
            yield
        finally:
            self._render_deadline = float("inf")
            self._kill = _nothing
            self.advance()

    def encoding(self, kill: Callable[[], None]) -> None:
        """An encoder was started; `kill` ends it, even while the render thread waits for it."""
        self._kill = kill
        self.advance()

    def check(self) -> None:
        """Stops the render if it is over its limits, and the encoder of a render that was stopped or cancelled."""
        if self.reason is None:
            self.reason = self._overdue(time.monotonic())
            if self.reason is not None:
                self._cancelled.set()
        if self._cancelled.is_set():
            self._kill()

    def _overdue(self, now: float) -> str | None:
        at, allowed = self._progress  # one read: the render thread replaces the pair
        if now - at > allowed:
            return f"The render made no progress for {allowed:g} s"
        if now > self._render_deadline:
            return f"The render took longer than {self._render_limit:g} s"
        return None


@dataclass(frozen=True)
class Watchdog:
    """Watches one render at a time. An explicit `stall_timeout` or `render_timeout` replaces the derived limit.

    `on_stall` is called with the reason when a render is stopped, and with None when that render has ended. If it has
    not ended some seconds later, `on_stuck` is called with the reason. A render that blocks the interpreter itself ends
    the process if `ends_process` is set: no Python code can run then.
    """

    stall_timeout: float | None = None
    render_timeout: float | None = None
    on_stall: Callable[[str | None], None] = lambda _: None
    on_stuck: Callable[[str], None] = lambda _: None
    ends_process: bool = False

    @contextmanager
    def watching(self, cancelled: Event) -> Iterator[Watch]:
        """Watches the block, which must end soon after `cancelled` is set."""
        watch, ended = Watch(cancelled, self.stall_timeout or _STALL), Event()
        thread = Thread(target=copy_context().run, args=(self._run, watch, ended), name="watchdog", daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            ended.set()
            thread.join()
            if watch.reason is not None:
                self.on_stall(None)

    def limits(self, job_input: JobInput, *, is_demo: bool, expected: float | None = None) -> Limits:
        """The limits of this job. `expected` seconds of its render, if they are known, replace those of a slow GPU."""
        derived = Limits.of(job_input, is_demo=is_demo)
        if expected is not None:
            derived = replace(derived, render=_EXPECTED_TIMES * expected + _STALL)
        return Limits(
            self.stall_timeout or derived.stall,
            self.stall_timeout or derived.step,
            self.render_timeout or derived.render,
        )

    def _run(self, watch: Watch, ended: Event) -> None:
        with self._process_deadline(watch) as postpone:
            while watch.reason is None:
                if ended.wait(_POLL_INTERVAL):
                    return
                watch.check()
                postpone()
            log.error("%s; stopping it (HUNYUAN_STALL_TIMEOUT, HUNYUAN_RENDER_TIMEOUT)", watch.reason)
            self.on_stall(watch.reason)
            deadline = time.monotonic() + _GRACE
            while not ended.wait(_POLL_INTERVAL):
                watch.check()
                if time.monotonic() > deadline:
                    self.on_stuck(watch.reason)
                    return

    @contextmanager
    def _process_deadline(self, watch: Watch) -> Iterator[Callable[[], None]]:
        """Ends the process from a thread of C, unless the caller postpones it while the interpreter runs."""
        if not self.ends_process:
            yield _nothing
            return
        postponed = float("-inf")

        def postpone() -> None:
            nonlocal postponed
            now = time.monotonic()
            if now - postponed > _GRACE:
                postponed = now
                faulthandler.dump_traceback_later(watch.allowed + 3 * _GRACE, exit=True, file=_STDERR)

        postpone()
        try:
            yield postpone
        finally:
            faulthandler.cancel_dump_traceback_later()


def exit_stuck(reason: str) -> None:
    """Ends the process with WorkerExit.RENDER_STUCK. A thread that never returns can't be ended in any other way."""
    log.critical(
        "%s and did not end when it was stopped; the worker exits with code %d. Its task is queued again. The stack of "
        "every thread follows",
        reason,
        WorkerExit.RENDER_STUCK,
    )
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    os._exit(WorkerExit.RENDER_STUCK)


def _nothing() -> None:
    pass
