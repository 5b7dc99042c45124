"""Options that several commands have. A request's fields become options by themselves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from contract.job import JobRequest, Resolution, plain_type

#: The command line renders short videos unless told otherwise; the API's own defaults are longer and larger.
DEFAULT_DURATION: Final = 5
DEFAULT_RESOLUTION: Final = Resolution.P720

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File or directory to save to; - is stdout. Default: TASK_ID.mp4."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, and print only what scripts need.")]

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
            annotation=Annotated[
                plain_type(field.annotation) | None, typer.Option(help=_help(name, field.description))
            ],
        )
        for name, field in JobRequest.model_fields.items()
        if not field.is_required()
    ]
    fixed = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*fixed, *options])  # type: ignore[attr-defined]
    return command


def _help(name: str, description: str | None) -> str:
    return f"{description} Or a file on this machine." if name == "image" else f"{description}"
