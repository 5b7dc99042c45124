"""Measures the model at its real dimensions on this GPU, with random weights. Downloads nothing.

    python -m benchmarks.gpu                      every profile, resolution and duration
    python -m benchmarks.gpu --vram-limit 12      the same in 12 GB
    python -m benchmarks.gpu --dry-run            computes nothing: counts bytes and operations on the meta device
    python -m benchmarks.gpu --tiny               small models, also on a CPU: shows that the benchmark works

For each kind of job: the seconds of one transformer pass at each of its sizes, its share of the matmul peak measured in
the same run (operations counted from shapes), the seconds of the whole job by stage, and peak memory. `--stock` also
times a pass of diffusers' own transformer with its dense mask. Long profiles run only `--steps` of their steps, and the
others are extrapolated; the result says so.
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

from benchmarks.counted import dry_run
from benchmarks.gpu_models import REAL, TINY, RandomModels, Scale
from contract.job import DEFAULT_MODEL, JobInput, Profile, Resolution, num_frames
from contract.result import Stage
from handler.settings import WorkerSettings
from handler.video_model.attention import choose_backend, is_eight_bit, use_mask_free_attention
from handler.video_model.catalog import Checkpoint, trained_size
from handler.video_model.compilation import compile_blocks, should_compile
from handler.video_model.cost import Speed, gpu_named
from handler.video_model.generate import PipelineModel
from handler.video_model.memory import Budget, peak
from handler.video_model.parts import Parts
from handler.video_model.placement import put_on_gpu
from handler.video_model.windows import SuperResolutionTiling, windows
from handler.video_model.workload import kind_of_job

RESULTS: Final = Path(__file__).parent / "results"
PROMPT: Final = "A paper boat drifts along a rainy street at night, neon signs mirrored in the puddles, cinematic"
#: Seconds that a job should take, from the API reference's table.
REFERENCE: Final = {("720p", 5): "20-30", ("720p", 10): "40-60", ("1080p", 5): "30-45", ("1080p", 10): "60-90"}


@dataclass(frozen=True)
class Pass:
    """One transformer pass, over the whole video or over a window of it."""

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
    planned_gb: float = 0.0
    calculated: float = 0.0
    problem: str = ""


def main(given: Sequence[str] | None = None) -> None:
    arguments = _arguments(given)
    if arguments.dry_run:
        print("\n".join(dry_run(_wanted(arguments))))
        return
    diffusers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("This machine has no GPU. Pass --tiny to run small models on the CPU.")
    bench = Bench(arguments, TINY if arguments.tiny else REAL, device)
    cells = [bench.cell(*cell) for cell in _wanted(arguments)]
    _write(arguments, bench, cells)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--profiles", nargs="+", type=Profile, default=list(Profile))
    parser.add_argument("--resolutions", nargs="+", type=Resolution, default=list(Resolution))
    parser.add_argument("--durations", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--steps", type=int, default=4, help="steps of a base model that are timed")
    parser.add_argument("--vram-limit", type=float, help="GPU memory in GB that may be used")
    parser.add_argument("--stock", action="store_true", help="also time a pass of diffusers' transformer")
    parser.add_argument("--no-compile", action="store_true", help="leave the blocks uncompiled")
    parser.add_argument("--dry-run", action="store_true", help="count on the meta device, compute nothing")
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(given)


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[Profile, Resolution, int]]:
    for profile in arguments.profiles:
        for resolution in arguments.resolutions:
            for duration in arguments.durations:
                yield profile, resolution, duration


class Bench:
    """Builds the models of one profile at a time and measures them."""

    def __init__(self, arguments: argparse.Namespace, scale: Scale, device: str) -> None:
        self.arguments = arguments
        self.scale = scale
        self.models = RandomModels(scale, device)
        self.device = device
        self.dtype = self.models.dtype
        self.peak = self._matmul_peak()
        self.compiled = False
        self.memory: Budget | None = None
        self._profile: Profile | None = None
        self._model: PipelineModel | None = None

    def cell(self, profile: Profile, resolution: Resolution, duration: int) -> Cell:
        """Measures one kind of job. `problem` says why if it does not fit."""
        reference = REFERENCE.get((resolution, duration), "")
        empty = Cell(profile, resolution, duration, False, [], {}, "", 0.0, reference, 0.0)
        try:
            model = self._loaded(profile)
            self._reset_peak()
            passes = [self._pass(*each, duration) for each in self._transformers(model.parts, resolution)]
            stages, timed = self._job(model, resolution, duration)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as exc:
            self._release()
            return replace(empty, problem=str(exc).partition("\n")[0])
        job_input = kind_of_job(resolution, duration)
        return replace(
            empty,
            planned_gb=self._planned_gb(model, job_input),
            calculated=model.expected_seconds(job_input) or 0.0,
            compiled=self.compiled,
            passes=passes,
            stages=stages,
            steps_timed=timed,
            total=sum(stages.values()),
            peak_gb=self._peak_gb(),
        )

    def _planned_gb(self, model: PipelineModel, job_input: JobInput) -> float:
        if self.memory is None:
            return 0.0
        return peak(self.memory.plan, self.memory.weights, model.workload(job_input)) / 1e9

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
        parts = self.models.parts(profile)
        # As the worker does: 8-bit attention in profile turbo alone, if it works here.
        backend = choose_backend(self.device, flash=True, sage=None if profile is Profile.TURBO else False)
        for transformer in parts.transformers:
            use_mask_free_attention(transformer, backend)
        settings = WorkerSettings(
            vram_limit=self.arguments.vram_limit, compile=False if self.arguments.no_compile else None
        )
        self.memory = put_on_gpu(parts, settings) if self.device == "cuda" else None
        compiles = should_compile(settings.compile, self.device, self.memory)
        self.compiled = compiles and compile_blocks(parts.transformers)
        gpu = gpu_named(torch.cuda.get_device_name()) if self.device == "cuda" else None
        speed = Speed.of(gpu, eight_bit=is_eight_bit(backend)) if gpu is not None else None
        return PipelineModel(parts, attention=backend, memory=self.memory, speed=speed)

    def _transformers(
        self, parts: Parts, resolution: Resolution
    ) -> Iterator[tuple[Any, Checkpoint, SuperResolutionTiling | None]]:
        route = parts.routes[DEFAULT_MODEL, resolution]
        base = parts.bases[route.base]
        yield base.pipeline.transformer, base.checkpoint, None
        for name in route.super_resolution:
            yield parts.upscalers[name].stage.transformer, parts.upscalers[name].checkpoint, route.tiling

    def _pass(
        self, transformer: Any, checkpoint: Checkpoint, tiling: SuperResolutionTiling | None, duration: int
    ) -> Pass:
        ratio = 8 if self.scale is TINY else 16
        width, height = trained_size(checkpoint.base_size, 16, 9, ratio)
        box = windows(tiling, (num_frames(duration) - 1) // 4 + 1, height // ratio, width // ratio)[0]
        named = self._inputs(transformer, len(box.frames), len(box.rows), len(box.columns))
        seconds = self._timed(lambda: transformer(**named))
        operations = self._operations(box.tokens, int(named["encoder_attention_mask"].sum()))
        stock = self._stock_pass(transformer, named) if self.arguments.stock else None
        tflops = operations / seconds / 1e12
        size = len(box.columns) * ratio, len(box.rows) * ratio
        return Pass(*size, box.tokens, seconds, tflops, tflops / self.peak, stock)

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
        """Operations of a pass: 24 D^2 a token for projections and feed-forward, 4 S^2 D for attention."""
        width, both = self.scale.width, tokens + text
        return self.scale.layers * (24.0 * both * width**2 + 4.0 * both**2 * width)

    def _stock_pass(self, transformer: Any, named: dict[str, Any]) -> float | None:
        """Seconds of the same pass with diffusers' processor and its dense mask; None if that does not fit."""
        stock = self.models.transformer(transformer.config.in_channels, meanflow=transformer.config.use_meanflow)
        try:
            stock.to(self.device)
            return self._timed(partial(stock, **named))
        except torch.OutOfMemoryError:
            return None

    def _job(self, model: PipelineModel, resolution: Resolution, duration: int) -> tuple[dict[str, float], str]:
        """Seconds of a whole job by stage. Runs at most `--steps` base steps and extrapolates the others."""
        base = model.parts.bases[model.parts.routes[DEFAULT_MODEL, resolution].base]
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

    def _matmul_peak(self) -> float:
        """TFLOP/s of a large matrix product: the most that this chip reaches."""
        size = 8192 if self.device == "cuda" else 512
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self._timed(lambda: left @ right, repeat=10) / 1e12

    @torch.no_grad()
    def _timed(self, run: Callable[[], Any], repeat: int = 2) -> float:
        """Seconds of one run, after a warm-up."""
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
        "| profile | video | pass (s, share of peak; stock) | whole job (s), calculated | reference (s) "
        "| peak GB, planned | |",
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
            f"| {cell.profile} | {cell.resolution} {cell.duration} s | {passes} "
            f"| {cell.total:.1f}, {cell.calculated:.1f} | {cell.reference} "
            f"| {cell.peak_gb:.1f}, {cell.planned_gb:.1f} | {note} |"
        )
    gpu = gpu_named(str(facts["device"]))
    shares = [each.tflops / gpu.tflops for cell in cells for each in cell.passes] if gpu is not None else []
    if shares:
        lines += ["", f"HUNYUAN_GPU_SHARE={sum(shares) / len(shares):.2f}: the mean share of the data sheet's peak"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
