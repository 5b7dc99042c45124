"""Log lines: one shape for every process, text or JSON, with what a line is about as fields.

A task's story is told by several processes. Each line about it carries its `task_id`, so that one search finds the
whole of it. Bind the ids once, where the work begins, and log plain sentences from there:

    with bound(task_id=task_id):
        log.info("stored in %.1f s", seconds)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

import structlog
from pydantic import BeforeValidator, Field
from structlog.contextvars import bind_contextvars as bind
from structlog.contextvars import bound_contextvars as bound
from structlog.contextvars import clear_contextvars
from structlog.typing import EventDict, Processor

from contract.settings import Settings

__all__ = ["LogFormat", "LogOptions", "begin", "bind", "bound", "configure"]

#: Fields that a text line shows behind its message. JSON lines carry every field.
_SHOWN: Final = ("task_id", "worker_id", "request_id", "prompt")
#: Our own packages. Other libraries stay at INFO: at DEBUG they log headers with their keys, and rows of the queue with
#: their prompts.
_OURS: Final = ("contract", "handler", "hunyuan", "shim", "storage")
_PLAIN: Final = re.compile(r"[\w.:-]+", re.ASCII)


class LogFormat(StrEnum):
    """How a line is written."""

    TEXT = "text"
    JSON = "json"


class LogOptions(Settings):
    """The settings of log lines: a part of the server's settings and of the worker's."""

    log_format: LogFormat = Field(
        default=LogFormat.TEXT,
        validation_alias="HUNYUAN_LOG_FORMAT",
        description="Log lines as `text`, or as `json`: one object on each line.",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
    ] = Field(
        default="INFO",
        validation_alias="HUNYUAN_LOG_LEVEL",
        description="Lowest level that is logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`.",
    )
    log_prompts: bool = Field(
        default=False,
        validation_alias="HUNYUAN_LOG_PROMPTS",
        description="Log each task's prompt when it is accepted and when a worker takes it. Otherwise no line has it.",
    )


def begin(**fields: str) -> None:
    """Binds `fields` and drops every field that the context inherited from whatever started it."""
    clear_contextvars()
    bind(**fields)


def configure(options: LogOptions, **fields: str) -> None:
    """Logs to stderr as `options` say, with `fields` on every line of this process. Replaces any earlier set-up."""

    def add_process_fields(_: object, __: str, event: EventDict) -> EventDict:
        return {**fields, **event}

    def drop_prompt(_: object, __: str, event: EventDict) -> EventDict:
        if not options.log_prompts:
            event.pop("prompt", None)
        return event

    fields_of_a_line: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_process_fields,
        structlog.stdlib.ExtraAdder(),
        drop_prompt,
    ]
    handler = logging.StreamHandler()
    if options.log_format is LogFormat.JSON:
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(foreign_pre_chain=fields_of_a_line, processors=_JSON_PROCESSORS)
        )
    else:
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=fields_of_a_line,
                processor=_text,
                fmt="%(asctime)s %(levelname)s %(name)s: %(message)s",
                keep_exc_info=True,
            )
        )
    level = logging.getLevelNamesMapping()[options.log_level]
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    for package in _OURS:
        logging.getLogger(package).setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs, and ours are presigned
    logging.captureWarnings(True)


def _level(_: object, __: str, event: EventDict) -> EventDict:
    event["level"] = event["_record"].levelname
    return event


def _traceback(logger: object, method: str, event: EventDict) -> EventDict:
    event = structlog.processors.format_exc_info(logger, method, event)
    if "exception" in event:
        event["exc_info"] = event.pop("exception")
    return event


_JSON_PROCESSORS: Final[list[Processor]] = [
    _level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%f+00:00", utc=True, key="time"),
    _traceback,
    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
    structlog.processors.EventRenamer("message"),
    structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
]


def _text(_: object, __: str, event: EventDict) -> str:
    """The message, and behind it the fields that it does not say itself."""
    message = str(event["event"])
    unsaid = _unsaid(message, event)
    return f"{message} [{' '.join(unsaid)}]" if unsaid else message


def _unsaid(message: str, event: Mapping[str, Any]) -> list[str]:
    shown = {name: str(event[name]) for name in _SHOWN if name in event}
    return [f"{name}={_quoted(value)}" for name, value in shown.items() if value not in message]


def _quoted(value: str) -> str:
    """A value with a line break must not look like a line of its own."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
