"""Checks every promise against the answers that clients received, the database, the bucket and the workers' notes."""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from pathlib import Path

import boto3
import httpx
import psycopg
from pydantic import ValidationError

from contract.result import Manifest
from storage import layout
from storage.errors import ObjectNotFoundError
from storage.settings import BucketSettings
from tests.faults.clients import Record
from tests.faults.forms import HAS_RECONCILER
from tests.faults.system import System
from tests.support.mp4 import probe

#: Seconds within which the reconciler removes what no task owns.
_RECONCILE_SECONDS = 240.0
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def ended(system: System) -> int:
    """How many ends of tasks the queue has counted. It counts each in the transaction that ends the task."""
    with psycopg.connect(system.database.url) as connection:
        row = connection.execute("SELECT sum(total) FROM outcomes").fetchone()
    assert row is not None
    return int(row[0])


def violations(system: System, record: Record, tasks: int, ended_before: int) -> list[str]:
    """Everything that contradicts a promise."""
    found = list(record.violations)
    if len(record.ended) != tasks:
        return [*found, f"{len(record.ended)} of {tasks} tasks ended"]
    return [
        *found,
        *_changed_answers(system, record),
        *_wrong_in_database(system, record, ended(system) - ended_before),
        *_wrong_videos(system, record),
        *_rendered_again(system, record),
        *(_remaining_orphans(system, record) if HAS_RECONCILER else []),
    ]


def _changed_answers(system: System, record: Record) -> list[str]:
    """Each server answers with the same final status as when the task ended."""
    seen = Record()
    seen.ended = dict(record.ended)
    for task_id in record.ended:
        for shim in system.shims:
            seen.end(shim.service.status(task_id))
    return seen.violations


def _wrong_in_database(system: System, record: Record, ends: int) -> list[str]:
    with psycopg.connect(system.database.url) as connection:
        rows = connection.execute("SELECT task_id, state, attempts FROM jobs").fetchall()
    states = ("completed", "failed", "cancelled")
    wrong = [f"{task_id} is {state}" for task_id, state, _ in rows if state not in states]
    attempts = {task_id: attempts for task_id, _, attempts in rows}
    for task_id, status in record.ended.items():
        if "was lost" in status.get("error", "") and attempts.get(task_id, 0) < 3:
            wrong.append(f"{task_id} was tried {attempts.get(task_id)} times; the client received {status}")
    if ends != len(record.accepted):
        wrong.append(f"{len(record.accepted)} tasks were accepted, and {ends} ended")
    return wrong


def _wrong_videos(system: System, record: Record) -> list[str]:
    """The manifest names the bytes that the client got, the server still serves them, and ffmpeg decodes them."""
    wrong = []
    for task_id, status in record.ended.items():
        if status["status"] != "completed":
            continue
        try:
            manifest = Manifest.model_validate_json(system.bucket.get_bytes(layout.manifest_key(task_id)))
        except ObjectNotFoundError as exc:
            wrong.append(f"{task_id} is completed but not stored: {exc}")
            continue
        try:
            served = system.shims[0].service.http.get(f"/videos/{task_id}.mp4").content
        except httpx.TransportError as exc:
            wrong.append(f"{task_id} is completed and can't be downloaded: {exc}")
            continue
        sums = {manifest.sha256, hashlib.sha256(served).hexdigest(), record.downloaded.get(task_id)}
        if len(sums) > 1 or len(served) != status["file_size"]:
            wrong.append(f"{task_id}: manifest, served and first download differ: {sums}, {len(served)} of {status}")
            continue
        wrong += _undecodable(system.directory / "served.mp4", served, task_id)
    return wrong


def _undecodable(path: Path, video: bytes, task_id: str) -> list[str]:
    path.write_bytes(video)
    try:
        frames = probe(path).num_frames
    except AssertionError as exc:
        return [f"{task_id}: ffmpeg can't decode the video: {exc}"]
    return [] if frames == 121 else [f"{task_id}: the video has {frames} frames"]


def _rendered_again(system: System, record: Record) -> list[str]:
    """The tasks that a worker rendered although their manifest was already stored."""
    notes = [note for note in system.notes() if note.task_id in record.ended]
    stored: dict[str, float] = {}
    for note in notes:
        if note.event == "stored":
            stored[note.task_id] = min(note.at, stored.get(note.task_id, note.at))
    return [
        f"{note.task_id} was stored at {stored[note.task_id]} and rendered again at {note.at} by {note.pid}"
        for note in notes
        if note.event == "rendering" and note.at > stored.get(note.task_id, float("inf"))
    ]


def _remaining_orphans(system: System, record: Record) -> list[str]:
    """The orphans that the servers do not delete. They scan the bucket when they start, and then every 10 minutes."""
    if orphans(system, record):
        for shim in system.shims:
            shim.kill()
            shim.start()
    deadline = time.monotonic() + _RECONCILE_SECONDS
    while (found := orphans(system, record)) and time.monotonic() < deadline:
        time.sleep(1)
    return [f"no completed task owns {key}" for key in found]


def orphans(system: System, record: Record) -> list[str]:
    """The objects that no completed task owns. The key of a manifest may keep the tombstone of another task."""
    by_task = defaultdict(set)
    for key in _keys(system.store.settings):
        if match := _UUID.search(key):
            by_task[match[0]].add(key)
    return sorted(
        key
        for task_id, status in record.ended.items()
        for key in by_task[task_id] - _owned(system, task_id, completed=status["status"] == "completed")
    )


def _owned(system: System, task_id: str, *, completed: bool) -> set[str]:
    key = layout.manifest_key(task_id)
    try:
        manifest = Manifest.model_validate_json(system.bucket.get_bytes(key))
    except (ObjectNotFoundError, ValidationError):
        return {key}  # a tombstone
    return {key, *manifest.object_keys} if completed else set()


def _keys(settings: BucketSettings) -> list[str]:
    client = boto3.client(
        "s3",
        endpoint_url=str(settings.endpoint_url),
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=settings.secret_access_key.get_secret_value(),
        region_name=settings.region,
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=settings.name)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]
