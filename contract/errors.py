"""Why a request or a job failed, in the shape clients read."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError


def first_of(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are, for the text of an error."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class ErrorCode(StrEnum):
    """Error codes that a worker may return. `shim.errors` adds the codes that only the server returns."""

    INVALID_PROMPT = "INVALID_PROMPT"
    INVALID_DURATION = "INVALID_DURATION"
    INVALID_RESOLUTION = "INVALID_RESOLUTION"
    INVALID_MODEL = "INVALID_MODEL"
    INVALID_REQUEST = "INVALID_REQUEST"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    OOM_ERROR = "OOM_ERROR"
    GENERATION_FAILED = "GENERATION_FAILED"
    CANCELLED = "CANCELLED"
    VIDEO_DELETED = "VIDEO_DELETED"


class JobFailure(BaseModel):
    """What a client reads when its request or job failed: `{"error": text, "error_code": CODE}`."""

    model_config = ConfigDict(frozen=True)

    error: str
    error_code: ErrorCode

    @classmethod
    def from_wire(cls, text: str | None) -> Self:
        """Read the failure back from RunPod's `error` string.

        Our worker sends its failures as JSON. Any other text (a traceback of the SDK, a message of the platform)
        becomes GENERATION_FAILED and stays in the logs, because a client must not see a traceback.
        """
        try:
            return cls.model_validate_json(text or "")
        except ValidationError:
            return cls(
                error="Video generation failed; the worker's log has the details",
                error_code=ErrorCode.GENERATION_FAILED,
            )


#: The failure of a task that a client cancelled.
TASK_CANCELLED: Final = JobFailure(error="The task was cancelled", error_code=ErrorCode.CANCELLED)

#: What a client of a completed task reads after its video was deleted.
VIDEO_DELETED: Final = JobFailure(error="The video was deleted", error_code=ErrorCode.VIDEO_DELETED)
