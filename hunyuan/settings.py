"""Settings of the `hunyuan` command."""

from __future__ import annotations

import os
from typing import Final

from pydantic import Field, HttpUrl, SecretStr

from contract.job import Profile
from contract.settings import HeaderToken, Settings


class ClientSettings(Settings):
    """What the `hunyuan` commands that talk to a server need to know."""

    server: HttpUrl = Field(
        default=HttpUrl("http://localhost:8000"),
        validation_alias="HUNYUAN_SERVER",
        description="Server that `hunyuan generate`, `status`, `download` and `health` talk to.",
    )
    api_key: HeaderToken | None = Field(
        default=None,
        validation_alias="HUNYUAN_API_KEY",
        description="Key for a server that has HUNYUAN_API_KEYS. Never logged.",
    )


class DeploySettings(Settings):
    """What `hunyuan deploy` needs to know, beside its options.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

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


#: What a deployed worker reads from its environment and `hunyuan deploy` hands on, beside the bucket's variables.
WORKER_VARIABLES: Final = (
    "HUNYUAN_APPROXIMATIONS",
    "HUNYUAN_CACHE_DIR",
    "HUNYUAN_COMPILE",
    "HUNYUAN_ENABLE_FLASH_ATTN",
    "HUNYUAN_ENABLE_SAGE_ATTN",
    "HUNYUAN_LOG_FORMAT",
    "HUNYUAN_LOG_LEVEL",
    "HUNYUAN_LOG_PROMPTS",
    "HUNYUAN_MODEL_PATH",
    "HUNYUAN_OFFLOAD_CPU",
    "HUNYUAN_PROFILE",
    "HUNYUAN_STORE_PATIENCE",
    "HUNYUAN_VRAM_LIMIT",
    "HUNYUAN_WORK_DIR",
)
BUCKET_VARIABLES: Final = (
    "BUCKET_ENDPOINT_URL",
    "BUCKET_ACCESS_KEY_ID",
    "BUCKET_SECRET_ACCESS_KEY",
    "BUCKET_NAME",
    "BUCKET_REGION",
    "BUCKET_PUBLIC_ENDPOINT_URL",
    "BUCKET_URL_EXPIRES_IN",
)


def deployed_environment() -> dict[str, str]:
    """What of this process's environment a worker elsewhere needs."""
    return {name: os.environ[name] for name in (*BUCKET_VARIABLES, *WORKER_VARIABLES) if os.environ.get(name)}
