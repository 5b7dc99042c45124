"""Videos from an image have the stock pipeline's numbers and pass super-resolution, and the worker checks the image."""

from __future__ import annotations

import base64
import io
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from contract.errors import ErrorCode
from contract.job import AspectRatio, JobInput, Resolution
from contract.result import Stage
from handler.images import ImageError
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.base import Frames
from handler.video_model.catalog import Checkpoint, Route, Sampling, trained_size
from handler.video_model.generate import PipelineModel
from handler.video_model.memory import CHUNK
from handler.video_model.parts import Base, Parts
from handler.worker import Job, JobError, Worker
from storage.bucket import Bucket
from storage.images import Images
from storage.layout import image_key
from storage.settings import BucketSettings
from tests.support.full import full
from tests.support.queues import NOWHERE
from tests.support.s3_servers import new_bucket
from tests.support.scripted_model import ScriptedModel
from tests.support.small_models import image_family, image_pipeline

PROMPT = "A paper boat on a rainy street"


def picture(color: tuple[int, int, int] = (200, 40, 40), size: tuple[int, int] = (160, 90)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste((20, 60, 220), (0, 0, size[0] // 2, size[1] // 2))
    return image


@pytest.mark.parametrize("prompt", [full(PROMPT), 'A shop sign that says "OPEN" in the rain', full("word " * 99)])
@pytest.mark.parametrize(("guidance_scale", "chunk"), [(6.0, CHUNK), (1.0, 100)])
def test_mask_free_attention_is_exact_from_an_image(prompt: str, guidance_scale: float, chunk: int) -> None:
    latents = []
    for mask_free in (False, True):
        pipeline = image_pipeline()
        pipeline.target_size = 96
        pipeline.tokenizer_max_length = 640
        pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
        pipeline.set_progress_bar_config(disable=True)
        if mask_free:
            use_mask_free_attention(pipeline.transformer, NATIVE, chunk=chunk)
        latents.append(
            pipeline(
                prompt=prompt,
                image=picture(),
                num_frames=25,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(7),
                output_type="latent",
            ).frames
        )
    stock, ours = latents
    assert stock.shape == ours.shape == (1, 8, 7, 9, 16)
    assert (stock - ours).abs().max() < 1e-4


def test_our_latents_for_an_image_equal_those_of_the_stock_pipeline() -> None:
    stock = image_pipeline()
    stock.set_progress_bar_config(disable=True)
    stock.target_size = 48
    stock.guider = stock.guider.new(guidance_scale=6.0)
    expected = stock(
        prompt=PROMPT,
        image=picture(size=(1280, 720)),
        num_frames=121,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).frames
    pipeline = image_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    routes = {("HunyuanVideo-1.5", Resolution.P720): Route("base")}
    base = Base(Checkpoint("base", 48, Sampling(2, guidance_scale=6.0)), pipeline)
    model = PipelineModel(Parts("image", {"base": base}, routes, image_routes=routes))
    job_input = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P720, image="https://example.com/x.png")
    latents = model._latents(job_input, picture(size=(1280, 720)), 7, lambda *_: None, Event())
    assert (latents * pipeline.vae.config.scaling_factor - expected).abs().max() < 1e-4


def render(image: Image.Image) -> Frames:
    told: list[Stage] = []
    job = JobInput(prompt=PROMPT, duration=5, resolution=Resolution.P720, image="https://example.com/x.png")
    chunks = image_family().render(
        job, seed=1, on_progress=lambda stage, _: told.append(stage), cancelled=Event(), image=image
    )
    frames = np.concatenate(list(chunks))
    assert list(dict.fromkeys(told)) == [Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.UPSCALING, Stage.DECODING]
    return frames


@pytest.mark.full
def test_the_image_goes_through_base_and_super_resolution_and_decides_what_is_seen() -> None:
    red = render(picture())
    assert red.shape == (121, 48, 88, 3)
    assert np.array_equal(red, render(picture()))
    assert not np.array_equal(red, render(picture((40, 200, 40))))


@pytest.mark.full
def test_an_image_of_another_shape_is_cropped() -> None:
    assert render(picture(size=(300, 100))).shape == (121, 48, 88, 3)


@pytest.mark.parametrize("aspect_ratio", [each if each is AspectRatio.TALL else full(each) for each in AspectRatio])
def test_each_stage_gets_the_image_resampled_once_from_the_original(
    monkeypatch: pytest.MonkeyPatch, aspect_ratio: AspectRatio
) -> None:
    """The first stages' own pixels equal one crop and one Lanczos resampling of the original picture."""
    model, seen = image_family(), []
    pipeline = next(iter(model.parts.bases.values())).pipeline
    encode = pipeline.encode_image

    def note(*arguments: object, **named: object) -> torch.Tensor:
        seen.append(named["image"])
        states: torch.Tensor = encode(*arguments, **named)
        return states

    monkeypatch.setattr(pipeline, "encode_image", note)
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (91, 161, 3), dtype=np.uint8))
    job = JobInput(
        prompt=PROMPT, duration=5, resolution=Resolution.P720, aspect_ratio=aspect_ratio, image="https://example.com/x"
    )
    model._latents(job, original, 1, lambda *_: None, Event())
    wide, high = map(int, aspect_ratio.split(":"))
    expected = [trained_size(size, wide, high, 8) for size in (48, 72)]
    assert [np.asarray(image).tolist() for image in seen] == [
        np.asarray(ImageOps.fit(original, size, Image.Resampling.LANCZOS)).tolist() for size in expected
    ]


