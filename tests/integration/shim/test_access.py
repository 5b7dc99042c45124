"""Keys, limits, origins and headers over a real port."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from pydantic import ValidationError

from contract.worker import WorkerState
from shim.access import Access, is_allowed_host, parse_api_keys
from shim.api.platform import Platform
from shim.app import create_app
from shim.errors import ServerErrorCode
from shim.queue.sql import SqlQueue
from shim.settings import ShimSettings
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.http_server import serving
from tests.support.queues import JOB, NOWHERE, TOKEN, sql_bench
from tests.support.s3_servers import new_bucket

ALICE = "alices-key-0123456789"
BOB = "bobs-key-0123456789ab"
KEYS = parse_api_keys(f"alice:{ALICE},bob:{BOB}")
PLATFORM = {"Authorization": f"Bearer {TOKEN}"}
BEARER = {"Authorization": f"Bearer {ALICE}"}


@asynccontextmanager
async def running(
    directory: Path, access: Access, bucket: Bucket | None = None, **worker: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The app with the platform's routes and a worker, which is ready by default."""
    async with sql_bench(f"sqlite:///{directory}/queue.sqlite3", max_queue_size=50) as bench:
        await bench.worker(**worker)
        assert isinstance(bench.queue, SqlQueue)
        platform = Platform(bench.queue, bench.dispatcher, bench.outbox, endpoint_id="local", token=TOKEN, hold=0.1)
        app = create_app(bench.queue, bucket or Bucket(NOWHERE), access=access, routers=[platform.router])

        @app.get("/added-later")
        def added_later() -> str:
            return "for clients with a key"

        @app.get("/broken")
        def broken() -> None:
            raise ZeroDivisionError("secret detail")

        async with serving(app) as address, httpx.AsyncClient(base_url=address, timeout=30) as http:
            yield http
            platform.stop()


@pytest.fixture(scope="module")
async def locked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with running(tmp_path_factory.mktemp("locked"), Access(KEYS)) as http:
        yield http


@pytest.fixture(scope="module")
async def unlocked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with running(tmp_path_factory.mktemp("unlocked"), Access()) as http:
        yield http


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 401, response.text
    assert response.json()["error_code"] == ServerErrorCode.UNAUTHORIZED
    assert response.headers["www-authenticate"] == "Bearer"


# Keys


@pytest.mark.parametrize("headers", [BEARER, {"authorization": f"bEARER {BOB}"}, {"X-API-Key": BOB}])
async def test_every_key_is_accepted_in_either_header(locked: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await locked.post("/generate", json=JOB.wire(), headers=headers)
    assert response.status_code == 202
    status = await locked.get(f"/status/{response.json()['task_id']}", headers=headers)
    assert status.json()["status"] == "processing"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
        {"Authorization": f"Bearer {ALICE}x"},
        {"Authorization": f"Bearer {ALICE[:-1]}"},
        {"Authorization": f"Bearer alice:{ALICE}"},
        {"Authorization": f"Bearer {TOKEN}"},
        {"X-API-Key": ALICE.upper()},
        {"X-API-Key": ""},
        {"Cookie": f"key={ALICE}"},
    ],
)
async def test_an_invalid_key_is_rejected(locked: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await locked.post("/generate", json=JOB.wire(), headers=headers)
    assert_refused(response)
    assert ALICE not in response.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/generate"),
        ("GET", "/status/any"),
        ("GET", "/videos/any.mp4"),
        ("HEAD", "/videos/any.mp4"),
        ("DELETE", "/tasks/any"),
        ("GET", "/metrics"),
        ("GET", "/added-later"),
        ("GET", "/no-such-path"),
        ("OPTIONS", "/generate"),
        ("PUT", "/generate"),
        ("GET", "/health/"),
        ("GET", "/Health"),
        ("GET", "/docs/oauth2-redirect"),
        ("GET", "/health/../added-later"),
        ("GET", "/v2"),
        ("GET", "//v2/local/health"),
        ("GET", "/added-later?/v2/"),
        ("GET", "/added-later?api_key=" + ALICE),
    ],
)
async def test_every_path_needs_a_key_even_an_unknown_one(locked: httpx.AsyncClient, method: str, path: str) -> None:
    url = httpx.URL(str(locked.base_url).rstrip("/") + path)
    response = await locked.request(method, url)
    if method == "HEAD":
        assert response.status_code == 401
    else:
        assert_refused(response)


async def test_two_clients_may_use_the_same_idempotency_key(locked: httpx.AsyncClient) -> None:
    task_ids = []
    for key in (ALICE, ALICE, BOB):
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "order 1"}
        task_ids.append((await locked.post("/generate", json=JOB.wire(), headers=headers)).json()["task_id"])
    assert task_ids[0] == task_ids[1] != task_ids[2]


async def test_a_route_that_is_added_later_needs_a_key(locked: httpx.AsyncClient) -> None:
    assert (await locked.get("/added-later", headers=BEARER)).text == '"for clients with a key"'
    assert (await locked.get("/no-such-path", headers=BEARER)).status_code == 404


