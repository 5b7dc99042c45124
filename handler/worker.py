"""Runs one job: find its manifest or render, encode and store the video."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Final

import numpy as np
from PIL import Image
from pydantic import ValidationError

from contract import tracing
from contract.errors import ErrorCode, JobFailure
from contract.job import DEMO_MODEL, InvalidInputError, JobInput, QueuedInput, num_frames, parse_queued
from contract.offer import check_offered
from contract.result import JobResult, Manifest, Stage, Tombstone, Verdict
from contract.retry import RetryPolicy
from contract.settings import explain
from handler.encode import DiskFullError, EncodeError, Target, encode, files_in
from handler.images import ImageError, decoded, load_image
from handler.inline import InlineStore, VideoTooLargeError
from handler.meter import Meter, OnProgress
from handler.provenance import ProvenanceError
from handler.store import NOT_STORED, JobStore
from handler.video_model.base import AdapterError, ModelOutOfMemoryError, RenderCancelledError, VideoModel
from handler.watchdog import Watch, Watchdog
from handler.work_dir import WorkDirError, job_directory
from storage.bucket import Bucket
from storage.errors import StorageError, StorageFullError
from storage.images import Images
from storage.settings import JobBucketSettings
from storage.videos import Videos

#: How long a finished video is kept and stored again, unless HUNYUAN_STORE_PATIENCE says otherwise.
_STORE_RETRIES: Final = RetryPolicy(first=1.0, longest=30.0, total=600.0)

log = logging.getLogger(__name__)


class JobError(Exception):
    """The job failed; `failure` is what the client reads."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.error)
        self.failure = failure

    @classmethod
    def of(cls, code: ErrorCode, error: str) -> JobError:
        """The same from an error code and its text."""
        return cls(JobFailure(error=error, error_code=code))


class RenderStalledError(JobError):
    """The watchdog stopped the render. Another attempt may succeed."""


@dataclass(frozen=True)
class Job:
    """A job as the queue delivers it. `s3_config` is RunPod's s3Config, for a job that brings its own bucket."""

    task_id: str
    input: Any
    s3_config: Any = None


