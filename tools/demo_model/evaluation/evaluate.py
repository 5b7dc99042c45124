"""`make eval-demo`: renders held-out prompts with the demo model and judges the videos by their pixels.

    python -m tools.demo_model.evaluation.evaluate --prompts 40 --json scores.json --sheet failures.png

Renders in this process, as the worker does: `load_model` and `VideoModel.render`. Exits with 1 if a limit of
`scores.LIMITS` is missed or one of `checks.CHECKS` fails.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from contract.job import AspectRatio
from handler.settings import WorkerSettings
from handler.video_model.loader import load_model
from tools.demo_model.evaluation.checks import CHECKS, Check, Clip, Renderer, renders
from tools.demo_model.evaluation.prompts import HELD_OUT, held_out
from tools.demo_model.evaluation.scores import table, total
from tools.demo_model.evaluation.seen import Seen
from tools.demo_model.evaluation.sheet import write_sheet


def _report(clips: Sequence[Clip], checks: Sequence[Check], model: str, seed: int) -> dict[str, Any]:
    """All of it, for a JSON file."""
    return {
        "model": model,
        "seed": seed,
        "render_seconds": round(float(np.median([clip.seconds for clip in clips])), 2),
        "scores": {
            aspect: {**asdict(score), "share": round(score.share, 4), "passes": score.passes}
            for aspect, score in total(clip.judged for clip in clips).items()
        },
        "checks": [asdict(check) for check in checks],
        "prompts": [
            {
                "prompt": clip.prompt.text,
                "seed": clip.seed,
                "asked": [*map(str, clip.prompt.objects), clip.prompt.scene],
                "seen": _words(clip.seen),
                "right": clip.judged,
            }
            for clip in clips
        ],
    }


def _words(seen: Seen) -> list[str]:
    return [*map(str, seen.objects), str(seen.background)]


def main(
    model: Annotated[str, typer.Option(help="HUNYUAN_MODEL_PATH: `demo` or a checkpoint's directory.")] = "demo",
    prompts: Annotated[int, typer.Option(help="Number of prompts.", min=2)] = HELD_OUT,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; each next one has the next seed.")] = 0,
    duration: Annotated[int, typer.Option(help="Seconds of each video.", min=5, max=10)] = 5,
    aspect_ratio: Annotated[AspectRatio, typer.Option(help="Width to height.")] = AspectRatio.WIDE,
    checks: Annotated[bool, typer.Option(help="Render some prompts again: guidance, swapped prompts, seeds.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results there.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a PNG of the failures there.")] = None,
) -> None:
    """Scores the demo model on held-out prompts."""
    asked = held_out(prompts)
    loaded = load_model(WorkerSettings(model_path=model))
    renderer = Renderer(loaded, duration, aspect_ratio, expected=renders(asked, checks=checks))
    clips = [renderer.clip(prompt, seed + index) for index, prompt in enumerate(asked)]
    scores = total(clip.judged for clip in clips)
    print(f"\n{table(scores)}")
    compared: list[Check] = []
    for check in CHECKS if checks else ():
        compared.append(check(renderer, clips))
        print(f"{'passes' if compared[-1].passes else 'MISSED'}: {compared[-1].name}: {compared[-1].found}")
    if json_file is not None:
        json_file.write_text(json.dumps(_report(clips, compared, model, seed), indent=1) + "\n")
    if sheet is not None:
        write_sheet(sheet, [clip for clip in clips if not all(clip.judged.values())])
    sys.exit(not (all(score.passes for score in scores.values()) and all(check.passes for check in compared)))


if __name__ == "__main__":
    typer.run(main)