async def test_health_readiness_and_documentation_need_no_key(locked: httpx.AsyncClient) -> None:
    assert (await locked.get("/health")).status_code == 200
    assert (await locked.get("/ready")).status_code == 503, "the bucket is away"
    assert (await locked.get("/docs")).status_code == 200
    assert (await locked.get("/openapi.json")).status_code == 200


async def test_only_clients_with_a_key_see_why_the_model_is_not_loaded(tmp_path: Path) -> None:
    async with running(tmp_path, Access(KEYS), state=WorkerState.FAILED, error="no /srv/weights") as http:
        answers = [await http.get("/ready", headers=headers) for headers in ({}, {"X-API-Key": "wrong"}, BEARER)]
        assert [answer.json()["error_code"] for answer in answers] == [ServerErrorCode.MODEL_NOT_LOADED] * 3
        assert ["/srv/weights" in answer.text for answer in answers] == [False, False, True]
        assert "/srv" not in (await http.get("/health")).text


async def test_the_platforms_routes_need_the_platforms_token(locked: httpx.AsyncClient) -> None:
    for path in ("/v2/local/health", "/v2/local/job-take/w2", "/v2/local/status/any"):
        for headers in ({}, BEARER, {"X-API-Key": ALICE}, {"Authorization": ""}):
            response = await locked.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error_code"] == ServerErrorCode.UNAUTHORIZED
    assert (await locked.get("/v2/local/health", headers={"Authorization": TOKEN})).status_code == 200
    assert (await locked.get("/v2/other/health", headers={"Authorization": TOKEN})).status_code == 404


async def test_the_openapi_document_says_which_paths_need_a_key(
    locked: httpx.AsyncClient, unlocked: httpx.AsyncClient
) -> None:
    document = (await locked.get("/openapi.json")).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation.get("security") == ([] if path in ("/health", "/ready") else None)
            assert ("401" in operation["responses"]) == (path not in ("/health", "/ready", "/added-later", "/broken"))
    assert "security" not in (await unlocked.get("/openapi.json")).json()


@pytest.fixture(scope="module")
def bucket_settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


async def test_the_hunyuan_command_sends_its_key(tmp_path: Path, bucket_settings: BucketSettings) -> None:
    async with running(tmp_path, Access(KEYS), Bucket(bucket_settings)) as http:
        task_id = (await http.post("/generate", json=JOB.wire(), headers=BEARER)).json()["task_id"]
        command = [sys.executable, "-m", "hunyuan", "status", task_id, "--json"]
        for key, code, words in (
            (ALICE, 0, "processing"),
            ("", 2, "HUNYUAN_API_KEY"),
            (BOB + "x", 2, "UNAUTHORIZED"),
        ):
            environment = {"HUNYUAN_SERVER": str(http.base_url), "HUNYUAN_API_KEY": key, "PYTHONPATH": sys.path[0]}
            done = await anyio.run_process(command, env=environment, check=False)
            output = (done.stdout + done.stderr).decode()
            assert done.returncode == code, output
            assert words in output
            assert ALICE not in output
            assert BOB not in output


# The rate limit


async def test_more_videos_than_the_limit_are_429_and_each_key_has_its_own(tmp_path: Path) -> None:
    async with running(tmp_path, Access(KEYS, rate_limit=2)) as http:
        for _ in range(2):
            accepted = await http.post("/generate", json=JOB.wire(), headers=BEARER)
            assert accepted.status_code == 202
        response = await http.post("/generate", json=JOB.wire(), headers=BEARER)
        assert (response.status_code, response.json()["error_code"]) == (429, ServerErrorCode.RATE_LIMITED)
        assert 0 < int(response.headers["retry-after"]) <= 30
        assert (await http.post("/generate", json=JOB.wire(), headers={"X-API-Key": BOB})).status_code == 202
        status = await http.get(f"/status/{accepted.json()['task_id']}", headers=BEARER)
        assert status.status_code == 200, "only videos are counted"
        for _ in range(5):
            assert_refused(await http.post("/generate", json=JOB.wire()))


async def test_without_keys_the_rate_limit_is_per_address(tmp_path: Path) -> None:
    async with running(tmp_path, Access(rate_limit=1)) as http:
        assert (await http.post("/generate", json=JOB.wire())).status_code == 202
        assert (await http.post("/generate", json=JOB.wire(), headers=BEARER)).status_code == 429
        proxied = {"X-Forwarded-For": "192.0.2.7"}
        assert (await http.post("/generate", json=JOB.wire(), headers=proxied)).status_code == 202, (
            "a proxy on loopback"
        )


async def test_an_invalid_request_counts_too(tmp_path: Path) -> None:
    async with running(tmp_path, Access(rate_limit=1)) as http:
        assert (await http.post("/generate", json={})).status_code == 400
        assert (await http.post("/generate", json=JOB.wire())).status_code == 429


