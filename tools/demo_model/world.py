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

from tools.demo_model.shapes import KINDS, NOT_TAUGHT, TABLE_REACH, table

FPS: Final = 24
#: Frames and pixels (on a side) of a latent.
TEMPORAL: Final = 8
CELL: Final = 32
#: Points on a side of a cell at which latents know the distance to an object.
_POINTS: Final = 4

RGB = tuple[float, float, float]

COLOURS: Final[dict[str, RGB]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (1.00, 0.87, 0.10),
    "green": (0.13, 0.65, 0.22),
    "turquoise": (0.10, 0.78, 0.78),
    "blue": (0.12, 0.32, 0.90),
    "purple": (0.52, 0.18, 0.72),
    "pink": (1.00, 0.50, 0.72),
    "brown": (0.48, 0.28, 0.12),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.55, 0.55, 0.57),
    "black": (0.06, 0.06, 0.07),
}
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
class Scene:
    """What is behind the objects: colours from top to bottom above and below the horizon, and a texture of the ground.

    A scene without a ground has a sky alone.
    """

    sky: tuple[RGB, RGB]
    ground: tuple[RGB, RGB] | None = None
    texture: int = 0
    stars: bool = False


_WAVES, _BLADES, _DUNES = 1, 2, 3
LANDSCAPES: Final[dict[str, Scene]] = {
    "sea": Scene(((0.55, 0.80, 0.98), (0.80, 0.92, 1.00)), ((0.10, 0.45, 0.75), (0.03, 0.25, 0.55)), _WAVES),
    "meadow": Scene(((0.50, 0.78, 1.00), (0.78, 0.91, 1.00)), ((0.42, 0.74, 0.28), (0.25, 0.55, 0.15)), _BLADES),
    "snow": Scene(((0.42, 0.58, 0.80), (0.70, 0.82, 0.94)), ((0.98, 0.99, 1.00), (0.84, 0.91, 0.98)), _DUNES),
    "desert": Scene(((0.45, 0.72, 0.95), (0.95, 0.88, 0.75)), ((0.93, 0.78, 0.48), (0.80, 0.60, 0.32)), _DUNES),
    "night": Scene(((0.02, 0.02, 0.12), (0.10, 0.10, 0.30)), stars=True),
    "sky": Scene(((0.35, 0.65, 0.98), (0.82, 0.93, 1.00))),
    "sunset": Scene(((0.35, 0.15, 0.45), (1.00, 0.60, 0.25))),
}


