"""What the worker asks of a model, whatever it is made of. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from contract.job import JobInput
from contract.result import Stage
from contract.worker import Gpu

#: RGB frames, uint8 of shape (frames, height, width, 3).
Frames: TypeAlias = npt.NDArray[np.uint8]

#: Called with a stage and how much of it is done, from 0.0 to 1.0.
OnProgress = Callable[[Stage, float], None]


class ModelError(Exception):
    """The model could not do what was asked."""


class ModelLoadError(ModelError):
    """The checkpoint can't be loaded; the message names the setting and what it takes."""


class ModelOutOfMemoryError(ModelError):
    """The render needs more memory than there is."""


class RenderCancelledError(ModelError):
    """The render was asked to stop, and did."""


class VideoModel(Protocol):
    """Renders one video at a time."""

    @property
    def name(self) -> str:
        """What stands in manifests and in /health, for example "demo"."""
        ...

    @property
    def models(self) -> Sequence[str]:
        """The `model` values of a request that it can render."""
        ...

    @property
    def takes_images(self) -> bool:
        """Whether it can start from an image."""
        ...

    @property
    def approximations(self) -> Sequence[str]:
        """What it does that is not exact, by name."""
        ...

    @property
    def load_seconds(self) -> Mapping[str, float]:
        """Seconds that each phase of loading took."""
        ...

    @property
    def attention(self) -> str:
        """The attention kernel in use, in diffusers' names."""
        ...

    def render(
        self,
        job_input: JobInput,
        *,
        seed: int,
        on_progress: OnProgress,
        cancelled: Event,
        image: Image.Image | None = None,
    ) -> Iterator[Frames]:
        """The video's frames in order, a few at a time; `num_frames(job_input.duration)` of them in all.

        `image` (RGB, any size) is what the first frame shows; only for a model that `takes_images`.

        The frames' size is the model's own; whoever encodes them fits them to `job_input.resolution`. The same
        `seed` gives the same frames on the same machine. `on_progress` is told of the stages up to DECODING;
        DENOISING and UPSCALING share one fraction, of the work of both.

        Raises:
            RenderCancelledError: within one denoising step, or one decoded tile, of `cancelled` being set.
            ModelOutOfMemoryError: call `release_memory` and the next render can go on.
        """
        ...

    def gpu(self) -> Gpu | None:
        """The GPU in use and its memory as of now; None on a CPU. Safe to call from any thread."""
        ...

    def release_memory(self) -> None:
        """Give back what a render that failed or was cancelled has left behind."""
        ...
