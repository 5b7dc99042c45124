"""What a client receives. Every model is frozen, and keeps fields that a newer server adds."""

import base64
from pathlib import Path
from typing import Annotated, Final, Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

#: A notebook stores what it shows. A larger video is not embedded.
_EMBEDDED_BYTES: Final = 50_000_000


class LoraFields(TypedDict):
    """A LoRA adapter by its name, and its strength; 1.0 if left out."""

    name: str
    scale: NotRequired[float]


class RequestFields(TypedDict, total=False):
    """The optional fields of a request. docs/api.md says what each one does; the server sets what is left out."""

    duration: int
    resolution: Literal["720p", "1080p"]
    model: str
    aspect_ratio: Literal["16:9", "9:16", "1:1", "4:3", "3:4"]
    seed: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    image: str | Path
    enhance_prompt: bool
    loras: list[LoraFields]
    webhook_url: str


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class TaskAnswer(_Answer):
    """An answer about one task. Every method that takes a task takes this or the task's id."""

    task_id: str


class AcceptedTask(TaskAnswer):
    """A task that the server accepted. `estimated_time` is in seconds."""

    status: Literal["processing"]
    estimated_time: int


class ProcessingStatus(TaskAnswer):
    """A waiting or running task. `progress` is a percentage, `elapsed_time` the seconds since it was accepted.

    `remaining_time` is in seconds; None if that cannot be said, or if the server is older. `preview_url` is a JPEG of
    what is seen so far.
    """

    status: Literal["processing"]
    progress: int = 0
    elapsed_time: int = 0
    stage: str | None = None
    queue_position: int | None = None
    remaining_time: int | None = None
    preview_url: str | None = None


class CompletedStatus(TaskAnswer):
    """A task with a video. `duration` is in seconds, `file_size` in bytes. Older servers leave out prompt and seed."""

    status: Literal["completed"]
    video_url: str
    duration: int
    resolution: str
    file_size: int
    prompt: str | None = None
    seed: int | None = None


class FailedStatus(TaskAnswer):
    """A task that ended without a video."""

    status: Literal["failed"]
    error: str
    error_code: str


#: The answer of /status; `status` tells them apart.
TaskStatus = ProcessingStatus | CompletedStatus | FailedStatus
TASK_STATUS: Final[TypeAdapter[TaskStatus]] = TypeAdapter(Annotated[TaskStatus, Field(discriminator="status")])


class TaskPage(_Answer):
    """Some tasks, the newest first. `next_cursor` gets the page after this one; None if it is the last."""

    tasks: tuple[Annotated[TaskStatus, Field(discriminator="status")], ...]
    next_cursor: str | None = None


class UploadedImage(_Answer):
    """An image that the server has stored for a day. `image` is a value of the field `image` of a request."""

    image: str


class Health(_Answer):
    """The answer of /health."""

    status: str
    model_loaded: bool
    gpu_available: bool
    vram_free: str
    version: str


class Video(TaskAnswer):
    """A video on this machine. A notebook plays it."""

    path: Path
    file_size: int

    def _repr_html_(self) -> str | None:
        """The video itself, for Jupyter: neither the server nor its key is needed to play it later."""
        if self.file_size > _EMBEDDED_BYTES or not self.path.is_file():
            return None
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f'<video controls loop style="max-width: 100%" src="data:video/mp4;base64,{data}"></video>'
