"""What a batch has done, in a file of JSON lines beside its videos, so that the same command goes on after a kill.

Each render has an idempotency key that is known before its request is sent: the batch's random id, the digest of the
request, and how many times it failed before. If a kill came before the task was written down, the server returns the
same task again.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from hunyuan.cli.batch_file import Row
from hunyuan.cli.exits import CommandError, ExitCode

_FILE: Final = ".hunyuan-batch.jsonl"
_SLUG_LENGTH: Final = 40


@dataclass
class Item:
    """One video of the batch. `failures` counts the tasks for it that failed, in earlier runs too."""

    row: Row
    digest: str
    output: Path
    task_id: str | None = None
    failures: int = 0
    saved: bool = False
    error: tuple[str, str | None] | None = None

    @property
    def ended(self) -> bool:
        return self.saved or self.error is not None


class BatchState:
    """The items of a batch with what earlier runs did for them. One process at a time may use a directory."""

    def __init__(self, directory: Path, rows: Iterable[Row]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / _FILE
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            text = f"another `hunyuan batch` is saving to {directory}; give this one its own --output-dir"
            raise CommandError(text, ExitCode.USAGE) from None
        self.items = list(_items(directory, rows))
        self._id = self._replay() or secrets.token_hex(8)
        self._file.write("\n")  # ends a line that a kill has cut off
        self._add(batch=self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def idempotency_key(self, item: Item) -> str:
        return f"batch-{self._id}-{item.digest}-{item.failures}"

    def submitted(self, item: Item, task_id: str) -> None:
        item.task_id = task_id
        self._add(item=item.digest, task_id=task_id, output=item.output.name)

    def forgotten(self, item: Item) -> None:
        """The server has no such task any more."""
        item.task_id = None
        self._add(item=item.digest, task_id=None)

    def saved(self, item: Item) -> None:
        item.saved = True
        self._add(item=item.digest, saved=True)

    def failed(self, item: Item, error: str, error_code: str | None) -> None:
        item.error = (error, error_code)
        self._add(item=item.digest, error=error, error_code=error_code)

    def _add(self, **record: object) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _replay(self) -> str | None:
        """Applies the records of earlier runs and returns the batch's id."""
        batch, known = None, {item.digest: item for item in self.items}
        self._file.seek(0)
        for line in self._file:
            record = _record(line)
            batch = record.get("batch", batch)
            if (item := known.get(record.get("item", ""))) is None:
                continue
            if "error" in record:
                item.failures, item.task_id = item.failures + 1, None
            elif "saved" in record:
                item.saved = item.output.exists()
            else:
                item.task_id = record["task_id"]
                item.output = item.output.with_name(record.get("output", item.output.name))
        return batch


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # cut off by a kill
        return {}
    return record if isinstance(record, dict) else {}


def _items(directory: Path, rows: Iterable[Row]) -> Iterator[Item]:
    """Two rows with the same request are two videos."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        request = json.dumps(row.request, sort_keys=True, default=str)
        seen[request] += 1
        digest = hashlib.sha256(f"{request} {seen[request]}".encode()).hexdigest()[:16]
        slug = re.sub(r"[^a-z0-9]+", "-", str(row.request["prompt"]).lower())[:_SLUG_LENGTH].strip("-")
        yield Item(row, digest, directory / (f"{number:03}-{slug}.mp4" if slug else f"{number:03}.mp4"))
