"""`hunyuan download-weights` and `hunyuan convert-weights`."""

from pathlib import Path
from typing import Annotated, Final

import typer

from contract.job import Profile
from hunyuan.cli import launch
from hunyuan.cli.exits import ExitCode, end

LICENCE: Final = """\
The weights of HunyuanVideo-1.5 come under the Tencent Hunyuan Community License Agreement. It does not cover the
European Union, the United Kingdom and South Korea: there, it permits no use.
https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5/blob/main/LICENSE"""


def download_weights(
    profile: Annotated[Profile, typer.Argument(help="The profile to download for.")],
    to: Annotated[Path, typer.Option(help="Directory for the checkpoints: the server's HUNYUAN_MODEL_PATH.")],
    images: Annotated[
        bool, typer.Option("--images", help="Also download what videos that start from an image need.")
    ] = False,
    first: Annotated[
        int | None,
        typer.Option(min=1, help="Download only so many checkpoints, in the order of their names.", show_default=False),
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Confirm that you have read the licence and accept it.")
    ] = False,
) -> None:
    """Download the checkpoints that a profile needs. Run the same command again to resume."""
    typer.echo(LICENCE)
    if not accept_licence:
        end("Pass --accept-licence to accept this licence.", ExitCode.USAGE)
    launch.download_weights(profile, to, images=images, first=first)


def convert_weights(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a directory with one or with its shards.")],
    target: Annotated[Path, typer.Argument(help="Directory to create.")],
    name: Annotated[
        str | None, typer.Option(help="The checkpoint's name; by default from the directory names.", show_default=False)
    ] = None,
) -> None:
    """Convert a checkpoint from the original layout to diffusers' layout."""
    launch.convert_weights(source, target, name)
