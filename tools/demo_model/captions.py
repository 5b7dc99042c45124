"""Random clips and what people might say of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final, TypeAlias

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
_SIDEWAYS: Final = ("left", "right")
#: Motions that need the picture's whole height.
_TALL: Final = ("up", "down", "bouncing", "circling")
#: A thing's place from left to right and its height, or None where its motion decides.
_Lane: TypeAlias = tuple[float | None, float | None]


def _one(random: Random, options: str) -> str:
    return random.choice(options.split(";"))


def random_clip(random: Random, kinds: Sequence[str] = TAUGHT) -> Clip:
    """One object, or two in every other clip."""
    scene = _scene(random)
    first = random.choice((*MOTIONS, "spinning", "circling", "shrinking"))  # the hardest
    colours = [colour for colour in COLOURS if colour not in _hidden_by(scene)]
    kind, colour = random.choice(kinds), random.choice(colours)
    if random.random() < 0.5:
        thing = _placed(random, kind, colour, random.choice(("small", "medium", "medium", "large")), first)
        return Clip((thing,), scene, random.getrandbits(30))
    second = first if random.random() < 0.45 else random.choice(MOTIONS)
    sideways = first in _SIDEWAYS or second in _SIDEWAYS
    sizes = ("small", "small", "medium") if sideways else ("small", "small", "medium", "medium", "large")
    size = random.choice(sizes)
    lanes = _lanes(random, first, second)
    one = _placed(random, kind, colour, size, first, lanes[0])
    if random.random() > 0.4 or second != first:
        kind, size = random.choice(kinds), random.choice(sizes)
        colour = random.choice([other for other in colours if other != colour])
    return Clip((one, _placed(random, kind, colour, size, second, lanes[1])), scene, random.getrandbits(30))


def _lanes(random: Random, first: str, second: str) -> list[_Lane]:
    """Of each of two things that move in these ways, so that they do not meet."""
    movers = [motion for motion in (first, second) if motion in _SIDEWAYS]
    if movers and (first in _TALL or second in _TALL):  # one goes away from the other
        away, stays = (0.46, 0.78) if movers[0] == "left" else (0.54, 0.22)
        return [(away if motion in _SIDEWAYS else stays, None) for motion in (first, second)]
    lanes: list[_Lane] = [(None, 0.27), (None, 0.73)] if movers else [(0.27, None), (0.73, None)]
    random.shuffle(lanes)
    return lanes


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


def _placed(random: Random, kind: str, colour: str, size: str, motion: str, lane: _Lane = (None, None)) -> Thing:
    """A thing where its motion has room, among two things in its lane."""
    x, y = random.uniform(0.25, 0.75), random.uniform(0.32, 0.68)
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
        x, y = random.uniform(0.4, 0.6), random.uniform(0.44, 0.56)
    jitter = random.uniform(-0.04, 0.04)
    x, y = (of if fixed is None else fixed + jitter for of, fixed in zip((x, y), lane, strict=True))
    mirrored = motion == "left" if motion in _SIDEWAYS else random.random() < 0.5
    scale = random.uniform(0.94, 1.06)
    return Thing(kind, colour, size, motion, x, y, scale, mirrored and kind in ("fish", "boat"))


def caption(random: Random, clip: Clip) -> str:
    """What someone might say to get this clip. May leave things out, never says wrong ones."""
    first, *rest = clip.things
    twins = bool(rest) and (rest[0].kind, rest[0].colour, rest[0].motion) == (first.kind, first.colour, first.motion)
    shared = not rest or rest[0].motion == first.motion
    names = [_article(random, _name(random, thing)) for thing in clip.things]
    if twins:
        named = _one(random, "two;two;two;a pair of") + " " + _name(random, first, plural=True)
    else:
        named = _one(random, " and ; and ; and ; next to ; with ; beside ; together with ; alongside ").join(names)
    chance = random.random()
    if chance < 0.14:  # "a red ball at sea. it rises"
        parts = [f"{named} {_where(random, clip.scene)}.", _aside(random), _again(random, clip.things, shared=shared)]
        return _framed(random, " ".join(parts))
    if not shared:
        return _dressed(random, _each(random, names, clip.things), clip)
    if chance < 0.2:
        return _dressed(random, named, clip)
    return _dressed(random, _sentence(random, named, first, plural=bool(rest)), clip)


def _each(random: Random, names: Sequence[str], things: Sequence[Thing]) -> str:
    """Two things with a motion each."""
    be, form = random.choice((("", 0), ("", 0), ("", 2), (" is", 2)))
    moved = [f"{name}{be} {_motion(random, thing, form)}" for name, thing in zip(names, things, strict=True)]
    return _one(random, " and ; and ; while ; as ;. ;, ").join(moved)


def _again(random: Random, things: Sequence[Thing], *, shared: bool) -> str:
    """What the things of the sentence before do."""
    first = things[0]
    if not shared:
        kinds = [_word(random, KIND_WORDS[thing.kind]) for thing in things]
        if things[1].kind == first.kind or random.random() < 0.4:
            kinds = [_name(random, thing) for thing in things]
        return _each(random, [f"the {kind}" for kind in kinds], things)
    if len(things) > 1:
        return f"they {_motion(random, first, 1)}"
    options = "it;it;the {0};the {1};a {1};a {1}"
    name = _one(random, options).format(_word(random, KIND_WORDS[first.kind]), _name(random, first))
    return f"{name} {_motion(random, first, 0)}"


def _aside(random: Random) -> str:
    """Words between two sentences, often none."""
    words = _one(random, EXTRAS).split() if random.random() < 0.4 else []
    while random.random() < 0.4:
        words.append(_one(random, f"{FILLERS};it;it") if random.random() < 0.6 else _unknown(random))
    return " ".join(words)


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
        words.insert(random.randint(0, len(words)), _unknown(random))
    return " ".join(words)


def _unknown(random: Random) -> str:
    return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 8)))


def _where(random: Random, scene: tuple[str, ...]) -> str:
    if scene[0] in LANDSCAPES:
        if random.random() < 0.3:
            return _one(random, BEHIND).format(_one(random, SCENE_NOUNS[scene[0]]))
        return _one(random, SCENE_WORDS[scene[0]])
    names = [_word(random, COLOUR_WORDS[colour]) for colour in scene]
    return _one(random, PLAIN if len(scene) == 1 else GRADIENT).format(*names)
