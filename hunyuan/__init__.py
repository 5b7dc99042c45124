"""Use a HunyuanVideo server: clients to import, and the `hunyuan` command. docs/client.md has examples.

from hunyuan import Client

with Client("http://localhost:8000") as client:
    task = client.generate("A paper boat on a rainy street", duration=5)
    client.wait(task)
    client.download(task, "boat.mp4")
"""

from hunyuan.client import AsyncClient, Client
from hunyuan.errors import (
    ApiError,
    ClientError,
    RefusedError,
    TaskFailedError,
    UnexpectedAnswerError,
    UnreachableError,
    WaitTimeoutError,
)
from hunyuan.models import (
    AcceptedTask,
    CompletedStatus,
    FailedStatus,
    Health,
    ProcessingStatus,
    RequestFields,
    TaskPage,
    TaskStatus,
    Video,
)

__all__ = [
    "AcceptedTask",
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "CompletedStatus",
    "FailedStatus",
    "Health",
    "ProcessingStatus",
    "RefusedError",
    "RequestFields",
    "TaskFailedError",
    "TaskPage",
    "TaskStatus",
    "UnexpectedAnswerError",
    "UnreachableError",
    "Video",
    "WaitTimeoutError",
]
