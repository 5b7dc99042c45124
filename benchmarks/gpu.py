"""What the model's real dimensions cost on this GPU, with random weights made on the spot: nothing is downloaded.

    python -m benchmarks.gpu                      every profile, resolution and duration
    python -m benchmarks.gpu --vram-limit 12      the same in 12 GB
    python -m benchmarks.gpu --tiny               small models, on a CPU too: shows that the benchmark itself works

For each cell: seconds of one transformer pass at each size it goes through, its share of the matmul peak measured in
the same run (operations counted from shapes), seconds of the whole job by stage, and peak memory. `--stock` times a
pass of diffusers' own pipeline beside it, with its dense mask. Long profiles are not run to their end: `--steps` of
them are timed and the rest is reckoned; the result says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Final

import diffusers
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from contract.job import DEFAULT_MODEL, JobInput, Profile, Resolution, num_frames
from contract.result import Stage
from handler.settings import WorkerSettings
from handler.video_model import demo
from handler.video_model.attention import choose_backend, use_mask_free_attention
from handler.video_model.catalog import CHECKPOINTS, ROUTES, Checkpoint, bucket_size
from handler.video_model.compilation import compile_blocks
from handler.video_model.generate import Base, PipelineModel, Upscaler
from handler.video_model.loader import compiles
from handler.video_model.placement import Parts, put_on_gpu
from handler.video_model.super_resolution import SRTo720pUpsampler, SRTo1080pUpsampler, SuperResolution

RESULTS: Final = Path(__file__).parent / "results"
PROMPT: Final = "A paper boat drifts along a rainy street at night, neon signs mirrored in the puddles, cinematic"
#: The reference's table, in seconds: what a job of each kind should take.
REFERENCE: Final = {("720p", 5): "20-30", ("720p", 10): "40-60", ("1080p", 5): "30-45", ("1080p", 10): "60-90"}


@dataclass(frozen=True)
class Scale:
    """The dimensions of the models: those of the published checkpoints, or small ones."""

    layers: int
    heads: int
    head_dim: int
    rope: tuple[int, int, int]
    latent_channels: int
    text_dim: int
    text_2_dim: int
    text_layers: int
    shrink: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


REAL: Final = Scale(54, 16, 128, (16, 56, 56), 32, 3584, 1472, 28, 1)
TINY: Final = Scale(2, 2, 16, (4, 6, 6), 8, 32, 16, 3, 10)


@dataclass(frozen=True)
class Pass:
    """One transformer pass."""

    width: int
    height: int
    tokens: int
    seconds: float
    tflops: float
    share_of_peak: float
    stock_seconds: float | None


@dataclass(frozen=True)
class Cell:
    """One kind of job."""

    profile: str
    resolution: str
    duration: int
    compiled: bool
    passes: Sequence[Pass]
    stages: dict[str, float]
    steps_timed: str
    total: float
    reference: str
    peak_gb: float
    problem: str = ""


def main() -> None:
    arguments = _arguments()
    diffusers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("There is no GPU here. `--tiny` shows on a CPU that the benchmark works.")
    bench = Bench(arguments, TINY if arguments.tiny else REAL, device)
    cells = [bench.cell(*cell) for cell in _wanted(arguments)]
    _write(arguments, bench, cells)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--profiles", nargs="+", type=Profile, default=list(Profile))
    parser.add_argument("--resolutions", nargs="+", type=Resolution, default=list(Resolution))
    parser.add_argument("--durations", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--steps", type=int, default=4, help="steps of a base model that are timed")
    parser.add_argument("--vram-limit", type=float, help="GPU memory in GB that may be used")
    parser.add_argument("--stock", action="store_true", help="time a pass of the stock pipeline, too")
    parser.add_argument("--no-compile", action="store_true", help="leave the blocks uncompiled")
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[Profile, Resolution, int]]:
    for profile in arguments.profiles:
        for resolution in arguments.resolutions:
            for duration in arguments.durations:
                yield profile, resolution, duration


class Bench:
    """The models of one profile at a time, and the clock."""

    def __init__(self, arguments: argparse.Namespace, scale: Scale, device: str) -> None:
        self.arguments = arguments
        self.scale = scale
        self.device = device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.peak = self._matmul_peak()
        self.compiled = False
        self._profile: Profile | None = None
        self._model: PipelineModel | None = None

    def cell(self, profile: Profile, resolution: Resolution, duration: int) -> Cell:
        """Measure one kind of job. One that does not fit says so in its `problem`."""
        reference = REFERENCE.get((resolution, duration), "")
        empty = Cell(profile, resolution, duration, False, [], {}, "", 0.0, reference, 0.0)
        try:
            model = self._loaded(profile)
            self._reset_peak()
            passes = [self._pass(part, duration) for part in self._parts(model, resolution)]
            stages, timed = self._job(model, resolution, duration)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as exc:
            self._release()
            return replace(empty, problem=str(exc).partition("\n")[0])
        return replace(
            empty,
            compiled=self.compiled,
            passes=passes,
            stages=stages,
            steps_timed=timed,
            total=sum(stages.values()),
            peak_gb=self._peak_gb(),
        )

    def _loaded(self, profile: Profile) -> PipelineModel:
        if self._profile is not profile or self._model is None:
            self._release()
            self._model, self._profile = self._build(profile), profile
        return self._model

    def _release(self) -> None:
        self._model = None
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _build(self, profile: Profile) -> PipelineModel:
        routes = {(DEFAULT_MODEL, resolution): ROUTES[profile, resolution] for resolution in Resolution}
        names = {name for route in routes.values() for name in route.checkpoints}
        bases, upscalers = {}, {}
        for name in sorted(names):
            checkpoint = self._scaled(CHECKPOINTS[name])
            if "_sr_" in name:
                upscalers[name] = Upscaler(checkpoint, self._stage(checkpoint))
            else:
                bases[name] = Base(checkpoint, self._pipeline())
        backend = choose_backend(self.device, flash=True, sage=False)
        parts = Parts(f"random {profile}", bases, routes, upscalers)
        for transformer in parts.transformers:
            use_mask_free_attention(transformer, backend)
        settings = WorkerSettings(
            vram_limit=self.arguments.vram_limit, compile=False if self.arguments.no_compile else None
        )
        memory = put_on_gpu(parts, settings) if self.device == "cuda" else None
        self.compiled = compiles(settings, self.device, memory) and compile_blocks(parts.transformers)
        return PipelineModel(
            name=parts.name, bases=bases, routes=routes, upscalers=upscalers, attention=backend, memory=memory
        )

    def _scaled(self, checkpoint: Checkpoint) -> Checkpoint:
        return replace(checkpoint, base_size=checkpoint.base_size // self.scale.shrink)

    def _parts(self, model: PipelineModel, resolution: Resolution) -> Iterator[tuple[Any, Checkpoint]]:
        route = model._routes[DEFAULT_MODEL, resolution]
        base = model._bases[route.base]
        yield base.pipeline.transformer, base.checkpoint
        for name in route.super_resolution:
            yield model._upscalers[name].stage.transformer, model._upscalers[name].checkpoint

    def _pass(self, part: tuple[Any, Checkpoint], duration: int) -> Pass:
        transformer, checkpoint = part
        ratio = 8 if self.scale is TINY else 16
        width, height = bucket_size(checkpoint.base_size, 16, 9, ratio)
        frames = (num_frames(duration) - 1) // 4 + 1
        named = self._inputs(transformer, frames, height // ratio, width // ratio)
        seconds = self._timed(lambda: transformer(**named))
        tokens = frames * (height // ratio) * (width // ratio)
        operations = self._operations(tokens, int(named["encoder_attention_mask"].sum()))
        stock = self._stock_pass(transformer, named) if self.arguments.stock else None
        tflops = operations / seconds / 1e12
        return Pass(width, height, tokens, seconds, tflops, tflops / self.peak, stock)

    def _inputs(self, transformer: Any, frames: int, height: int, width: int) -> dict[str, Any]:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        text = 120  # valid tokens of a prompt of some 60 words, with its template
        named = {
            "hidden_states": noise(1, transformer.config.in_channels, frames, height, width),
            "timestep": torch.tensor([500.0], device=self.device, dtype=self.dtype),
            "encoder_hidden_states": noise(1, 1000, self.scale.text_dim),
            "encoder_attention_mask": (torch.arange(1000, device=self.device) < text)[None].to(self.dtype),
            "encoder_hidden_states_2": noise(1, 256, self.scale.text_2_dim),
            "encoder_attention_mask_2": torch.zeros(1, 256, device=self.device, dtype=self.dtype),
            "image_embeds": torch.zeros(1, 0, transformer.config.image_embed_dim, device=self.device, dtype=self.dtype),
            "return_dict": False,
        }
        if transformer.config.use_meanflow:
            named["timestep_r"] = torch.zeros(1, device=self.device, dtype=self.dtype)
        return named

    def _operations(self, tokens: int, text: int) -> float:
        """Multiplications and additions of a pass: projections and feed-forward 24 D^2 a token, attention 4 S^2 D."""
        width, both = self.scale.width, tokens + text
        return self.scale.layers * (24.0 * both * width**2 + 4.0 * both**2 * width)

    def _stock_pass(self, transformer: Any, named: dict[str, Any]) -> float | None:
        """The same pass with diffusers' own processor and its dense mask; None where that does not fit."""
        stock = self._transformer(transformer.config.in_channels, meanflow=transformer.config.use_meanflow)
        try:
            stock.to(self.device)
            return self._timed(partial(stock, **named))
        except torch.OutOfMemoryError:
            return None

    def _job(self, model: PipelineModel, resolution: Resolution, duration: int) -> tuple[dict[str, float], str]:
        """Seconds by stage of a whole job; of a long base model `--steps` are run and the rest reckoned."""
        base = model._bases[model._routes[DEFAULT_MODEL, resolution].base]
        steps = base.checkpoint.sampling.num_inference_steps
        timed = min(steps, self.arguments.steps)
        seconds: dict[str, float] = {}
        stage, since = Stage.ENCODING_PROMPT, time.perf_counter()

        def on_progress(now: Stage, _: float) -> None:
            nonlocal stage, since
            if now is not stage:
                self._wait()
                seconds[stage] = time.perf_counter() - since
                stage, since = now, time.perf_counter()

        job = JobInput(prompt=PROMPT, resolution=resolution, duration=duration, num_inference_steps=timed)
        for _ in model.render(job, seed=1, on_progress=on_progress, cancelled=Event()):
            pass
        seconds[stage] = time.perf_counter() - since
        seconds[Stage.DENOISING] *= steps / timed
        return {str(name): round(value, 3) for name, value in seconds.items()}, f"{timed} of {steps}"

    def _transformer(self, channels: int, *, meanflow: bool) -> Any:
        scale = self.scale
        return self._made(
            lambda: HunyuanVideo15Transformer3DModel(
                in_channels=channels,
                out_channels=scale.latent_channels,
                num_attention_heads=scale.heads,
                attention_head_dim=scale.head_dim,
                num_layers=scale.layers,
                text_embed_dim=scale.text_dim,
                text_embed_2_dim=scale.text_2_dim,
                rope_axes_dim=scale.rope,
                task_type="t2v",
                use_meanflow=meanflow,
            )
        )

    def _pipeline(self) -> HunyuanVideo15Pipeline:
        built = demo.build_pipeline()
        components: dict[str, Any] = {
            **built.components,
            "transformer": self._transformer(2 * self.scale.latent_channels + 1, meanflow=False),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "guider": ClassifierFreeGuidance(),
        }
        if self.scale is REAL:
            components |= {
                "vae": self._made(AutoencoderKLHunyuanVideo15),
                "text_encoder": self._made(self._qwen),
                "text_encoder_2": self._made(
                    lambda: T5EncoderModel(
                        T5Config(vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6)
                    )
                ),
                "tokenizer_2": ByT5Tokenizer(),
            }
        pipeline = HunyuanVideo15Pipeline(**components)
        for name in ("system_message", "prompt_template_encode_start_idx"):
            setattr(pipeline, name, getattr(built, name))
        return pipeline

    def _qwen(self) -> nn.Module:
        model: nn.Module = Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=152_064,
                hidden_size=3584,
                intermediate_size=18_944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            )
        )
        return model

    def _stage(self, checkpoint: Checkpoint) -> SuperResolution:
        channels = self.scale.latent_channels
        small: nn.Module = (
            SRTo720pUpsampler(channels, channels, global_residual=True)
            if checkpoint.name.startswith("720p")
            else SRTo1080pUpsampler(channels, channels, block_out_channels=(4 * channels, 2 * channels))
        )
        return SuperResolution(
            transformer=self._transformer(3 * channels + 2, meanflow=True),
            upsampler=small.eval().to(self.device),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=checkpoint.sampling.shift or 1.0),
            sampling=checkpoint.sampling,
        )

    def _made(self, build: Callable[[], Any]) -> Any:
        """A module with random weights in our dtype, in host memory, its numbers made on the GPU where there is one."""
        with torch.device("meta"):
            module = build()
        module = module.to(self.dtype).to_empty(device="cpu").eval()
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, device=self.device, dtype=self.dtype) * 0.02)
        for part in module.modules():
            if hasattr(part, "inv_freq"):  # a buffer that is computed, not learned
                part.inv_freq.copy_(torch.logspace(0, -6, part.inv_freq.numel()))
        return module

    def _matmul_peak(self) -> float:
        """TFLOP/s of a large matrix product: what this chip gives at most."""
        size = 8192 if self.device == "cuda" else 512
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self._timed(lambda: left @ right, repeat=10) / 1e12

    @torch.no_grad()
    def _timed(self, run: Callable[[], Any], repeat: int = 2) -> float:
        """Seconds of one run, after one that warms up."""
        run()
        self._wait()
        started = time.perf_counter()
        for _ in range(repeat):
            run()
        self._wait()
        return (time.perf_counter() - started) / repeat

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else 0.0


