"""Random clips and what people might say of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from tools.demo_model.scenes import COLOURS, LANDSCAPES
from tools.demo_model.shapes import TAUGHT
from tools.demo_model.words import (
    ADJECTIVES,
    BEHIND,
    COLOUR_WORDS,
    DIRECTIONS,
    EXTRAS,
    FILLERS,
    GO,
    GRADIENT,
    KIND_WORDS,
    OPENINGS,
    PLAIN,
    SCENE_NOUNS,
    SCENE_WORDS,
    SIZE_WORDS,
    VERBS,
    plural_of,
)
from tools.demo_model.world import MOTIONS, Clip, Thing

_THEM: Final = {True: ("it", "which"), False: ("they", "which")}


def _one(random: Random, options: str) -> str:
    return random.choice(options.split(";"))


def random_clip(random: Random, kinds: Sequence[str] = TAUGHT) -> Clip:
    """One object, or two in four of ten clips."""
    scene = _scene(random)
    first = random.choice((*MOTIONS, "spinning", "circling", "shrinking"))  # the hardest
    colours = [colour for colour in COLOURS if colour not in _hidden_by(scene)]
    if random.random() > 0.4:
        size = random.choice(("small", "medium", "medium", "large"))
        thing = _placed(random, random.choice(kinds), random.choice(colours), size, first, None)
        return Clip((thing,), scene, random.getrandbits(30))
    # Things that move sideways get a height each, others a place from left to right each.
    sideways = first in ("left", "right")
    second = first
    if random.random() < 0.42:
        rest = ("spinning", "still", "growing", "shrinking")
        second = random.choice((("left", "right") if sideways else ("up", "down", "bouncing")) + rest)
    sizes = ("small", "small", "medium") if sideways else ("small", "small", "medium", "medium", "large")
    kind, colour, size = random.choice(kinds), random.choice(colours), random.choice(sizes)
    places = [0.27, 0.73]
    random.shuffle(places)
    one = _placed(random, kind, colour, size, first, (places[0], sideways))
    if random.random() < 0.4 and second == first:
        two = _placed(random, kind, colour, size, second, (places[1], sideways))
    else:
        others = [other for other in colours if other != colour]
        kind = random.choice(kinds)
        two = _placed(random, kind, random.choice(others), random.choice(sizes), second, (places[1], sideways))
    return Clip((one, two), scene, random.getrandbits(30))


def _scene(random: Random) -> tuple[str, ...]:
    chance = random.random()
    if chance < 0.4:
        return (random.choice(list(LANDSCAPES)),)
    if chance < 0.75:
        return (random.choice(list(COLOURS)),)
    return tuple(random.sample(list(COLOURS), 2))


def _hidden_by(scene: tuple[str, ...]) -> tuple[str, ...]:
    """Colours that cannot be told from the scene."""
    of = {"sea": ("blue",), "meadow": ("green",), "snow": ("white",), "night": ("black",), "sky": ()}
    return of.get(scene[0], ()) if scene[0] in LANDSCAPES else scene


def _placed(random: Random, kind: str, colour: str, size: str, motion: str, lane: tuple[float, bool] | None) -> Thing:
    """A thing where its motion has room. `lane` is its height, or its place from left to right, among two things."""
    x, y = random.uniform(0.25, 0.75), random.uniform(0.32, 0.68)
    if lane is not None:
        along, sideways = lane
        along += random.uniform(-0.04, 0.04)
        x, y = (x, along) if sideways else (along, y)
    if motion == "left":
        x = random.uniform(0.70, 0.86)
    elif motion == "right":
        x = random.uniform(0.14, 0.30)
    elif motion == "up":
        y = random.uniform(0.72, 0.86)
    elif motion == "down":
        y = random.uniform(0.14, 0.28)
    elif motion == "bouncing":
        y = random.uniform(0.74, 0.80)
    elif motion == "circling":
        x, y = (random.uniform(0.4, 0.6), random.uniform(0.44, 0.56)) if lane is None else (x, y)
    mirrored = motion == "left" if motion in ("left", "right") else random.random() < 0.5
    jitter = random.uniform(0.94, 1.06)
    return Thing(kind, colour, size, motion, x, y, jitter, mirrored and kind in ("fish", "boat"))


def caption(random: Random, clip: Clip) -> str:
    """What someone might say to get this clip. May leave things out, never says wrong ones."""
    first, *rest = clip.things
    twins = bool(rest) and (rest[0].kind, rest[0].colour, rest[0].motion) == (first.kind, first.colour, first.motion)
    shared = not rest or rest[0].motion == first.motion
    silent = shared and random.random() < 0.06
    if twins:
        named = _one(random, "two;two;two;a pair of") + " " + _name(random, first, plural=True)
    else:
        named = _article(random, _name(random, first))
        if rest and shared:
            named += _one(random, " and ; and ; and ; next to ; with ; beside ; together with ; alongside ") + _article(
                random, _name(random, rest[0])
            )
    if not shared:
        other = _article(random, _name(random, rest[0]))
        form = 1 if random.random() < 0.5 else 2
        parts = [
            f"{named} {_motion(random, first, 0 if form == 1 else 2)}",
            f"{other} {_motion(random, rest[0], 0 if form == 1 else 2)}",
        ]
        moved = _one(random, " and ; and ; while ; as ").join(parts)
    elif silent:
        moved = named
    elif random.random() < 0.08:  # "a red ball at sea. it rises"
        names = (_word(random, KIND_WORDS[first.kind]), _name(random, first))
        again = "they" if rest else _one(random, "it;it;the {0};the {1};a {1}").format(*names)
        return _framed(
            random, f"{named} {_where(random, clip.scene)}. {again} {_motion(random, first, int(bool(rest)))}"
        )
    else:
        moved = _sentence(random, named, first, plural=bool(rest))
    return _dressed(random, moved, clip)


def _sentence(random: Random, named: str, thing: Thing, *, plural: bool) -> str:
    finite, gerund = _motion(random, thing, int(plural)), _motion(random, thing, 2)
    them, which = _THEM[not plural]
    be = "are" if plural else "is"
    chance = random.random()
    if chance < 0.45:
        return f"{named} {finite}"
    if chance < 0.75:
        return f"{named} {gerund}"
    if chance < 0.85:
        return f"{named} {be} {gerund}"
    if chance < 0.92:
        return f"{named} {_one(random, f'that;{which}')} {finite}"
    return f"{named}, {them} {finite}"


def _motion(random: Random, thing: Thing, form: int) -> str:
    """Third person, plural or gerund (`form` 0, 1, 2) of what the thing does."""
    verbs, directions = VERBS.get(thing.motion), DIRECTIONS.get(thing.motion)
    if verbs is not None and (directions is None or random.random() < 0.5):
        return _form(_one(random, verbs), form)
    return f"{_form(_one(random, GO), form)} {_one(random, directions or '')}"


def _form(forms: str, form: int) -> str:
    return (forms.split(",") if "," in forms else forms.split())[form]


def _name(random: Random, thing: Thing, *, plural: bool = False) -> str:
    words = []
    if random.random() < (0.25 if thing.size == "medium" else 0.6):
        words.append(_word(random, SIZE_WORDS[thing.size]) if thing.size != "medium" else "")
    if random.random() < 0.97:
        words.append(_word(random, COLOUR_WORDS[thing.colour]))
    if random.random() < 0.08:
        words.insert(random.randint(0, len(words)), _one(random, ADJECTIVES))
    kind = _word(random, KIND_WORDS[thing.kind])
    words.append(plural_of(kind) if plural else kind)
    return " ".join(filter(None, words))


def _word(random: Random, words: str) -> str:
    """The first word half of the time."""
    options = words.split()
    return options[0] if random.random() < 0.5 else random.choice(options)


def _article(random: Random, name: str) -> str:
    chance = random.random()
    if chance < 0.08:
        return name
    if chance < 0.14:
        return f"one {name}"
    if chance < 0.2:
        return f"the {name}"
    return ("an " if name[0] in "aeiou" else "a ") + name


def _dressed(random: Random, moved: str, clip: Clip) -> str:
    """The sentence with its scene."""
    text = moved
    if random.random() < 0.93:
        where = _where(random, clip.scene)
        text = f"{where}, {moved}" if random.random() < 0.2 else f"{moved} {where}"
    return _framed(random, text)


def _framed(random: Random, text: str) -> str:
    """The text with words that mean nothing here."""
    if random.random() < 0.25:
        text = f"{_one(random, OPENINGS)} {text}"
    while random.random() < 0.25:
        text = f"{text} {_one(random, EXTRAS)}"
    words = text.split()
    while random.random() < 0.15:
        words.insert(random.randint(0, len(words)), _one(random, FILLERS))
    while random.random() < 0.12:
        letters = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 8)))
        words.insert(random.randint(0, len(words)), letters)
    return " ".join(words)


def _where(random: Random, scene: tuple[str, ...]) -> str:
    if scene[0] in LANDSCAPES:
        if random.random() < 0.3:
            return _one(random, BEHIND).format(_one(random, SCENE_NOUNS[scene[0]]))
        return _one(random, SCENE_WORDS[scene[0]])
    names = [_word(random, COLOUR_WORDS[colour]) for colour in scene]
    return _one(random, PLAIN if len(scene) == 1 else GRADIENT).format(*names)
