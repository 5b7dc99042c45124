"""Schemathesis checks the server against its own OpenAPI document, on a real port."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import sys
from pathlib import Path

import anyio
import pytest

from contract.errors import ErrorCode, JobFailure
from shim.access import Access, parse_api_keys
from shim.app import create_app
from storage import layout
from storage.bucket import Bucket
from storage.settings import BucketSettings
from tests.support.full import full
from tests.support.http_server import serving
from tests.support.queues import Bench, result, sql_bench
from tests.support.s3_servers import new_bucket

SECONDS = 20  # a busy machine made 47 cases in 12
KEY = "key-of-the-fuzzer-0123456789"
VIDEO = bytes(range(256)) * 40

#: 503 is documented, because the queue fills up. 400 rejects what JSON Schema allows: 5.0 is an integer to it, and ten
#: spaces are ten characters. Schemathesis' other checks are unchanged.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 404, 409, 429, 503]
"""


@pytest.fixture(scope="module")
def bucket_settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


async def work(bench: Bench, bucket: Bucket) -> None:
    """A worker that completes every second task with a video, on average, and fails the others."""
    while True:
        delivery = await bench.dispatcher.take("w1")
        if delivery is None:
            await asyncio.sleep(0.2)
            continue
        task_id = delivery.task_id
        if random.random() < 0.5:
            failure = JobFailure(error="Out of memory", error_code=ErrorCode.OOM_ERROR)
            await bench.dispatcher.fail("w1", task_id, failure)
            continue
        output = result(task_id).model_copy(
            update={"file_size": len(VIDEO), "sha256": hashlib.sha256(VIDEO).hexdigest()}
        )
        await asyncio.to_thread(bucket.put_bytes, VIDEO, layout.video_key(task_id), content_type="video/mp4")
        await bench.dispatcher.complete("w1", task_id, output.model_dump(mode="json"))


@pytest.mark.parametrize("phases", ["examples,coverage,fuzzing", full("stateful")])
async def test_the_server_keeps_what_its_openapi_document_promises(
    tmp_path: Path, bucket_settings: BucketSettings, phases: str
) -> None:
    seed = random.randrange(2**32)
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    report = tmp_path / "report.json"
    bucket = Bucket(bucket_settings)
    async with sql_bench(f"sqlite:///{tmp_path}/queue.sqlite3", max_queue_size=10) as bench:
        await bench.worker()
        app = create_app(bench.queue, bucket, access=Access(parse_api_keys(KEY)))
        async with serving(app) as address:
            worker = asyncio.create_task(work(bench, bucket))
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
                *("run", f"{address}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
                *("--seed", str(seed), "--max-time", str(SECONDS), "--request-timeout", "10", "--phases", phases),
                *("--report", "json", "--report-json-path", str(report), "--continue-on-failure"),
            ]
            done = await anyio.run_process(command, check=False, cwd=tmp_path)
            worker.cancel()
    output = (done.stdout + done.stderr).decode()
    print(f"schemathesis --seed {seed}")
    assert done.returncode == 0, output
    ran = json.loads(report.read_text())
    assert (ran["failures"], ran["errors"]) == ([], [])
    assert ran["test_cases"]["generated"] > 50
    assert ran["warnings"]["unresolvable_reference"] == []
    if phases == "stateful":
        links = re.search(r"(\d+) covered / \d+ selected / (\d+) total \((\d+) inferred\)", output)
        assert links is not None
        covered, total, inferred = map(int, links.groups())
        assert covered >= total - inferred == 3, "every documented link was followed"
