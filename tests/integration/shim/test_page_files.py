"""The files of the web page: access and headers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from shim.access import OPEN_TO_ALL, Access, parse_api_keys
from shim.app import create_app
from shim.errors import ServerErrorCode
from storage.bucket import Bucket
from tests.support.http_server import serving
from tests.support.queues import NOWHERE, sql_bench

_SCRIPT = "text/javascript; charset=utf-8"
SCRIPTS = ("api", "app", "card", "code", "fields", "health", "hints", "image", "key", "schema", "tasks", "words")
FILES = {
    "/": "text/html; charset=utf-8",
    **dict.fromkeys((f"/static/{name}.js" for name in SCRIPTS), _SCRIPT),
    "/static/style.css": "text/css; charset=utf-8",
    "/static/icon.svg": "image/svg+xml",
}


@asynccontextmanager
async def client(directory: Path, access: Access = OPEN_TO_ALL) -> AsyncIterator[httpx.AsyncClient]:
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3") as bench:
        app = create_app(bench.queue, Bucket(NOWHERE), access=access)
        async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
            yield http


async def test_the_page_needs_no_key_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    async with client(tmp_path, Access(parse_api_keys("alices-key-0123456789"))) as http:
        for path, kind in FILES.items():
            response = await http.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == kind
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'self'; media-src 'self' blob:; img-src 'self' blob:; ")
            assert "unsafe" not in policy
            assert response.headers["cache-control"] == "no-cache"
            head = await http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            again = await http.get(path, headers={"If-None-Match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["content-security-policy"] == policy, "a browser uses the headers of a 304"
        assert (await http.get("/static/other.js")).status_code == 401


async def test_other_paths_than_the_pages_files_are_404(tmp_path: Path) -> None:
    async with client(tmp_path) as http:
        for path in ("/static/", "/static/index.html", "/static/../settings.py", "/static/%2e%2e/settings.py"):
            response = await http.get(path)
            assert (response.status_code, response.json()["error_code"]) == (404, ServerErrorCode.NOT_FOUND)
        assert (await http.post("/")).status_code == 405


async def test_the_page_is_not_in_the_openapi_document(tmp_path: Path) -> None:
    async with client(tmp_path) as http:
        document = (await http.get("/openapi.json")).json()
        assert FILES.keys() & document["paths"].keys() == set()


async def test_the_footer_has_the_notice_and_the_licence_that_health_states(tmp_path: Path) -> None:
    async with client(tmp_path) as http:
        health = (await http.get("/health")).json()
        page = (await http.get("/")).text
    footer = page.partition("<footer")[2].partition("</footer>")[0]
    assert health["notice"] in footer
    assert f'href="{health["licence"]}"' in footer
