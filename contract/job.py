"""A job's input: fields, sizes and the API reference's limits.

The server validates a request with `parse_input` before it queues it. The worker validates the same way, so a job sent
straight to RunPod gets the same limits and the same error codes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from contract.errors import ErrorCode, JobFailure

FPS: Final = 24
MIN_PROMPT_LENGTH: Final = 10
MAX_PROMPT_LENGTH: Final = 500
MIN_DURATION: Final = 5
MAX_DURATION: Final = 10

MAX_SEED: Final = 2**32 - 1
#: Characters of an image's URL. A data URL of 5 MB; over REST the body's own limit is lower.
MAX_IMAGE_LENGTH: Final = 7_000_000

#: The name every client may ask for: whatever profile this server prefers.
DEFAULT_MODEL: Final = "HunyuanVideo-1.5"


class Profile(StrEnum):
    """How much time a video may take. Which of them a server offers depends on the weights it has."""

    FAST = "fast"
    BALANCED = "balanced"
    QUALITY = "quality"

    @property
    def model(self) -> str:
        """The `model` that asks for it by name."""
        return f"{DEFAULT_MODEL}-{self.value}"


KNOWN_MODELS: Final = (DEFAULT_MODEL, *(profile.model for profile in Profile))
#: The HUNYUAN_MODEL_PATH of the small model that needs no weights and no GPU, and its name in manifests.
DEMO_MODEL: Final = "demo"


class Resolution(StrEnum):
    """An output size a client may ask for."""

    P720 = "720p"
    P1080 = "1080p"


class AspectRatio(StrEnum):
    """Width to height of the video. Every one has about the pixels of its resolution's 16:9."""

    WIDE = "16:9"
    TALL = "9:16"
    SQUARE = "1:1"
    CLASSIC = "4:3"
    PORTRAIT = "3:4"


_SIZES: Final[Mapping[tuple[Resolution, AspectRatio], tuple[int, int]]] = {
    (Resolution.P720, AspectRatio.WIDE): (1280, 720),
    (Resolution.P720, AspectRatio.TALL): (720, 1280),
    (Resolution.P720, AspectRatio.SQUARE): (960, 960),
    (Resolution.P720, AspectRatio.CLASSIC): (1104, 828),
    (Resolution.P720, AspectRatio.PORTRAIT): (828, 1104),
    (Resolution.P1080, AspectRatio.WIDE): (1920, 1080),
    (Resolution.P1080, AspectRatio.TALL): (1080, 1920),
    (Resolution.P1080, AspectRatio.SQUARE): (1440, 1440),
    (Resolution.P1080, AspectRatio.CLASSIC): (1664, 1248),
    (Resolution.P1080, AspectRatio.PORTRAIT): (1248, 1664),
}


def num_frames(duration: int) -> int:
    """Frames in a video of `duration` seconds: 24 a second and the first one, as 4k+1 latents decode to."""
    return FPS * duration + 1


