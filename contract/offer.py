"""What a worker's weights can render, and whether a job is among it."""

from collections.abc import Collection, Iterable

from pydantic import BaseModel, ConfigDict

from contract.errors import ErrorCode, JobFailure
from contract.job import InvalidInputError, JobInput
from contract.lora import unknown_adapter


class SamplingLimits(BaseModel):
    """What a request for `model` may not change, because the checkpoint behind it is distilled. None: it may.

    `from_image` tells whether this is about videos from an image: they have a checkpoint of their own.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    from_image: bool
    guidance_scale: float | None = None
    num_inference_steps: int | None = None

    def failure(self, job_input: JobInput) -> JobFailure | None:
        """Why this job breaks the limits; None if it keeps them, or if they are those of other jobs."""
        if (self.model, self.from_image) != (job_input.model, job_input.image is not None):
            return None
        for name, fixed, asked in (
            ("guidance_scale", self.guidance_scale, job_input.guidance_scale),
            ("num_inference_steps", self.num_inference_steps, job_input.num_inference_steps),
        ):
            if fixed is not None and asked is not None and asked != fixed:
                text = (
                    f'{name} must be {fixed:g} for the model "{self.model}", because its weights are distilled; '
                    f"got {asked:g}. Leave it out, or use another model"
                )
                return JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST)
        return None


def check_offered(
    job_input: JobInput,
    models: Collection[str],
    *,
    takes_images: bool,
    limits: Iterable[SamplingLimits] = (),
    loras: Collection[str] | None = None,
) -> None:
    """Check that a worker has weights for the job. The server checks before it queues, the worker before it renders.

    `models` are the `model` values that can be rendered, `limits` what their checkpoints fix, `loras` the names of the
    LoRA adapters; None does not check these.

    Raises:
        InvalidInputError: INVALID_MODEL naming `models`; INVALID_REQUEST for an image that no weights support, for a
            number that differs from a limit, or for an adapter that does not exist.
    """
    if job_input.model not in models:
        known = ", ".join(f'"{name}"' for name in models)
        text = f"model: this server has weights for {known} only"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_MODEL))
    if job_input.image is not None and not takes_images:
        text = "image: this server has no image-to-video weights"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST))
    for limit in limits:
        if (failure := limit.failure(job_input)) is not None:
            raise InvalidInputError(failure)
    for lora in job_input.loras:
        if loras is not None and lora.name not in loras:
            text = unknown_adapter(lora.name, loras)
            raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST))
