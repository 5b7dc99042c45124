"""Options that several commands have. A request's fields become options by themselves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from pydantic.fields import FieldInfo

from contract.job import JobRequest, Resolution, plain_type
from contract.lora import MAX_SCALE, Lora

#: The command line renders short videos unless told otherwise; the API's own defaults are longer and larger.
DEFAULT_DURATION: Final = 5
DEFAULT_RESOLUTION: Final = Resolution.P720

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File or directory to save to; - is stdout. Default: TASK_ID.mp4."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, and print only what scripts need.")]


def _lora(text: str) -> dict[str, object]:
    try:
        return Lora.parse(text).model_dump()
    except ValueError:
        takes = f"NAME or NAME:SCALE with a scale from {-MAX_SCALE:g} to {MAX_SCALE:g}"
        raise typer.BadParameter(f"it takes {takes}; got {text!r}") from None


_LORAS: Final = Annotated[
    list[object] | None,  # what `parser` returns
    typer.Option(
        "--lora",
        parser=_lora,
        metavar="NAME[:SCALE]",
        help="A LoRA adapter of the workers; `hunyuan health` names them. May be repeated.",
    ),
]

C = TypeVar("C", bound=Callable[..., None])


def with_request_fields(command: C) -> C:
    """`command` with an option for each optional field of a request in place of its `**fields`."""
    signature = inspect.signature(command, eval_str=True)
    defaults = {"duration": DEFAULT_DURATION, "resolution": DEFAULT_RESOLUTION}
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name, field.default or None),  # a flag that is off is not sent
            annotation=_LORAS if name == "loras" else _option(name, field),
        )
        for name, field in JobRequest.model_fields.items()
        if not field.is_required()
    ]
    fixed = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    return command


def _option(name: str, field: FieldInfo) -> Any:
    return Annotated[plain_type(field.annotation) | None, typer.Option(help=_help(name, field.description))]


def _help(name: str, description: str | None) -> str:
    return f"{description} Or a file on this machine." if name == "image" else f"{description}"
