"""`hunyuan mcp`: the server as tools of an assistant."""

from importlib.util import find_spec

from hunyuan.cli.exits import CommandError, ExitCode, reported
from hunyuan.cli.session import Server, account


def mcp(server: Server = None) -> None:
    """Offer the server to an assistant, over the Model Context Protocol on stdin and stdout."""
    with reported(as_json=False):
        if find_spec("mcp") is None:
            raise CommandError("this command needs an extra: pip install 'hunyuan-video-service[mcp]'", ExitCode.FAILED)
        address, key = account(server)
        from hunyuan.cli.mcp_tools import serve

        serve(address, key)
