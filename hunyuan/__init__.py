"""Use a HunyuanVideo server: a client to import, and the `hunyuan` command.

from pathlib import Path
from hunyuan import Client

with Client("http://localhost:8000") as client:
    task_id = client.generate({"prompt": "A paper boat on a rainy street"})
    client.wait(task_id)
    client.download(task_id, Path("boat.mp4"))
"""

from hunyuan.client import Client, ClientError, Health, RefusedError, TaskFailedError, TaskStatus, UnreachableError

__all__ = ["Client", "ClientError", "Health", "RefusedError", "TaskFailedError", "TaskStatus", "UnreachableError"]
