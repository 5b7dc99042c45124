"""What a job reports while it runs, and what it returns when it is done."""

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from contract.errors import ErrorCode, JobFailure
from contract.job import FPS, JobInput


class Stage(StrEnum):
    """The stages of a job, in order."""

    QUEUED = "queued"
    ENCODING_PROMPT = "encoding_prompt"
    DENOISING = "denoising"
    UPSCALING = "upscaling"
    DECODING = "decoding"
    STORING = "storing"


#: Bytes of a preview: in base64, a report of progress has 32 KiB of it.
MAX_PREVIEW_BYTES: Final = 24 * 1024


class Progress(BaseModel):
    """How far a running job is. `progress` is a percentage that never falls; only a result counts as 100."""

    model_config = ConfigDict(frozen=True)

    progress: int = Field(ge=0, le=99)
    stage: Stage
    elapsed_time: float = Field(default=0.0, ge=0, description="Seconds since the worker took the job.")
    preview: Base64Bytes | None = Field(
        default=None,
        max_length=MAX_PREVIEW_BYTES,
        exclude_if=lambda preview: preview is None,
        description="A JPEG of what the latents show, if there is a new one.",
    )


def _key_without_attempt(extension: str, *, exclude: bool = False) -> Any:
    """Workers of releases before the attempt keys named no keys: every attempt wrote to the same ones."""
    return Field(default_factory=lambda fields: f"videos/{fields.get('task_id')}.{extension}", exclude=exclude)


class Manifest(BaseModel):
    """Describes a finished video and is stored beside it. If the manifest exists, the video is complete.

    `video_key`, `poster_key` and `sheet_key` are the object keys of the attempt that completed the task, in the
    manifest's bucket.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    task_id: str
    status: Literal["completed"] = "completed"
    video_key: str = _key_without_attempt("mp4")
    poster_key: str = _key_without_attempt("jpg")
    sheet_key: str | None = Field(default=None, description="null in manifests of earlier releases.")
    input: JobInput
    rewritten_prompt: str | None = Field(
        default=None, description="The prompt that the model rendered, if `input` asked to enhance its own."
    )
    warnings: tuple[str, ...] = Field(default=(), description="What could not be done for the request.")
    remixed_from: str | None = Field(default=None, description="The task whose settings and seed the request took.")
    model: str = Field(description='The model that rendered, for example "demo".')
    attention: str = Field(default="", description="The attention kernel that was used, in diffusers' names.")
    approximations: tuple[str, ...] = Field(default=(), description="The HUNYUAN_APPROXIMATIONS that the render used.")
    seed: int
    width: int
    height: int
    rendered_size: tuple[int, int] | None = Field(
        default=None,
        description="Width and height of the frames that the model rendered. If they differ from `width` and `height`, "
        "the encoder scaled the frames (Lanczos). null in manifests of earlier releases.",
    )
    num_frames: int
    fps: int = FPS
    file_size: int = Field(description="Bytes.")
    sha256: str
    created_at: datetime
    timings: Mapping[str, float] = Field(description="Seconds spent in each stage, and `total`.")
    version: str = Field(description="Version of the service that rendered.")

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        """A manifest names objects of its own task only: the server reads what it names."""
        own = f"videos/{self.task_id}.", f"videos/{self.task_id}/"
        if not all(key.startswith(own) for key in self.object_keys):
            raise ValueError("video_key, poster_key and sheet_key must be keys of the task")
        return self

    @property
    def object_keys(self) -> frozenset[str]:
        """The keys of its objects."""
        return frozenset(filter(None, (self.video_key, self.poster_key, self.sheet_key)))


class Tombstone(BaseModel):
    """Says that a task ended without a video. It is stored in place of the manifest, so that no late worker adds one.

    The server writes it for a task that failed or was cancelled.
    """

    model_config = ConfigDict(frozen=True)

    task_id: str
    status: Literal["failed", "cancelled"]
    error: str
    error_code: ErrorCode
    ended_at: datetime

    @classmethod
    def of(cls, task_id: str, failure: JobFailure, *, cancelled: bool = False) -> Self:
        """The tombstone of a task that ends now."""
        return cls(
            task_id=task_id,
            status="cancelled" if cancelled else "failed",
            error=failure.error,
            error_code=failure.error_code,
            ended_at=datetime.now(UTC),
        )

    @property
    def failure(self) -> JobFailure:
        """What a client of the task reads."""
        return JobFailure(error=self.error, error_code=self.error_code)


#: How a task ended, as the object at the key of its manifest says.
Verdict = Manifest | Tombstone
VERDICT: Final[TypeAdapter[Verdict]] = TypeAdapter(Annotated[Verdict, Field(discriminator="status")])


class JobResult(Manifest):
    """What a job returns: the manifest, and presigned URLs for callers who use RunPod's API without the server."""

    video_url: str
    poster_url: str


class InlineResult(JobResult):
    """What a job on RunPod returns whose worker has no bucket: the MP4 itself, and no keys or URLs of objects."""

    video_key: str = _key_without_attempt("mp4", exclude=True)
    poster_key: str = _key_without_attempt("jpg", exclude=True)
    sheet_key: None = Field(default=None, exclude=True)
    video_url: str = Field(default="", exclude=True)
    poster_url: str = Field(default="", exclude=True)
    video_base64: str
