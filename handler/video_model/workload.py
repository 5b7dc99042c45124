"""What a video asks of the model: its stages with their sizes, passes and tokens. Imports no torch.

The memory plan and the cost model both read it, the worker for its jobs and `hunyuan plan` for every kind of job.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from contract.job import JobInput, Resolution, num_frames
from handler.video_model.catalog import Checkpoint, Route, trained_size
from handler.video_model.dimensions import TRANSFORMER, VAE
from handler.video_model.windows import windows

#: Tokens of the longest text that the pipeline passes on: Qwen's, and ByT5's for words in quotation marks.
LONGEST_TEXT: Final = 1000, 256
#: Tokens of the vision tower's states of an image.
IMAGE_TOKENS: Final = 729
#: Tokens of a prompt of some sixty words without quotation marks, for the cost model.
USUAL_TEXT: Final = 128, 0


@dataclass(frozen=True)
class Stage:
    """The denoising of one checkpoint: latents of (frames, height, width), and its passes.

    A step has one pass for each of its `windows`, which are numbers of latent tokens; twice as many if it is `guided`.
    """

    checkpoint: str
    latents: tuple[int, int, int]
    windows: tuple[int, ...]
    steps: int
    guided: bool
    super_resolution: bool

    @property
    def tokens(self) -> int:
        """Latent tokens of the whole video at this stage."""
        frames, height, width = self.latents
        return frames * height * width

    @property
    def passes(self) -> int:
        """Passes of the transformer in the whole stage."""
        return self.steps * len(self.windows) * (2 if self.guided else 1)

    @property
    def channels(self) -> int:
        """Channels that enter the transformer: latents, condition and its mask, low resolution and its mask."""
        latent = TRANSFORMER.latent_channels
        return 3 * latent + 2 if self.super_resolution else 2 * latent + 1


@dataclass(frozen=True)
class Workload:
    """A video's stages in order. `from_image` tells whether it starts from an image."""

    frames: int
    stages: tuple[Stage, ...]
    from_image: bool

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the decoded video."""
        _, height, width = self.stages[-1].latents
        return VAE.spatial * width, VAE.spatial * height

    @property
    def latent_frames(self) -> int:
        """Frames in latent space: the first is one frame, every other is four."""
        return (self.frames - 1) // VAE.temporal + 1


def kind_of_job(resolution: Resolution, duration: int, *, from_image: bool = False) -> JobInput:
    """A 16:9 job of this kind, for a plan: its prompt and its image are placeholders."""
    image = "data:image/png;base64," if from_image else None
    return JobInput(prompt="A job of this kind", resolution=resolution, duration=duration, image=image)


def workload(job_input: JobInput, route: Route, checkpoints: Mapping[str, Checkpoint]) -> Workload:
    """The stages of a job on a route. `checkpoints` has every name of the route."""
    wide, high = map(int, job_input.aspect_ratio.split(":"))
    frames = num_frames(job_input.duration)

    def stage(name: str) -> Stage:
        checkpoint = checkpoints[name]
        width, height = trained_size(checkpoint.base_size, wide, high, VAE.spatial)
        latents = (frames - 1) // VAE.temporal + 1, height // VAE.spatial, width // VAE.spatial
        sampling = checkpoint.sampling
        if name in route.super_resolution:
            passes = tuple(window.tokens for window in windows(route.tiling, *latents))
            return Stage(name, latents, passes, sampling.num_inference_steps, False, True)
        steps = job_input.num_inference_steps or sampling.num_inference_steps
        # A checkpoint without a guidance scale of its own has that of its pipeline, which is above 1.
        guidance = job_input.guidance_scale or sampling.guidance_scale
        guided = guidance is None or guidance > 1
        return Stage(name, latents, (latents[0] * latents[1] * latents[2],), steps, guided, False)

    stages = tuple(map(stage, route.checkpoints))
    return Workload(frames, stages, job_input.image is not None)
