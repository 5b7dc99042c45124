"""The variables that `hunyuan deploy` copies to workers, compared with the settings that read them."""

from __future__ import annotations

from pydantic_settings import BaseSettings

from contract.settings import WORKER_VARIABLES
from handler.settings import WorkerSettings
from hunyuan.settings import BUCKET_VARIABLES, INIT_TIMEOUT, REQUIRED_BUCKET_VARIABLES
from storage.settings import BucketSettings

#: RunPod's platform, or `hunyuan serve`, sets these for each worker.
SET_BY_THE_PLATFORM = {"HUNYUAN_WORKER_REPORT_URL", "RUNPOD_AI_API_KEY", "RUNPOD_POD_ID", "RUNPOD_WEBHOOK_GET_JOB"}


def variables(settings: type[BaseSettings]) -> set[str]:
    return {str(field.validation_alias) for field in settings.model_fields.values()}


def test_deployed_workers_get_every_worker_variable_that_an_operator_sets() -> None:
    assert {*WORKER_VARIABLES, INIT_TIMEOUT} == variables(WorkerSettings) - SET_BY_THE_PLATFORM
    assert variables(WorkerSettings) >= SET_BY_THE_PLATFORM


def test_deployed_workers_get_every_bucket_variable() -> None:
    """Except the one that `hunyuan serve` sets for its embedded bucket."""
    assert set(BUCKET_VARIABLES) == variables(BucketSettings) - {"BUCKET_SYNC_DIRECTORY"}


def test_the_required_bucket_variables_are_those_that_the_bucket_requires() -> None:
    required = [str(field.validation_alias) for field in BucketSettings.model_fields.values() if field.is_required()]
    assert list(REQUIRED_BUCKET_VARIABLES) == required
