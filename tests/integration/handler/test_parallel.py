"""Several processes render one video: the numbers of one process, and one fate for all of them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from benchmarks import random_model
from contract.job import JobInput, Resolution
from contract.result import Stage
from handler.settings import Approximation, WorkerSettings
from handler.video_model import ranks
from handler.video_model.base import ModelLoadError, ModelOutOfMemoryError, RenderCancelledError
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_model
from handler.video_model.parallel import Parallel, token_counts
from handler.video_model.ranks import FOLLOWER
from tests.support.full import full
from tests.support.service import Service, eventually, running_service
from tests.support.small_rank import MISSING, TOO_LARGE, load_rank

BOAT = JobInput(prompt="A paper boat on a rainy street", duration=5, num_inference_steps=3)


@contextlib.contextmanager
def others_of(settings: WorkerSettings) -> Iterator[ranks.OtherRanks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "FOLLOWER", "tests.support.small_rank")
        others = ranks.OtherRanks(settings, backend="gloo")
    try:
        yield others
    finally:
        others.close()


@contextlib.contextmanager
def loaded(model_path: str, gpus: int, **options: Any) -> Iterator[PipelineModel]:
    """A small model, in so many processes."""
    settings = WorkerSettings(model_path=model_path, gpus_per_job=gpus, **options)
    if gpus == 1:
        yield load_rank(settings, None)
        return
    with others_of(settings) as others:
        model = load_rank(settings, others.parallel)
        model._ranks = others
        others.wait_until_loaded()
        yield model


@pytest.fixture(scope="module", params=["family", full("windowed family")])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[PipelineModel, PipelineModel]]:
    """The same model in one and in two processes."""
    with loaded(request.param, 1) as alone, loaded(request.param, 2) as together:
        yield alone, together


@pytest.fixture(scope="module")
def together(pair: tuple[PipelineModel, PipelineModel]) -> PipelineModel:
    return pair[1]


def latents(model: PipelineModel, job: JobInput = BOAT, image: Image.Image | None = None) -> torch.Tensor:
    with model._rendering(job, image, 1, Event()) as cancellation:
        return model._latents(job, image, 1, lambda *_: None, cancellation)


def picture() -> Image.Image:
    image = Image.new("RGB", (160, 90), (200, 40, 40))
    image.paste((20, 60, 220), (0, 0, 80, 45))
    return image


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("resolution", [full(Resolution.P720), Resolution.P1080])
def test_two_processes_have_the_latents_of_one(
    pair: tuple[PipelineModel, PipelineModel], resolution: Resolution, guidance_scale: float
) -> None:
    alone, together = pair
    job = BOAT.model_copy(update={"resolution": resolution, "guidance_scale": guidance_scale})
    assert (latents(together, job) - latents(alone, job)).abs().max() < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("approximation", [None, Approximation.MAGCACHE, Approximation.TAYLORSEER])
def test_so_do_they_from_an_image_and_with_skipped_steps(approximation: Approximation | None) -> None:
    job = BOAT.model_copy(update={"image": "data:,", "guidance_scale": 6.0, "num_inference_steps": 6})
    others = (Approximation.FP8_WEIGHTS, Approximation.SR_WINDOW_ATTENTION)
    options = {"approximations": (approximation, *others) if approximation else ()}
    with loaded("image family", 1, **options) as one, loaded("image family", 2, **options) as two:
        assert (latents(two, job, picture()) - latents(one, job, picture())).abs().max() < 1e-5


@pytest.mark.full
def test_four_processes_share_passes_and_tokens_of_the_demo_model() -> None:
    """It guides its first steps only: then the halves share one pass."""
    job = BOAT.model_copy(update={"num_inference_steps": 6})
    one, four = (load_model(WorkerSettings(model_path="demo", gpus_per_job=gpus)) for gpus in (1, 4))
    assert isinstance(one, PipelineModel)
    assert isinstance(four, PipelineModel)
    assert four._ranks is not None
    try:
        assert (latents(four, job) - latents(one, job)).abs().max() < 1e-5
    finally:
        four._ranks.close()


@pytest.mark.parametrize("tokens", [5, 7, 64])
def test_every_rank_has_a_part_of_the_tokens(tokens: int) -> None:
    parts = token_counts(tokens, 4)
    assert sum(parts) == tokens
    assert max(parts) - min(parts) <= 1


def test_a_cancelled_render_ends_in_every_process_and_the_next_one_has_the_same_frames(together: PipelineModel) -> None:
    cancelled, told = Event(), []

    def cancel_in_between(stage: Stage, done: float) -> None:
        told.append((stage, done))
        if done > 0.2:
            cancelled.set()

    before = latents(together)
    with pytest.raises(RenderCancelledError):
        list(together.render(BOAT, seed=1, on_progress=cancel_in_between, cancelled=cancelled))
    assert [stage for stage, _ in told][:2] == [Stage.ENCODING_PROMPT, Stage.DENOISING]
    assert told[-1][1] < 0.6
    assert torch.equal(latents(together), before)


@pytest.mark.parametrize("rank", [0, 1])
def test_too_little_memory_in_one_process_fails_the_job_alone(together: PipelineModel, rank: int) -> None:
    def fail_on_rank_0(_: Stage, done: float) -> None:
        if rank == 0 and done > 0.2:
            raise MemoryError("can't allocate memory on rank 0")

    before = latents(together)
    job = BOAT.model_copy(update={"prompt": TOO_LARGE}) if rank == 1 else BOAT
    with pytest.raises(ModelOutOfMemoryError, match=f"on rank {rank}"):
        list(together.render(job, seed=1, on_progress=fail_on_rank_0, cancelled=Event()))
    assert torch.equal(latents(together), before)


def test_an_error_of_another_process_is_logged(together: PipelineModel, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Stage, done: float) -> None:
        if done > 0.2:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(together.render(BOAT, seed=1, on_progress=fail, cancelled=Event()))
    assert "rank 1: " in caplog.text


@pytest.mark.full
def test_a_model_that_another_process_can_not_load_is_an_error_of_loading() -> None:
    """Rank 0 still loads when it reads of it: the other one must not end before, which would end the worker."""
    with others_of(WorkerSettings(model_path=MISSING, gpus_per_job=2)) as others:
        (other,) = others._ranks
        eventually("the report", lambda: not other._reports.empty(), seconds=90)
        with pytest.raises(subprocess.TimeoutExpired):
            other.process.wait(3)
        with pytest.raises(ModelLoadError, match="rank 1: it is not on this disk"):
            others.wait_until_loaded()


def test_heads_that_the_ranks_cannot_share_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="4 GPUs cannot share 2 attention heads evenly"):
        Parallel(0, 4, tmp_path, backend="gloo").share(random_model.build_pipeline().transformer)


@pytest.mark.parametrize("gpus", ["3", "16", "two"])
def test_other_numbers_of_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    monkeypatch.setenv("HUNYUAN_GPUS_PER_JOB", gpus)
    with pytest.raises(ValidationError, match="HUNYUAN_GPUS_PER_JOB"):
        WorkerSettings()


@pytest.mark.parametrize("approximation", ["first-block-cache", "teacache"])
def test_caches_that_would_skip_different_steps_on_each_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, approximation: str
) -> None:
    monkeypatch.setenv("HUNYUAN_APPROXIMATIONS", approximation)
    monkeypatch.setenv("HUNYUAN_GPUS_PER_JOB", "2")
    with pytest.raises(ValidationError, match=f"must be 1 with HUNYUAN_APPROXIMATIONS={approximation}"):
        WorkerSettings()


def follower_of(worker: psutil.Process) -> psutil.Process:
    def look() -> psutil.Process | None:
        return next((each for each in worker.children() if FOLLOWER in each.cmdline()), None)

    return eventually("the process of rank 1", look)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    with running_service(directory, HUNYUAN_GPUS_PER_JOB="2", HUNYUAN_STALL_TIMEOUT="20") as running:
        yield running


@pytest.mark.full
@pytest.mark.parametrize("loses", ["rank 1", "rank 0", "rank 1 to a stop"])
def test_a_task_survives_the_loss_of_a_process_and_no_process_is_left(service: Service, loses: str) -> None:
    task = service.generate()
    worker = service.worker()
    follower = follower_of(worker)
    eventually("a step", lambda: service.status(task).get("progress", 0) > 10, seconds=90)
    open_ports = [each for each in follower.net_connections() if each.status == psutil.CONN_LISTEN]
    assert {each.laddr.ip for each in open_ports} == {"127.0.0.1"}, "others can't reach the ranks"
    if loses == "rank 0":
        worker.kill()
    elif loses == "rank 1":
        follower.kill()
    else:
        follower.suspend()
    gone, alive = psutil.wait_procs([worker, follower], timeout=90)
    assert (len(gone), alive) == (2, [])
    assert service.finished(task)["status"] == "completed"
    assert follower_of(service.worker()).pid != follower.pid
