"""`python -m handler` reads the settings, checks the bucket, loads the model and takes jobs.

`--test_input '{"input": {...}}'` runs one job and exits. The exit codes are `contract.worker.WorkerExit`.
"""

import logging
import os
import signal
import sys
import time
from importlib.metadata import version
from typing import Final, NoReturn

from pydantic import ValidationError

from contract import log_fields as logs
from contract import tracing
from contract.imports import without_collections
from contract.log_fields import LogFormat
from contract.retry import RetryPolicy
from contract.settings import explain, warnings_of_unknown_variables
from contract.worker import WorkerExit
from handler.allocator import configure_allocator, configure_sockets, configure_threads
from handler.machine import first_lines
from handler.provenance import ProvenanceError, Signer
from handler.report import Reporter
from handler.settings import WorkerSettings, unresolved_references
from handler.video_model.base import ModelLoadError, VideoModel
from handler.work_dir import WorkDirError, remove_leftovers
from storage.bucket import Bucket
from storage.errors import StorageDeniedError, StorageError
from storage.settings import BucketSettings, bucket_settings

_DISTRIBUTION: Final = "hunyuan-video-service"
#: Seconds to wait for the bucket's first answer.
_CHECK_TIMEOUT: Final = 10.0

log = logging.getLogger(__name__)


def main() -> None:
    """Run the worker."""
    exit_on_sigterm()
    # 1. Read the settings
    settings, bucket = _settings()
    signer = _signer(settings)
    logs.configure(settings, **({"worker_id": settings.worker_id} if settings.worker_id else {}))
    tracing.configure(settings, "hunyuan-worker", version(_DISTRIBUTION))
    for line in first_lines():
        log.info("%s", line)
    for warning in warnings_of_unknown_variables():
        log.warning("%s", warning)
    key = settings.platform_key.get_secret_value() if settings.platform_key is not None else ""
    url = (settings.report_url or "").replace("$RUNPOD_POD_ID", settings.worker_id or "") or None
    remove_leftovers(settings.work_dir)
    with Reporter(url, key=key, model=settings.model_path) as reporter:
        # 2. Check the bucket and load the model
        if bucket is not None:
            _check(bucket, reporter)
        model = _load(settings, reporter)

        # 3. Warm up
        from handler import serverless
        from handler.encode import EncodeError
        from handler.watchdog import Watchdog, exit_stuck
        from handler.worker import Worker

        worker = Worker(
            model,
            Bucket(bucket, observe=tracing.bucket_request) if bucket else None,
            version=version(_DISTRIBUTION),
            returns_videos=url is None,
            work_dir=settings.work_dir,
            sign=signer.sign if signer is not None else None,
            store_policy=RetryPolicy(total=settings.store_patience),
            watchdog=Watchdog(
                stall_timeout=settings.stall_timeout,
                render_timeout=settings.render_timeout,
                on_stall=reporter.stalled,
                on_stuck=exit_stuck,
                ends_process=True,
            ),
        )
        try:
            worker.warm_up()
        except (EncodeError, WorkDirError) as exc:
            log.error("ffmpeg can't encode into HUNYUAN_WORK_DIR, so jobs will fail: %s", exc)

        # 4. Take jobs
        has_platform = settings.job_url is not None
        if has_platform and settings.log_format is LogFormat.JSON:
            serverless.capture_sdk_logs()
        serverless.serve(
            worker, send_progress=has_platform, on_stop=reporter.stopping, releases_stalled=url is not None
        )


def exit_on_sigterm() -> None:
    """Exit at once on SIGTERM until the SDK sets its own signal handler; until then there is no job to lose.

    Not with an exception: Python drops one that is raised while the SDK forks, and the lock of `logging` stays taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(WorkerExit.STOPPED))


def _settings() -> tuple[WorkerSettings, BucketSettings | None]:
    if literal := list(unresolved_references()):
        _exit("\n".join(literal), WorkerExit.BAD_SETTINGS)
    try:
        return WorkerSettings(), bucket_settings()
    except ValidationError as exc:
        _exit(explain(exc), WorkerExit.BAD_SETTINGS)


def _signer(settings: WorkerSettings) -> Signer | None:
    if settings.c2pa_certificate is None and settings.c2pa_key is None:
        return None
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        _exit("HUNYUAN_C2PA_CERTIFICATE and HUNYUAN_C2PA_KEY need each other: set both", WorkerExit.BAD_SETTINGS)
    try:
        return Signer.load(settings.c2pa_certificate, settings.c2pa_key, version(_DISTRIBUTION))
    except ProvenanceError as exc:
        _exit(str(exc), WorkerExit.BAD_SETTINGS)


def _check(bucket: BucketSettings, reporter: Reporter) -> None:
    """Exit if the bucket denies access, before the model loads for minutes. Go on if the bucket is unavailable."""
    try:
        Bucket(bucket, timeout=_CHECK_TIMEOUT, attempts=1).check()
    except StorageDeniedError as exc:
        reporter.failed(str(exc))
        _exit(str(exc), WorkerExit.NO_MODEL_OR_BUCKET)
    except StorageError as exc:
        log.error("the bucket is unavailable; loading the model meanwhile, jobs retry the bucket: %s", exc)


def _load(settings: WorkerSettings, reporter: Reporter) -> VideoModel:
    started = time.monotonic()
    configure_allocator()
    configure_threads()
    configure_sockets()
    try:
        with without_collections():
            from handler.video_model.loader import load_model  # torch and diffusers take seconds to import
        imported = time.monotonic()
        model = load_model(settings)
    except ModelLoadError as exc:
        reporter.failed(str(exc))
        _exit(str(exc), WorkerExit.NO_MODEL_OR_BUCKET)
    except Exception as exc:
        reporter.failed(f"the model can't be loaded ({type(exc).__name__}); the worker's log has the details")
        raise
    phases = {"imports": imported - started, **model.load_seconds, "total": time.monotonic() - started}
    log.info("model %s loaded: %s", model.name, ", ".join(f"{name} {took:.1f} s" for name, took in phases.items()))
    if settings.job_url is not None and settings.report_url is None and phases["total"] > settings.init_timeout / 2:
        log.warning(
            "loading took %.0f s, and RunPod gives up a worker that loads for %.0f s: raise RUNPOD_INIT_TIMEOUT",
            phases["total"],
            settings.init_timeout,
        )
    reporter.ready(model, phases)
    return model


def _exit(text: str, code: WorkerExit) -> NoReturn:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
