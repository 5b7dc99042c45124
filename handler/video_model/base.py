"""The protocol between the worker and a model. Imports nothing heavy."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from threading import Event
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from contract.job import JobInput
from contract.offer import SamplingLimits
from contract.result import Stage
from contract.worker import Gpu

#: RGB frames, uint8 of shape (frames, height, width, 3).
Frames: TypeAlias = npt.NDArray[np.uint8]

#: Called with a stage and the fraction of it that is done, from 0.0 to 1.0.
OnProgress = Callable[[Stage, float], None]

#: Called after a denoising step, before its progress, with a function that makes a preview of it: a JPEG of at most
#: MAX_PREVIEW_BYTES. That takes milliseconds, so it is called for few steps, in the same thread.
OnPreview = Callable[[Callable[[], bytes]], None]


class Cancellation(Protocol):
    """Whether a render was cancelled. A `threading.Event` is one."""

    def is_set(self) -> bool:
        """Whether the render must end now."""


def no_preview(_: Callable[[], bytes]) -> None:
    """An OnPreview for a render that nobody looks at."""


class ModelError(Exception):
    """The model cannot be loaded, or cannot render a job."""


class ModelLoadError(ModelError):
    """The checkpoint cannot be loaded; the message names the setting and its valid values."""


class ModelOutOfMemoryError(ModelError):
    """The render needs more memory than the machine has."""


class AdapterError(ModelError):
    """A LoRA adapter of the job cannot be used; the message is for the client."""


class RenderCancelledError(ModelError):
    """The render stopped because it was cancelled."""


class VideoModel(Protocol):
    """Renders one video at a time."""

    @property
    def name(self) -> str:
        """The name in manifests and in /health, for example "demo"."""

    @property
    def models(self) -> Sequence[str]:
        """The values of a request's `model` that it can render."""

    @property
    def takes_images(self) -> bool:
        """Whether a video may start from an image."""

    @property
    def limits(self) -> Sequence[SamplingLimits]:
        """What a request may not change, because a checkpoint is distilled."""

    @property
    def loras(self) -> Collection[str]:
        """Names of the LoRA adapters that exist now. Any thread may ask."""

    @property
    def approximations(self) -> Sequence[str]:
        """Names of the approximations in use."""

    @property
    def load_seconds(self) -> Mapping[str, float]:
        """Seconds of each phase of loading."""

    @property
    def attention(self) -> str:
        """The attention kernel in use, in diffusers' names."""

    def caption(self, job_input: JobInput) -> str | None:
        """Text that the encoder draws in the lower left corner of the video; None for a video without a caption."""

    def expected_seconds(self, job_input: JobInput) -> float | None:
        """Seconds that the render should take, calculated; None if the speed of this machine is unknown."""

    def render(
        self,
        job_input: JobInput,
        *,
        seed: int,
        on_progress: OnProgress,
        cancelled: Event,
        image: Image.Image | None = None,
        on_preview: OnPreview = no_preview,
    ) -> Generator[Frames, None, None]:
        """Yields the `num_frames(job_input.duration)` frames of the video in order, a few at a time, as they are ready.

        `image` (RGB, any size) becomes the first frame; pass it only if the model `takes_images`.

        The model chooses the size of the frames; the encoder scales them to `job_input.size`. The same `seed` gives the
        same frames on the same machine. Calls `on_progress` for the stages up to DECODING. DENOISING and UPSCALING
        share one fraction, which covers the steps of both. Close the generator if not all frames are taken: it holds
        memory.

        Raises:
            AdapterError: one of `job_input.loras` cannot be used.
            RenderCancelledError: within one denoising step, or one decoded latent frame, after `cancelled` is set.
            ModelOutOfMemoryError: call `release_memory` before the next render.
        """

    def gpu(self) -> Gpu | None:
        """The GPU in use and its current memory; None on a CPU. Any thread may call it."""

    def release_memory(self) -> None:
        """Frees what a failed or cancelled render has left in memory."""
