"""Whole jobs with a real bucket and a real ffmpeg; only the model is scripted."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from contract.errors import ErrorCode
from contract.job import DEFAULT_MODEL, JobInput, Resolution
from contract.result import MAX_PREVIEW_BYTES, InlineResult, JobResult, Manifest, Progress, Stage
from contract.retry import RetryPolicy
from handler.provenance import ProvenanceError
from handler.video_model.base import AdapterError, Frames, ModelOutOfMemoryError, RenderCancelledError
from handler.worker import Job, JobError, Worker
from storage import layout
from storage.bucket import Bucket
from storage.errors import StorageUnavailableError
from storage.settings import BucketSettings
from storage.videos import Videos
from tests.support.mp4 import picture, probe, shows_caption
from tests.support.s3_servers import new_bucket
from tests.support.scripted_model import STEPS, ScriptedModel, preview_of

PROMPT = "A paper boat on a rainy street"


@pytest.fixture(scope="module")
def settings(s3_server: BucketSettings) -> BucketSettings:
    return new_bucket(s3_server)


@dataclass
class Bench:
    """A worker with its parts, and the progress that it reported."""

    bucket: Bucket
    model: ScriptedModel = field(default_factory=ScriptedModel)
    reports: list[Progress] = field(default_factory=list)
    cancelled: Event = field(default_factory=Event)
    store_seconds: float = 0.0
    sign: Callable[[Path], None] | None = None

    def run(self, task_id: str = "task-1", s3_config: dict[str, Any] | None = None, **fields: Any) -> JobResult:
        job_input = {"prompt": PROMPT, "duration": 5, "resolution": "720p", **fields}
        worker = Worker(
            self.model,
            self.bucket,
            version="1.2.3",
            store_policy=RetryPolicy(total=self.store_seconds, first=0.05),
            sign=self.sign,
        )
        return worker.run(Job(task_id, job_input, s3_config), self.reports.append, self.cancelled)

    def failure(self, **arguments: Any) -> tuple[ErrorCode, str]:
        with pytest.raises(JobError) as caught:
            self.run(**arguments)
        return caught.value.failure.error_code, caught.value.failure.error


@pytest.fixture
def full_size(settings: BucketSettings) -> Iterator[Bench]:
    bench = Bench(Bucket(settings))
    yield bench
    for task_id in ("task-1", "task-2"):
        Videos(bench.bucket).discard(task_id)


@pytest.fixture
def bench(full_size: Bench, small_videos: None) -> Bench:
    """Its videos are small."""
    return full_size


def test_a_job_leaves_video_poster_and_manifest_and_returns_them(full_size: Bench, tmp_path: Path) -> None:
    result = full_size.run(duration=6, resolution="1080p")
    manifest = Manifest.model_validate_json(full_size.bucket.get_bytes(layout.manifest_key("task-1")))
    assert Manifest.model_validate(result.model_dump()) == manifest
    assert manifest.input.prompt == PROMPT
    assert (manifest.input.duration, manifest.input.resolution) == (6, Resolution.P1080)
    assert manifest.input.model == DEFAULT_MODEL
    assert (manifest.width, manifest.height, manifest.num_frames, manifest.fps) == (1920, 1080, 145, 24)
    assert (manifest.model, manifest.version, manifest.status) == ("scripted", "1.2.3", "completed")
    video = httpx.get(result.video_url)
    assert (video.status_code, video.headers["content-type"]) == (200, "video/mp4")
    assert (len(video.content), hashlib.sha256(video.content).hexdigest()) == (manifest.file_size, manifest.sha256)
    (tmp_path / "video.mp4").write_bytes(video.content)
    assert probe(tmp_path / "video.mp4").num_frames == 145
    poster = httpx.get(result.poster_url)
    assert (poster.headers["content-type"], poster.content[:2]) == ("image/jpeg", b"\xff\xd8")
    assert manifest.sheet_key is not None
    assert full_size.bucket.get_bytes(manifest.sheet_key).startswith(b"\xff\xd8")
    timings = dict(manifest.timings)
    assert set(timings) == {"encoding_prompt", "denoising", "decoding", "storing", "total"}
    assert timings.pop("total") == pytest.approx(sum(timings.values()), abs=0.01)


def test_a_rewritten_prompt_is_rendered_and_the_manifest_has_both(bench: Bench) -> None:
    rewritten = "A small boat folded from white paper drifts along a flooded street."
    result = bench.run(enhance_prompt=True, rewritten_prompt=rewritten, warnings=["a warning"], remixed_from="task-0")
    [(rendered, _)] = bench.model.rendered
    assert rendered.prompt == rewritten
    assert (result.input.prompt, result.input.enhance_prompt) == (PROMPT, True)
    stored = json.loads(bench.bucket.get_bytes(layout.manifest_key("task-1")))
    assert "rewritten_prompt" not in stored["input"]
    assert stored["remixed_from"] == "task-0"
    assert (stored["rewritten_prompt"], stored["warnings"]) == (rewritten, ["a warning"])


def test_the_manifest_names_the_adapters(bench: Bench) -> None:
    bench.model.loras = ("film",)
    bench.run(loras=[{"name": "film", "scale": 0.5}])
    stored = json.loads(bench.bucket.get_bytes(layout.manifest_key("task-1")))
    assert stored["input"]["loras"] == [{"name": "film", "scale": 0.5}]


def test_an_adapter_that_does_not_exist_or_cannot_be_used_fails_the_job_saying_why(bench: Bench) -> None:
    assert bench.failure(loras=[{"name": "film"}]) == (
        ErrorCode.INVALID_REQUEST,
        'loras: there is no adapter "film"; the workers have none (HUNYUAN_LORA_DIR)',
    )

    def refuse(step: int) -> None:
        raise AdapterError('loras: the adapter "film" is of another model')

    bench.model.loras, bench.model.before_step = ("film",), refuse
    expected = ErrorCode.INVALID_REQUEST, 'loras: the adapter "film" is of another model'
    assert bench.failure(loras=[{"name": "film"}]) == expected
    bench.model.before_step = lambda _: None
    bench.run()


@pytest.mark.parametrize("caption", [None, "demo model: A paper boat on a rainy street"])
def test_video_and_poster_carry_the_models_caption_if_it_has_one(
    full_size: Bench, tmp_path: Path, caption: str | None
) -> None:
    full_size.model.caption_text = caption
    result = full_size.run()
    for url in (result.video_url, result.poster_url):
        (tmp_path / "file").write_bytes(httpx.get(url).content)
        assert shows_caption(picture(tmp_path / "file"), "demo model: A paper boat on a rainy street") == bool(caption)


def test_a_video_is_signed_before_its_size_and_digest_are_taken(bench: Bench) -> None:
    def sign(video: Path) -> None:
        with video.open("ab") as file:
            file.write(b"signed")

    bench.sign = sign
    result = bench.run()
    content = httpx.get(result.video_url).content
    assert content.endswith(b"signed")
    assert (len(content), hashlib.sha256(content).hexdigest()) == (result.file_size, result.sha256)


def test_a_video_that_cannot_be_signed_fails_and_is_not_stored(bench: Bench) -> None:
    def sign(video: Path) -> None:
        raise ProvenanceError("the certificate has expired")

    bench.sign = sign
    assert bench.failure() == (ErrorCode.GENERATION_FAILED, "The video could not be signed")
    assert not bench.bucket.list_keys(layout.PREFIX)


def test_a_video_without_a_bucket_is_in_the_result_if_runpod_takes_it(bench: Bench, tmp_path: Path) -> None:
    worker = Worker(bench.model, None, version="1.2.3", returns_videos=True)
    job_input = {"prompt": PROMPT, "duration": 5, "resolution": "720p"}
    result = worker.run(Job("task-1", job_input), bench.reports.append, bench.cancelled)
    assert isinstance(result, InlineResult)
    video = base64.b64decode(result.video_base64)
    assert (len(video), hashlib.sha256(video).hexdigest()) == (result.file_size, result.sha256)
    written = result.model_dump(mode="json")
    assert written.keys().isdisjoint({"video_key", "poster_key", "sheet_key", "video_url", "poster_url"})
    assert (written["task_id"], written["status"], written["num_frames"]) == ("task-1", "completed", 121)
    with pytest.raises(JobError) as caught:
        Worker(bench.model, None, version="1.2.3").run(Job("task-1", job_input), bench.reports.append, bench.cancelled)
    assert caught.value.failure.error_code is ErrorCode.STORAGE_UNAVAILABLE, "a worker of our own server"


class Noise(ScriptedModel):
    """Noise of 960x540, which no encoder makes small."""

    def render(self, job_input: JobInput, **options: Any) -> Generator[Frames, None, None]:
        for chunk in super().render(job_input, **options):
            yield np.random.default_rng(1).integers(0, 256, (len(chunk), 540, 960, 3), np.uint8)


@pytest.mark.full
def test_a_video_that_is_too_large_for_a_result_fails_with_its_size(full_size: Bench) -> None:
    worker = Worker(Noise(), None, version="1.2.3", returns_videos=True)
    job_input = {"prompt": PROMPT, "duration": 5, "resolution": "720p"}
    with pytest.raises(JobError) as caught:
        worker.run(Job("task-1", job_input), full_size.reports.append, full_size.cancelled)
    assert caught.value.failure.error_code is ErrorCode.STORAGE_UNAVAILABLE
    text = caught.value.failure.error
    size = re.match(r"The video has ([\d.]+) MB, and a result on RunPod can carry 7.4 MB: set BUCKET_", text)
    assert size is not None, text
    assert float(size[1]) > 7.4


def test_the_manifest_is_written_last(bench: Bench) -> None:
    written: list[str] = []

    class Recording(Bucket):
        def put_file(self, path: Path, key: str, **options: Any) -> None:
            super().put_file(path, key, **options)
            written.append(key)

        def put_bytes(self, body: bytes, key: str, **options: Any) -> None:
            super().put_bytes(body, key, **options)
            written.append(key)

    bench.bucket = Recording(bench.bucket._settings)
    bench.run()
    manifest = Manifest.model_validate_json(bench.bucket.get_bytes("videos/task-1.json"))
    assert written == [manifest.video_key, manifest.poster_key, manifest.sheet_key, "videos/task-1.json"]
    assert re.fullmatch(r"videos/task-1/[0-9a-f]{12}\.mp4", manifest.video_key)


def test_a_job_that_is_done_already_is_not_rendered_again(bench: Bench) -> None:
    first = bench.run()
    second = bench.run()
    assert len(bench.model.rendered) == 1
    assert Manifest.model_validate(second.model_dump()) == Manifest.model_validate(first.model_dump())
    assert httpx.get(second.video_url).status_code == 200


def test_an_invalid_manifest_is_overwritten(bench: Bench) -> None:
    bench.bucket.put_bytes(b"{}", layout.manifest_key("task-1"), content_type="application/json")
    assert bench.run().file_size > 0
    assert Manifest.model_validate_json(bench.bucket.get_bytes(layout.manifest_key("task-1")))


def test_progress_goes_through_the_stages_and_never_falls(bench: Bench) -> None:
    bench.run()
    percentages = [progress.progress for progress in bench.reports]
    assert percentages == sorted(percentages)
    assert percentages[-1] <= 99
    stages = list(dict.fromkeys(progress.stage for progress in bench.reports))
    assert stages == [Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.DECODING, Stage.STORING]
    assert len(bench.reports) < 20, "one a second and one for each stage, not one for each frame"


def test_a_report_has_the_latest_preview_and_fits_what_the_platform_takes(bench: Bench) -> None:
    """The steps follow each other faster than reports: only the last preview is sent, when the next stage begins."""
    bench.run()
    previews = {report.stage: report.preview for report in bench.reports if report.preview is not None}
    assert previews[Stage.DECODING] == preview_of(STEPS - 1)
    assert len([report for report in bench.reports if report.preview is not None]) <= 2
    sent = bench.reports[-1].model_copy(update={"preview": b"x" * MAX_PREVIEW_BYTES})
    assert len(sent.model_dump_json()) < 33_000
    assert Progress.model_validate_json(sent.model_dump_json()) == sent
    assert "preview" not in bench.reports[-1].model_dump(mode="json")


def test_progress_moves_through_decoding_with_the_frames(bench: Bench) -> None:
    """Decoding and encoding share 80 to 97 percent."""
    bench.model.before_frames = lambda left: time.sleep(1.1 if left in (89, 33) else 0)
    bench.run()
    decoding = [progress.progress for progress in bench.reports if progress.stage is Stage.DECODING]
    assert decoding[0] == 80
    done = [80 + 17 * (121 - left) / 121 for left in (89, 33)]
    assert all(any(abs(percent - at) <= 2 for percent in decoding) for at in done), decoding


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelOutOfMemoryError("CUDA out of memory"), ErrorCode.OOM_ERROR),
        (RuntimeError("in the decoder"), ErrorCode.GENERATION_FAILED),
    ],
)
def test_an_error_after_some_frames_are_encoded_ends_ffmpeg_and_the_next_job_works(
    bench: Bench, error: Exception, code: ErrorCode
) -> None:
    def fail(left: int) -> None:
        if left < 60:
            raise error

    bench.model.before_frames = fail
    assert bench.failure()[0] is code
    assert not [child for child in psutil.Process().children() if "ffmpeg" in child.name()]
    bench.model.before_frames = lambda _: None
    assert bench.run().num_frames == 121


def test_the_seed_depends_on_the_task_alone(bench: Bench) -> None:
    first = bench.run()
    bench.bucket.delete(layout.manifest_key("task-1"))
    assert bench.run().seed == first.seed
    assert bench.run("task-2").seed != first.seed


def raising(exc: Exception, at: int = 2) -> Callable[[int], None]:
    def before_step(step: int) -> None:
        if step == at:
            raise exc

    return before_step


def test_out_of_memory_has_its_own_code_and_the_next_job_works(bench: Bench) -> None:
    bench.model.before_step = raising(ModelOutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    assert bench.failure() == (ErrorCode.OOM_ERROR, "Out of memory: reduce resolution or duration")
    assert bench.model.released == 1
    bench.model.before_step = lambda _: None
    assert bench.run().file_size > 0


def test_an_unexpected_error_fails_the_job_and_shows_no_traceback(bench: Bench) -> None:
    bench.model.before_step = raising(ZeroDivisionError("secret detail"))
    code, text = bench.failure()
    assert code is ErrorCode.GENERATION_FAILED
    assert "secret detail" not in text
    assert "Traceback" not in text
    bench.model.before_step = lambda _: None
    assert bench.run().file_size > 0


def test_a_video_with_too_few_frames_fails_and_is_not_stored(bench: Bench) -> None:
    bench.model.missing_frames = 1
    assert bench.failure()[0] is ErrorCode.GENERATION_FAILED
    assert bench.bucket.list_keys("videos/task-1") == []


def test_a_cancelled_job_stops_before_its_next_step_and_stores_nothing(bench: Bench) -> None:
    steps: list[int] = []

    def before_step(step: int) -> None:
        steps.append(step)
        if step == 1:
            bench.cancelled.set()

    bench.model.before_step = before_step
    with pytest.raises(RenderCancelledError):
        bench.run()
    assert steps == [0, 1]
    assert bench.model.released == 1
    assert bench.bucket.list_keys("videos/task-1") == []
    bench.cancelled.clear()
    bench.model.before_step = lambda _: None
    assert bench.run().file_size > 0


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "short"}, ErrorCode.INVALID_PROMPT),
        ({"duration": 11}, ErrorCode.INVALID_DURATION),
        ({"resolution": "4k"}, ErrorCode.INVALID_RESOLUTION),
        ({"model": "other"}, ErrorCode.INVALID_MODEL),
        ({"colour": "red"}, ErrorCode.INVALID_REQUEST),
    ],
)
def test_bad_input_is_refused_with_its_documented_code(bench: Bench, fields: dict[str, Any], code: ErrorCode) -> None:
    assert bench.failure(**fields)[0] is code
    assert bench.model.rendered == []


def test_a_job_with_an_s3_config_goes_to_that_bucket(
    bench: Bench, settings: BucketSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="handler")
    other = Bucket(settings.model_copy(update={"name": "other-videos"}))
    other.create()
    secret = settings.secret_access_key.get_secret_value()
    config = {
        "accessId": settings.access_key_id,
        "accessSecret": secret,
        "bucketName": "other-videos",
        "endpointUrl": str(settings.endpoint_url),
    }
    result = bench.run(s3_config=config)
    assert len(other.get_bytes(result.video_key)) == result.file_size
    assert "/other-videos/" in result.video_url
    assert bench.bucket.list_keys("videos/task-1") == []
    assert secret not in caplog.text


def test_an_incomplete_s3_config_names_the_missing_field(bench: Bench) -> None:
    code, text = bench.failure(s3_config={"accessId": "id", "accessSecret": "hidden"})
    assert code is ErrorCode.INVALID_REQUEST
    assert "endpointUrl" in text
    assert "hidden" not in text


def test_without_a_bucket_the_job_fails_naming_the_setting() -> None:
    with pytest.raises(JobError, match="BUCKET_ENDPOINT_URL"):
        Worker(ScriptedModel(), None, version="1").run(Job("task-1", {"prompt": PROMPT}), lambda _: None, Event())


def test_storing_is_retried_until_the_bucket_is_available(bench: Bench) -> None:
    class UnavailableAtFirst(Bucket):
        refusals = 2

        def put_file(self, path: Path, key: str, **options: Any) -> None:
            if self.refusals:
                self.refusals -= 1
                raise StorageUnavailableError("unavailable")
            super().put_file(path, key, **options)

    bench.bucket = UnavailableAtFirst(bench.bucket._settings)
    bench.store_seconds = 30.0
    assert bench.run().file_size > 0
    assert len(bench.model.rendered) == 1, "the finished video was kept"


def test_a_bucket_that_stays_unavailable_fails_the_job_with_its_code(settings: BucketSettings) -> None:
    nowhere = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    bench = Bench(Bucket(nowhere))
    assert bench.failure()[0] is ErrorCode.STORAGE_UNAVAILABLE
    assert bench.model.rendered == [], "nothing is rendered that could not be stored"
