"""Log lines: fields, formats, and what they must not contain."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from contract.log_fields import LogFormat, LogOptions, bind, configure
from handler.settings import WorkerSettings
from shim.queue.sql import SqlQueue
from shim.settings import ShimSettings
from tests.support.queues import sql_bench

PROMPT = "A paper boat\non a rainy street"
LOGGERS = ("", "handler", "httpx", "shim", "storage")


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def text_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split(",", 1)[1].split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_text_line_appends_the_fields_that_its_message_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogOptions(), worker_id="w1")
    log = logging.getLogger("shim.test")

    def speak() -> None:
        bind(task_id="t1")
        log.info("t1: taken")
        log.info("nothing said", extra={"task_id": "t2", "status": 200})

    copy_context().run(speak)
    log.info("outside")
    assert text_lines(capsys) == [
        "INFO shim.test: t1: taken [worker_id=w1]",
        "INFO shim.test: nothing said [task_id=t2 worker_id=w1]",
        "INFO shim.test: outside [worker_id=w1]",
    ]


def test_a_json_line_is_one_object_even_with_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogOptions(log_format=LogFormat.JSON), worker_id="w1")
    try:
        raise ValueError('of "two"\nlines')
    except ValueError:
        logging.getLogger("shim.test").exception("it\nfailed", extra={"task_id": "t1"})
    (line,) = json_lines(capsys)
    assert {name: line[name] for name in ("level", "logger", "message", "task_id", "worker_id")} == {
        "level": "ERROR",
        "logger": "shim.test",
        "message": "it\nfailed",
        "task_id": "t1",
        "worker_id": "w1",
    }
    assert line["time"].endswith("+00:00")
    assert "ValueError" in line["exc_info"]


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_prompt_is_logged_only_if_log_prompts_is_set(
    log_format: LogFormat, log_prompts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(LogOptions(log_format=log_format, log_prompts=log_prompts))
    logging.getLogger("shim.test").info("accepted", extra={"prompt": PROMPT})
    said = capsys.readouterr().err
    assert ("paper boat" in said) is log_prompts
    assert len(said.splitlines()) == 1, "a line break in a prompt starts no new line"


async def test_each_asyncio_task_has_its_own_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure(LogOptions(log_format=LogFormat.JSON))
    log = logging.getLogger("shim.test")

    async def about(task_id: str) -> None:
        bind(task_id=task_id)
        await asyncio.sleep(0)
        log.info(task_id)
        await asyncio.to_thread(log.info, task_id)

    await asyncio.gather(*(about(f"t{number}") for number in range(3)))
    lines = json_lines(capsys)
    assert len(lines) == 6
    assert all(line["task_id"] == line["message"] for line in lines)


def test_only_our_loggers_go_below_info(capsys: pytest.CaptureFixture[str]) -> None:
    """At DEBUG, HTTP libraries log headers with their keys, and the database's driver logs rows."""
    configure(LogOptions(log_level="DEBUG"))
    for name in ("shim.test", "handler.test", "storage.test", "sqlalchemy.engine", "aiosqlite", "httpcore", "botocore"):
        logging.getLogger(name).debug("here")
    assert [line.partition(":")[0] for line in text_lines(capsys)] == [
        "DEBUG shim.test",
        "DEBUG handler.test",
        "DEBUG storage.test",
    ]
    configure(LogOptions(log_level="WARNING"))
    logging.getLogger("shim.test").info("here")
    logging.getLogger("uvicorn.error").info("here")
    assert text_lines(capsys) == []


@pytest.mark.parametrize("settings", [ShimSettings, WorkerSettings])
def test_both_sides_read_the_same_settings(
    settings: type[ShimSettings | WorkerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUNYUAN_LOG_FORMAT", "json")
    monkeypatch.setenv("HUNYUAN_LOG_LEVEL", "debug")
    read = settings()
    assert (read.log_format, read.log_level, read.log_prompts) == (LogFormat.JSON, "DEBUG", False)
    for variable in ("HUNYUAN_LOG_FORMAT", "HUNYUAN_LOG_LEVEL", "HUNYUAN_LOG_PROMPTS"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "loud")
            with pytest.raises(ValidationError, match=variable):
                settings()


async def test_a_database_error_does_not_show_the_values_of_its_statement(tmp_path: Path) -> None:
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3") as bench:
        async with bench.database.write() as connection:
            trigger = "CREATE TRIGGER refuse BEFORE INSERT ON jobs BEGIN SELECT RAISE(ABORT, 'refused'); END"
            await connection.execute(text(trigger))
        assert isinstance(bench.queue, SqlQueue)
        with pytest.raises(IntegrityError) as caught:
            await bench.queue.enqueue({"prompt": PROMPT}, {"s3Config": {"accessSecret": "hush"}})
    assert "INSERT INTO jobs" in str(caught.value)
    assert "paper boat" not in str(caught.value)
    assert "hush" not in str(caught.value)
