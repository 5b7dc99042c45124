"""Log lines of every process, as text or JSON, with ids as fields.

Several processes log about the same task. Every such line has the field `task_id`, so one search finds them all. Bind
the ids once, where the work begins, and log plain sentences from there on:

    with bound(task_id=task_id):
        log.info("stored in %.1f s", seconds)
"""

import json
import logging
import re
from enum import StrEnum
from typing import Annotated, Final, Literal

import structlog
from pydantic import BeforeValidator, Field
from structlog.contextvars import bind_contextvars as bind
from structlog.contextvars import bound_contextvars as bound
from structlog.contextvars import clear_contextvars
from structlog.typing import EventDict, Processor

from contract.settings import Settings

__all__ = ["LogFormat", "LogOptions", "begin", "bind", "bound", "configure"]

#: Fields that a text line appends to its message. JSON lines have every field.
_SHOWN: Final = ("task_id", "worker_id", "rank", "request_id", "prompt")
#: Packages that follow HUNYUAN_LOG_LEVEL below INFO. Libraries do not: at DEBUG they log headers with keys, and rows of
#: the queue with prompts.
_OURS: Final = ("contract", "handler", "hunyuan", "shim", "storage")
_PLAIN: Final = re.compile(r"[\w.:-]+", re.ASCII)


class LogFormat(StrEnum):
    """Format of log lines."""

    TEXT = "text"
    JSON = "json"


class LogOptions(Settings):
    """Settings of log lines, part of the server's and of the worker's settings."""

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
        description="Log each task's prompt, when the server accepts it and when a worker takes it.",
    )


def begin(**fields: str) -> None:
    """Binds `fields` and drops every field that this context inherited."""
    clear_contextvars()
    bind(**fields)


def configure(options: LogOptions, **fields: str) -> None:
    """Logs to stderr as `options` say, with `fields` on every line. Replaces any earlier configuration."""

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
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs, and presigned URLs are secret
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
    """The message, followed by those of its fields that it does not contain."""
    message = str(event["event"])
    shown = {name: str(event[name]) for name in _SHOWN if name in event}
    fields = " ".join(f"{name}={_quoted(value)}" for name, value in shown.items() if value not in message)
    return f"{message} [{fields}]" if fields else message


def _quoted(value: str) -> str:
    """`value` on one line: a line break in it must not start a new log line."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
