"""The shim's settings. This module and the packages' other `settings` modules alone read the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, HttpUrl, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from handler.contract import Profile


class ShimSettings(BaseSettings):
    """What `hunyuan serve` needs to know.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

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
        description="Key for the RunPod-compatible endpoints under /v2. Else one is made and kept in HUNYUAN_DATA_DIR.",
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
    def directory(self) -> Path:
        """`data_dir`, absolute."""
        return self.data_dir.expanduser().resolve()


class ClientSettings(BaseSettings):
    """What the `hunyuan` commands that talk to a server need to know."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    server: HttpUrl = Field(
        default=HttpUrl("http://localhost:8000"),
        validation_alias="HUNYUAN_SERVER",
        description="Server that `hunyuan generate`, `status`, `download` and `health` talk to.",
    )


class DeploySettings(BaseSettings):
    """What `hunyuan deploy` needs to know, beside its options.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    api_key: SecretStr = Field(validation_alias="RUNPOD_API_KEY", description="RunPod API key. Never logged.")
    api_url: HttpUrl = Field(
        default=HttpUrl("https://api.runpod.io/v2"),
        validation_alias="RUNPOD_API_URL",
        description="Base of RunPod's management API.",
    )
    endpoint_base_url: HttpUrl = Field(
        default=HttpUrl("https://api.runpod.ai/v2"),
        validation_alias="RUNPOD_ENDPOINT_BASE_URL",
        description="Base of RunPod's endpoint API.",
    )
    profile: Profile = Field(
        default=Profile.FAST,
        validation_alias="HUNYUAN_PROFILE",
        description="What to choose GPUs and the execution timeout for, and what workers serve first.",
    )


def worker_environment() -> dict[str, str]:
    """What of this process's environment a worker elsewhere needs: `BUCKET_*`, and `HUNYUAN_*` that is a worker's."""
    own = {
        field.validation_alias
        for settings in (ShimSettings, ClientSettings)
        for field in settings.model_fields.values()
    }
    own.remove("HUNYUAN_MODEL_PATH")
    return {
        name: value
        for name, value in os.environ.items()
        if value and name.startswith(("BUCKET_", "HUNYUAN_")) and name not in own
    }


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for one it starts, with `overrides`."""
    return {**os.environ, **overrides}
