"""The shim's settings. This module and the packages' other `settings` modules alone read the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import NoDecode

from contract.log_fields import LogOptions
from contract.settings import Settings
from shim.access import Access, ApiKey, parse_api_keys


def _parsed_keys(value: object) -> object:
    return parse_api_keys(value) if isinstance(value, str) else value


def _listed(value: object) -> object:
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise ValueError("must be * or origins such as https://films.example, with no path and no slash at the end")
    return text


class ShimSettings(LogOptions):
    """What `hunyuan serve` needs to know.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

    host: str = Field(default="0.0.0.0", validation_alias="HUNYUAN_HOST", description="Address to listen on.")  # noqa: S104 - documented
    port: int = Field(
        default=8000, ge=0, le=65535, validation_alias="HUNYUAN_PORT", description="Port; 0 takes a free one."
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=64,
        validation_alias="HUNYUAN_WORKERS",
        description="Worker processes to start on this machine, one per GPU. 0 where workers run elsewhere.",
    )
    max_queue_size: int = Field(
        default=10,
        ge=1,
        validation_alias="HUNYUAN_MAX_QUEUE_SIZE",
        description="Tasks that may wait; more get QUEUE_FULL.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        validation_alias="HUNYUAN_MAX_ATTEMPTS",
        description="Workers that a task may lose before it fails.",
    )
    worker_timeout: float = Field(
        default=60.0,
        ge=15,
        validation_alias="HUNYUAN_WORKER_TIMEOUT",
        description="Seconds without a sign of life after which a worker counts as lost and its task is handed on. "
        "Workers give one every 5 seconds.",
    )
    history_ttl: float = Field(
        default=7 * 24 * 3600.0,
        ge=3600,
        validation_alias="HUNYUAN_HISTORY_TTL",
        description="Seconds after its end for which the queue remembers a task. A finished video's status stays "
        "available for as long as the bucket has it.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias="HUNYUAN_DATABASE_URL",
        description="PostgreSQL that several servers share as their queue: `postgresql://user:password@host/database`. "
        "Else a SQLite file in HUNYUAN_DATA_DIR. Never logged.",
    )
    model_path: str | None = Field(
        default=None,
        min_length=1,
        validation_alias="HUNYUAN_MODEL_PATH",
        description="Checkpoint directory, hub id, or `demo`. Without it `hunyuan serve` serves the demo model and "
        "says so; a worker started on its own loads HunyuanVideo-1.5 480p.",
    )
    data_dir: Path = Field(
        default=Path("~/.local/share/hunyuan"),
        validation_alias="HUNYUAN_DATA_DIR",
        description="Where the queue, the platform token and the embedded bucket live.",
    )
    public_url: HttpUrl | None = Field(
        default=None,
        validation_alias="HUNYUAN_PUBLIC_URL",
        description="Address that clients reach this server under; video_url starts with it. Else the request's own.",
    )
    platform_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        validation_alias="HUNYUAN_PLATFORM_TOKEN",
        description="Key for the RunPod-compatible endpoints under /v2, where workers and jobs come in: the same for "
        "servers that share a database. Else one is made and kept in HUNYUAN_DATA_DIR.",
    )
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_parsed_keys)] = Field(
        default=(),
        validation_alias="HUNYUAN_API_KEYS",
        description="Keys that clients need, each `key` or `name:key` with at least 16 characters in the key, with "
        "commas between. Without them anyone may use the server. Never logged.",
    )
    rate_limit: int | None = Field(
        default=None,
        ge=1,
        validation_alias="HUNYUAN_RATE_LIMIT",
        description="Videos a minute that each key may ask for; where no keys are set, each client address.",
    )
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, BeforeValidator(_listed)] = (
        Field(
            default=(),
            validation_alias="HUNYUAN_CORS_ORIGINS",
            description="Origins whose web pages may use the server, with commas between; `*` for any.",
        )
    )
    shutdown_grace: float = Field(
        default=30.0,
        ge=0,
        validation_alias="HUNYUAN_SHUTDOWN_GRACE",
        description="Seconds that running renders get to finish when the server stops; then they are queued again.",
    )
    runpod_endpoint_id: str | None = Field(
        default=None,
        validation_alias="RUNPOD_ENDPOINT_ID",
        description="RunPod endpoint to queue jobs on, in place of the local queue and workers.",
    )
    runpod_api_key: SecretStr | None = Field(
        default=None, validation_alias="RUNPOD_API_KEY", description="RunPod API key. Never logged."
    )
    runpod_base_url: HttpUrl = Field(
        default=HttpUrl("https://api.runpod.ai/v2"),
        validation_alias="RUNPOD_ENDPOINT_BASE_URL",
        description="Base of RunPod's endpoint API.",
    )

    @model_validator(mode="after")
    def _runpod_is_whole(self) -> Self:
        if self.runpod_endpoint_id is not None:
            self.runpod_endpoint()
        return self

    def runpod_endpoint(self) -> tuple[str, SecretStr]:
        """The endpoint's id and key, where jobs go to RunPod."""
        if self.runpod_endpoint_id is None or self.runpod_api_key is None:
            raise ValueError("RUNPOD_ENDPOINT_ID and RUNPOD_API_KEY are needed together")
        return self.runpod_endpoint_id, self.runpod_api_key

    @property
    def access(self) -> Access:
        """Who may use the server, and how often."""
        return Access(self.api_keys, self.rate_limit, self.cors_origins)

    @property
    def directory(self) -> Path:
        """`data_dir`, absolute."""
        return self.data_dir.expanduser().resolve()


class RemoteWorkerSettings(Settings):
    """What `hunyuan worker` needs to know, beside its bucket and what the handler reads for itself."""

    platform_url: HttpUrl = Field(
        validation_alias="HUNYUAN_PLATFORM_URL", description="Address of a server, or of what balances between several."
    )
    platform_token: SecretStr = Field(
        min_length=16, validation_alias="HUNYUAN_PLATFORM_TOKEN", description="The servers' key. Never logged."
    )


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for one it starts, with `overrides`."""
    return {**os.environ, **overrides}
