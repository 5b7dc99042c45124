"""The base class of all settings. Only modules named `settings` read the environment."""

import re
from typing import Annotated, Final

from pydantic import AfterValidator, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

#: The token syntax of RFC 6750: it needs no quoting in a header, and contains neither colon nor comma.
_HEADER_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
HEADER_KEY_RULE: Final = "must consist of A-Z a-z 0-9 . _ ~ + / - with = at its end only"


class Settings(BaseSettings):
    """Settings from environment variables, one per field, named by its `validation_alias`.

    Raises:
        pydantic.ValidationError: names each variable that is missing or wrong; `explain` formats it.
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True, hide_input_in_errors=True
    )


def explain(exc: ValidationError) -> str:
    """One line per missing or wrong setting: its variable and the reason, never its value."""
    return "\n".join(
        f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}"
        for error in exc.errors(include_url=False, include_input=False)
    )


def is_header_token(text: str) -> bool:
    """Whether `text` can be sent in an Authorization header without quoting (RFC 6750, section 2.1)."""
    return _HEADER_TOKEN.fullmatch(text) is not None


def _check_header_token(key: SecretStr) -> SecretStr:
    if not is_header_token(key.get_secret_value()):
        raise ValueError(HEADER_KEY_RULE)  # the message must not contain the key
    return key


#: A key that a client sends in a header.
HeaderToken = Annotated[SecretStr, AfterValidator(_check_header_token)]
