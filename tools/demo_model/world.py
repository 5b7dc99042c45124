"""The demo model's world: flat objects that move over simple scenes, described by numbers and drawn from them.

A `Clip` says what is to be seen. A `Batch` holds several clips as tensors, and computes from them both what the decoder
must draw (`frames`) and the latents that it draws from (`latents`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it

from tools.demo_model.scenes import CELL, COLOURS, GRAIN, LANDSCAPES, PATTERNS, Scene, patterns
from tools.demo_model.shapes import KINDS, NOT_TAUGHT, TABLE_REACH, TAUGHT, table

FPS: Final = 24
#: Frames of a latent.
TEMPORAL: Final = 8
#: Points on a side of a cell at which latents know the distance to an object.
_POINTS: Final = 4

MOTIONS: Final = (
    "left",
    "right",
    "up",
    "down",
    "circling",
    "bouncing",
    "growing",
    "shrinking",
    "spinning",
    "still",
)
#: Radius of an object in pixels, where the picture is 160 high.
SIZES: Final[dict[str, float]] = {"small": 21.0, "medium": 31.0, "large": 43.0}


@dataclass(frozen=True)
class Thing:
    """An object: where its centre starts, in parts of the picture's width and height, and how it moves."""

    kind: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    scale: float = 1.0  # of its size
    mirrored: bool = False


@dataclass(frozen=True)
class Clip:
    """One or two things in front of a scene. `scene` is its name: a landscape, a colour, or two colours."""

    things: tuple[Thing, ...]
    scene: tuple[str, ...]
    stars: int = 0  # the seed of the stars

    @property
    def look(self) -> Scene:
        """The colours and the texture of the scene."""
        if self.scene[0] in LANDSCAPES:
            return LANDSCAPES[self.scene[0]]
        first, last = COLOURS[self.scene[0]], COLOURS[self.scene[-1]]
        return Scene((first, last))


