"""A command on a terminal of 80 columns, as a person sees it."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path


class OnTerminal:
    """`python -m hunyuan ARGUMENTS` whose stdin, stdout and stderr are one terminal."""

    def __init__(self, *arguments: str, directory: Path, environment: Mapping[str, str], columns: int = 80) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hunyuan", *arguments],
            cwd=directory,
            env={**os.environ, "TERM": "xterm", **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
        )
        os.close(slave)
        self.text = ""

    def until(self, wanted: str, seconds: float = 60.0) -> None:
        """Reads until the terminal has shown `wanted`."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            assert self._read() or wanted in self.text, self.text

    def type_in(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = 60.0) -> int:
        """Reads to the end and returns the exit code."""
        deadline = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < deadline, self.text
        os.close(self._master)
        return self.process.wait(10)

    def screen(self) -> list[str]:
        """The lines as they are left: what a carriage return overwrote is gone."""
        return [line.rstrip("\r").rpartition("\r")[2] for line in self.text.split("\n")]

    def _read(self) -> bool:
        """Whether the command may print more."""
        if not select.select([self._master], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError as exc:  # Linux's end of a terminal whose programs have ended
            if exc.errno != errno.EIO:
                raise
            return False
        self.text += data.decode(errors="replace")
        return bool(data)
