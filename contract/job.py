"""A job's input: its fields, their limits, and the sizes of videos.

The server validates a request with `parse_input` before it queues the job. The worker validates the job again, so a job
that was sent straight to RunPod gets the same limits and the same error codes.

To add a resolution, add one line to `Resolution` here and its routes to `handler.video_model.catalog`. To add an
optional field, add it to `JobInput`: the command line and the page read `JobInput.model_json_schema()`. A field that
only the server uses goes into `JobRequest`, and what the server adds for the worker into `QueuedInput`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from contract.errors import ErrorCode, JobFailure
from contract.lora import MAX_LORAS, MAX_SCALE, Lora

FPS: Final = 24
MIN_PROMPT_LENGTH: Final = 10
MAX_PROMPT_LENGTH: Final = 500
#: Characters of a rewritten prompt. The model's text encoder reads 1,000 tokens, which is about as much in Chinese.
MAX_REWRITTEN_LENGTH: Final = 1500
MIN_DURATION: Final = 5
MAX_DURATION: Final = 10

MAX_SEED: Final = 2**32 - 1
#: Characters of an image's URL, enough for a data URL of 5 MB. Over REST the limit of the request body is lower.
MAX_IMAGE_LENGTH: Final = 7_000_000
MAX_WEBHOOK_URL_LENGTH: Final = 2000
#: Bytes and pixels of an image file.
MAX_IMAGE_BYTES: Final = 20 * 1024 * 1024
MAX_IMAGE_PIXELS: Final = 50_000_000
#: An image that POST /images stored begins with this; its id follows.
UPLOAD_PREFIX: Final = "upload:"

#: The model that every client may ask for. The worker renders it with its preferred profile.
DEFAULT_MODEL: Final = "HunyuanVideo-1.5"


class Profile(StrEnum):
    """A trade-off between render time and quality, fastest first. A worker offers the profiles whose weights it has."""

    TURBO = "turbo"
    FAST = "fast"
    BALANCED = "balanced"
    QUALITY = "quality"

    @property
    def model(self) -> str:
        """The `model` value that requests this profile."""
        return f"{DEFAULT_MODEL}-{self.value}"


KNOWN_MODELS: Final = (DEFAULT_MODEL, *(profile.model for profile in Profile))
#: HUNYUAN_MODEL_PATH of the demo model, which needs no download and no GPU. Manifests name it the same.
DEMO_MODEL: Final = "demo"


class AspectRatio(StrEnum):
    """Width to height of the video. Every one has about the pixels of its resolution's 16:9."""

    WIDE = "16:9"
    TALL = "9:16"
    SQUARE = "1:1"
    CLASSIC = "4:3"
    PORTRAIT = "3:4"


class Resolution(StrEnum):
    """An output size a client may ask for."""

    sizes: Mapping[AspectRatio, tuple[int, int]]

    def __new__(cls, value: str, *sizes: tuple[int, int]) -> Self:
        """`sizes` are (width, height) in pixels, one for each AspectRatio, in its order."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.sizes = dict(zip(AspectRatio, sizes, strict=True))
        return member

    # name, then 16:9, 9:16, 1:1, 4:3, 3:4
    P720 = ("720p", (1280, 720), (720, 1280), (960, 960), (1104, 828), (828, 1104))
    P1080 = ("1080p", (1920, 1080), (1080, 1920), (1440, 1440), (1664, 1248), (1248, 1664))


def num_frames(duration: int) -> int:
    """Frames in a video of `duration` seconds: 24 per second plus one, because k+1 latents decode to 4k+1 frames."""
    return FPS * duration + 1


class InvalidInputError(ValueError):
    """The job's input is invalid; `failure` tells the client why."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.error)
        self.failure = failure


@dataclass(frozen=True)
class Takes:
    """Marks a field of `JobInput` with what it takes, in words that follow "must be" in an error."""

    text: str

    @classmethod
    def one_of(cls, values: Iterable[str]) -> Self:
        """The field takes one of these strings."""
        return cls("one of " + ", ".join(f'"{value}"' for value in values))


def _known_model(name: str) -> str:
    if name not in KNOWN_MODELS:
        raise ValueError("unknown model")
    return name


def _storable_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("NUL character")
    return text


_HTTP_URL: Final = TypeAdapter(HttpUrl)


def _normal_url(text: str) -> str:
    """The URL with its host in ASCII. Raises ValueError if it is malformed or has a user name."""
    url = _HTTP_URL.validate_python(text)
    if url.username is not None or url.password is not None:
        raise ValueError("user name")
    return str(url)


#: The URL of a receiver of webhooks.
WebhookUrl = Annotated[
    str, StringConstraints(max_length=MAX_WEBHOOK_URL_LENGTH, pattern=r"^https?://"), AfterValidator(_normal_url)
]


def _is_empty(value: object) -> bool:
    return not value


def _each_once(loras: tuple[Lora, ...]) -> tuple[Lora, ...]:
    if len({lora.name for lora in loras}) < len(loras):
        raise ValueError("an adapter is named twice")
    return loras


