"""The server's settings. Only the `settings` modules of our packages read the environment."""

import base64
import binascii
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import NoDecode

from contract.job import Profile, WebhookUrl
from contract.log_fields import LogOptions
from contract.settings import HeaderToken, Settings, split_commas
from contract.tracing import TraceOptions
from shim.access import Access, ApiKey, ConnectionLimits, parse_api_keys
from shim.queue.webhook_request import WebhookOptions


def _parse_keys(value: object) -> object:
    return parse_api_keys(value) if isinstance(value, str) else value


def _check_origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", text):
        raise ValueError("must be * or origins such as https://films.example, without a path and without a final slash")
    return text


def _check_host(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z0-9._-]+", text.lower(), re.ASCII):
        raise ValueError("must be * or host names such as films.example, without a port and without https://")
    return text.lower()


def _webhook_key(secret: SecretStr) -> bytes:
    """The key in a secret of Standard Webhooks. Raises ValueError, which does not contain the secret."""
    prefix, _, encoded = secret.get_secret_value().partition("_")
    encoded = encoded.rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except binascii.Error:
        key = b""
    if prefix != "whsec" or not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ and 24 to 64 bytes in base64, as `openssl rand -base64 24` prints them")
    return key


def _check_webhook_secret(secret: SecretStr) -> SecretStr:
    _webhook_key(secret)
    return secret