def data_url(image: Image.Image) -> str:
    body = io.BytesIO()
    image.save(body, "PNG")
    return "data:image/png;base64," + base64.b64encode(body.getvalue()).decode()


def failure(worker: Worker, image: str) -> tuple[ErrorCode, str]:
    job = Job("task-1", {"prompt": PROMPT, "duration": 5, "resolution": "720p", "image": image})
    with pytest.raises(JobError) as caught:
        worker._image(JobInput.model_validate(job.input))
    return caught.value.failure.error_code, caught.value.failure.error


def test_an_image_that_can_not_be_used_fails_the_job_and_says_why() -> None:
    def refuse(_: str) -> Image.Image:
        raise ImageError("the image's host is not on the open internet")

    worker = Worker(ScriptedModel(), Bucket(NOWHERE), version="1", load_image=refuse)
    code, text = failure(worker, "http://169.254.169.254/latest/meta-data")
    assert code is ErrorCode.INVALID_REQUEST
    assert text == "image: the image's host is not on the open internet"


def test_an_uploaded_image_is_read_from_the_workers_bucket_until_it_is_deleted(s3_server: BucketSettings) -> None:
    body = io.BytesIO()
    picture().save(body, "PNG")
    bucket = Bucket(new_bucket(s3_server))
    image_id, _ = Images(bucket).put(body.getvalue(), content_type="image/png")
    worker = Worker(ScriptedModel(), bucket, version="1")
    job_input = JobInput(prompt=PROMPT, image=f"upload:{image_id}")
    loaded = worker._image(job_input)
    assert loaded is not None
    assert np.array_equal(np.asarray(loaded), np.asarray(picture()))
    bucket.delete(image_key(image_id))
    code, text = failure(worker, f"upload:{image_id}")
    assert (code, text) == (ErrorCode.INVALID_REQUEST, "image: the uploaded image has expired; upload it again")


def test_a_worker_without_a_bucket_says_that_it_has_no_uploaded_images() -> None:
    worker = Worker(ScriptedModel(), None, version="1", returns_videos=True)
    code, text = failure(worker, "upload:1900000000-" + "A" * 43)
    assert (code, text) == (ErrorCode.INVALID_REQUEST, "image: the worker has no bucket with uploaded images")


def test_a_model_without_image_weights_says_so() -> None:
    model = ScriptedModel()
    model.takes_images = False
    job_input = {"prompt": PROMPT, "duration": 5, "resolution": "720p", "image": data_url(picture())}
    with pytest.raises(JobError) as caught:
        Worker(model, Bucket(NOWHERE), version="1").run(Job("task-1", job_input), lambda _: None, Event())
    code, text = caught.value.failure.error_code, caught.value.failure.error
    assert (code, "image-to-video" in text) == (ErrorCode.INVALID_REQUEST, True)


def test_a_manifest_keeps_an_images_address_and_not_its_bytes() -> None:
    address = "https://example.com/x.png"
    assert JobInput(prompt=PROMPT, image=address).without_data().image == address
    assert JobInput(prompt=PROMPT, image=data_url(picture())).without_data().image is None
