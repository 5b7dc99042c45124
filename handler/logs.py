"""What log lines look like: one shape for server and worker, text or JSON, with what a line is about as fields.

A task's story is told by several processes. Each line about it carries its `task_id`, so that one search finds the
whole of it. Both sides of the queue use this module, as they use `handler.contract`; it is as light as that one.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pythonjsonlogger.json import JsonFormatter

#: Fields that a text line shows behind its message. JSON lines carry every field.
_SHOWN: Final = ("task_id", "worker_id", "request_id", "prompt")
#: Where our own lines come from. Other libraries stay at INFO: at DEBUG they log headers with their keys, and rows of
#: the queue with their prompts.
_OURS: Final = ("handler", "shim", "storage")
_PLAIN: Final = re.compile(r"[\w.:-]+", re.ASCII)

_fields: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default=MappingProxyType({}))


class LogFormat(StrEnum):
    """How a line is written."""

    TEXT = "text"
    JSON = "json"


class LogOptions(BaseModel):
    """The settings of log lines: a part of the server's settings and of the worker's."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    log_format: LogFormat = Field(
        default=LogFormat.TEXT,
        validation_alias="HUNYUAN_LOG_FORMAT",
        description="Log lines as `text`, or as `json`: an object on each line.",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
    ] = Field(
        default="INFO",
        validation_alias="HUNYUAN_LOG_LEVEL",
        description="Least level of the lines that are logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`.",
    )
    log_prompts: bool = Field(
        default=False,
        validation_alias="HUNYUAN_LOG_PROMPTS",
        description="Log each task's prompt when it is accepted and when it is taken. Else no line has it.",
    )


def begin(**fields: str) -> None:
    """As `bind`, for work that must inherit no field from whatever started it."""
    _fields.set(fields)


def bind(**fields: str) -> None:
    """Put `fields` on every further line of this context: of this asyncio task and what it starts, of this thread.

    A thread pool has contexts of its own: carry this one in with `contextvars.copy_context().run`.
    """
    begin(**{**_fields.get(), **fields})


def configure(options: LogOptions, **fields: str) -> None:
    """Log to stderr as `options` say, with `fields` on every line of this process. Replaces what was set up before."""
    handler = logging.StreamHandler()
    handler.addFilter(_AddFields(fields, prompts=options.log_prompts))
    if options.log_format is LogFormat.JSON:
        names = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=names, timestamp="time"))
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logging.getLevelNamesMapping()[options.log_level]
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    for room in _OURS:
        logging.getLogger(room).setLevel(level)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs, and ours are presigned
    logging.captureWarnings(True)


class _AddFields(logging.Filter):
    """Adds what the process and the context say of a line; takes the prompt away unless it is asked for."""

    def __init__(self, fields: Mapping[str, str], *, prompts: bool) -> None:
        super().__init__()
        self._process_fields = fields
        self._prompts = prompts

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in {**self._process_fields, **_fields.get()}.items():
            record.__dict__.setdefault(name, value)
        if not self._prompts:
            record.__dict__.pop("prompt", None)
        return True


class _TextFormatter(logging.Formatter):
    """The message, and behind it the fields that it does not say itself."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        fields = {name: str(getattr(record, name)) for name in _SHOWN if hasattr(record, name)}
        unsaid = [f"{name}={_shown(value)}" for name, value in fields.items() if value not in record.message]
        line = super().formatMessage(record)
        return f"{line} [{' '.join(unsaid)}]" if unsaid else line


def _shown(value: str) -> str:
    """One that holds a line break must not pass for a line of its own."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