class JobInput(BaseModel):
    """What to render. The same model checks POST /generate and RunPod's `input`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=MIN_PROMPT_LENGTH, max_length=MAX_PROMPT_LENGTH),
        AfterValidator(_storable_text),
        Takes(f"text of {MIN_PROMPT_LENGTH}-{MAX_PROMPT_LENGTH} characters after trimming"),
    ] = Field(description="Text description of the desired video, 10-500 characters after trimming.")
    duration: Annotated[int, Takes(f"an integer from {MIN_DURATION} to {MAX_DURATION} (seconds)")] = Field(
        default=10, strict=True, ge=MIN_DURATION, le=MAX_DURATION, description="Video length in seconds."
    )
    resolution: Annotated[Resolution, Takes.one_of(Resolution)] = Field(
        default=Resolution.P1080, description="Output resolution."
    )
    model: Annotated[str, AfterValidator(_known_model), Takes.one_of(KNOWN_MODELS)] = Field(
        default=DEFAULT_MODEL, description="Model version to use.", json_schema_extra={"enum": list(KNOWN_MODELS)}
    )
    aspect_ratio: Annotated[AspectRatio, Takes.one_of(AspectRatio)] = Field(
        default=AspectRatio.WIDE, title="Aspect ratio", description="Width to height."
    )
    seed: Annotated[int | None, Takes(f"an integer from 0 to {MAX_SEED}")] = Field(
        default=None, strict=True, ge=0, le=MAX_SEED, description="The same seed gives the same video again."
    )
    negative_prompt: Annotated[
        Annotated[str, AfterValidator(_storable_text)] | None, Takes(f"text of at most {MAX_PROMPT_LENGTH} characters")
    ] = Field(
        default=None,
        max_length=MAX_PROMPT_LENGTH,
        description="What the video must not show. Models without guidance ignore it.",
    )
    num_inference_steps: Annotated[int | None, Takes("an integer from 1 to 100")] = Field(
        default=None,
        strict=True,
        ge=1,
        le=100,
        title="Steps",
        description="Denoising steps; the default depends on the profile. Distilled models take only their own number.",
    )
    guidance_scale: Annotated[float | None, Takes("a number from 1 to 20")] = Field(
        default=None,
        strict=True,
        ge=1,
        le=20,
        allow_inf_nan=False,
        title="Guidance",
        description="How closely to follow the prompt; 1 turns guidance off, the default depends on the profile. "
        "Distilled models take only 1.",
    )
    image: Annotated[
        str | None, Takes("an http(s) URL, a data:image/...;base64 URL, or what POST /images returned")
    ] = Field(
        default=None,
        max_length=MAX_IMAGE_LENGTH,
        pattern=r"^(https?://|data:image/[a-z+.-]+;base64,|upload:[0-9]{10}-[A-Za-z0-9_-]{43}$)",
        title="First frame",
        description="The image that the video starts from: an http(s) URL, a base64 data URL, or what POST "
        "/images returned. JPEG, PNG or WebP.",
    )

    enhance_prompt: Annotated[bool, Takes("true or false")] = Field(
        default=False,
        strict=True,
        exclude_if=_is_empty,  # a worker of an earlier release does not know the field
        title="Enhance prompt",
        description="Let a language model write out the prompt in detail before the render.",
    )
    loras: Annotated[
        tuple[Lora, ...],
        AfterValidator(_each_once),
        Takes(
            f'a list of at most {MAX_LORAS} objects like {{"name": "NAME", "scale": 1.0}}, each name once, '
            f"with a scale from {-MAX_SCALE:g} to {MAX_SCALE:g}"
        ),
    ] = Field(
        default=(),
        max_length=MAX_LORAS,
        exclude_if=_is_empty,  # a worker of an earlier release does not know the field
        title="Adapters",
        description='LoRA adapters of the base model, each as {"name": NAME, "scale": 1.0}. /health names them.',
    )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the delivered video in pixels."""
        return self.resolution.sizes[self.aspect_ratio]

    @property
    def upload_id(self) -> str | None:
        """The id of the uploaded image that the video starts from; None without one."""
        return self.image.removeprefix(UPLOAD_PREFIX) if self.image and self.image.startswith(UPLOAD_PREFIX) else None

    def without_data(self) -> JobInput:
        """The same input without an image that came as a data URL, which may be megabytes."""
        return self.model_copy(update={"image": None}) if (self.image or "").startswith("data:") else self

    def wire(self) -> dict[str, Any]:
        """The input as it is queued: a JSON object without the fields that the client did not set."""
        return self.model_dump(mode="json", exclude_none=True)


def plain_type(annotation: Any) -> Any:
    """`str` for `Annotated[str, ...] | None`."""
    arguments = get_args(annotation)
    return plain_type(arguments[0]) if arguments else annotation