@dataclass(frozen=True)
class Worker:
    """Runs one job at a time on `model`. Stores videos in `bucket`, or in the bucket that a job's `s3_config` names.

    With `returns_videos`, a job without a bucket returns its video, if RunPod accepts a result of that size.
    """

    model: VideoModel
    bucket: Bucket | None
    _: KW_ONLY
    version: str
    returns_videos: bool = False
    work_dir: Path | None = None
    store_policy: RetryPolicy = _STORE_RETRIES
    load_image: Callable[[str], Image.Image] = load_image
    watchdog: Watchdog = field(default_factory=Watchdog)
    #: Signs the MP4 in place. None leaves it unsigned.
    sign: Callable[[Path], None] | None = None

    def run(self, job: Job, on_progress: OnProgress, cancelled: Event) -> JobResult:
        """Renders and stores the job's video. If its manifest exists already, that is the result.

        Blocks until the job is done. `on_progress` receives percentages that never fall.

        Raises:
            JobError: the job failed.
            RenderStalledError: the watchdog stopped the render, and has set `cancelled`.
            RenderCancelledError: `cancelled` was set, and the render has stopped.
        """
        # SystemExit is caught, too: a library that exits must fail the job and not end the worker.
        try:
            parent = tracing.traceparent_of(job.input)
            with (
                tracing.span("job", parent=parent, kind="CONSUMER", task_id=job.task_id),
                self.watchdog.watching(cancelled) as watch,
                Meter(on_progress, watch) as meter,
            ):
                return self._run(job, meter, watch, cancelled)
        except JobError:
            raise
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - logged below
            error = _as_job_error(exc, job) if watch.reason is None else _stalled(watch.reason)
        # Memory is released here, after the block above has dropped the exception that refers to the render's tensors.
        self.model.release_memory()
        raise error

    def warm_up(self) -> None:
        """Encodes a few frames, so that ffmpeg is in memory when RunPod stops this process and later restores it."""
        with job_directory(self.work_dir) as directory:
            target = Target(*files_in(directory), 64, 64, 4)
            encode([np.zeros((4, 64, 64, 3), np.uint8)], target, lambda _: None)

    def _run(self, job: Job, meter: Meter, watch: Watch, cancelled: Event) -> JobResult:
        # 1. Check the input
        queued = parse_queued(job.input)
        job_input = queued.request
        model = self.model
        check_offered(job_input, model.models, takes_images=model.takes_images, limits=model.limits, loras=model.loras)
        asked = job_input.model, job_input.resolution, job_input.duration
        log.info("job begins: %s, %s, %d s", *asked, extra={"prompt": queued.rendered.prompt})

        # 2. Return the verdict of an earlier attempt
        store = self._store_for(job, meter, watch, cancelled)
        verdict = store.find()
        if verdict is not None:
            log.info("the bucket says already that this task is %s; not rendering it", verdict.status)
            return store.result(_completed(verdict))

        # 3. Render, encode and store
        image = self._image(job_input)
        seed = _seed(job.task_id) if job_input.seed is None else job_input.seed
        with job_directory(self.work_dir) as directory:
            frames = num_frames(job_input.duration)
            target = Target(*files_in(directory), *job_input.size, frames, caption=model.caption(job_input))
            expected = model.expected_seconds(job_input)
            is_demo = model.name == DEMO_MODEL
            with watch.rendering(self.watchdog.limits(job_input, is_demo=is_demo, expected=expected)):
                rendered = self._render(queued.rendered, image, seed, target, meter, watch, cancelled)
            if self.sign is not None:
                self.sign(target.video)
            meter.reach(Stage.STORING, 0.0)
            watch.advance()
            with tracing.span(Stage.STORING):
                stored = store.put(*target.files, lambda: self._manifest(store, queued, seed, target, rendered, meter))
            manifest = _completed(stored)
        log.info("done in %.1f s, %d bytes stored", manifest.timings["total"], manifest.file_size)
        return store.result(manifest)

    def _render(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        seed: int,
        target: Target,
        meter: Meter,
        watch: Watch,
        cancelled: Event,
    ) -> tuple[int, int]:
        """Returns the (width, height) of the frames that the model rendered."""
        frames = self.model.render(
            job_input,
            seed=seed,
            on_progress=meter.reach,
            cancelled=cancelled,
            image=image,
            on_preview=meter.offer_preview,
        )
        try:
            return encode(frames, target, lambda taken: meter.encoded(taken / target.num_frames), watch.encoding)
        except DiskFullError as exc:
            raise WorkDirError("the disk is full") from exc
        except EncodeError as exc:
            if cancelled.is_set():  # the watchdog has killed ffmpeg
                raise RenderCancelledError("cancelled while ffmpeg encoded") from exc
            log.error("ffmpeg failed to encode the frames: %s", exc)
            raise JobError.of(ErrorCode.GENERATION_FAILED, "The video could not be encoded") from exc
        finally:
            frames.close()  # a render that is not finished holds GPU memory

    def _manifest(
        self,
        store: JobStore | InlineStore,
        queued: QueuedInput,
        seed: int,
        target: Target,
        rendered: tuple[int, int],
        meter: Meter,
    ) -> Manifest:
        return Manifest(
            task_id=store.task_id,
            **store.keys,
            input=queued.request.without_data(),
            rewritten_prompt=queued.rewritten_prompt,
            warnings=queued.warnings,
            remixed_from=queued.remixed_from,
            model=self.model.name,
            attention=self.model.attention,
            approximations=tuple(self.model.approximations),
            seed=seed,
            width=target.width,
            height=target.height,
            rendered_size=rendered,
            num_frames=target.num_frames,
            file_size=target.video.stat().st_size,
            sha256=_sha256(target.video),
            created_at=datetime.now(UTC),
            timings=meter.timings(),
            version=self.version,
        )

    def _image(self, job_input: JobInput) -> Image.Image | None:
        if job_input.image is None:
            return None
        try:
            upload_id = job_input.upload_id
            return self.load_image(job_input.image) if upload_id is None else decoded(self._uploaded(upload_id))
        except ImageError as exc:
            raise JobError.of(ErrorCode.INVALID_REQUEST, f"image: {exc}") from exc

    def _uploaded(self, image_id: str) -> bytes:
        """An image that POST /images stored in the worker's own bucket, which is the server's."""
        if self.bucket is None:
            raise ImageError("the worker has no bucket with uploaded images")
        body = Images(self.bucket).get(image_id)
        if body is None:
            raise ImageError("the uploaded image has expired; upload it again")
        return body

    def _store_for(self, job: Job, meter: Meter, watch: Watch, cancelled: Event) -> JobStore | InlineStore:
        if self.returns_videos and self.bucket is None and job.s3_config is None:
            return InlineStore(task_id=job.task_id)
        return JobStore(
            videos=Videos(self._bucket_for(job), on_bytes=watch.advance),
            task_id=job.task_id,
            is_ours=job.s3_config is None,
            policy=self.store_policy,
            cancelled=cancelled,
            keep_alive=meter.keep_alive,
            on_progress=watch.advance,
            is_stalled=lambda: watch.reason is not None,
        )

    def _bucket_for(self, job: Job) -> Bucket:
        if job.s3_config is not None:
            try:
                return Bucket(JobBucketSettings.model_validate(job.s3_config))
            except ValidationError as exc:
                errors = "; ".join(explain(exc).splitlines())
                raise JobError.of(ErrorCode.INVALID_REQUEST, f"s3Config is invalid: {errors}") from exc
        if self.bucket is None:
            text = "The worker has no bucket: set BUCKET_ENDPOINT_URL and its keys, or send s3Config"
            raise JobError.of(ErrorCode.STORAGE_UNAVAILABLE, text)
        return self.bucket


