"""`python -m handler`: settings, the bucket, the model, then jobs. `--test_input '{"input": {...}}'` runs one and ends.

Exit codes: 0 stopped by SIGTERM, 1 the test job failed, 2 a setting is wrong, 3 the model can't be loaded or the bucket
refuses: those two may be mended while the platform starts this worker again and again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from importlib.metadata import version
from typing import Final, NoReturn

from pydantic import ValidationError

from contract import log_fields as logs
from contract.log_fields import LogFormat
from contract.settings import explain
from handler.report import Reporter
from handler.settings import WorkerSettings
from handler.store import Patience
from handler.video_model.base import ModelLoadError, VideoModel
from handler.work_dir import remove_leftovers
from storage.bucket import Bucket
from storage.errors import StorageDeniedError, StorageError
from storage.settings import BucketSettings, bucket_settings

_DISTRIBUTION: Final = "hunyuan-video-service"
_BAD_SETTINGS: Final = 2
_UNFIT: Final = 3
#: Seconds that the bucket gets for its first answer.
_CHECK_TIMEOUT: Final = 10.0

log = logging.getLogger(__name__)


def main() -> None:
    """Run the worker."""
    stop_at_once_on_sigterm()
    settings, bucket = _settings()
    logs.configure(settings, **({"worker_id": settings.worker_id} if settings.worker_id else {}))
    key = settings.platform_key.get_secret_value() if settings.platform_key is not None else ""
    url = (settings.report_url or "").replace("$RUNPOD_POD_ID", settings.worker_id or "") or None
    remove_leftovers(settings.work_dir)
    with Reporter(url, key=key, model=settings.model_path) as reporter:
        if bucket is not None:
            _check(bucket, reporter)
        model = _load(settings, reporter)
        from handler import serverless
        from handler.worker import Worker

        worker = Worker(
            model,
            Bucket(bucket) if bucket else None,
            version=version(_DISTRIBUTION),
            work_dir=settings.work_dir,
            patience=Patience(settings.store_patience),
        )
        has_platform = settings.job_url is not None
        if has_platform and settings.log_format is LogFormat.JSON:
            serverless.log_as_ours()
        serverless.serve(worker, tells_progress=has_platform, on_stop=reporter.stopping)


def stop_at_once_on_sigterm() -> None:
    """Until the SDK takes over there is no job to lose.

    With no exception: raised while the SDK forks, Python would pass it over and leave the lock of `logging` taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _settings() -> tuple[WorkerSettings, BucketSettings | None]:
    try:
        return WorkerSettings(), bucket_settings()
    except ValidationError as exc:
        _end(explain(exc), _BAD_SETTINGS)


def _check(bucket: BucketSettings, reporter: Reporter) -> None:
    """A bucket that refuses ends the start before minutes go into loading the model; one that is away does not."""
    try:
        Bucket(bucket, timeout=_CHECK_TIMEOUT, attempts=1).check()
    except StorageDeniedError as exc:
        reporter.failed(str(exc))
        _end(str(exc), _UNFIT)
    except StorageError as exc:
        log.error("going on without the bucket until it answers: %s", exc)


def _load(settings: WorkerSettings, reporter: Reporter) -> VideoModel:
    started = time.monotonic()
    try:
        from handler.video_model.loader import load_model  # torch and diffusers take seconds to import

        imported = time.monotonic()
        model = load_model(settings)
    except ModelLoadError as exc:
        reporter.failed(str(exc))
        _end(str(exc), _UNFIT)
    except Exception as exc:
        reporter.failed(f"the model can't be loaded ({type(exc).__name__}); the worker's log has the details")
        raise
    phases = {"imports": imported - started, **model.load_seconds, "total": time.monotonic() - started}
    log.info("model %s loaded: %s", model.name, ", ".join(f"{name} {took:.1f} s" for name, took in phases.items()))
    reporter.ready(model, phases)
    return model


def _end(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
