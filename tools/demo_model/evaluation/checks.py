"""Renders prompts and compares the renders: guidance, swapped prompts and seeds."""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event
from typing import Final

import numpy as np
import numpy.typing as npt

from contract.job import FPS, AspectRatio, JobInput, Resolution
from handler.video_model.base import VideoModel
from tools.demo_model.evaluation.prompts import Prompt
from tools.demo_model.evaluation.scores import judge, share_right
from tools.demo_model.evaluation.seen import look_at
from tools.demo_model.evaluation.sheet import Shown

#: Prompts that are rendered again for each check.
_WITHOUT_GUIDANCE: Final = 24
_SWAPPED: Final = 6
_OTHER_SEEDS: Final = 8
_SAME_SEED: Final = 2
#: Added to a prompt's seed for its other placement.
_OTHER_SEED: Final = 10_000
#: The share of pixels that another prompt must change by more than `_CHANGE` of 255.
_CHANGED: Final = 0.02
_CHANGE: Final = 40
#: How far the object stands from its place with another seed, in shares of the picture; the median over the prompts.
_MOVED: Final = 0.05


@dataclass(frozen=True)
class Clip(Shown):
    """A rendered prompt. `digest` is the sha256 of all its frames."""

    seed: int
    digest: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """A comparison of renders, in words, and whether it came out as it must."""

    name: str
    found: str
    passes: bool


@dataclass
class Renderer:
    """Renders prompts with one model and shows the progress on stderr."""

    model: VideoModel
    duration: int
    aspect_ratio: AspectRatio
    expected: int
    rendered: int = 0
    started: float = field(default_factory=time.monotonic)

    def clip(self, prompt: Prompt, seed: int, guidance_scale: float | None = None) -> Clip:
        """Renders the prompt and looks at it."""
        job_input = JobInput(
            prompt=prompt.text,
            duration=self.duration,
            resolution=Resolution.P720,
            aspect_ratio=self.aspect_ratio,
            guidance_scale=guidance_scale,
        )
        started = time.monotonic()
        chunks = self.model.render(job_input, seed=seed, on_progress=lambda *_: None, cancelled=Event())
        frames = np.concatenate(list(chunks))
        seconds = time.monotonic() - started
        seen = look_at(frames, FPS)
        self._progress()
        three = frames[[0, len(frames) // 2, -1]]
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        return Clip(prompt, three, seen, judge(prompt, seen), seed, digest, seconds)

    def _progress(self) -> None:
        self.rendered += 1
        left = (time.monotonic() - self.started) / self.rendered * (self.expected - self.rendered)
        end = "" if self.rendered < self.expected else "\n"
        print(f"\r{self.rendered} of {self.expected}, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


def without_guidance(renderer: Renderer, clips: Sequence[Clip]) -> Check:
    """Guidance 1, which is none, follows the prompts less."""
    some = clips[:_WITHOUT_GUIDANCE]
    default = share_right(clip.judged for clip in some)
    without = share_right(renderer.clip(clip.prompt, clip.seed, guidance_scale=1).judged for clip in some)
    found = f"{without:.1%} right, with the default {default:.1%}"
    return Check("guidance 1 is worse than the default", found, without < default)


def own_prompt(_: Renderer, clips: Sequence[Clip]) -> Check:
    """Each video shows what its own prompt asks for, and not what the next one does."""
    others = [*clips[1:], *clips[:1]]
    own = share_right(clip.judged for clip in clips)
    swapped = share_right(judge(other.prompt, clip.seen) for clip, other in zip(clips, others, strict=True))
    found = f"{own:.1%} right by its own prompt, {swapped:.1%} by the next one"
    return Check("a video shows its own prompt", found, swapped < own - 0.3)


def swapped_prompts(renderer: Renderer, clips: Sequence[Clip]) -> Check:
    """The next prompt with the same seed gives another picture."""
    changed = []
    for clip, other in pairwise(clips[: _SWAPPED + 1]):
        frames = renderer.clip(other.prompt, clip.seed).frames
        changed.append(_changed(clip.frames, frames))
    found = f"{min(changed, default=0):.1%} of the pixels or more change"
    return Check("another prompt changes the picture", found, min(changed, default=0) >= _CHANGED)


def _changed(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """The share of pixels that differ visibly."""
    return float((np.abs(one.astype(int) - other.astype(int)).max(axis=-1) > _CHANGE).mean())


def other_seeds(renderer: Renderer, clips: Sequence[Clip]) -> Check:
    """Another seed gives another placement."""
    single = [clip for clip in clips if len(clip.prompt.objects) == 1][:_OTHER_SEEDS]
    moved = []
    for clip in single:
        other = renderer.clip(clip.prompt, clip.seed + _OTHER_SEED).seen
        if clip.seen.objects and other.objects:
            (x, y), (other_x, other_y) = clip.seen.objects[0].place, other.objects[0].place
            moved.append(max(abs(x - other_x), abs(y - other_y)))
    median = float(np.median(moved)) if moved else 0.0
    return Check("another seed gives another placement", f"{median:.1%} of the picture away", median >= _MOVED)


def same_seed(renderer: Renderer, clips: Sequence[Clip]) -> Check:
    """The same seed gives the same frames."""
    some = clips[:_SAME_SEED]
    equal = sum(renderer.clip(clip.prompt, clip.seed).digest == clip.digest for clip in some)
    return Check("the same seed gives the same frames", f"{equal} of {len(some)} equal", equal == len(some))


CHECKS: Final[tuple[Callable[[Renderer, Sequence[Clip]], Check], ...]] = (
    without_guidance,
    own_prompt,
    swapped_prompts,
    other_seeds,
    same_seed,
)


def renders(prompts: Sequence[Prompt], *, checks: bool) -> int:
    """How many videos all of it renders."""
    if not checks:
        return len(prompts)
    single = sum(len(prompt.objects) == 1 for prompt in prompts)
    again = min(_WITHOUT_GUIDANCE, len(prompts)) + min(_SWAPPED, max(len(prompts) - 1, 0))
    return len(prompts) + again + min(_OTHER_SEEDS, single) + min(_SAME_SEED, len(prompts))