class JobRequest(JobInput):
    """The body of POST /generate: a job's input, and what stays on the server. Workers and manifests never get that."""

    webhook_url: Annotated[
        WebhookUrl | None, Takes(f"an http(s) URL of at most {MAX_WEBHOOK_URL_LENGTH} characters without a user name")
    ] = Field(
        default=None,
        title="Webhook",
        description="URL that gets a signed POST when the task has ended. The server must be set up for webhooks.",
    )

    @property
    def job_input(self) -> JobInput:
        """The part that workers get."""
        return JobInput.model_validate(self.model_dump(include=set(JobInput.model_fields)))


class QueuedInput(JobInput):
    """A job's input as it is queued: the request, and what the server adds to it. The worker needs no network for it.

    `warnings` say what the server could not do for the request. `remixed_from` is the task whose settings and seed the
    request took. `traceparent` is the W3C trace context of the request.
    """

    rewritten_prompt: Annotated[str | None, Takes(f"text of at most {MAX_REWRITTEN_LENGTH} characters")] = Field(
        default=None, max_length=MAX_REWRITTEN_LENGTH
    )
    warnings: Annotated[tuple[str, ...], Takes("a list of texts")] = Field(default=(), exclude_if=_is_empty)
    remixed_from: Annotated[str | None, Takes("a task id")] = Field(default=None, max_length=128)
    traceparent: Annotated[str | None, Takes("a trace context as the W3C defines it")] = Field(
        default=None, pattern=r"^[0-9a-f]{2}(-[0-9a-f]+){3}$", max_length=64
    )

    @classmethod
    def of(cls, request: JobInput, **additions: Any) -> Self:
        """The request with `additions`, which are fields of this class."""
        return cls.model_validate({**dict(request), **additions})

    @property
    def request(self) -> JobInput:
        """What the client sent."""
        return JobInput.model_construct(**{name: getattr(self, name) for name in JobInput.model_fields})

    @property
    def rendered(self) -> JobInput:
        """What the model renders: the request with its rewritten prompt, if it has one."""
        return self.request.model_copy(update={"prompt": self.rewritten_prompt or self.prompt})


ParsedInput = TypeVar("ParsedInput", bound=JobInput)


def parse_input(raw: bytes | Mapping[str, Any] | object) -> JobInput:
    """Validate a request: a body (JSON bytes), or the decoded object.

    Raises:
        InvalidInputError: with the documented code of the first wrong field, and what that field takes.
    """
    return _parsed(JobInput, raw)


def parse_request(raw: bytes | Mapping[str, Any]) -> JobRequest:
    """Validate the body of POST /generate, JSON or decoded. Raises InvalidInputError as `parse_input` does."""
    return _parsed(JobRequest, raw)


def parse_queued(raw: object) -> QueuedInput:
    """Validate the decoded `input` of a queued job, which may have come without passing our server.

    Raises:
        InvalidInputError: as `parse_input`, and for a prompt that should have been rewritten before it was queued.
    """
    queued = _parsed(QueuedInput, raw)
    if queued.enhance_prompt and queued.rewritten_prompt is None and not queued.warnings:
        text = "enhance_prompt: our server rewrites prompts, and this job has not passed it; leave the field out"
        raise InvalidInputError(JobFailure(error=text, error_code=ErrorCode.INVALID_REQUEST))
    return queued


def _parsed(model: type[ParsedInput], raw: object) -> ParsedInput:
    try:
        return model.model_validate_json(raw) if isinstance(raw, bytes) else model.model_validate(raw)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False)[0]
        raise InvalidInputError(_failure(error, model)) from exc


def _failure(error: ErrorDetails, model: type[JobInput]) -> JobFailure:
    field = str(error["loc"][0]) if error["loc"] else ""
    is_whole = len(error["loc"]) == 1  # not a part of a field's value
    if error["type"] == "extra_forbidden" and is_whole:
        known = ", ".join(model.model_fields)
        return JobFailure(
            error=f"unknown field {_as_json(field)}; known fields are {known}", error_code=ErrorCode.INVALID_REQUEST
        )
    if field in model.model_fields:
        takes = next(item for item in model.model_fields[field].metadata if isinstance(item, Takes))
        # Four fields have a code of their own, named after the field.
        code = ErrorCode.__members__.get(f"INVALID_{field.upper()}", ErrorCode.INVALID_REQUEST)
        received = "it is missing" if error["type"] == "missing" and is_whole else _received(error)
        return JobFailure(error=f"{field} must be {takes.text}; {received}", error_code=code)
    if error["type"] == "json_invalid":
        return JobFailure(error="the body is not valid JSON", error_code=ErrorCode.INVALID_REQUEST)
    return JobFailure(error="the body must be a JSON object", error_code=ErrorCode.INVALID_REQUEST)


def _received(error: ErrorDetails) -> str:
    match error["type"], error["input"]:
        case "string_too_short" | "string_too_long", str() as text:
            return f"got {len(text.strip())}"
        case _, value:
            return f"got {_as_json(value)}"


def _as_json(value: object) -> str:
    """`value` as JSON, shortened to fit an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
