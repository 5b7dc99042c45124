"""`python -m tests.support.scripted_worker`: the worker with its SDK loop, bucket and ffmpeg, and the scripted model.

It writes a note (a line of JSON) for each `rendering`, with the time of its last lookup of the manifest, for each
`uploading` of a video that begins, and for each `stored` manifest. A step hangs while the file `hang-PID` is beside
the notes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import re
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from contract import tracing
from handler.__main__ import exit_on_sigterm
from handler.report import Reporter
from handler.serverless import serve
from handler.settings import WorkerSettings
from handler.watchdog import Watchdog, exit_stuck
from handler.worker import Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings, bucket_settings
from tests.support.scripted_model import ScriptedModel
from tests.support.small_videos import make_videos_small
from tests.support.stepped_clock import follow


class Notes:
    """A file that several workers append to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, event: str, task_id: str, at: float) -> None:
        line = json.dumps({"event": event, "task_id": task_id, "at": at, "pid": os.getpid()})
        with self._path.open("a") as file:
            file.write(line + "\n")  # one write, appended: lines of several processes do not mix


class NotedBucket(Bucket):
    """Remembers which task's manifest was looked up last, and when."""

    def __init__(self, settings: BucketSettings, notes: Notes) -> None:
        super().__init__(settings, observe=tracing.bucket_request)
        self._notes = notes
        self._last_lookup = ("", 0.0)

    def get_bytes(self, key: str) -> bytes:
        self._last_lookup = (_task_id(key), time.time())
        return super().get_bytes(key)

    def put_file(self, path: Path, key: str, **options: Any) -> None:
        if path.suffix == ".mp4":
            self._notes.add("uploading", _task_id(key), time.time())
        super().put_file(path, key, **options)

    def put_bytes(self, body: bytes, key: str, **options: Any) -> None:
        super().put_bytes(body, key, **options)
        if b'"status":"completed"' in body:  # a manifest, not a tombstone
            self._notes.add("stored", _task_id(key), time.time())

    def note_rendering(self) -> None:
        self._notes.add("rendering", *self._last_lookup)


def _task_id(key: str) -> str:
    """The task of an object: the UUID in its key, or the name of the file."""
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)
    return found[0] if found else PurePosixPath(key).stem


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--step-seconds", type=float, default=0.1)
    parser.add_argument("--answer-timeout", type=float, default=150.0)
    parser.add_argument("--frame-seconds", type=float, default=0.0, help="seconds before each chunk of frames")
    parser.add_argument("--hang", type=Path, help="the first step does not end while this file exists")
    parser.add_argument("--hold-gil", action="store_true", help="the first step blocks the interpreter for 10 minutes")
    parser.add_argument("--clock", type=Path, help="both clocks of Python are ahead by the seconds in this file")
    parser.add_argument("--full-size", action="store_true", help="encode as many pixels as were asked for")
    parser.add_argument("--silent", action="store_true", help="send no progress")
    arguments = parser.parse_args()
    sys.argv[1:] = []  # the SDK parses them, too
    if arguments.clock is not None:
        follow(arguments.clock, monotonic=True)
    if not arguments.full_size:
        make_videos_small(pytest.MonkeyPatch())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    exit_on_sigterm()
    settings, named = WorkerSettings(), bucket_settings()
    assert named is not None
    assert settings.platform_key is not None
    tracing.configure(settings, "hunyuan-worker", "0")
    bucket = NotedBucket(named, Notes(arguments.notes))
    hang = arguments.notes.with_name(f"hang-{os.getpid()}")

    def before_step(step: int) -> None:
        if step == 0:
            bucket.note_rendering()
            while arguments.hang is not None and arguments.hang.exists():
                time.sleep(0.05)
            if arguments.hold_gil:
                ctypes.PyDLL(None).sleep(600)
        time.sleep(arguments.step_seconds)
        while hang.exists():
            time.sleep(0.05)

    model = ScriptedModel(before_step)
    model.before_frames = lambda _: time.sleep(arguments.frame_seconds)
    url = (settings.report_url or "").replace("$RUNPOD_POD_ID", settings.worker_id or "")
    with Reporter(url or None, key=settings.platform_key.get_secret_value(), model=model.name) as reporter:
        reporter.ready(model, {})
        watchdog = Watchdog(
            stall_timeout=settings.stall_timeout,
            render_timeout=settings.render_timeout,
            on_stall=reporter.stalled,
            on_stuck=exit_stuck,
            ends_process=True,
        )
        serve(
            Worker(model, bucket, version="0", work_dir=settings.work_dir, watchdog=watchdog),
            send_progress=not arguments.silent,
            on_stop=reporter.stopping,
            answer_timeout=arguments.answer_timeout,
            releases_stalled=True,
        )


if __name__ == "__main__":
    main()
