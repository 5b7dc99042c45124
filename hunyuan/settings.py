"""The settings of the `hunyuan` command, and the environments of what it starts or deploys."""

import os
from typing import Final

from pydantic import Field, HttpUrl, SecretStr

from contract.job import DEMO_MODEL, Profile
from contract.settings import WORKER_VARIABLES, HeaderToken, Settings


class ClientSettings(Settings):
    """The settings of the commands that talk to a server."""

    server: HttpUrl = Field(
        default=HttpUrl("http://localhost:8000"),
        validation_alias="HUNYUAN_SERVER",
        description="Server that `hunyuan generate`, `batch` and the like, and the Python client, talk to.",
    )
    api_key: HeaderToken | None = Field(
        default=None,
        validation_alias="HUNYUAN_API_KEY",
        description="One of the server's HUNYUAN_API_KEYS. Never logged.",
    )


class DeploySettings(Settings):
    """The settings of `hunyuan deploy`, in addition to its options."""

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
    profile: Profile | None = Field(
        default=None,
        validation_alias="HUNYUAN_PROFILE",
        description="The profile that workers serve; it also decides how long a job may run. Default: that of the "
        "endpoint, and `turbo` for a new one.",
    )


BUCKET_SECRET: Final = "BUCKET_SECRET_ACCESS_KEY"  # noqa: S105 - its name
REQUIRED_BUCKET_VARIABLES: Final = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", BUCKET_SECRET)
BUCKET_VARIABLES: Final = (
    *REQUIRED_BUCKET_VARIABLES,
    "BUCKET_NAME",
    "BUCKET_REGION",
    "BUCKET_PUBLIC_ENDPOINT_URL",
    "BUCKET_URL_EXPIRES_IN",
)


#: Seconds after which RunPod gives up a worker that loads; 420 if unset.
#: Source: https://docs.runpod.io/serverless/development/optimization.
INIT_TIMEOUT: Final = "RUNPOD_INIT_TIMEOUT"
#: Endings of the Hugging Face client's variables that name files or directories of this machine.
_LOCAL_PATHS: Final = ("_HOME", "_CACHE", "_PATH", "_DIR")


def deployed_environment() -> dict[str, str]:
    """The part of this process's environment that a deployed worker gets: what its operator would set."""
    hub = [name for name in os.environ if name.startswith(("HF_", "OTEL_")) and not name.endswith(_LOCAL_PATHS)]
    names = (*BUCKET_VARIABLES, *WORKER_VARIABLES, INIT_TIMEOUT, *sorted(hub))
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def demo_environment(port: int, data_dir: str) -> dict[str, str]:
    """The environment of a server on loopback with the demo model, one worker and the embedded bucket.

    Settings of ours in this process's environment that would change that are emptied.
    """
    emptied = ("HUNYUAN_PUBLIC_URL", "HUNYUAN_API_KEYS", "HUNYUAN_RATE_LIMIT", "RUNPOD_ENDPOINT_ID")
    return {
        **os.environ,
        **dict.fromkeys((*emptied, *REQUIRED_BUCKET_VARIABLES), ""),
        "HUNYUAN_HOST": "127.0.0.1",
        "HUNYUAN_PORT": str(port),
        "HUNYUAN_DATA_DIR": data_dir,
        "HUNYUAN_MODEL_PATH": DEMO_MODEL,
        "HUNYUAN_WORKERS": "1",
    }