class InvalidInputError(ValueError):
    """The job's input is outside the documented bounds."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.error)
        self.failure = failure


def _known_model(name: str) -> str:
    if name not in KNOWN_MODELS:
        raise ValueError("unknown model")
    return name


def _storable_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("NUL character")
    return text


class JobInput(BaseModel):
    """What to render. The same model checks POST /generate and RunPod's `input`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=MIN_PROMPT_LENGTH, max_length=MAX_PROMPT_LENGTH),
        AfterValidator(_storable_text),
    ] = Field(description="Text description of the desired video, 10-500 characters after trimming.")
    duration: int = Field(
        default=10, strict=True, ge=MIN_DURATION, le=MAX_DURATION, description="Video length in seconds."
    )
    resolution: Resolution = Field(default=Resolution.P1080, description="Output resolution.")
    model: Annotated[str, AfterValidator(_known_model)] = Field(
        default=DEFAULT_MODEL,
        description="Model version to use.",
        json_schema_extra={"enum": list(KNOWN_MODELS)},
    )
    aspect_ratio: AspectRatio = Field(default=AspectRatio.WIDE, title="Aspect ratio", description="Width to height.")
    seed: int | None = Field(
        default=None, strict=True, ge=0, le=MAX_SEED, description="The same seed gives the same video again."
    )
    negative_prompt: Annotated[str, AfterValidator(_storable_text)] | None = Field(
        default=None,
        max_length=MAX_PROMPT_LENGTH,
        description="What the video should not show; without effect on models that use no guidance.",
    )
    num_inference_steps: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=100,
        title="Steps",
        description="Denoising steps of the base model, in place of its own.",
    )
    guidance_scale: float | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=20,
        allow_inf_nan=False,
        title="Guidance",
        description="How closely to follow the prompt, in place of the model's own; 1 is none.",
    )
    image: str | None = Field(
        default=None,
        max_length=MAX_IMAGE_LENGTH,
        pattern=r"^(https?://|data:image/[a-z+.-]+;base64,)",
        title="First frame",
        description="The image that the video starts from: an http(s) URL, or a base64 data URL. JPEG, PNG or WebP.",
    )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the delivered video in pixels."""
        return _SIZES[self.resolution, self.aspect_ratio]

    def without_data(self) -> JobInput:
        """The same, with an image that came with the request left out: it may be megabytes."""
        return self.model_copy(update={"image": None}) if (self.image or "").startswith("data:") else self

    def wire(self) -> dict[str, Any]:
        """The input as it is queued: JSON, with what was not asked for left out."""
        return self.model_dump(mode="json", exclude_none=True)


def parse_input(raw: bytes | Mapping[str, Any] | object) -> JobInput:
    """Validate a request body (JSON bytes) or RunPod's decoded `input`.

    Raises:
        InvalidInputError: with the documented code of the first field that is wrong, and what it takes.
    """
    try:
        if isinstance(raw, bytes):
            return JobInput.model_validate_json(raw)
        return JobInput.model_validate(raw)
    except ValidationError as exc:
        raise InvalidInputError(_failure(exc.errors(include_url=False, include_context=False)[0])) from exc


def _one_of(field: str, values: Iterable[str]) -> str:
    return f"{field} must be one of " + ", ".join(f'"{value}"' for value in values)


_FIELD_RULES: Final[Mapping[str, tuple[ErrorCode, str]]] = {
    "prompt": (
        ErrorCode.INVALID_PROMPT,
        f"prompt must be text of {MIN_PROMPT_LENGTH}-{MAX_PROMPT_LENGTH} characters after trimming",
    ),
    "duration": (
        ErrorCode.INVALID_DURATION,
        f"duration must be an integer from {MIN_DURATION} to {MAX_DURATION} (seconds)",
    ),
    "resolution": (ErrorCode.INVALID_RESOLUTION, _one_of("resolution", Resolution)),
    "model": (ErrorCode.INVALID_MODEL, _one_of("model", KNOWN_MODELS)),
    "aspect_ratio": (ErrorCode.INVALID_REQUEST, _one_of("aspect_ratio", AspectRatio)),
    "seed": (ErrorCode.INVALID_REQUEST, f"seed must be an integer from 0 to {MAX_SEED}"),
    "negative_prompt": (
        ErrorCode.INVALID_REQUEST,
        f"negative_prompt must be text of at most {MAX_PROMPT_LENGTH} characters",
    ),
    "num_inference_steps": (ErrorCode.INVALID_REQUEST, "num_inference_steps must be an integer from 1 to 100"),
    "image": (ErrorCode.INVALID_REQUEST, "image must be an http(s) URL or a data:image/...;base64 URL"),
    "guidance_scale": (ErrorCode.INVALID_REQUEST, "guidance_scale must be a number from 1 to 20"),
}


def _failure(error: ErrorDetails) -> JobFailure:
    field = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = ", ".join(JobInput.model_fields)
        return JobFailure(
            error=f"unknown field {_shown(field)}; known fields are {known}",
            error_code=ErrorCode.INVALID_REQUEST,
        )
    if field in _FIELD_RULES:
        code, rule = _FIELD_RULES[field]
        return JobFailure(error=f"{rule}; {_what_came(error)}", error_code=code)
    if error["type"] == "json_invalid":
        return JobFailure(error="the body is not valid JSON", error_code=ErrorCode.INVALID_REQUEST)
    return JobFailure(error="the body must be a JSON object", error_code=ErrorCode.INVALID_REQUEST)


def _what_came(error: ErrorDetails) -> str:
    match error["type"], error["input"]:
        case "missing", _:
            return "it is missing"
        case "string_too_short" | "string_too_long", str() as text:
            return f"got {len(text.strip())}"
        case _, value:
            return f"got {_shown(value)}"


def _shown(value: object) -> str:
    """`value` as JSON, cut to a length that fits an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_offered(job_input: JobInput, models: Collection[str], *, takes_images: bool) -> None:
    """Whether there are weights for the job: the shim asks before it queues, the handler before it renders.

    `models` are those that can be rendered.

    Raises:
        InvalidInputError: INVALID_MODEL naming them, or INVALID_REQUEST where it starts from an image and none can.
    """
    if job_input.model not in models:
        known = ", ".join(f'"{name}"' for name in models)
        text = f"model: this server has the weights for {known} only"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_MODEL))
    if job_input.image is not None and not takes_images:
        text = "image: this server has no image-to-video weights"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST))