async def test_a_repeated_request_costs_no_rate_token_and_returns_the_first_task(tmp_path: Path) -> None:
    async with running(tmp_path, Access(rate_limit=1)) as http:
        key = {"Idempotency-Key": "order 1"}
        first = await http.post("/generate", json=JOB.wire(), headers=key)
        assert first.status_code == 202
        for _ in range(3):
            again = await http.post("/generate", json=JOB.wire(), headers=key)
            assert (again.status_code, again.json()["task_id"]) == (202, first.json()["task_id"])
        other = await http.post("/generate", json=JOB.wire(), headers={"Idempotency-Key": "order 2"})
        assert (other.status_code, other.json()["error_code"]) == (429, ServerErrorCode.RATE_LIMITED)


# Host names


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("127.0.0.1:8000", "192.0.2.7", "[::1]:8000", "localhost:8000", "app.localhost")),
        *((host, 200) for host in ("videos.example", "VIDEOS.example.:8443", "public.example", socket.gethostname())),
        *((host, 421) for host in ("rebound.example", "rebound.example:8000", "videos.example.evil", "127.0.0.1.evil")),
        *((host, 421) for host in ("localhost.evil", "[::1].evil.example", "videos.example@evil", "evil:80:80")),
    ],
)
async def test_a_server_without_keys_answers_only_to_its_own_names(tmp_path: Path, host: str, status: int) -> None:
    settings = ShimSettings(
        HUNYUAN_ALLOWED_HOSTS="videos.example, other.example", HUNYUAN_PUBLIC_URL="https://public.example"
    )
    async with running(tmp_path, settings.access) as http:
        response = await http.get("/openapi.json", headers={"Host": host})
        assert response.status_code == status
        if status == 421:
            assert response.json()["error_code"] == ServerErrorCode.HOST_NOT_ALLOWED
            assert "HUNYUAN_ALLOWED_HOSTS" in response.json()["error"]
        assert (await http.get("/health", headers={"Host": host})).status_code == 200, "a probe"
        assert (await http.get("/v2/local/ping/w1", headers={"Host": host, **PLATFORM})).status_code == 200


def test_the_host_is_checked_without_keys_and_where_hosts_are_named() -> None:
    assert ShimSettings().access.allowed_hosts is not None
    assert ShimSettings(HUNYUAN_API_KEYS=ALICE).access.allowed_hosts is None
    named = ShimSettings(HUNYUAN_API_KEYS=ALICE, HUNYUAN_ALLOWED_HOSTS="a.example").access.allowed_hosts
    assert named is not None
    assert "a.example" in named
    assert is_allowed_host("anything.example", ShimSettings(HUNYUAN_ALLOWED_HOSTS="*").access.allowed_hosts or ())


@pytest.mark.parametrize("hosts", ["https://a.example", "a.example:80", "a b"])
def test_an_invalid_host_name_is_a_wrong_setting(hosts: str) -> None:
    with pytest.raises(ValidationError, match="HUNYUAN_ALLOWED_HOSTS"):
        ShimSettings(HUNYUAN_ALLOWED_HOSTS=hosts)


# Browsers


async def test_only_the_origins_of_the_setting_are_allowed(tmp_path: Path, unlocked: httpx.AsyncClient) -> None:
    preflight = {
        "Origin": "https://films.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, authorization, x-api-key",
    }
    closed = await unlocked.options("/generate", headers=preflight)
    assert closed.status_code == 405
    assert not [name for name in closed.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in (await unlocked.get("/health", headers=preflight)).headers
    (tmp_path / "open").mkdir()
    async with running(tmp_path / "open", Access(KEYS, cors_origins=("https://films.example",))) as http:
        allowed = await http.options("/generate", headers=preflight)
        assert allowed.status_code == 200, "a preflight carries no key"
        assert allowed.headers["access-control-allow-origin"] == "https://films.example"
        other = await http.options("/generate", headers={**preflight, "Origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        refused = await http.post("/generate", json=JOB.wire(), headers={"Origin": "https://films.example"})
        assert_refused(refused)
        assert refused.headers["access-control-allow-origin"] == "https://films.example"
        assert "Retry-After" in refused.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in refused.headers


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/openapi.json", 200), ("/status/any", 503), ("/no", 404), ("/broken", 500)],
)
async def test_every_answer_has_the_safe_headers(unlocked: httpx.AsyncClient, path: str, status: int) -> None:
    response = await unlocked.get(path)
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert "script-src" not in response.headers["content-security-policy"]
    assert "server" not in response.headers
    assert "secret detail" not in response.text


async def test_the_documentation_page_runs_only_scripts_of_this_server(unlocked: httpx.AsyncClient) -> None:
    response = await unlocked.get("/docs")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    sources = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert "static/swagger-ui/swagger-ui-bundle.js" in sources
    for source in sources:
        assert (await unlocked.get(f"/{source}")).status_code == 200


async def test_the_platforms_routes_are_not_in_the_openapi_document(unlocked: httpx.AsyncClient) -> None:
    assert not [path for path in json.loads((await unlocked.get("/openapi.json")).text)["paths"] if "/v2" in path]
