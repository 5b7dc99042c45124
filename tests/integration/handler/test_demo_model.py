"""The demo model and its like, which have diffusers' own classes at a small size, render a prompt to frames."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import random_model
from contract.job import JobInput, Resolution
from contract.result import Stage
from handler.settings import WorkerSettings
from handler.video_model import demo
from handler.video_model.attention import NATIVE, use_mask_free_attention
from handler.video_model.base import Frames, ModelLoadError, ModelOutOfMemoryError, RenderCancelledError, VideoModel
from handler.video_model.blocks import ChunkedBlock
from handler.video_model.checkpoints import single_parts
from handler.video_model.decode import decode
from handler.video_model.generate import PipelineModel
from handler.video_model.loader import load_model
from handler.video_model.memory import CHUNK
from tests.support.full import full
from tests.support.small_models import single

PROMPT = "A paper boat on a rainy street"
STEPS = demo.CHECKPOINT.sampling.num_inference_steps


def job(prompt: str = PROMPT, steps: int | None = None) -> JobInput:
    return JobInput(prompt=prompt, duration=5, num_inference_steps=steps)


def render(
    model: VideoModel, prompt: str = PROMPT, seed: int = 1, steps: int | None = None, chunks: int | None = None
) -> Frames:
    """All frames, or those of the first `chunks`; with the model's own number of steps by default."""
    frames = model.render(job(prompt, steps), seed=seed, on_progress=lambda *_: None, cancelled=Event())
    return np.concatenate(list(islice(frames, chunks)))


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(WorkerSettings(model_path="demo"))


@pytest.mark.full
def test_it_shows_the_colours_that_were_asked_for_in_the_promised_frames_and_reports_each_stage(
    model: VideoModel,
) -> None:
    told: list[tuple[Stage, float]] = []
    asked = job("A large red ball moves to the left on a white background")
    chunks = list(
        model.render(asked, seed=1, on_progress=lambda stage, done: told.append((stage, done)), cancelled=Event())
    )
    assert {chunk.shape[1:] for chunk in chunks} == {(160, 288, 3)}
    assert {chunk.dtype for chunk in chunks} == {np.dtype(np.uint8)}
    assert max(len(chunk) for chunk in chunks) <= 8
    assert sum(len(chunk) for chunk in chunks) == 121
    assert told[0] == (Stage.ENCODING_PROMPT, 0.0)
    denoising = [done for stage, done in told if stage is Stage.DENOISING]
    assert denoising == pytest.approx([step / STEPS for step in range(STEPS + 1)])
    decoding = [done for stage, done in told if stage is Stage.DECODING]
    assert decoding == pytest.approx([0.0] + [frame / 16 for frame in range(17)])
    assert told[-1] == (Stage.DECODING, 1.0)
    frames = np.concatenate(chunks).astype(int)
    red, green, blue = np.moveaxis(frames, -1, 0)
    thing, wall = (red > green + 80) & (red > blue + 80), frames.min(axis=-1) > 180
    assert (thing.mean(axis=(1, 2)) > 0.005).mean() > 0.8, "something red is in most frames"
    assert (thing | wall).mean() > 0.8, "there is little else"


def test_seed_and_prompt_decide_what_is_seen(model: VideoModel) -> None:
    """In the first nine frames."""
    first = render(model, steps=2, chunks=3)
    assert np.array_equal(first, render(model, steps=2, chunks=3))
    assert not np.array_equal(first, render(model, steps=2, chunks=3, seed=2))
    assert not np.array_equal(first, render(model, steps=2, chunks=3, prompt="A red fox walks through fresh snow"))


