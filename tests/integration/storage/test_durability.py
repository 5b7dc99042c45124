"""A completed task of an embedded bucket survives a power cut: its video is on the disk before its manifest."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from threading import Event

import pytest
from pydantic import ValidationError

from contract.result import JobResult
from contract.retry import RetryPolicy
from handler.worker import Job, JobError, Worker
from shim.host.gateway import EmbeddedBucket
from storage.bucket import Bucket
from storage.settings import BucketSettings, JobBucketSettings
from storage.videos import Videos
from tests.support.disks import crashing_disk
from tests.support.s3_servers import juicefs
from tests.support.scripted_model import ScriptedModel

pytestmark = pytest.mark.usefixtures("small_videos")

INPUT = {"prompt": "A paper boat on a rainy street", "duration": 5, "resolution": "720p"}


def render(bucket: Bucket, directory: Path, patience: float = 60.0) -> JobResult:
    policy = RetryPolicy(total=patience)
    worker = Worker(ScriptedModel(), bucket, version="1", work_dir=directory, store_policy=policy)
    return worker.run(Job("task", INPUT), lambda _: None, Event())


def extensions(bucket: Bucket) -> set[str]:
    """Which kinds of the task's objects the bucket has."""
    return {key.rpartition(".")[2] for key in bucket.list_keys("videos/task")}


def test_a_task_that_completed_before_a_power_cut_has_its_video_after_it(tmp_path: Path) -> None:
    with crashing_disk(tmp_path, 64) as disk:
        with juicefs(disk.mount_point) as settings:
            bucket = Bucket(settings.model_copy(update={"sync_directory": disk.mount_point}))
            bucket.sync()  # the bucket itself is there since long ago
            result = render(bucket, tmp_path)
            after_the_cut = disk.contents()
        disk.umount()
        disk.restore(after_the_cut)
        disk.mount()
        with juicefs(disk.mount_point, settings) as settings:
            bucket = Bucket(settings)
            manifest = Videos(bucket).find("task")
            assert manifest is not None
            video = bucket.get_bytes(manifest.video_key)
            assert hashlib.sha256(video).hexdigest() == manifest.sha256 == result.sha256
            assert extensions(bucket) == {"mp4", "jpg", "json"}


def test_the_disk_is_synced_between_video_and_manifest_and_before_the_task_completes(tmp_path: Path) -> None:
    """A hook in place of syncfs(2) looks at what the real S3 server has at that moment."""
    (tmp_path / "bucket").mkdir()
    with juicefs(tmp_path / "bucket") as settings:
        looks: list[set[str]] = []
        reader = Bucket(settings)

        def sync(directory: Path) -> None:
            assert directory == tmp_path / "bucket"
            looks.append(extensions(reader))

        embedded = settings.model_copy(update={"sync_directory": tmp_path / "bucket"})
        render(Bucket(embedded, sync=sync), tmp_path)
        assert looks == [{"mp4", "jpg"}, {"mp4", "jpg", "json"}]
        render(Bucket(settings, sync=sync), tmp_path)
        assert len(looks) == 2, "no other bucket is synced"


def test_a_task_does_not_complete_while_the_disk_can_not_be_synced(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    with juicefs(tmp_path / "bucket") as settings:
        lost = settings.model_copy(update={"sync_directory": tmp_path / "no-such-directory"})
        with pytest.raises(JobError, match="could not be stored"):
            render(Bucket(lost), tmp_path, patience=1.0)
        assert "json" not in extensions(Bucket(settings))


def test_a_worker_of_the_embedded_bucket_knows_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = EmbeddedBucket(tmp_path)
    for name, value in embedded.environment().items():
        monkeypatch.setenv(name, value)
    assert BucketSettings() == embedded.settings
    assert BucketSettings().sync_directory == tmp_path


@pytest.mark.parametrize("name", ["BUCKET_SYNC_DIRECTORY", "sync_directory"])
def test_a_client_can_not_choose_the_directory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_SYNC_DIRECTORY", "/")
    config = {"endpointUrl": "http://127.0.0.1:9", "accessId": "id", "accessSecret": "secret"}
    assert JobBucketSettings.model_validate(config).sync_directory is None
    with suppress(ValidationError):  # refused is as good as ignored
        assert JobBucketSettings.model_validate({**config, name: "/"}).sync_directory is None
