"""One job from start to finish: look whether it is done already, render, encode, store, and the manifest last."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, Final

from PIL import Image
from pydantic import ValidationError

from contract.errors import ErrorCode, JobFailure
from contract.job import InvalidInputError, JobInput, check_offered, num_frames, parse_input
from contract.result import JobResult, Manifest, Progress, Stage
from contract.settings import explain
from handler.encode import DiskFullError, EncodeError, Target, encode
from handler.images import ImageError, load_image
from handler.store import JobStore, Patience
from handler.video_model.base import ModelOutOfMemoryError, RenderCancelledError, VideoModel
from handler.work_dir import WorkDirError, job_directory
from storage.bucket import Bucket
from storage.errors import StorageError
from storage.settings import JobBucketSettings
from storage.videos import Videos

#: Percent at which each stage begins and ends. DENOISING and UPSCALING count as one piece of work; the model decodes
#: before frames flow, and both are DECODING.
_SPANS: Final[Mapping[Stage, tuple[float, float]]] = {
    Stage.ENCODING_PROMPT: (0, 2),
    Stage.DENOISING: (2, 80),
    Stage.UPSCALING: (2, 80),
    Stage.DECODING: (80, 90),
    Stage.STORING: (97, 99),
}
_ENCODING_SPAN: Final = (90, 97)
#: Progress is told at most so often (seconds), and at each change of stage.
_TELL_EVERY: Final = 1.0
#: The same is told again after so many seconds: whoever waits sees that the worker is alive.
_TELL_AGAIN: Final = 5.0

log = logging.getLogger(__name__)


class JobError(Exception):
    """The job failed; the caller is told why by `failure`."""

    def __init__(self, failure: JobFailure) -> None:
        super().__init__(failure.error)
        self.failure = failure

    @classmethod
    def of(cls, code: ErrorCode, error: str) -> JobError:
        """From a code and what to say."""
        return cls(JobFailure(error=error, error_code=code))


@dataclass(frozen=True)
class Job:
    """What a queue hands to the worker. `s3_config` is RunPod's, for a job that brings its own bucket."""

    task_id: str
    input: Any
    s3_config: Any = None


