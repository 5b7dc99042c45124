"""What a job reports while it runs, and what it returns when it is done."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from contract.job import FPS, JobInput


class Stage(StrEnum):
    """The stages of a job, in order."""

    QUEUED = "queued"
    ENCODING_PROMPT = "encoding_prompt"
    DENOISING = "denoising"
    UPSCALING = "upscaling"
    DECODING = "decoding"
    STORING = "storing"


class Progress(BaseModel):
    """How far a running job is. `progress` is a percentage that never falls; only a result counts as 100."""

    model_config = ConfigDict(frozen=True)

    progress: int = Field(ge=0, le=99)
    stage: Stage
    elapsed_time: float = Field(default=0.0, ge=0, description="Seconds since the worker took the job.")


class Manifest(BaseModel):
    """Describes a finished video and is stored beside it. If the manifest exists, the video is complete."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    task_id: str
    status: Literal["completed"] = "completed"
    input: JobInput
    model: str = Field(description='The model that rendered, for example "demo".')
    attention: str = Field(default="", description="The attention kernel that was used, in diffusers' names.")
    approximations: tuple[str, ...] = Field(default=(), description="The HUNYUAN_APPROXIMATIONS that the render used.")
    seed: int
    width: int
    height: int
    num_frames: int
    fps: int = FPS
    file_size: int = Field(description="Bytes.")
    sha256: str
    created_at: datetime
    timings: Mapping[str, float] = Field(description="Seconds spent in each stage, and `total`.")
    version: str = Field(description="Version of the service that rendered.")


class JobResult(Manifest):
    """What a job returns: the manifest, and presigned URLs for callers who use RunPod's API without the server."""

    video_url: str
    poster_url: str
