"""One machine: the embedded S3 gateway and the worker processes, kept running for as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Seconds before a process that died is started again: the first time, the second, ... and from then on.
_BACK_OFF: Final = (0.5, 1, 2, 5, 10, 30)
#: A process that ran for so many seconds had started well: the next back-off begins anew.
_SETTLED: Final = 60.0
_GATEWAY_START: Final = 30.0

log = logging.getLogger(__name__)


class LocalError(Exception):
    """A part of the local service can't be started; the message says what to do."""


@dataclass(frozen=True)
class Launch:
    """One life of a process: how to start it, where its output goes (None: ours), and whom its end concerns.

    `ended` is given the exit code (negative: the signal) and whether the process was asked to end.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    ended: Callable[[int, bool], Awaitable[None]]
    output: Path | None = None


class Supervised:
    """A process that is started again, with back-off, whenever it ends before `stop`.

    It runs in a session of its own, so that a Ctrl-C in our terminal is ours to handle, and what it leaves behind
    in its process group goes with it. It can't outlive us: see `shim.tether`.
    """

    def __init__(
        self, name: str, launch: Callable[[], Awaitable[Launch]], on_restart: Callable[[], None] = lambda: None
    ) -> None:
        self._name = name
        self._launch = launch
        self._on_restart = on_restart
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Keep the process running until `stop`. Raises what `Launch.ended` raises."""
        failures = 0
        while not self._stopping.is_set():
            launch = await self._launch()
            started = time.monotonic()
            code = await self._live(launch)
            await launch.ended(code, self._stopping.is_set())
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > _SETTLED else failures
            delay = _BACK_OFF[min(failures, len(_BACK_OFF) - 1)]
            failures += 1
            log.warning("%s ended with code %d; starting it again in %.1f s", self._name, code, delay)
            self._on_restart()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _live(self, launch: Launch) -> int:
        tethered = [sys.executable, "-m", "shim.host.die_with_parent", str(os.getpid()), *launch.command]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(launch.output.open("ab")) if launch.output else None
            process = await asyncio.create_subprocess_exec(
                *tethered,
                env=launch.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process = process
        if self._stopping.is_set():  # `stop` came while the process was being made and saw none
            process.terminate()
        try:
            return await process.wait()
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            self._process = None

    async def stop(self, grace: float) -> None:
        """SIGTERM, and after `grace` seconds SIGKILL. Returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            log.warning("%s did not end within %.0f s of SIGTERM", self._name, grace)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