def test_the_decoder_is_exact_for_the_demos_ratios() -> None:
    """Latents of 8 frames and 32x32 pixels, which no published checkpoint has."""
    vae = demo.load_pipeline().vae
    latents = torch.randn(1, vae.config.latent_channels, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = vae.decoder(latents)[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255).numpy()
    ours = np.concatenate(list(decode(vae, latents, lambda _: None)))
    assert ours.shape == (17, 64, 96, 3)
    assert np.abs(ours.astype(int) - stock).max() <= 1


def test_it_is_the_same_model_each_time_it_is_built() -> None:
    first, second = (random_model.build_pipeline().transformer.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cancelled_in_the_middle_of_decoding_no_further_frame_is_decoded(model: VideoModel) -> None:
    cancelled = Event()
    frames = model.render(job(steps=1), seed=1, on_progress=lambda *_: None, cancelled=cancelled)
    assert [len(next(frames)) for _ in range(3)] == [1, 4, 4]
    cancelled.set()
    with pytest.raises(RenderCancelledError):
        next(frames)
    assert len(render(model, steps=1, chunks=2)) == 5


def test_out_of_memory_in_the_middle_of_decoding_is_told_apart_and_nothing_stays_in_memory() -> None:
    pipeline = random_model.build_pipeline()
    model = single(pipeline)
    upsampled = pipeline.vae.decoder.up_blocks[3].resnets[0].conv_shortcut
    calls: list[int] = []

    def fail_at_the_ninth(*_: object) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    hook = upsampled.register_forward_pre_hook(fail_at_the_ninth)
    before = held_by_tensors()
    frames = model.render(job(), seed=1, on_progress=lambda *_: None, cancelled=Event())
    assert [len(next(frames)) for _ in range(2)] == [1, 4]
    with pytest.raises(ModelOutOfMemoryError):
        next(frames)
    assert held_by_tensors() - before < 2_000_000, "encoded prompts may stay, nothing else"
    hook.remove()
    assert len(render(model, steps=1)) == 121


class CancelledIn(Event):
    """Set when a render reaches the stage, at the time `at`."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        self.at = 0.0

    def on_progress(self, stage: Stage, _: float) -> None:
        if stage is self._stage and not self.is_set():
            self.at = time.monotonic()
            self.set()


def test_a_render_ends_soon_after_it_is_cancelled_in_any_stage_and_the_next_one_works(model: VideoModel) -> None:
    for stage in (Stage.ENCODING_PROMPT, Stage.DENOISING, Stage.DECODING):
        cancelled = CancelledIn(stage)
        with pytest.raises(RenderCancelledError):
            list(model.render(job(steps=2), seed=1, on_progress=cancelled.on_progress, cancelled=cancelled))
        # A denoising step and a decoded latent frame each take a tenth of a second.
        assert time.monotonic() - cancelled.at < 10
    assert len(render(model, steps=1)) == 121


def test_cancelled_between_two_steps_no_further_step_is_taken(model: VideoModel) -> None:
    cancelled = Event()
    steps: list[float] = []

    def on_progress(stage: Stage, done: float) -> None:
        if stage is Stage.DENOISING and done:
            steps.append(done)
            cancelled.set()

    with pytest.raises(RenderCancelledError):
        list(model.render(job(), seed=1, on_progress=on_progress, cancelled=cancelled))
    assert steps == [1 / STEPS]


def held_by_tensors() -> int:
    """Bytes of every tensor that is alive."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is torch.Tensor
    }
    return sum(storages.values())


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("transformer", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
        full(
            "vae.decoder.up_blocks.3.resnets.0.conv_shortcut",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        ),
        full("text_encoder", MemoryError()),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors_and_the_next_render_works(
    error: Exception, part: str
) -> None:
    pipeline = random_model.build_pipeline()
    model = single(pipeline)
    module = pipeline
    for name in part.split("."):
        module = getattr(module, name)

    def fail(*_: object) -> None:
        raise error

    before = held_by_tensors()
    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(ModelOutOfMemoryError):
        render(model)
    model.release_memory()
    assert held_by_tensors() - before < 2_000_000, "encoded prompts may stay, nothing else"
    hook.remove()
    assert len(render(model, steps=1)) == 121


def test_another_error_is_left_as_it_is() -> None:
    pipeline = random_model.build_pipeline()
    model = single(pipeline)

    def fail(*_: object) -> None:
        raise RuntimeError("shape mismatch")

    pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        render(model)


@pytest.mark.parametrize(
    "prompt",
    [PROMPT, 'A shop sign that says "OPEN" and “closed” in the rain', "word " * 99, "雨の通りの紙の船です、とても静か"],
)
@pytest.mark.parametrize(("guidance_scale", "chunk"), [full(6.0, CHUNK), (1.0, CHUNK), full(6.0, 100)])
def test_mask_free_attention_is_exact(prompt: str, guidance_scale: float, chunk: int) -> None:
    """Compares the stock pipeline with its dense masks with ours, from the same noise."""
    latents = []
    for mask_free in (False, True):
        pipeline = random_model.build_pipeline()
        pipeline.tokenizer_max_length = 640
        pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
        pipeline.set_progress_bar_config(disable=True)
        if mask_free:
            use_mask_free_attention(pipeline.transformer, NATIVE, chunk=chunk)
            pipeline.vision_num_semantic_tokens = 0
        latents.append(
            pipeline(
                prompt=prompt,
                height=72,
                width=128,
                num_frames=25,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(7),
                output_type="latent",
            ).frames
        )
    stock, ours = latents
    assert (stock - ours).abs().max() < 1e-4
    assert stock.std() > 0.1


@pytest.mark.parametrize("guidance_scale", [None, full(1.0)])
@pytest.mark.parametrize(
    "prompt", [full(PROMPT), 'A shop sign that says "OPEN" in the rain', full("a word " * 70 + "at its end")]
)
def test_our_latents_for_a_prompt_equal_those_of_the_stock_pipeline(prompt: str, guidance_scale: float | None) -> None:
    """Compares `PipelineModel` with diffusers, called as its documentation says."""
    stock = random_model.build_pipeline()
    stock.set_progress_bar_config(disable=True)
    stock.scheduler.set_shift(5.0)
    stock.guider = stock.guider.new(guidance_scale=guidance_scale or 6.0)
    expected = stock(
        prompt=prompt,
        negative_prompt="blurry",
        height=32,
        width=56,
        num_frames=121,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).frames

    pipeline = random_model.build_pipeline()
    use_mask_free_attention(pipeline.transformer, NATIVE)
    model = PipelineModel(single_parts(replace(random_model.CHECKPOINT, base_size=48), pipeline))
    job_input = JobInput(
        prompt=prompt,
        duration=5,
        resolution=Resolution.P720,
        negative_prompt="blurry",
        num_inference_steps=3,
        guidance_scale=guidance_scale,
    )
    latents = model._latents(job_input, None, 7, lambda *_: None, Event()) * pipeline.vae.config.scaling_factor
    assert (latents - expected).abs().max() < 1e-4


def test_no_mask_reaches_the_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records the masks of the blocks' calls to PyTorch's kernel, which are the long ones."""
    masks: list[object] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        if 5 * 9 * 16 < query.shape[-2] < 1500:  # the text encoder pads to more, and attends causally
            masks.append(named.get("attn_mask"))
        return kernel(query, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = load_model(WorkerSettings(model_path="demo"))
    render(model, steps=5, chunks=1)
    assert len(masks) == (2 * 2 + 3) * 6, "the first two of five steps have guidance; six blocks"
    assert set(masks) == {None}


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of the largest result that PyTorch computes inside it."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def largest_in_a_block(tokens: int, *, stock: bool) -> int:
    transformer = random_model.build_pipeline().transformer
    if not stock:
        use_mask_free_attention(transformer, NATIVE, chunk=512)
    latent, text, modulation = torch.randn(1, tokens, 32), torch.randn(1, 20, 32), torch.randn(1, 32)
    with torch.no_grad(), LargestTensor() as seen:  # type: ignore[no-untyped-call]
        transformer.transformer_blocks[0](latent, text, modulation, torch.ones(1, 20))
    largest: int = seen.largest
    return largest


def test_no_tensor_of_a_block_grows_with_the_square_of_its_tokens() -> None:
    small, large = (largest_in_a_block(tokens, stock=False) for tokens in (1000, 4000))
    assert large <= 4.2 * small
    assert large <= 4020 * 32 * 4, "in bytes: a joint tensor; the feed-forward's inside is twice as wide, and chunked"
    assert largest_in_a_block(4000, stock=True) >= 4020**2, "the same measurement sees the stock processor's mask"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one small checkpoint that has the target size of a 480p model."""
    directory = tmp_path_factory.mktemp("checkpoints")
    pipeline = random_model.build_pipeline()
    pipeline.save_pretrained(directory / "Tiny-480p_t2v")
    return directory


@pytest.mark.parametrize("inside", ["", "Tiny-480p_t2v"])
def test_a_checkpoint_is_loaded_from_its_directory_or_the_one_above(checkpoints: Path, inside: str) -> None:
    model = load_model(WorkerSettings(model_path=str(checkpoints / inside)))
    assert model.name == "Tiny-480p_t2v"
    assert isinstance(model, PipelineModel)
    assert model.models == ["HunyuanVideo-1.5"]
    (base,) = model.parts.bases.values()
    assert (base.checkpoint.base_size, base.checkpoint.sampling.num_inference_steps) == (640, 50)
    assert base.pipeline.scheduler.shift == 5.0
    assert base.pipeline.guider.guidance_scale == 6.0
    assert base.pipeline.vae.use_tiling
    for block in base.pipeline.transformer.transformer_blocks:
        assert isinstance(block.forward, ChunkedBlock)


@pytest.mark.full
def test_a_loaded_checkpoint_renders_what_the_saved_one_does(checkpoints: Path) -> None:
    loaded = HunyuanVideo15Pipeline.from_pretrained(checkpoints / "Tiny-480p_t2v")
    built = random_model.build_pipeline()
    loaded.system_message = built.system_message
    loaded.prompt_template_encode_start_idx = built.prompt_template_encode_start_idx
    loaded.tokenizer_max_length = built.tokenizer_max_length
    first, second = (render(single(pipeline)) for pipeline in (built, loaded))
    # Weights mapped from a file have another alignment, so the last bit of a float may differ.
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_what_can_not_be_loaded_names_the_setting_and_what_is_wrong(tmp_path: Path, checkpoints: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "HunyuanVideo15Pipeline"}')
    (tmp_path / "garbled").mkdir()
    (tmp_path / "garbled" / "model_index.json").write_text("{")
    (tmp_path / "image").mkdir()
    kind = HunyuanVideo15ImageToVideoPipeline.__name__
    (tmp_path / "image" / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    cases = {
        "absent": "is no directory",
        "empty": "no model_index.json",
        "broken": "can't be loaded",
        "garbled": "can't be loaded",
        "image": "ImageToVideo",
        "": "broken, garbled, image",
    }
    for name, words in cases.items():
        with pytest.raises(ModelLoadError, match="HUNYUAN_MODEL_PATH") as caught:
            load_model(WorkerSettings(model_path=str(tmp_path / name)))
        assert words in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_an_unavailable_hub_id_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WorkerSettings(model_path="nobody/no-such-checkpoint", cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"HUNYUAN_MODEL_PATH: nobody/no-such-checkpoint can't be loaded"):
        load_model(settings)
