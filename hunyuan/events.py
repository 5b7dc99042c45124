"""Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from collections.abc import AsyncIterator


async def data_of(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event. Comments, which keep the connection open, and the other fields are skipped."""
    data: list[bytes] = []
    async for line in _lines(chunks):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif not line and data:
            yield b"\n".join(data)
            data = []


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines by LF or CRLF only: str.splitlines would split at characters that JSON leaves as they are."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
