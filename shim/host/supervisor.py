"""Child processes that are restarted for as long as the server runs."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from contract.retry import RetryPolicy
from shim.settings import child_environment

_RESTART: Final = RetryPolicy(first=0.5, longest=30)
#: A process that ran for this many seconds had started well: the next restart waits for the shortest time again.
_STABLE_AFTER: Final = 60.0

log = logging.getLogger(__name__)


async def _ignore_exit(_: int, __: bool) -> None:
    pass


@dataclass(frozen=True)
class Launch:
    """How to start a process once. Its output goes to ours unless `output` names a file.

    `on_exit` is called with the exit code (negative: the signal) and whether `stop` had been called. An error that it
    raises ends the supervision.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    on_exit: Callable[[int, bool], Awaitable[None]] = _ignore_exit
    output: Path | None = None


class Supervised:
    """A process that is restarted, with back-off, whenever it exits before `stop`.

    It runs in a session of its own, so that Ctrl-C in our terminal reaches only us, and whatever is left in its
    process group is killed with it. It dies when we die: see `shim.host.die_with_parent`.
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
        """Keeps the process running until `stop`. Raises what `Launch.on_exit` raises."""
        failures = 0
        while not self._stopping.is_set():
            launch = await self._launch()
            started = time.monotonic()
            code = await self._run_once(launch)
            await launch.on_exit(code, self._stopping.is_set())
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - started > _STABLE_AFTER else failures + 1
            delay = _RESTART.wait_after(failures)
            log.warning("%s exited with code %d; restarting it in %.1f s", self._name, code, delay)
            self._on_restart()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def _run_once(self, launch: Launch) -> int:
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(launch.output.open("ab")) if launch.output else None
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "shim.host.die_with_parent", str(os.getpid())),
                *launch.command,
                env=child_environment(**launch.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process = process
        if self._stopping.is_set():  # `stop` was called before the process existed
            process.terminate()
        try:
            return await process.wait()
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            self._process = None

    async def stop(self, grace: float) -> None:
        """Sends SIGTERM, and SIGKILL after `grace` seconds. Returns when the process has exited."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not exit within %.0f s of SIGTERM; killing it", self._name, grace)
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()


@contextlib.asynccontextmanager
async def supervising(processes: Sequence[Supervised], grace: float) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    """Keeps `processes` running until the block ends, and then stops them within `grace` seconds."""
    tasks = [asyncio.create_task(process.run()) for process in processes]
    try:
        yield tasks
    finally:
        await asyncio.gather(*(process.stop(grace) for process in processes))
        await asyncio.gather(*tasks, return_exceptions=True)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