class Worker:
    """Runs one job at a time on `model`. Jobs with no `s3_config` go to `bucket`, if there is one."""

    def __init__(
        self,
        model: VideoModel,
        bucket: Bucket | None,
        *,
        version: str,
        work_dir: Path | None = None,
        patience: Patience | None = None,
        load_image: Callable[[str], Image.Image] = load_image,
    ) -> None:
        self._model = model
        self._bucket = bucket
        self._version = version
        self._work_dir = work_dir
        self._patience = patience or Patience()
        self._load_image = load_image

    def run(self, job: Job, tell: Callable[[Progress], None], cancelled: Event) -> JobResult:
        """Render and store the job's video; if its manifest is in the bucket already, that is the result.

        Blocks for as long as it takes. `tell` hears of progress, which never falls.

        Raises:
            JobError: the job failed, and why.
            RenderCancelledError: `cancelled` was set, and nothing is left to do.
        """
        error: JobError | RenderCancelledError
        try:
            return self._run(job, _Meter(tell), cancelled)
        except JobError:
            raise
        except InvalidInputError as exc:
            raise JobError(exc.failure) from exc
        except StorageError as exc:
            log.error("%s: %s", job.task_id, exc)
            # Whoever brought the bucket can mend it.
            text = "The video could not be stored" + (f": s3Config: {exc}" if job.s3_config is not None else "")
            raise JobError.of(ErrorCode.STORAGE_UNAVAILABLE, text) from exc
        except WorkDirError as exc:
            log.error("%s: HUNYUAN_WORK_DIR: %s", job.task_id, exc)
            error = JobError.of(ErrorCode.GENERATION_FAILED, f"The worker can't write the video: {exc}")
        except ModelOutOfMemoryError as exc:
            log.error("%s: out of memory: %s", job.task_id, exc)
            error = JobError.of(ErrorCode.OOM_ERROR, "Out of memory: reduce resolution or duration")
        except RenderCancelledError as exc:
            error = RenderCancelledError(str(exc))
        except (Exception, SystemExit) as exc:
            # Whatever it was, it costs this job and not the worker; the traceback is for the log alone.
            log.exception("%s: the render failed", job.task_id)
            text = f"Video generation failed ({type(exc).__name__}); the worker's log has the details"
            error = JobError.of(ErrorCode.GENERATION_FAILED, text)
        # Here, where no exception holds on to the render's tensors any more.
        self._model.release_memory()
        raise error

    def _run(self, job: Job, meter: _Meter, cancelled: Event) -> JobResult:
        job_input = parse_input(job.input)
        check_offered(job_input, self._model.models, takes_images=self._model.takes_images)
        kind = job_input.model, job_input.resolution, job_input.duration
        log.info("%s: begins: %s, %s, %d s", job.task_id, *kind, extra={"prompt": job_input.prompt})
        videos = Videos(self._bucket_for(job))
        store = JobStore(
            videos,
            job.task_id,
            is_ours=job.s3_config is None,
            patience=self._patience,
            cancelled=cancelled,
            waiting=meter.again,
        )
        finished = store.find()
        if finished is not None:
            log.info("%s: done before, its manifest is in the bucket", job.task_id)
            return videos.result(finished)
        image = self._image(job_input)
        with job_directory(self._work_dir) as directory:
            width, height = job_input.size
            frames = num_frames(job_input.duration)
            target = Target(directory / "video.mp4", directory / "poster.jpg", width, height, frames)
            seed = _seed(job.task_id) if job_input.seed is None else job_input.seed
            self._render(job_input, image, seed, target, meter, cancelled)
            meter.reach(Stage.STORING, 0.0)
            manifest = store.put(
                target.video, target.poster, lambda: self._manifest(job.task_id, job_input, seed, target, meter)
            )
        log.info("%s: done in %.1f s, %d bytes", job.task_id, manifest.timings["total"], manifest.file_size)
        return videos.result(manifest)

    def _render(
        self,
        job_input: JobInput,
        image: Image.Image | None,
        seed: int,
        target: Target,
        meter: _Meter,
        cancelled: Event,
    ) -> None:
        frames = self._model.render(job_input, seed=seed, on_progress=meter.reach, cancelled=cancelled, image=image)
        try:
            encode(frames, target, lambda taken: meter.encoded(taken / target.num_frames))
        except DiskFullError as exc:
            raise WorkDirError("the disk is full") from exc
        except EncodeError as exc:
            log.error("encoding failed: %s", exc)
            raise JobError.of(ErrorCode.GENERATION_FAILED, "The video could not be encoded") from exc

    def _manifest(self, task_id: str, job_input: JobInput, seed: int, target: Target, meter: _Meter) -> Manifest:
        return Manifest(
            task_id=task_id,
            input=job_input.without_data(),
            model=self._model.name,
            attention=self._model.attention,
            approximations=tuple(self._model.approximations),
            seed=seed,
            width=target.width,
            height=target.height,
            num_frames=target.num_frames,
            file_size=target.video.stat().st_size,
            sha256=_sha256(target.video),
            created_at=datetime.now(UTC),
            timings=meter.timings(),
            version=self._version,
        )

    def _image(self, job_input: JobInput) -> Image.Image | None:
        if job_input.image is None:
            return None
        try:
            return self._load_image(job_input.image)
        except ImageError as exc:
            raise JobError.of(ErrorCode.INVALID_REQUEST, f"image: {exc}") from exc

    def _bucket_for(self, job: Job) -> Bucket:
        if job.s3_config is not None:
            try:
                return Bucket(JobBucketSettings.model_validate(job.s3_config))
            except ValidationError as exc:
                wrong = "; ".join(explain(exc).splitlines())
                raise JobError.of(ErrorCode.INVALID_REQUEST, f"s3Config can't be used: {wrong}") from exc
        if self._bucket is None:
            text = "There is no bucket to store the video in: set BUCKET_ENDPOINT_URL and its keys, or send s3Config"
            raise JobError.of(ErrorCode.STORAGE_UNAVAILABLE, text)
        return self._bucket


class _Meter:
    """Turns fractions of stages into one percentage that never falls, and times the stages."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._started = time.monotonic()
        self._stage = Stage.ENCODING_PROMPT
        self._percent = 0
        self._stage_since = self._started
        self._seconds: dict[str, float] = {}
        self._told: tuple[float, Stage, int] | None = None

    def reach(self, stage: Stage, fraction: float) -> None:
        """That much of the stage is done."""
        self._advance(stage, _SPANS[stage], fraction)

    def encoded(self, fraction: float) -> None:
        """That much of the video is encoded."""
        self._advance(Stage.DECODING, _ENCODING_SPAN, fraction)

    def again(self) -> None:
        """Nothing is done since; tell so now and then."""
        self._advance(self._stage, (0, 0), 0.0)

    def timings(self) -> Mapping[str, float]:
        """Seconds in each stage so far and in all."""
        now = time.monotonic()
        seconds = {**self._seconds, self._stage.value: now - self._stage_since, "total": now - self._started}
        return {name: round(value, 3) for name, value in seconds.items()}

    def _advance(self, stage: Stage, span: tuple[float, float], fraction: float) -> None:
        now = time.monotonic()
        if stage is not self._stage:
            self._seconds[self._stage.value] = now - self._stage_since
            log.info("%s took %.1f s, next is %s", self._stage, now - self._stage_since, stage)
            self._stage, self._stage_since = stage, now
        begin, end = span
        self._percent = max(self._percent, int(begin + (end - begin) * min(fraction, 1.0)))
        if self._told is not None:
            told_at, told_stage, told_percent = self._told
            every = _TELL_AGAIN if self._percent == told_percent else _TELL_EVERY
            if stage is told_stage and now - told_at < every:
                return
        self._told = (now, stage, self._percent)
        self._tell(Progress(progress=self._percent, stage=stage, elapsed_time=round(now - self._started, 3)))


def _seed(task_id: str) -> int:
    """32 bits that look random, and the same again for a task that is rendered again after its worker was lost."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
