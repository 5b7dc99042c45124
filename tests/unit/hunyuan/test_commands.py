"""The options of the `hunyuan` commands, and the requests that they make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
import typer.main
from typer.testing import CliRunner

from contract.job import JobInput
from hunyuan.cli.main import app


class RefusingServer(BaseHTTPRequestHandler):
    """Records the body of each POST and refuses it."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    RefusingServer.bodies = []
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingServer) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def request_of(address: str, *options: str) -> dict[str, Any]:
    arguments = ["generate", "A paper boat on a rainy street", "--server", address, *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    (body,) = RefusingServer.bodies
    return body


def test_generate_has_an_option_for_every_optional_request_field() -> None:
    command = typer.main.get_group(app).commands["generate"]
    options = {parameter.name for parameter in command.params}
    assert options == {*JobInput.model_fields, "output", "server", "as_json"}


def test_generate_renders_five_seconds_at_720p_unless_told_otherwise(address: str) -> None:
    assert request_of(address) == {
        "prompt": "A paper boat on a rainy street",
        "duration": 5,
        "resolution": "720p",
        "model": "HunyuanVideo-1.5",
        "aspect_ratio": "16:9",
    }


def test_generate_sends_its_options_as_the_request_has_them(address: str) -> None:
    options = {
        "duration": 6,
        "resolution": "1080p",
        "model": "HunyuanVideo-1.5-fast",
        "aspect_ratio": "1:1",
        "seed": 7,
        "negative_prompt": "rain",
        "num_inference_steps": 20,
        "guidance_scale": 5.5,
        "image": "https://films.example/boat.png",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sent = request_of(address, *words, "--enhance-prompt")
    assert sent == {"prompt": "A paper boat on a rainy street", **options, "enhance_prompt": True}
