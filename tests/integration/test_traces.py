"""The trace of a task, as a collector receives it from the server's and the worker's process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.otlp_receiver import OtlpReceiver, Received, otlp_receiver
from tests.support.service import Service, eventually, running_without_workers
from tests.support.worker_process import WorkerProcess

TOKEN = "a-token-of-the-tests"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
PROMPT = "A paper boat that only this test mentions"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as made:
        yield made


@pytest.fixture
def service(tmp_path: Path, receiver: OtlpReceiver) -> Iterator[Service]:
    """A server and a worker with the scripted model, which send their spans several times a second."""
    options = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with running_without_workers(tmp_path, HUNYUAN_PLATFORM_TOKEN=TOKEN, **options) as server:
        worker = eventually("the embedded bucket", lambda: _worker(server, tmp_path, options), 60)
        worker.start("--step-seconds", "0.05")
        try:
            eventually("readiness", lambda: server.http.get("/ready").status_code == 200, 120)
            yield server
        finally:
            worker.terminate()
            assert worker.wait() == 0, worker.log.read_text()


def _worker(server: Service, directory: Path, options: dict[str, str]) -> WorkerProcess | None:
    if not (server.directory / "data" / "bucket" / "port").exists():
        return None
    bucket = server.embedded_bucket()
    return WorkerProcess(directory, bucket, platform=server.address, token=TOKEN, settings=options)


def child_of(parent: Received, spans: list[Received], name: str) -> Received:
    [found] = [span for span in spans if span.name == name and span.parent == parent.id]
    return found


@pytest.mark.full
def test_the_trace_of_a_task_leads_from_its_request_to_the_workers_stages(
    service: Service, receiver: OtlpReceiver
) -> None:
    request = {"prompt": PROMPT, "duration": 5, "resolution": "720p"}
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    accepted = service.http.post("/generate", json=request, headers=headers)
    task_id = accepted.json()["task_id"]
    assert service.finished(task_id)["status"] == "completed"
    job = eventually("the span of the job", lambda: receiver.named("job"))[0]
    spans = receiver.spans

    # 1. One trace, which is the caller's, in the order of its parents
    assert {span.trace for span in spans if span.attributes.get("task_id") == task_id} == {TRACE}
    [root] = receiver.named("POST /generate")
    assert (root.service, root.kind, root.trace, root.parent) == ("hunyuan-server", "SERVER", TRACE, CALLER)
    submit = child_of(root, spans, "submit")
    queue = child_of(submit, spans, "queue")
    assert (submit.service, queue.service) == ("hunyuan-server", "hunyuan-server")
    assert (job.service, job.kind, job.parent) == ("hunyuan-worker", "CONSUMER", submit.id)
    stages = [child_of(job, spans, name) for name in ("encoding_prompt", "denoising", "decoding", "storing")]
    assert {stage.service for stage in stages} == {"hunyuan-worker"}
    requests = [span.name for span in spans if span.parent == stages[-1].id]
    assert requests.count("bucket put_object") == 4, f"the video, its two pictures and the manifest: {requests}"

    # 2. The stages follow each other inside the job
    times = [job.started, *(time for stage in stages for time in (stage.started, stage.ended)), job.ended]
    assert all(earlier <= later + 0.01 for earlier, later in pairwise(times)), times
    assert stages[1].ended - stages[1].started >= 3 * 0.05

    # 3. No span of polls, and no prompt
    assert not [span.name for span in spans if "status" in span.name or "job-" in span.name or "report" in span.name]
    assert PROMPT not in str(spans)


def test_without_the_setting_no_span_is_made_and_no_sdk_is_imported() -> None:
    program = """
import sys
import shim.host.serve, handler.__main__, handler.worker
from contract import tracing

tracing.configure(tracing.TraceOptions(), "a", "1")
with tracing.span("a"), tracing.bucket_request("b"):
    assert tracing.traceparent() is None
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""
    run([sys.executable, "-c", program])


def test_the_setting_without_the_extra_costs_a_warning_that_names_it() -> None:
    program = """
import logging, sys
from contract import tracing

logging.basicConfig()
sys.modules["opentelemetry"] = None
tracing.configure(tracing.TraceOptions(otlp_endpoint="http://127.0.0.1:9"), "a", "1")
with tracing.span("a"):
    pass
"""
    assert "pip install 'hunyuan-video-service[otel]'" in run([sys.executable, "-c", program])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr
