"""What the demo model has learned of prompts: eight of them, judged by the pixels of their videos.

The model card says what it has not learned yet. `make eval-demo` judges 200 prompts. One test here shows that an MP4 is
judged as its frames are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from contract.job import FPS, JobInput, num_frames
from handler.encode import Target, encode
from handler.settings import WorkerSettings
from handler.video_model.base import Frames, VideoModel
from handler.video_model.loader import load_model
from tests.support.drawn_clips import FPS as DRAWN_FPS
from tests.support.drawn_clips import Drawn, clip
from tests.support.mp4 import decoded
from tools.demo_model.evaluation.prompts import AskedObject, Prompt
from tools.demo_model.evaluation.scores import judge, share_right
from tools.demo_model.evaluation.seen import Seen, look_at

pytestmark = pytest.mark.timeout(600)

SEED = 4
SECONDS = 5


def asked(text: str, objects: str, scene: str) -> Prompt:
    """`objects` is "red ball left", or two of these with a comma between them."""
    return Prompt(text, tuple(AskedObject(*each.split()) for each in objects.split(", ")), scene)


PROMPTS = (
    asked("A red ball moves to the left on a plain white background", "red ball left", "white"),
    asked("A yellow star rises slowly in the night sky", "yellow star up", "night"),
    asked("A white boat sails to the right over the sea", "white boat right", "sea"),
    asked("A purple heart sinks slowly over a green meadow", "purple heart down", "meadow"),
    asked("A black square moves to the right on a yellow background", "black square right", "yellow"),
    asked("A green tree stays perfectly still in a snowy landscape", "green tree still", "snow"),
    asked("Two red balls move upwards on a black background", "red ball up, red ball up", "black"),
    asked(
        "A blue triangle and a pink ring drift leftwards on a white background",
        "blue triangle left, pink ring left",
        "white",
    ),
)


@dataclass(frozen=True)
class Video:
    prompt: Prompt
    frames: Frames
    seen: Seen


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_model(WorkerSettings(model_path="demo"))


@pytest.fixture(scope="module")
def videos(model: VideoModel) -> list[Video]:
    return [watched(prompt, render(model, prompt, SEED + index)) for index, prompt in enumerate(PROMPTS)]


def render(model: VideoModel, prompt: Prompt, seed: int, guidance_scale: float | None = None) -> Frames:
    job = JobInput(prompt=prompt.text, duration=SECONDS, guidance_scale=guidance_scale)
    return np.concatenate(list(model.render(job, seed=seed, on_progress=lambda *_: None, cancelled=Event())))


def watched(prompt: Prompt, frames: Frames) -> Video:
    return Video(prompt, frames, look_at(frames, FPS))


def test_the_analysis_sees_through_the_encoder(tmp_path: Path) -> None:
    """A drawn clip that took the way of a render, scaled to 720p and encoded with H.264, is seen as it was drawn."""
    drawn = [Drawn("pink", "star", "left", 0.13, (0.3, 0.4)), Drawn("yellow", "fish", "left", 0.19, (0.75, 0.6))]
    frames = clip("sea", drawn).repeat(FPS // DRAWN_FPS, axis=0)[: num_frames(SECONDS)]
    target = Target(tmp_path / "drawn.mp4", Path("/dev/null"), Path("/dev/null"), 1280, 720, len(frames))
    encode([frames], target, lambda _: None)
    seen = look_at(decoded(target.video, 288, 162), FPS)
    assert sorted(map(str, seen.objects)) == ["pink star, left", "yellow fish, left"]
    assert "sea" in seen.background.names


def test_every_video_is_whole(videos: list[Video]) -> None:
    assert {len(video.frames) for video in videos} == {num_frames(SECONDS)}


LEARNED = ("object colour", "background", "number of objects")


@pytest.mark.parametrize("aspect", LEARNED)
def test_the_videos_show_what_the_prompts_ask_for(videos: list[Video], aspect: str) -> None:
    judged = {video.prompt.text: judge(video.prompt, video.seen) for video in videos}
    right = [each[aspect] for each in judged.values() if aspect in each]
    wrong = [
        f"{video.prompt.text}: {'; '.join(map(str, video.seen.objects)) or 'no object'}, {video.seen.background}"
        for video in videos
        if not judged[video.prompt.text].get(aspect, True)
    ]
    assert sum(right) >= 6 / 8 * len(right), wrong


def test_without_guidance_the_videos_follow_their_prompts_less(model: VideoModel, videos: list[Video]) -> None:
    some = videos[:4]
    free = [render(model, video.prompt, SEED + index, guidance_scale=1) for index, video in enumerate(some)]
    guided = share_right(judge(video.prompt, video.seen) for video in some)
    assert share_right(judge(video.prompt, look_at(of, FPS)) for video, of in zip(some, free, strict=True)) < guided


def test_another_prompt_changes_the_picture(videos: list[Video]) -> None:
    """A video is more like what its own prompt asks for than like what any other one does."""

    def likeness(prompt: Prompt, video: Video) -> int:
        judged = judge(prompt, video.seen)
        return sum(judged[aspect] for aspect in LEARNED)

    own = [
        likeness(video.prompt, video) > max(likeness(prompt, video) for prompt in PROMPTS if prompt != video.prompt)
        for video in videos
    ]
    assert sum(own) >= 6, own