def _completed(verdict: Verdict) -> Manifest:
    """The manifest. Raises JobError for a task that has failed or was cancelled."""
    if isinstance(verdict, Tombstone):
        raise JobError(verdict.failure)
    return verdict


def _stalled(reason: str) -> RenderStalledError:
    text = f"{reason} and was stopped; the worker's log has the details"
    return RenderStalledError(JobFailure(error=text, error_code=ErrorCode.GENERATION_FAILED))


def _as_job_error(exc: BaseException, job: Job) -> JobError | RenderCancelledError:
    """What `Worker.run` raises for `exc`. Logs the details that the client must not see."""
    match exc:
        case RenderCancelledError():
            return RenderCancelledError(str(exc))
        case InvalidInputError():
            return JobError(exc.failure)
        case StorageError():
            log.error("the bucket failed; HUNYUAN_STORE_PATIENCE sets how long uploads are retried: %s", exc)
            # Only the owner of the bucket can act on the details.
            detail = f": s3Config: {exc}" if job.s3_config is not None else ""
            if isinstance(exc, StorageFullError) and not detail:
                detail = ": the disk of the bucket is full"
            return JobError.of(NOT_STORED.error_code, f"{NOT_STORED.error}{detail}")
        case ProvenanceError():
            log.error("the video can't be signed: %s", exc)
            return JobError.of(ErrorCode.GENERATION_FAILED, "The video could not be signed")
        case VideoTooLargeError():
            log.error("%s", exc)
            return JobError.of(NOT_STORED.error_code, str(exc))
        case WorkDirError():
            log.error("the work directory can't hold the video; free space or change HUNYUAN_WORK_DIR: %s", exc)
            return JobError.of(ErrorCode.GENERATION_FAILED, f"The worker can't write the video: {exc}")
        case AdapterError():
            log.warning("%s; HUNYUAN_LORA_DIR has the file", exc)
            return JobError.of(ErrorCode.INVALID_REQUEST, str(exc))
        case ModelOutOfMemoryError():
            log.error("the render ran out of GPU memory, see HUNYUAN_OFFLOAD_CPU and HUNYUAN_VRAM_LIMIT: %s", exc)
            return JobError.of(ErrorCode.OOM_ERROR, "Out of memory: reduce resolution or duration")
        case _:
            log.error("the render failed with an unexpected error", exc_info=exc)
            text = f"Video generation failed ({type(exc).__name__}); the worker's log has the details"
            return JobError.of(ErrorCode.GENERATION_FAILED, text)


def _seed(task_id: str) -> int:
    """32 pseudo-random bits that depend on the task id alone, so that a second attempt renders the same video."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