def _write(arguments: argparse.Namespace, bench: Bench, cells: Sequence[Cell]) -> None:
    name = torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or platform.machine()
    date = datetime.now(UTC).date().isoformat()
    limit = f"-{arguments.vram_limit:g}gb" if arguments.vram_limit else ""
    stem = f"{name.replace(' ', '-').lower()}{limit}{'-tiny' if arguments.tiny else ''}-{date}"
    facts = {"device": name, "date": date, "torch": torch.__version__, "matmul_tflops": bench.peak}
    arguments.output.mkdir(parents=True, exist_ok=True)
    body = json.dumps({**facts, "vram_limit": arguments.vram_limit, "cells": [asdict(c) for c in cells]}, indent=2)
    (arguments.output / f"{stem}.json").write_text(body)
    table = _table(facts, cells)
    (arguments.output / f"{stem}.md").write_text(table)
    print(table)


def _table(facts: dict[str, Any], cells: Sequence[Cell]) -> str:
    lines = [
        f"{facts['device']}, {facts['date']}, torch {facts['torch']}, "
        f"measured matmul peak {facts['matmul_tflops']:.1f} TFLOP/s",
        "",
        "| profile | video | pass (s, share of peak; stock) | whole job (s) | reference (s) | peak GB | |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        passes = "; ".join(
            f"{one.width}x{one.height} {one.seconds:.2f}, {one.share_of_peak:.0%}"
            + (f" ({one.stock_seconds:.2f})" if one.stock_seconds is not None else "")
            for one in cell.passes
        )
        note = cell.problem or f"{cell.steps_timed} base steps timed"
        lines.append(
            f"| {cell.profile} | {cell.resolution} {cell.duration} s | {passes} | {cell.total:.1f} | {cell.reference} "
            f"| {cell.peak_gb:.1f} | {note} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
