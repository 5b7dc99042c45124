"""The tools of `hunyuan mcp`: a client's methods, for assistants that speak the Model Context Protocol.

Source: https://modelcontextprotocol.io/specification.
"""

import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final, Self

import anyio
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from contract.errors import ErrorCode
from contract.job import JobRequest
from contract.settings import explain
from hunyuan.cli.exits import CommandError, ExitCode
from hunyuan.cli.session import translated
from hunyuan.client import AsyncClient
from hunyuan.models import ProcessingStatus

_INSTRUCTIONS: Final = """\
Makes videos from text on a HunyuanVideo server. A video takes from seconds to many minutes: generate_video returns a
task_id at once, get_status with `wait` waits for the end, and get_video saves the MP4."""

#: Takes how far the task is, in percent, and its stage.
Report = Callable[[float, str], Awaitable[None]]
TaskId = Annotated[str, Field(min_length=1, description="The task_id that generate_video returned.")]


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """What the assistant has given. Raises CommandError if it is wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as exc:
            raise CommandError(explain(exc), ExitCode.USAGE, error_code=ErrorCode.INVALID_REQUEST) from exc


class _TaskArguments(_Arguments):
    task_id: TaskId


class _StatusArguments(_TaskArguments):
    wait: int = Field(
        default=0,
        ge=0,
        le=600,
        description="Seconds to wait for the end of a task that has not ended. Progress is reported meanwhile.",
    )


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


class _VideoArguments(_TaskArguments):
    output: Annotated[Path, AfterValidator(_absolute)] = Field(
        description="Absolute path of the file, or of a directory, to save the MP4 to."
    )
    overwrite: bool = Field(default=False, description="Replace the file if it exists.")


async def _generate_video(client: AsyncClient, given: dict[str, Any], _: Report) -> BaseModel:
    return await client.generate(given)  # the server checks the request


async def _get_status(client: AsyncClient, given: dict[str, Any], report: Report) -> BaseModel:
    arguments = _StatusArguments.of(given)
    status = await client.status(arguments.task_id)
    if arguments.wait == 0 or not isinstance(status, ProcessingStatus):
        return status
    reported = -1
    with anyio.move_on_after(arguments.wait):
        async with aclosing(client.stream_events(arguments.task_id)) as statuses:
            async for status in statuses:
                # The protocol wants each report to be higher than the one before it.
                if isinstance(status, ProcessingStatus) and status.progress > reported:
                    reported = status.progress
                    await report(reported, (status.stage or status.status).replace("_", " "))
    return status


async def _get_video(client: AsyncClient, given: dict[str, Any], _: Report) -> BaseModel:
    arguments = _VideoArguments.of(given)
    try:
        return await client.download(arguments.task_id, arguments.output, overwrite=arguments.overwrite)
    except FileExistsError as exc:
        raise CommandError(f"{exc}; set overwrite to replace it", ExitCode.USAGE) from exc


async def _cancel_task(client: AsyncClient, given: dict[str, Any], _: Report) -> BaseModel:
    return await client.cancel(_TaskArguments.of(given).task_id)


def _request_schema() -> dict[str, Any]:
    """The schema of a request, whose image may be a file."""
    schema = JobRequest.model_json_schema()
    about = f"{JobRequest.model_fields['image'].description} Or the absolute path of a file."
    schema["properties"]["image"] = {"type": "string", "description": about}
    return schema


_TOOLS: Final = (
    Tool(
        name="generate_video",
        description="Queue a video. Returns its task_id and the estimated seconds at once; get_status waits for it.",
        input_schema=_request_schema(),
        annotations=ToolAnnotations(destructive_hint=False),
    ),
    Tool(
        name="get_status",
        description="The status of a task: processing with its progress and stage, completed with the URL of its "
        "video, or failed with the reason. With `wait`, as soon as the task has ended.",
        input_schema=_StatusArguments.model_json_schema(),
        annotations=ToolAnnotations(read_only_hint=True),
    ),
    Tool(
        name="get_video",
        description="Save the MP4 of a completed task on this machine.",
        input_schema=_VideoArguments.model_json_schema(),
        annotations=ToolAnnotations(idempotent_hint=True),
    ),
    Tool(
        name="cancel_task",
        description="Cancel a task that waits or runs. A task that has ended does not change.",
        input_schema=_TaskArguments.model_json_schema(),
        annotations=ToolAnnotations(idempotent_hint=True),
    ),
)
_HANDLERS: Final = {
    "generate_video": _generate_video,
    "get_status": _get_status,
    "get_video": _get_video,
    "cancel_task": _cancel_task,
}


def serve(address: str, key: str | None) -> None:
    """Serves the tools on stdin and stdout until stdin ends."""
    anyio.run(_serve, address, key)


async def _serve(address: str, key: str | None) -> None:
    async with AsyncClient(address, key) as client, stdio_server() as (received, sent):
        server = _server(client)
        await server.run(received, sent, server.create_initialization_options())


def _server(client: AsyncClient) -> Server[Any]:
    async def list_tools(_: ServerRequestContext[Any], __: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=list(_TOOLS))

    async def call_tool(context: ServerRequestContext[Any], call: CallToolRequestParams) -> CallToolResult:
        async def report(percent: float, stage: str) -> None:
            await context.session.report_progress(percent, 100, stage)

        try:
            with translated():
                answer = await _handler(call.name)(client, call.arguments or {}, report)
        except CommandError as exc:
            return _result(str(exc), exc.fields, is_error=True)
        fields = answer.model_dump(mode="json", exclude_unset=True)
        return _result(json.dumps(fields), fields)

    return Server(
        "hunyuan",
        title="HunyuanVideo",
        version=version("hunyuan-video-service"),
        instructions=_INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _handler(name: str) -> Callable[[AsyncClient, dict[str, Any], Report], Awaitable[BaseModel]]:
    try:
        return _HANDLERS[name]
    except KeyError:
        raise CommandError(f"there is no tool {name}; there are {', '.join(_HANDLERS)}", ExitCode.USAGE) from None


def _result(text: str, fields: dict[str, Any], *, is_error: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(text=text)], structured_content=fields, is_error=is_error)
