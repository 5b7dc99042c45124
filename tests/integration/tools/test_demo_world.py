"""The demo model's world, captions and training: what a caption says is what the picture shows."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from tools.demo_model import components, drawing, first_frame, point_decoder, train_decoder, train_transformer, wiring
from tools.demo_model.captions import caption, random_clip
from tools.demo_model.optimizer import Muon
from tools.demo_model.scenes import CELL, COLOURS, LANDSCAPES
from tools.demo_model.shapes import KINDS
from tools.demo_model.words import vocabulary
from tools.demo_model.world import COVER_CHANNELS, FPS, LATENT_CHANNELS, MOTIONS, TEMPORAL, Batch, Clip, Thing, cells

MIDDLE = Thing("square", "red", "medium", "still", 0.5, 0.5)


def centre(clip: Clip, frame: int, colour: str = "red") -> tuple[float, float]:
    """Of the pixels of this colour, as (x, y) in parts of the picture."""
    picture = Batch([clip], frame // TEMPORAL + 2, 5, 9).frames(frame, frame + 1)[0, :, 0]
    wanted = 2 * torch.tensor(COLOURS[colour]) - 1
    rows, columns = ((picture - wanted[:, None, None]).abs().amax(dim=0) < 0.1).nonzero(as_tuple=True)
    return float(columns.float().mean()) / picture.shape[2], float(rows.float().mean()) / picture.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_has_its_colour_and_its_size_in_front_of_the_scene(kind: str) -> None:
    clip = Clip((Thing(kind, "red", "large", "still", 0.5, 0.5),), ("blue",))
    picture = Batch([clip], 1, 5, 9).frames()[0, :, 0]
    red = (picture - (2 * torch.tensor(COLOURS["red"]) - 1)[:, None, None]).abs().amax(dim=0) < 0.02
    blue = (picture - (2 * torch.tensor(COLOURS["blue"]) - 1)[:, None, None]).abs().amax(dim=0) < 0.02
    assert 0.02 < red.float().mean() < 0.2
    assert (red | blue).float().mean() > 0.97, "all but the edges"


@pytest.mark.parametrize(("motion", "dx", "dy"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_a_motion_goes_where_it_says(motion: str, dx: int, dy: int) -> None:
    clip = Clip((Thing("ball", "red", "small", motion, 0.5, 0.5),), ("white",))
    (x1, y1), (x2, y2) = centre(clip, 0), centre(clip, 48)
    assert (x2 - x1, y2 - y1) == pytest.approx((0.24 * dx, 0.24 * dy), abs=0.02)


def test_a_circle_starts_at_its_top_and_takes_five_seconds() -> None:
    clip = Clip((Thing("ball", "red", "small", "circling", 0.5, 0.5),), ("white",))
    x, y = zip(*(centre(clip, frame) for frame in (0, 32, 60, 88, 120)), strict=True)
    assert y == pytest.approx((0.23, 0.5, 0.77, 0.5, 0.23), abs=0.06)
    assert x == pytest.approx((0.5, 0.65, 0.5, 0.35, 0.5), abs=0.04)


def test_two_things_do_not_meet() -> None:
    random, seconds = Random(2), torch.arange(16) * (TEMPORAL / FPS)
    clips = [clip for clip in (random_clip(random) for _ in range(250)) if len(clip.things) == 2]
    assert len({tuple(thing.motion for thing in clip.things) for clip in clips}) > 40, "motions of many pairs"
    first, second = (Batch(clips, 16, 5, 9).distances(seconds, CELL // 4) < 0).unbind(dim=1)
    assert (first & second).flatten(2).sum(dim=2).max() < 2, "of places on a grid of 8 pixels"


def test_a_second_sentence_tells_each_motion_of_two_things() -> None:
    things = (Thing("ball", "red", "medium", "left", 0.5, 0.3), Thing("boat", "green", "medium", "bouncing", 0.8, 0.7))
    told = [caption(Random(seed), Clip(things, ("white",))) for seed in range(200)]
    assert any(re.search(r"\. .*the .*ball .*left.* the .*boat .*bounc", each) for each in told)


def test_half_of_the_captions_belong_to_other_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    named: set[Clip] = set()
    shown: list[Clip] = []

    def caption_of(_: Random, clip: Clip) -> str:
        named.add(clip)
        return "a ball"

    def batch_of(clips: list[Clip], *_: int) -> Batch:
        shown.extend(clips)
        return Batch(clips[:1], 1, 3, 4)

    monkeypatch.setattr(train_transformer, "caption", caption_of)
    monkeypatch.setattr(train_transformer, "Batch", batch_of)
    examples = train_transformer.Examples(train_transformer.Trainee(), seed=1)
    while len(shown) < 1000:
        examples.batch(frames=6)
    own = sum(clip in named for clip in shown)
    assert own / len(shown) == pytest.approx(0.9 * 0.5, abs=0.05), "one in ten has none"


def test_latents_of_a_moment_depend_on_that_moment_alone() -> None:
    """So images and clips have latents of one kind, and the decoder finds the frames between two of them."""
    clip = Clip((Thing("star", "green", "medium", "right", 0.2, 0.5),), ("night",), stars=7)
    long = Batch([clip], 5, 5, 9).latents()
    assert long.shape == (1, LATENT_CHANNELS, 5, 5, 9)
    assert torch.allclose(long[:, :, :2], Batch([clip], 2, 5, 9).latents(), atol=1e-5)
    assert torch.allclose(long[:, :, 3:], Batch([clip], 5, 5, 9).latents(3), atol=1e-5)
    assert not torch.allclose(long[:, :, 0], long[:, :, 4], atol=0.1)


def test_captions_name_what_is_seen_and_the_tokenizer_knows_their_words() -> None:
    random, words, made_up = Random(3), set(vocabulary()), 0
    for _ in range(300):
        clip = random_clip(random)
        assert all(thing.kind in KINDS and thing.motion in MOTIONS for thing in clip.things)
        spoken = re.findall(r"\w+", caption(random, clip))
        made_up += len(set(spoken) - words)
    assert made_up < 100, "letters at random, and nothing else"
    tokenizer = components.tokenizer()
    for word in filter(str.isalpha, words):
        assert tokenizer.tokenize(f"A {word.upper()}.")[1] == f"Ġ{word}"


def test_muon_steps_along_an_orthogonal_matrix() -> None:
    matrix = torch.nn.Parameter(torch.zeros(8, 12))
    matrix.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    Muon([matrix], lr=1.0).step()
    singular = torch.linalg.svdvals(matrix.detach())
    assert 0.6 < singular.min() <= singular.max() < 1.3


def features(batch: Batch, picture: int) -> torch.Tensor:
    """What the drawing levels expect for this frame, (B, FEATURES, H / 4, W / 4)."""
    seconds = torch.tensor([picture / FPS])
    distance = cells(batch.distances(seconds, 2).amin(dim=1).clamp(-drawing.REACH, drawing.REACH) / drawing.REACH, 2)
    nearness = torch.softmax(-batch.distances(seconds, 4) / 2, dim=1)
    colour = 2 * torch.einsum("bnthw,bnc->bcthw", nearness, batch.colour) - 1
    scene = 2 * torch.nn.functional.avg_pool2d(batch.plain(), 4) - 1
    light = 2 * cells(batch.light(), 2)
    constant = torch.full_like(scene[:, :1], drawing.CONSTANT)
    return torch.cat([distance[:, :, 0], colour[:, :, 0], scene, light[:, :, 0], constant], dim=1)


@pytest.mark.parametrize("scene", ["white", "black", "night"])
def test_the_drawing_levels_draw_from_their_features(scene: str) -> None:
    decoder = components.vae().decoder
    drawing.start(decoder)
    batch = Batch([Clip((MIDDLE,), (scene,))], 1, 5, 9)
    hidden = torch.nn.functional.pad(features(batch, 0).unsqueeze(2), (0, 0) * 3 + (0, 32 - drawing.FEATURES))
    with torch.no_grad():
        for block in decoder.up_blocks[3:]:
            hidden = block(hidden)
        drawn = decoder.conv_out(torch.nn.functional.silu(decoder.norm_out(hidden)))[:, :, 0]
    wanted = batch.frames()[:, :, 0]
    assert drawn.shape == wanted.shape == (1, 3, 5 * CELL, 9 * CELL)
    outline = batch.distances(torch.zeros(1), 1)[0, 0, 0].abs() < 3
    errors = (drawn - wanted).abs()[0]
    assert errors[:, ~outline].max() < 0.04
    assert errors[:, outline].mean() < 0.1


@pytest.mark.parametrize("training", [train_decoder, train_transformer])
def test_training_goes_on_from_its_checkpoint(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(train_transformer, "_TOKENS", 200)
    steps = []
    for seconds in (1.0, 2.0):
        training.train(tmp_path, seconds)
        saved = torch.load(next(tmp_path.glob("*.pt")))
        steps.append(saved["state"]["step"])
        assert saved["state"]["elapsed"] == seconds
    assert 0 < steps[0] < steps[1]


def decoder_of(points: point_decoder.PointDecoder) -> Any:
    decoder = components.vae().decoder.eval()
    point_decoder.put(points.state_dict(), decoder)
    return decoder


@torch.no_grad()
def levels(decoder: Any, latents: torch.Tensor) -> list[torch.Tensor]:
    """What the decoder has at cells and at squares of 8 x 8 pixels and of 4 x 4, as large as the points have it."""
    cells = hidden = decoder.mid_block(decoder.conv_in(latents) + latents)
    for block in decoder.up_blocks[:2]:
        hidden = block(hidden)
    found = [cells, hidden / first_frame.SCALES[2]]
    hidden = decoder.up_blocks[2](hidden)
    for resnet in decoder.up_blocks[3].resnets:
        hidden = resnet(hidden)
    return [*found, hidden / first_frame.SCALES[3]]


def test_the_decoder_computes_what_its_network_of_points_computes() -> None:
    torch.manual_seed(0)
    points = point_decoder.PointDecoder()
    for module in (points.mix, points.near, points.first_near, points.levels):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    latents = Batch([random_clip(Random(5))], 3, 3, 4).latents()
    cells, squares, halved = levels(decoder_of(points), latents)
    read = latents.clone()
    read[:, COVER_CHANNELS] = 0
    sides = torch.cat([read[..., :1], read, read[..., -1:]], dim=-1).unfold(-1, point_decoder.TAPS, 1)  # B C T h w taps
    with torch.no_grad():
        found = points.levels["0"](points.first(sides.permute(0, 2, 3, 4, 5, 1).flatten(4)))
    assert torch.allclose(found, cells.permute(0, 2, 3, 4, 1), atol=1e-4)
    for frame in range(squares.shape[2]):
        given = squares[0, :, frame].permute(1, 2, 0)
        with torch.no_grad():
            found = points.squares(given.flatten(0, 1), is_first=frame == 0).view(*given.shape[:2], 4, -1)
        rows, columns = given.shape[:2]
        expected = halved[0, :, max(2 * frame - 1, 0)].reshape(-1, rows, 2, columns, 2).permute(1, 3, 2, 4, 0)
        assert torch.allclose(found, expected.flatten(2, 3), atol=1e-4), frame
        if frame:
            assert torch.allclose(points.mixed_into(given.flatten(0, 1)), given.flatten(0, 1), atol=1e-3)


@pytest.mark.parametrize("scene", LANDSCAPES)
def test_an_untrained_decoder_knows_the_scene_and_where_the_thing_is(scene: str) -> None:
    """All that is linear is right before any training, textures and the places between two latents among it.

    In the first frame, textures are mixed up within squares of 8 x 8 pixels.
    """
    batch = Batch([Clip((Thing("house", "red", "medium", "bouncing", 0.3, 0.5),), (scene,))], 4, 5, 9)
    *_, found = levels(decoder_of(point_decoder.PointDecoder()), batch.latents())
    for picture in (0, *(2 * TEMPORAL + 1 + frame for frame in (0, 3, 7))):
        given = features(batch, picture)
        for channel in range(drawing.NAMES.index("scene red"), drawing.FEATURES):
            name = drawing.NAMES[channel]
            if picture == 0 and name.startswith("light"):
                continue
            error = (found[:, channel, picture] - given[:, channel]).abs().max()
            largest = drawing.CONSTANT if name == "constant" else 1.0
            assert error < (0.07 * largest if picture == 0 else 3e-4), (name, picture)
        u = batch.placed(torch.tensor([picture / FPS]))[0][0, 0, 0] * 9 - (torch.arange(9 * 8) + 0.5) / 8
        errors = (found[0, wiring.LEVELS[3].index("u"), picture] - u)[:, u.abs() < 2]
        assert errors.abs().max() < (0.01 if picture else 0.1), "of a cell"