@dataclass(frozen=True)
class Thing:
    """An object: where its centre starts, in parts of the picture's width and height, and how it moves."""

    kind: str
    colour: str
    size: str
    motion: str
    x: float
    y: float
    phase: float = 0.0
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
        self._phase = column(lambda thing: thing.phase)
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
        # Colours and descriptions reach beyond the outlines, each up to the other thing.
        nearness = cells(torch.softmax(-distances / 6.0, dim=1).flatten(0, 1), _POINTS).mean(dim=1)
        nearness = torch.unflatten(nearness, 0, distances.shape[:2])  # (B, N, T, h, w)
        colour = torch.einsum("bnthw,bnc->bcthw", nearness, self.colour)
        described = torch.einsum("bnthw,bncthw->bcthw", nearness, self._descriptions(seconds))
        scene = self._scene_latents().unsqueeze(2).expand(-1, -1, len(seconds), -1, -1)
        cover = F.avg_pool2d((0.5 - distances.amin(dim=1) * _POINTS / CELL).clamp(0, 1), 2)
        extra = torch.zeros(len(colour), _EXTRA_CHANNELS, *colour.shape[2:])
        extra[:, 0, seconds == 0] = 2.0
        extra[:, 1] = (seconds / 5 - 1)[:, None, None]
        extra[:, COVER_CHANNELS] = 1.5 * cells(cover, 2)
        return torch.cat([extra, _COLOUR_SCALE * (2 * colour - 1), scene, described], dim=1)

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
        size = 2 * torch.log(self._radius.unsqueeze(2) * scale / SIZES["medium"])
        moment = torch.stack([size, torch.cos(angle), torch.sin(angle)], dim=2)
        steady = torch.cat([same.unsqueeze(3).expand(-1, -1, -1, len(seconds)), moment], dim=2)
        for free, at, start_at in zip(map(KINDS.index, NOT_TAUGHT), (x, y), (self._x, self._y), strict=True):
            steady[:, :, free] = 4 * (at - start_at.unsqueeze(2))
        across = x[..., None] * self.columns - (torch.arange(self.columns) + 0.5)  # in cells
        down = y[..., None] * self.rows - (torch.arange(self.rows) + 0.5)
        shape = (*x.shape, self.rows, self.columns)
        place = torch.stack([across.unsqueeze(3).expand(shape), down.unsqueeze(4).expand(shape)], dim=2)
        steady = steady[..., None, None].expand(-1, -1, -1, -1, self.rows, self.columns)
        return torch.cat([steady, 3 * torch.tanh(place / 3)], dim=2)

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
        beyond = torch.hypot((u.abs() - TABLE_REACH).clamp_min(0), (v.abs() - TABLE_REACH).clamp_min(0))
        batch, things, frames = x.shape
        grid = torch.stack([u, v], dim=-1).div(TABLE_REACH).flatten(0, 1).flatten(1, 2)
        found = F.grid_sample(
            _tables()[self._kind.flatten()].unsqueeze(1), grid, padding_mode="border", align_corners=True
        )
        return (found.squeeze(1).view(batch, things, frames, len(down), len(across)) + beyond) * radius

    def placed(self, seconds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, y, scale and angle of each thing at each time, (B, N, T) each."""
        t = seconds.expand(*self._x.shape, -1)
        is_ = {name: (self._motion == index).unsqueeze(2) for index, name in enumerate(MOTIONS)}
        phase = self._phase.unsqueeze(2)
        turn = 2 * math.pi * (t / 5 + phase)
        zero = torch.zeros_like(t)
        # Fast at first and then slower: clear in a second, and still in the picture after ten.
        way = 0.66 * (1 - torch.exp(-t / 4.5))
        x = self._x.unsqueeze(2) + torch.where(is_["right"], way, zero) - torch.where(is_["left"], way, zero)
        y = self._y.unsqueeze(2) + torch.where(is_["down"], way, zero) - torch.where(is_["up"], way, zero)
        ratio = self.rows / self.columns
        x = x + torch.where(is_["circling"], 0.24 * min(ratio, 1.0) * torch.cos(turn), zero)
        y = y + torch.where(is_["circling"], 0.24 * min(1 / ratio, 1.0) * torch.sin(turn), zero)
        hop = torch.sin(math.pi * (t / 1.6 + phase)).abs()
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
        """(3, rows, columns) from -1 to 1: how bright each star of each cell is. Half of them do not shine."""
        return 2 * torch.rand(3, self.rows, self.columns, generator=torch.Generator().manual_seed(seed)) - 1

    def _scene_latents(self) -> torch.Tensor:
        """(B, 13, h, w): colour 3, its change downwards 3, textures 3, edge of the ground 1, stars 3."""
        scenes = []
        for look, seed in zip(self._looks, self._stars, strict=True):
            shades = self._shades(look)
            colour, change = 2 * shades.mean(dim=1) - 1, 4 * (shades[:, 1] - shades[:, 0])
            texture = torch.zeros(self.rows, 4)
            if look.texture:
                texture[self._horizon() :, look.texture - 1] = 1.5
                texture[self._horizon(), 3] = 1.5
            rows = torch.cat([_COLOUR_SCALE * colour, change, texture], dim=1)  # (rows, 10)
            stars = self._stars_of(seed) if look.stars else torch.zeros(3, self.rows, self.columns)
            scenes.append(torch.cat([rows.T.unsqueeze(2).expand(-1, -1, self.columns), 1.5 * stars]))
        return torch.stack(scenes)

    def scene(self) -> torch.Tensor:
        """(B, 3, H, W) from 0 to 1."""
        return torch.stack([self._picture(look, seed) for look, seed in zip(self._looks, self._stars, strict=True)])

    def _picture(self, look: Scene, seed: int) -> torch.Tensor:
        height, width = self.rows * CELL, self.columns * CELL
        mix = ((torch.arange(CELL) + 0.5) / CELL)[None, :, None]
        shades = self._shades(look)
        column = (shades[:, :1] * (1 - mix) + shades[:, 1:] * mix).flatten(0, 1)  # (H, 3)
        picture = column.T.unsqueeze(2).expand(-1, -1, width).clone()
        if look.texture:
            top = self._horizon() * CELL
            picture[:, top:] += _TEXTURES[look.texture](height - top, width)
        if look.stars:
            bright = self._stars_of(seed).clamp_min(0).repeat_interleave(CELL, dim=1).repeat_interleave(CELL, dim=2)
            for star, (x, y) in zip(bright, _STARS, strict=True):
                far = torch.hypot(torch.arange(CELL) + 0.5 - x, (torch.arange(CELL) + 0.5 - y)[:, None])
                glow = star * (2.2 - far).clamp(0, 1).repeat(self.rows, self.columns)
                picture += 0.9 * glow * (1 - picture)
        return picture.clamp(0, 1)


def _waves(height: int, width: int) -> torch.Tensor:
    """Bright crests, one for each cell's width, in rows of half a cell."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    crest = 3.0 * torch.cos(2 * math.pi * (x / CELL + (y // 16) * 0.5))
    away = (y % 16 - 8 - crest).abs()
    return 0.12 * (1.8 - away).clamp(0, 1)


def _blades(height: int, width: int) -> torch.Tensor:
    """Dark blades of grass, four for each cell's width."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    shifted = x + 4 * ((y // 16) % 2)
    up = (y % 16) / 16
    away = (shifted % 8 - 4).abs()
    return -0.10 * (2.4 * up - away + 0.3).clamp(0, 1)


def _dunes(height: int, width: int) -> torch.Tensor:
    """Soft ripples, one for each cell's width, in rows of half a cell."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    crest = 2.5 * torch.cos(2 * math.pi * (x / CELL + (y // 16) * 0.5))
    below = (y % 16 - 6 - crest) / 5
    return -0.06 * torch.where(below > 0, 1 - below, torch.zeros_like(below)).clamp(0, 1)


#: Places of the stars in each cell, in pixels from its upper left corner.
_STARS: Final = ((7.0, 9.0), (19.0, 25.0), (27.0, 5.0))
_TEXTURES: Final = {_WAVES: _waves, _BLADES: _blades, _DUNES: _dunes}

#: Channels of the latents: 16 extra ones, 3 of the nearest thing's colour, 13 of the scene, 32 that describe the thing.
LATENT_CHANNELS: Final = 64
#: Whether it is the first frame, which the decoder's upsampling treats in a way of its own, the time, and how much of
#: each quarter of the cell things cover. The other ten are zero: the decoder's first shortcut takes 64 channels.
_EXTRA_CHANNELS: Final = 16
#: Previews need them. The decoder does not read them, because the description says the same more exactly.
COVER_CHANNELS: Final = [2, 3, 4, 5]
COLOUR_CHANNELS: Final = [16, 17, 18]
SCENE_COLOUR_CHANNELS: Final = [19, 20, 21]
#: Of the kind and of the turn. Between the kinds' channels are those of the way.
KIND_CHANNELS: Final = [32 + index for index, kind in enumerate(KINDS) if kind not in NOT_TAUGHT]
TURN_CHANNELS: Final = [60, 61]
_COLOUR_SCALE: Final = 1.6


def cells(points: torch.Tensor, side: int) -> torch.Tensor:
    """(B, T, side h, side w) to (B, side^2, T, h, w)."""
    batch, frames, height, width = points.shape
    split = points.view(batch, frames, height // side, side, width // side, side)
    return split.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)


_TABLES: list[torch.Tensor] = []


def _tables() -> torch.Tensor:
    """The distances of all kinds, (kinds, size, size)."""
    if not _TABLES:
        _TABLES.append(torch.stack([torch.from_numpy(table(kind)) for kind in KINDS]))
    return _TABLES[0]
