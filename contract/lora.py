"""The LoRA adapters that a request names."""

import re
from collections.abc import Collection
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, Field

from contract.errors import first_of

MAX_LORAS: Final = 4
#: How much stronger than trained an adapter may be. A negative scale takes away what it adds.
MAX_SCALE: Final = 4.0
_MAX_NAME: Final = 100
#: Such a name has no path separator and is no hidden file. The command line takes NAME:SCALE, so it has no colon.
_NAME: Final = r"^[A-Za-z0-9_][A-Za-z0-9_ .()+-]*$"
#: Names that an error lists before it only counts them.
_SHOWN: Final = 20


class Lora(BaseModel):
    """A LoRA adapter and its strength."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=_MAX_NAME, pattern=_NAME, description="File name without its extension.")
    scale: float = Field(default=1.0, strict=True, ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The adapter that NAME or NAME:SCALE says. Raises ValueError (pydantic.ValidationError) for another text."""
        name, colon, scale = text.partition(":")
        return cls(name=name, scale=float(scale)) if colon else cls(name=name)


def is_adapter_name(text: str) -> bool:
    """Whether requests can name a file whose name without extension is `text`."""
    return len(text) <= _MAX_NAME and re.fullmatch(_NAME, text, re.ASCII) is not None


def unknown_adapter(name: str, known: Collection[str]) -> str:
    """The error of a request with an adapter that does not exist."""
    quoted = [f'"{each}"' for each in sorted(known)]
    exist = first_of(quoted, _SHOWN) if quoted else "none (HUNYUAN_LORA_DIR)"
    return f'loras: there is no adapter "{name}"; the workers have {exist}'
