"""The base class of all settings. Only modules named `settings` read the environment."""

import difflib
import os
import re
from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

#: The token syntax of RFC 6750: it needs no quoting in a header, and contains neither colon nor comma.
_HEADER_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
#: The variables of a worker that its operator sets. `hunyuan deploy` copies them from its own environment. A test
#: compares them with WorkerSettings.
WORKER_VARIABLES: Final = (
    "HUNYUAN_APPROXIMATIONS",
    "HUNYUAN_C2PA_CERTIFICATE",
    "HUNYUAN_C2PA_KEY",
    "HUNYUAN_CACHE_DIR",
    "HUNYUAN_COMPILE",
    "HUNYUAN_ENABLE_FLASH_ATTN",
    "HUNYUAN_ENABLE_SAGE_ATTN",
    "HUNYUAN_GPUS_PER_JOB",
    "HUNYUAN_GPU_SHARE",
    "HUNYUAN_LOG_FORMAT",
    "HUNYUAN_LOG_LEVEL",
    "HUNYUAN_LOG_PROMPTS",
    "HUNYUAN_LORA_DIR",
    "HUNYUAN_MODEL_PATH",
    "HUNYUAN_OFFLOAD_CPU",
    "HUNYUAN_PREVIEWS",
    "HUNYUAN_PROFILE",
    "HUNYUAN_RENDER_TIMEOUT",
    "HUNYUAN_STALL_TIMEOUT",
    "HUNYUAN_STORE_PATIENCE",
    "HUNYUAN_VRAM_LIMIT",
    "HUNYUAN_WORK_DIR",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)
#: The HUNYUAN_* variables of every program: each warns of the others, and may not import the others' settings.
KNOWN_VARIABLES: Final = frozenset(
    {
        *WORKER_VARIABLES,
        "HUNYUAN_ALLOWED_HOSTS",
        "HUNYUAN_API_KEY",
        "HUNYUAN_API_KEYS",
        "HUNYUAN_CORS_ORIGINS",
        "HUNYUAN_DATABASE_URL",
        "HUNYUAN_DATA_DIR",
        "HUNYUAN_HISTORY_TTL",
        "HUNYUAN_HOST",
        "HUNYUAN_MAX_ATTEMPTS",
        "HUNYUAN_MAX_CONNECTIONS_PER_ADDRESS",
        "HUNYUAN_MAX_QUEUE_SIZE",
        "HUNYUAN_PLATFORM_TOKEN",
        "HUNYUAN_PLATFORM_URL",
        "HUNYUAN_PORT",
        "HUNYUAN_PROVIDER",
        "HUNYUAN_PUBLIC_URL",
        "HUNYUAN_RATE_LIMIT",
        "HUNYUAN_REWRITE_API_KEY",
        "HUNYUAN_REWRITE_BASE_URL",
        "HUNYUAN_REWRITE_MODEL",
        "HUNYUAN_SERVER",
        "HUNYUAN_SHUTDOWN_GRACE",
        "HUNYUAN_VIDEO_TTL",
        "HUNYUAN_WEBHOOK_ALLOW_PRIVATE",
        "HUNYUAN_WEBHOOK_RETRIES",
        "HUNYUAN_WEBHOOK_SECRET",
        "HUNYUAN_WEBHOOK_TIMEOUT",
        "HUNYUAN_WEBHOOK_URL",
        "HUNYUAN_WORKERS",
        "HUNYUAN_WORKER_REPORT_URL",
        "HUNYUAN_WORKER_TIMEOUT",
    }
)
HEADER_KEY_RULE: Final = "must consist of A-Z a-z 0-9 . _ ~ + / - with = at its end only"


class Settings(BaseSettings):
    """Settings from environment variables, one per field, named by its `validation_alias`.

    Raises:
        pydantic.ValidationError: names each variable that is missing or wrong; `explain` formats it.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True, hide_input_in_errors=True
    )


def split_commas(value: object) -> object:
    """For a BeforeValidator: the items of a comma-separated text."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


def explain(exc: ValidationError) -> str:
    """One line per missing or wrong setting: its variable and the reason, never its value."""
    return "\n".join(
        f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
        for error in exc.errors(include_url=False, include_input=False)
    )


def warnings_of_unknown_variables() -> list[str]:
    """A sentence for each HUNYUAN_* variable of the environment that no program reads. It never has the value."""
    names = sorted(name for name in os.environ if name.upper().startswith("HUNYUAN_"))
    return [_warning(name) for name in names if name.upper() not in KNOWN_VARIABLES]


def _warning(name: str) -> str:
    nearest = difflib.get_close_matches(name.upper(), KNOWN_VARIABLES, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "docs/settings.md lists the variables"
    return f"{name} is set, and no setting has that name, so it changes nothing: {hint}"


def is_header_token(text: str) -> bool:
    """Whether `text` can be sent in an Authorization header without quoting (RFC 6750, section 2.1)."""
    return _HEADER_TOKEN.fullmatch(text) is not None


def _check_header_token(key: SecretStr) -> SecretStr:
    if not is_header_token(key.get_secret_value()):
        raise ValueError(HEADER_KEY_RULE)  # the message must not contain the key
    return key


#: A key that a client sends in a header.
HeaderToken = Annotated[SecretStr, AfterValidator(_check_header_token)]
