"""The demo model's world, captions and training: what a caption says is what the picture shows."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

from tools.demo_model import components, drawing, point_decoder, train_decoder, train_transformer, wiring
from tools.demo_model.captions import caption, random_clip
from tools.demo_model.optimizer import Muon
from tools.demo_model.scenes import CELL, COLOURS, LANDSCAPES
from tools.demo_model.shapes import KINDS
from tools.demo_model.words import vocabulary
from tools.demo_model.world import FPS, LATENT_CHANNELS, MOTIONS, TEMPORAL, Batch, Clip, Thing

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


@pytest.mark.full
def test_the_drawing_levels_draw_from_their_features() -> None:
    """Before any training of the decoder as a whole, but for single pixels."""
    torch.manual_seed(0)
    decoder = components.vae().decoder
    drawing.start(decoder, steps=400)
    batch = Batch([Clip((MIDDLE,), ("white",))], 1, 5, 9)
    features, _ = drawing.features(batch, 0, 1)
    hidden = torch.nn.functional.pad(features, (0, 0) * 3 + (0, 32 - drawing.FEATURES))
    with torch.no_grad():
        for block in decoder.up_blocks[3:]:
            hidden = block(hidden)
        drawn = decoder.conv_out(torch.nn.functional.silu(decoder.norm_out(hidden)))
    assert drawn.shape[-2:] == (5 * CELL, 9 * CELL)
    assert (drawn - batch.frames()).square().mean() < 0.1, "half of what the scene without the square would have"


@pytest.mark.parametrize("training", [train_decoder, train_transformer])
def test_training_goes_on_from_its_checkpoint(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(train_transformer, "_TOKENS", 200)
    monkeypatch.setattr(train_decoder, "_COLLECTING", 0.0)
    steps = []
    for seconds in (1.0, 2.0):
        training.train(tmp_path, seconds)
        saved = torch.load(next(tmp_path.glob("*.pt")))
        steps.append(saved["state"]["step"])
        assert saved["state"]["elapsed"] == seconds
    assert 0 < steps[0] < steps[1]


def test_the_decoder_computes_what_its_network_of_points_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "STEPS", 2)
    torch.manual_seed(0)
    points, decoder = point_decoder.PointDecoder(), components.vae().decoder.eval()
    for parameter in points.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    point_decoder.put(points.state_dict(), decoder)
    latents = torch.randn(1, LATENT_CHANNELS, 4, 3, 4)
    seen = point_decoder.neighbourhoods(latents).permute(0, 4, 5, 6, 1, 2, 3)
    with torch.no_grad():
        hidden = decoder.mid_block(decoder.conv_in(latents) + latents)
        for block in decoder.up_blocks[:3]:
            hidden = block(hidden)
        for resnet in decoder.up_blocks[3].resnets:
            hidden = resnet(hidden)
        for latent, frame in [(0, None), *((3, frame) for frame in range(TEMPORAL))]:
            found = points(seen[:, latent].flatten(0, 2), frame).unflatten(0, seen.shape[:1] + seen.shape[2:4])
            picture = 0 if frame is None else 1 + 2 * TEMPORAL + frame
            assert torch.allclose(found, point_decoder.quarters(hidden[:, :, picture]), atol=1e-4), frame


@pytest.mark.parametrize("frame", [0, 3, 7])
def test_untrained_points_know_the_scene_and_where_the_thing_is(frame: int) -> None:
    """All that is linear is right before any training, textures and the places between two latents among it."""
    batch = Batch([Clip((Thing("house", "red", "medium", "bouncing", 0.3, 0.5),), (s,)) for s in LANDSCAPES], 4, 5, 9)
    picture = 2 * TEMPORAL + 1 + frame
    wanted, _ = drawing.features(batch, picture, picture + 1)
    seen = point_decoder.neighbourhoods(batch.latents(1))[..., -1, :, :].permute(0, 4, 5, 1, 2, 3).flatten(0, 2)
    with torch.no_grad():
        found = point_decoder.PointDecoder()(seen, frame)
    scene = slice(drawing.NAMES.index("scene red"), None)
    given = point_decoder.quarters(wanted[:, :, 0]).flatten(0, 2)
    assert torch.allclose(found[..., scene][..., : drawing.FEATURES - scene.start], given[..., scene], atol=1e-4)
    across = batch.placed(torch.tensor([picture / FPS]))[0][0, 0, 0] * 9 - (torch.arange(9 * 8) + 0.5) / 8
    u = point_decoder.quarters(across.expand(len(LANDSCAPES), 1, 5 * 8, -1)).flatten(0, 2)[..., 0]
    error = (found[..., wiring.LEVELS[3].index("u")] - u)[u.abs() < 2]
    assert error.abs().max() < 0.01, "of a cell"