class ShimSettings(LogOptions, TraceOptions):
    """The settings of `hunyuan serve`."""

    host: str = Field(default="0.0.0.0", validation_alias="HUNYUAN_HOST", description="Address to listen on.")  # noqa: S104 - documented
    port: int = Field(
        default=8000, ge=0, le=65535, validation_alias="HUNYUAN_PORT", description="Port; 0 takes a free one."
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=64,
        validation_alias="HUNYUAN_WORKERS",
        description="Worker processes to start on this machine, one per GPU. 0 if all workers run elsewhere.",
    )
    max_queue_size: int = Field(
        default=10,
        ge=1,
        validation_alias="HUNYUAN_MAX_QUEUE_SIZE",
        description="Tasks that may wait in the queue; with HUNYUAN_API_KEYS, tasks of each key that may wait. A "
        "request beyond that gets QUEUE_FULL. Keys take turns: a worker takes one task of each key that has tasks "
        "waiting. On a RunPod endpoint, the limit is one for all keys.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        validation_alias="HUNYUAN_MAX_ATTEMPTS",
        description="Attempts per task. A task fails when this many workers were lost after they began it. Restarts of "
        "the server and workers that were stopped do not count.",
    )
    worker_timeout: float = Field(
        default=60.0,
        ge=15,
        validation_alias="HUNYUAN_WORKER_TIMEOUT",
        description="Seconds without a report after which a worker is lost: its lease expires and its task is queued "
        "again. Workers report every 5 seconds.",
    )
    history_ttl: float = Field(
        default=7 * 24 * 3600.0,
        ge=3600,
        validation_alias="HUNYUAN_HISTORY_TTL",
        description="Seconds for which the queue remembers a task after it ended. Its final status stays available "
        "after that, from the bucket.",
    )
    video_ttl: float | None = Field(
        default=None,
        ge=1,
        validation_alias="HUNYUAN_VIDEO_TTL",
        description="Seconds after which the server deletes a video, with its poster and its manifest. Default: never.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        validation_alias="HUNYUAN_DATABASE_URL",
        description="PostgreSQL database of the queue, which several servers can share: "
        "`postgresql://user:password@host/database`. Default: a SQLite file in HUNYUAN_DATA_DIR. Never logged.",
    )
    model_path: str | None = Field(
        default=None,
        min_length=1,
        validation_alias="HUNYUAN_MODEL_PATH",
        description="Checkpoint directory, hub id, or `demo`. If unset, `hunyuan serve` logs a warning and serves "
        "the demo model, and `python -m handler` loads HunyuanVideo-1.5 480p.",
    )
    gpus_per_job: int = Field(
        default=1,
        ge=1,
        validation_alias="HUNYUAN_GPUS_PER_JOB",
        description="GPUs that each worker of this machine takes.",
    )
    data_dir: Path = Field(
        default=Path("~/.local/share/hunyuan"),
        validation_alias="HUNYUAN_DATA_DIR",
        description="Directory of the SQLite queue, the generated platform token and the embedded bucket.",
    )
    public_url: HttpUrl | None = Field(
        default=None,
        validation_alias="HUNYUAN_PUBLIC_URL",
        description="Address under which clients reach this server; video_url starts with it. Default: the address of "
        "the request.",
    )
    platform_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        validation_alias="HUNYUAN_PLATFORM_TOKEN",
        description="Key for the RunPod-compatible endpoints under /v2, which workers use. Servers that share a "
        "database need the same key. Default: a key that is generated once and stored in HUNYUAN_DATA_DIR.",
    )
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(_parse_keys)] = Field(
        default=(),
        validation_alias="HUNYUAN_API_KEYS",
        description="Comma-separated keys that clients may use, each `key` or `name:key`, with 16 characters or more "
        "in the key. If unset, anyone may use the server. Never logged.",
    )
    rate_limit: int | None = Field(
        default=None,
        ge=1,
        validation_alias="HUNYUAN_RATE_LIMIT",
        description="Videos per minute that each key may request, and images that it may upload; each client "
        "address, if HUNYUAN_API_KEYS is unset. "
        "Default: no limit.",
    )
    provider: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        validation_alias="HUNYUAN_PROVIDER",
        description="Legal name of who offers this service to others, for the page and /health. The licence of the "
        "weights asks for it.",
    )
    rewrite_base_url: HttpUrl | None = Field(
        default=None,
        validation_alias="HUNYUAN_REWRITE_BASE_URL",
        description="Base of an OpenAI-compatible chat API, for example `http://localhost:11434/v1`. It rewrites the "
        "prompts of requests with `enhance_prompt`, which are refused if this is unset. Prompts are sent to it.",
    )
    rewrite_model: str | None = Field(
        default=None,
        min_length=1,
        validation_alias="HUNYUAN_REWRITE_MODEL",
        description="The chat model's name there. HUNYUAN_REWRITE_BASE_URL needs it.",
    )
    rewrite_api_key: HeaderToken | None = Field(
        default=None, validation_alias="HUNYUAN_REWRITE_API_KEY", description="Key for that API. Never logged."
    )
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_check_origin)], ...], NoDecode, BeforeValidator(split_commas)
    ] = Field(
        default=(),
        validation_alias="HUNYUAN_CORS_ORIGINS",
        description="Comma-separated origins whose web pages may use the server; `*` for any.",
    )
    allowed_hosts: (
        Annotated[tuple[Annotated[str, AfterValidator(_check_host)], ...], NoDecode, BeforeValidator(split_commas)]
        | None
    ) = Field(
        default=None,
        validation_alias="HUNYUAN_ALLOWED_HOSTS",
        description="Comma-separated host names under which clients reach the server, besides its IP addresses, "
        "`localhost`, the machine's own name and the host of HUNYUAN_PUBLIC_URL; `*` for any. Requests with another "
        "Host header get HOST_NOT_ALLOWED. Default: any if HUNYUAN_API_KEYS is set, none otherwise.",
    )
    max_connections_per_address: int = Field(
        default=ConnectionLimits.per_address,
        ge=1,
        validation_alias="HUNYUAN_MAX_CONNECTIONS_PER_ADDRESS",
        description="Connections that one client address, or one /64 network for IPv6, may keep open. It does not "
        "apply to addresses in FORWARDED_ALLOW_IPS (by default 127.0.0.1), nor to those that send the platform token.",
    )
    webhook_secret: Annotated[SecretStr, AfterValidator(_check_webhook_secret)] | None = Field(
        default=None,
        validation_alias="HUNYUAN_WEBHOOK_SECRET",
        description="Turns webhooks on, and signs them: `whsec_` and 24 to 64 bytes in base64. Servers that share a "
        "database need the same secret. Never logged.",
    )
    webhook_url: WebhookUrl | None = Field(
        default=None,
        repr=False,
        validation_alias="HUNYUAN_WEBHOOK_URL",
        description="URL that gets the webhooks of all tasks that name no `webhook_url`. It may have a private "
        "address. Logs have its host only.",
    )
    webhook_allow_private: bool = Field(
        default=False,
        validation_alias="HUNYUAN_WEBHOOK_ALLOW_PRIVATE",
        description="Whether a `webhook_url` of a client may lead to a private address: it then reaches whatever the "
        "server reaches.",
    )
    webhook_timeout: float = Field(
        default=15.0,
        ge=1,
        le=60,
        validation_alias="HUNYUAN_WEBHOOK_TIMEOUT",
        description="Seconds that a receiver has to answer a webhook.",
    )
    webhook_retries: Annotated[tuple[Annotated[float, Field(gt=0)], ...], NoDecode, BeforeValidator(split_commas)] = (
        Field(
            default=(5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
            validation_alias="HUNYUAN_WEBHOOK_RETRIES",
            description="Comma-separated seconds to wait after each failed attempt of a webhook. After the last one, "
            "or four days after the end of the task, the server gives the webhook up.",
        )
    )
    shutdown_grace: float = Field(
        default=30.0,
        ge=0,
        validation_alias="HUNYUAN_SHUTDOWN_GRACE",
        description="Seconds that running renders have to finish when the server stops. Then they are queued again.",
    )
    runpod_endpoint_id: str | None = Field(
        default=None,
        validation_alias="RUNPOD_ENDPOINT_ID",
        description="RunPod endpoint that gets the jobs, in place of the local queue and workers.",
    )
    runpod_api_key: SecretStr | None = Field(
        default=None, validation_alias="RUNPOD_API_KEY", description="RunPod API key. Never logged."
    )
    runpod_base_url: HttpUrl = Field(
        default=HttpUrl("https://api.runpod.ai/v2"),
        validation_alias="RUNPOD_ENDPOINT_BASE_URL",
        description="Base of RunPod's endpoint API.",
    )

    profile: Profile | None = Field(
        default=None,
        validation_alias="HUNYUAN_PROFILE",
        description="Profile that renders the model `HunyuanVideo-1.5` on the RunPod endpoint. It decides after how "
        "long RunPod ends a job of that model. Default: the time of the slowest profile.",
    )

    @model_validator(mode="after")
    def _check_runpod_endpoint(self) -> Self:
        if self.runpod_endpoint_id is not None:
            self.runpod_endpoint()
        return self

    @model_validator(mode="after")
    def _check_rewriter(self) -> Self:
        if (self.rewrite_base_url is None) != (self.rewrite_model is None):
            raise ValueError("set both HUNYUAN_REWRITE_BASE_URL and HUNYUAN_REWRITE_MODEL, or neither")
        return self

    def runpod_endpoint(self) -> tuple[str, SecretStr]:
        """The id and the key of the RunPod endpoint. Raises ValueError unless both are set."""
        if self.runpod_endpoint_id is None or self.runpod_api_key is None:
            raise ValueError("set both RUNPOD_ENDPOINT_ID and RUNPOD_API_KEY, or neither")
        return self.runpod_endpoint_id, self.runpod_api_key

    @model_validator(mode="after")
    def _check_webhooks(self) -> Self:
        if self.webhook_url is not None and self.webhook_secret is None:
            raise ValueError("HUNYUAN_WEBHOOK_URL needs HUNYUAN_WEBHOOK_SECRET, which signs the webhooks")
        if self.webhook_secret is not None and self.runpod_endpoint_id is not None:
            raise ValueError("unset HUNYUAN_WEBHOOK_SECRET: with RUNPOD_ENDPOINT_ID the server sends no webhooks")
        return self

    @property
    def webhooks(self) -> WebhookOptions | None:
        """How webhooks are sent; None if they are off."""
        if self.webhook_secret is None:
            return None
        return WebhookOptions(
            key=_webhook_key(self.webhook_secret),
            default_url=self.webhook_url,
            allow_private=self.webhook_allow_private,
            timeout=self.webhook_timeout,
            retries=self.webhook_retries,
        )

    @property
    def access(self) -> Access:
        """Which clients may use the server, and their rate limit."""
        return Access(self.api_keys, self.rate_limit, self.cors_origins, self._host_names())

    def _host_names(self) -> frozenset[str] | None:
        """The host names that the server answers to; None for any."""
        if self.allowed_hosts is None and self.api_keys:
            return None
        machine = socket.gethostname().lower()
        public = self.public_url.host if self.public_url is not None else None
        short = machine.partition(".")[0]
        names = {*(self.allowed_hosts or ()), machine, short, f"{short}.local", self.host.lower(), public or machine}
        return frozenset(names)

    @property
    def is_open_to_all(self) -> bool:
        """Whether anyone who reaches this machine may use the server."""
        return not self.api_keys and self.host in ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound

    @property
    def directory(self) -> Path:
        """`data_dir`, absolute."""
        return self.data_dir.expanduser().resolve()

    @property
    def queue_url(self) -> str:
        """The queue's database: `database_url`, or a SQLite file in `directory`. With its password."""
        named = self.database_url
        return named.get_secret_value() if named is not None else f"sqlite:///{self.directory}/queue.sqlite3"


class RemoteWorkerSettings(Settings):
    """The settings of `hunyuan worker`, in addition to BucketSettings and WorkerSettings."""

    platform_url: HttpUrl = Field(
        validation_alias="HUNYUAN_PLATFORM_URL",
        description="Address of a server, or of a load balancer in front of several.",
    )
    platform_token: SecretStr = Field(
        min_length=16,
        validation_alias="HUNYUAN_PLATFORM_TOKEN",
        description="HUNYUAN_PLATFORM_TOKEN of that server. Never logged.",
    )


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for a child process, with `overrides`."""
    return {**os.environ, **overrides}
