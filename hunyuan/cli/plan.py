"""`hunyuan plan`: what every kind of video needs on a GPU, before anyone rents one."""

import json
from typing import Annotated, Any, Final

import typer

from hunyuan.cli import launch
from hunyuan.cli.exits import AsJson

_NOTES: Final = """\
Calculated: seconds are operations over the share of the GPU's peak that is assumed or given by
--share; VRAM and host RAM are the worker's at its peak. Parts that are not resident are copied
while they compute. Without PYTORCH_ALLOC_CONF, which the worker sets, pinned memory takes the
host RAM in brackets."""


def plan(
    gpu: Annotated[str, typer.Option(help="RTX4090, L40S, L40, A100, H100, H200 or B200.")] = "H100",
    vram: Annotated[float | None, typer.Option(help="GPU memory in GB, if not all of it.", show_default=False)] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of its peak that the GPU reaches.", show_default=False),
    ] = None,
    sage: Annotated[bool, typer.Option("--sage", help="Compute with 8-bit attention (sageattention).")] = False,
    image: Annotated[bool, typer.Option("--image", help="Of videos that start from an image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print seconds, GPU memory and host memory of every profile, resolution and duration on a GPU."""
    rows = launch.plan(gpu, vram=vram, share=share, sage=sage, from_image=image)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    typer.echo(f"{'profile':9} {'video':10} {'seconds':>7} {'VRAM GB':>8} {'host RAM GB':>14}  {'fits':4} resident")
    for row in rows:
        typer.echo(_line(row))
    typer.echo(f"\n{_NOTES}")


def _line(row: dict[str, Any]) -> str:
    video = f"{row['resolution']} {row['duration']} s"
    host = f"{row['host']:.1f} ({row['host_rounded']:.1f})"
    fits = "yes" if row["fits"] else "no"
    return (
        f"{row['profile']:9} {video:10} {row['seconds']:7.0f} {row['vram']:8.1f} {host:>14}  {fits:4} {row['resident']}"
    )
