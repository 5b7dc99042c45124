"""The tail of a job: seconds from the last denoising step to the finished MP4, with the demo model at 720p and 5 s.

Also measures decoding alone and encoding alone, because the tail can't be shorter than the slower of the two.

    python -m benchmarks.tail [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

from contract.job import JobInput, Resolution, num_frames
from contract.result import Stage
from handler.encode import Target, encode, files_in
from handler.settings import WorkerSettings
from handler.video_model.base import Frames, VideoModel
from handler.video_model.loader import load_model

JOB = JobInput(prompt="A paper boat on a rainy street", duration=5, resolution=Resolution.P720, num_inference_steps=1)


class Render:
    """One render, and the times of its last step and of its first and last frame."""

    def __init__(self, model: VideoModel) -> None:
        self._model = model
        self.last_step = self.first_frame = self.last_frame = 0.0

    def frames(self) -> Iterator[Frames]:
        for chunk in self._model.render(JOB, seed=1, on_progress=self._on_progress, cancelled=Event()):
            self.first_frame = self.first_frame or time.perf_counter()
            yield chunk
        self.last_frame = time.perf_counter()

    def _on_progress(self, stage: Stage, _: float) -> None:
        if stage is Stage.DENOISING:
            self.last_step = time.perf_counter()


def measure(model: VideoModel, directory: Path) -> dict[str, float]:
    """Seconds of decoding alone, of encoding alone, of both as a worker does them, and until the first frame."""
    target = Target(*files_in(directory), *JOB.size, num_frames(JOB.duration))
    alone = Render(model)
    frames = list(alone.frames())
    started = time.perf_counter()
    encode(iter(frames), target, lambda _: None)
    encoded = time.perf_counter()
    both = Render(model)
    encode(both.frames(), target, lambda _: None)
    return {
        "decode alone": alone.last_frame - alone.last_step,
        "encode alone": encoded - started,
        "tail": time.perf_counter() - both.last_step,
        "first frame": both.first_frame - both.last_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    model = load_model(WorkerSettings(model_path="demo"))
    with tempfile.TemporaryDirectory() as directory:
        measured = [measure(model, Path(directory)) for _ in range(rounds)]
    print(f"720p, 5 s, median of {rounds}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name in measured[0]:
        print(f"{name:13} {statistics.median(each[name] for each in measured):6.2f} s")


if __name__ == "__main__":
    main()