class Batch:
    """Clips of one length and size as tensors: B clips, N things of each (an absent one is far away)."""

    def __init__(self, clips: Sequence[Clip], latent_frames: int, rows: int, columns: int) -> None:
        self.latent_frames, self.rows, self.columns = latent_frames, rows, columns
        self._things = [clip.things for clip in clips]
        slots = max(map(len, self._things))
        self._looks = [clip.look for clip in clips]
        self._stars = [clip.stars for clip in clips]

        def column(read: Callable[[Thing], float], default: float = 0.0) -> torch.Tensor:
            return torch.tensor(
                [[read(of[i]) if i < len(of) else default for i in range(slots)] for of in self._things],
                dtype=torch.float32,
            )

        self._kind = column(lambda thing: KINDS.index(thing.kind)).long()
        self._radius = column(lambda thing: SIZES[thing.size] * thing.scale, 10.0)
        self._motion = column(lambda thing: MOTIONS.index(thing.motion)).long()
        self._x, self._y = column(lambda thing: thing.x, -9.0), column(lambda thing: thing.y, -9.0)
        self._mirror = column(lambda thing: -1.0 if thing.mirrored else 1.0, 1.0)
        self.colour = torch.tensor(
            [[COLOURS[of[i].colour] if i < len(of) else (0, 0, 0) for i in range(slots)] for of in self._things],
            dtype=torch.float32,
        )

    def latents(self, first: int = 0) -> torch.Tensor:
        """(B, LATENT_CHANNELS, T, h, w): what the decoder draws from. The `first` of the latent frames, and all after.

        They show the first frame, and then every eighth.
        """
        seconds = torch.arange(first, self.latent_frames) * (TEMPORAL / FPS)
        distances = self.distances(seconds, CELL // _POINTS)  # (B, N, T, 4h, 4w) in pixels
        # Each cell knows of the nearest thing alone: between two, a mean of their places would be a third one's.
        least = torch.unflatten(cells(distances.flatten(0, 1), _POINTS).amin(dim=1), 0, distances.shape[:2])
        nearest = F.one_hot(least.argmin(dim=1), least.shape[1]).movedim(-1, 1).float()  # (B, N, T, h, w)
        colour = torch.einsum("bnthw,bnc->bcthw", nearest, self.colour)
        described = torch.einsum("bnthw,bncthw->bcthw", nearest, self._descriptions(seconds))
        scene = self._scene_latents().unsqueeze(2).expand(-1, -1, len(seconds), -1, -1)
        cover = F.avg_pool2d((0.5 - distances.amin(dim=1) * _POINTS / CELL).clamp(0, 1), 2)
        extra = torch.zeros(len(colour), _EXTRA_CHANNELS, *colour.shape[2:])
        extra[:, FIRST_FRAME_CHANNEL, seconds == 0] = FIRST_FRAME_FLAG
        extra[:, 1] = (seconds / 5 - 1)[:, None, None]
        extra[:, COVER_CHANNELS] = 1.5 * cells(cover, 2)
        return torch.cat([extra, COLOUR_SCALE * (2 * colour - 1), scene, described], dim=1)

    def _descriptions(self, seconds: torch.Tensor) -> torch.Tensor:
        """(B, N, 32, T, h, w) of each thing: its kind 14, motion 10, start 2, mirror 1, size 1, turn 2, place 2.

        The kinds that are not taught leave two channels free, for the thing's way since the start. Its place is that of
        its centre as seen from each cell. It is the same in many cells, so a little noise hides it in none. The
        decoder draws from it.
        """
        x, y, scale, angle = self.placed(seconds)  # (B, N, T) each
        kind, motion = F.one_hot(self._kind, len(KINDS)), F.one_hot(self._motion, len(MOTIONS))
        start = torch.stack([self._x, self._y], dim=-1)
        same = torch.cat([1.6 * kind, 1.6 * motion, 3 * start - 1.5, self._mirror.unsqueeze(-1)], dim=-1)
        size = 2 * (self._radius.unsqueeze(2) * scale / SIZES["medium"] - 1)
        moment = torch.stack([size, torch.cos(angle), torch.sin(angle)], dim=2)
        steady = torch.cat([same.unsqueeze(3).expand(-1, -1, -1, len(seconds)), moment], dim=2)
        for free, at, start_at in zip(map(KINDS.index, NOT_TAUGHT), (x, y), (self._x, self._y), strict=True):
            steady[:, :, free] = 4 * (at - start_at.unsqueeze(2))
        across = x[..., None] * self.columns - (torch.arange(self.columns) + 0.5)  # in cells
        down = y[..., None] * self.rows - (torch.arange(self.rows) + 0.5)
        shape = (*x.shape, self.rows, self.columns)
        place = torch.stack([across.unsqueeze(3).expand(shape), down.unsqueeze(4).expand(shape)], dim=2)
        steady = steady[..., None, None].expand(-1, -1, -1, -1, self.rows, self.columns)
        return torch.cat([steady, place.clamp(-FARTHEST, FARTHEST)], dim=2)

    def frames(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """(B, 3, n, H, W) from -1 to 1: the frames from `first` to before `last`, by default all."""
        count = TEMPORAL * (self.latent_frames - 1) + 1
        seconds = torch.arange(first, count if last is None else last) / FPS
        distances = self.distances(seconds, 1)  # (B, N, n, H, W)
        picture = self.scene().unsqueeze(2).expand(-1, -1, len(seconds), -1, -1)
        for i in range(distances.shape[1]):
            cover = (0.5 - distances[:, i]).clamp(0, 1).unsqueeze(1)
            colour = self.colour[:, i, :, None, None, None]
            picture = picture + cover * (colour - picture)
        return 2 * picture - 1

    def distances(self, seconds: torch.Tensor, spacing: int) -> torch.Tensor:
        """(B, N, T, H / spacing, W / spacing): pixels from each point to each thing's outline, negative inside."""
        height, width = self.rows * CELL, self.columns * CELL
        x, y, scale, angle = self.placed(seconds)  # (B, N, T) each
        centre = spacing / 2
        down = torch.arange(height // spacing) * spacing + centre
        across = torch.arange(width // spacing) * spacing + centre
        radius = (self._radius.unsqueeze(2) * scale)[..., None, None]
        dx = (across[None, :] - (x * width)[..., None, None]) / radius
        dy = (down[:, None] - (y * height)[..., None, None]) / radius
        cos, sin = torch.cos(angle)[..., None, None], torch.sin(angle)[..., None, None]
        u = (cos * dx + sin * dy) * self._mirror[..., None, None, None]
        v = cos * dy - sin * dx
        return outline(self._kind[..., None, None, None], u, v) * radius

    def placed(self, seconds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, y, scale and angle of each thing at each time, (B, N, T) each.

        Between two latents, the things are on the parabolas through the places of these and of the one before, because
        that is what the decoder can see. Before the first one, they stand still.
        """
        last = (seconds * (FPS / TEMPORAL) - 1e-4).ceil()
        at = [self._moved((last - back).clamp_min(0) * (TEMPORAL / FPS)) for back in (2, 1, 0)]
        part = seconds * (FPS / TEMPORAL) - last + 1
        shares = [part * (part - 1) / 2, 1 - part.square(), part * (part + 1) / 2]
        return tuple(
            sum(share * of for share, of in zip(shares, values, strict=True)) for values in zip(*at, strict=True)
        )

    def _moved(self, seconds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same where latents are."""
        t = seconds.expand(*self._x.shape, -1)
        is_ = {name: (self._motion == index).unsqueeze(2) for index, name in enumerate(MOTIONS)}
        turn = 2 * math.pi * t / 5
        zero = torch.zeros_like(t)
        # Fast at first and then slower: clear in a second, and still in the picture after ten.
        way = 0.66 * (1 - torch.exp(-t / 4.5))
        x = self._x.unsqueeze(2) + torch.where(is_["right"], way, zero) - torch.where(is_["left"], way, zero)
        y = self._y.unsqueeze(2) + torch.where(is_["down"], way, zero) - torch.where(is_["up"], way, zero)
        ratio = self.rows / self.columns
        x = x + torch.where(is_["circling"], 0.27 * min(ratio, 1.0) * torch.sin(turn), zero)
        y = y - torch.where(is_["circling"], 0.27 * min(1 / ratio, 1.0) * torch.cos(turn), zero)
        hop = torch.sin(math.pi * t / 1.6).abs()
        y = y - torch.where(is_["bouncing"], 0.42 * hop, zero)
        grown = 0.12 * t - 0.35
        scale = 1 + torch.where(is_["growing"], grown, zero) - torch.where(is_["shrinking"], 0.08 * t - 0.3, zero)
        angle = torch.where(is_["spinning"], 2 * math.pi * t / 4.5, zero)
        return x, y, scale, angle

    def _horizon(self) -> int:
        """Rows of cells above the ground."""
        return round(0.6 * self.rows)

    def _shades(self, look: Scene) -> torch.Tensor:
        """The scene's colours at the edges of its rows, (rows, 2, 3): top and bottom of each."""
        horizon = self._horizon() if look.ground is not None else self.rows
        bands = [(look.sky, horizon)] + ([(look.ground, self.rows - horizon)] if look.ground is not None else [])
        shades = []
        for (top, bottom), rows in bands:
            mix = torch.stack([torch.arange(rows), torch.arange(1, rows + 1)], dim=1).unsqueeze(2) / rows
            shades.append(torch.tensor(top) * (1 - mix) + torch.tensor(bottom) * mix)
        return torch.cat(shades)

    def _stars_of(self, seed: int) -> torch.Tensor:
        """(3, rows, columns) from 0 to 1: how bright each star of each cell is. Half of them do not shine."""
        drawn = torch.rand(3, self.rows, self.columns, generator=torch.Generator().manual_seed(seed))
        return (2 * drawn - 1).clamp_min(0)

    def _scene_latents(self) -> torch.Tensor:
        """(B, 13, h, w): colour 3, its change downwards 3, textures 3, edge of the ground 1, stars 3."""
        scenes = []
        for look, seed in zip(self._looks, self._stars, strict=True):
            shades = self._shades(look)
            colour, change = 2 * shades.mean(dim=1) - 1, 2 * (shades[:, 1] - shades[:, 0])
            texture = torch.zeros(self.rows, 4)
            if look.texture:
                texture[self._horizon() :, look.texture - 1] = PATTERN_SCALE
                texture[self._horizon(), 3] = PATTERN_SCALE
            rows = torch.cat([COLOUR_SCALE * colour, CHANGE_SCALE * change, texture], dim=1)  # (rows, 10)
            stars = self._stars_of(seed) if look.stars else torch.zeros(3, self.rows, self.columns)
            scenes.append(torch.cat([rows.T.unsqueeze(2).expand(-1, -1, self.columns), PATTERN_SCALE * stars]))
        return torch.stack(scenes)

    def scene(self) -> torch.Tensor:
        """(B, 3, H, W) from 0 to 1."""
        plain = self.plain()
        return plain + F.interpolate(self.light(), scale_factor=GRAIN, mode="bilinear").expand_as(plain)

    def plain(self) -> torch.Tensor:
        """The scene without textures and stars, alike."""
        return torch.stack([self._plain(look) for look in self._looks])

    def _plain(self, look: Scene) -> torch.Tensor:
        mix = ((torch.arange(CELL) + 0.5) / CELL)[None, :, None]
        shades = self._shades(look)
        column = (shades[:, :1] * (1 - mix) + shades[:, 1:] * mix).flatten(0, 1)  # (H, 3)
        return column.T.unsqueeze(2).expand(-1, -1, self.columns * CELL)

    def light(self) -> torch.Tensor:
        """(B, 1, H / 2, W / 2): by how much textures and stars make the scene brighter, in squares of 2 x 2 pixels."""
        lights = []
        for look, seed in zip(self._looks, self._stars, strict=True):
            shining = torch.zeros(len(PATTERNS), self.rows, self.columns)
            if look.texture:
                shining[look.texture - 1, self._horizon() :] = 1
            if look.stars:
                shining[3:] = self._stars_of(seed)
            spread = torch.einsum("lhw,lyx->hywx", shining, patterns())
            lights.append(spread.flatten(0, 1).flatten(1, 2))
        return torch.stack(lights).unsqueeze(1)


#: Channels of the latents: 16 extra ones, 3 of the nearest thing's colour, 13 of the scene, 32 that describe the thing.
LATENT_CHANNELS: Final = 64
#: Whether it is the first frame, which the decoder's upsampling treats in a way of its own, the time, and how much of
#: each quarter of the cell things cover. The other ten are zero: the decoder's first shortcut takes 64 channels.
_EXTRA_CHANNELS: Final = 16
FIRST_FRAME_CHANNEL: Final = 0
FIRST_FRAME_FLAG: Final = 2.0
#: Previews need them. The decoder does not read them, because the description says the same more exactly.
COVER_CHANNELS: Final = [2, 3, 4, 5]
COLOUR_CHANNELS: Final = [16, 17, 18]
SCENE_COLOUR_CHANNELS: Final = [19, 20, 21]
#: Of the colour from a cell's top to its bottom.
SCENE_CHANGE_CHANNELS: Final = [22, 23, 24]
#: Of textures and of stars. Between them is the edge of the ground.
PATTERN_CHANNELS: Final = [25, 26, 27, 29, 30, 31]
#: Between the kinds' channels are those of the way.
KIND_CHANNELS: Final = [32 + KINDS.index(kind) for kind in TAUGHT]
MIRROR_CHANNEL: Final = 58
SIZE_CHANNEL: Final = 59
TURN_CHANNELS: Final = [60, 61]
PLACE_CHANNELS: Final = [62, 63]
#: What colours from -1 to 1 and their change are multiplied by, and how bright patterns are.
COLOUR_SCALE: Final = 1.6
CHANGE_SCALE: Final = 2.0
PATTERN_SCALE: Final = 1.5
#: The farthest centre that a cell tells the place of, in cells.
FARTHEST: Final = 3.0


def cells(points: torch.Tensor, side: int) -> torch.Tensor:
    """(B, T, side h, side w) to (B, side^2, T, h, w)."""
    batch, frames, height, width = points.shape
    split = points.view(batch, frames, height // side, side, width // side, side)
    return split.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)


_TABLES: list[torch.Tensor] = []


def outline(kind: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """How far the outlines of things of the radius one are from points (u, v), negative inside."""
    if not _TABLES:
        _TABLES.append(torch.stack([torch.from_numpy(table(kind)) for kind in KINDS]))
    tables = _TABLES[0]
    last = tables.shape[-1] - 1
    beyond = torch.hypot((u.abs() - TABLE_REACH).clamp_min(0), (v.abs() - TABLE_REACH).clamp_min(0))
    column, row = (((of / TABLE_REACH + 1) * last / 2).clamp(0, last - 1e-3) for of in (u, v))
    x, y = column.long(), row.long()
    right, below = column - x, row - y
    corner = (kind * (last + 1) + y) * (last + 1) + x
    upper, lower = (
        torch.lerp(tables.take(corner + down), tables.take(corner + down + 1), right) for down in (0, last + 1)
    )
    return torch.lerp(upper, lower, below) + beyond
