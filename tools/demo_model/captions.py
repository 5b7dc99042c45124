"""Random clips and what people might say of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from tools.demo_model.shapes import KINDS, NOT_TAUGHT
from tools.demo_model.world import COLOURS, LANDSCAPES, MOTIONS, Clip, Thing

_COLOUR_WORDS: Final[dict[str, str]] = {
    "red": "red crimson scarlet ruby reddish",
    "orange": "orange tangerine amber",
    "yellow": "yellow golden gold lemon yellowish",
    "green": "green emerald lime greenish",
    "turquoise": "turquoise cyan teal aqua aquamarine",
    "blue": "blue navy azure cobalt sapphire bluish",
    "purple": "purple violet lilac magenta indigo",
    "pink": "pink rose salmon",
    "brown": "brown chocolate",
    "white": "white ivory",
    "gray": "gray grey silver",
    "black": "black",
}
_KIND_WORDS: Final[dict[str, str]] = {
    "ball": "ball circle sphere disc disk dot bubble balloon",
    "square": "square box block cube",
    "triangle": "triangle pyramid",
    "star": "star starfish",
    "heart": "heart",
    "ring": "ring donut doughnut hoop",
    "cross": "cross plus",
    "diamond": "diamond rhombus gem kite",
    "moon": "moon crescent",
    "fish": "fish goldfish",
    "boat": "boat sailboat ship yacht",
    "sun": "sun",
    "house": "house home hut cottage cabin",
    "tree": "tree fir pine",
}
_SIZE_WORDS: Final[dict[str, str]] = {
    "small": "small little tiny mini",
    "medium": "medium",
    "large": "large big huge giant great",
}
#: Third person, plural and gerund of verbs that a direction follows.
_GO: Final = (
    "moves move moving;moves move moving;moves move moving;goes go going;drifts drift drifting;glides glide gliding;"
    "slides slide sliding;travels travel traveling;flies fly flying;floats float floating;swims swim swimming;"
    "rolls roll rolling;sails sail sailing;runs run running;walks walk walking;heads head heading;"
    "slips slip slipping;speeds speed speeding;races race racing;rushes rush rushing;drives drive driving"
)
_DIRECTIONS: Final[dict[str, str]] = {
    "left": "to the left;to the left;left;leftwards;leftward;toward the left;towards the left;from right to left;"
    "from the right to the left;to the left side;from the right side to the left side;across the screen to the left;"
    "left across the screen",
    "right": "to the right;to the right;right;rightwards;rightward;toward the right;towards the right;"
    "from left to right;from the left to the right;to the right side;from the left side to the right side;"
    "across the screen to the right;right across the screen",
    "up": "up;up;upwards;upward;to the top;towards the top;toward the top;from bottom to top;"
    "from the bottom to the top;higher and higher;up to the top",
    "down": "down;down;downwards;downward;to the bottom;towards the bottom;toward the bottom;from top to bottom;"
    "from the top to the bottom;lower and lower;down to the bottom",
    "circling": "in a circle;in circles;in a circle;around in a circle;around and around;round and round;in a loop;"
    "in loops;in a circular path;along a circle",
}
_VERBS: Final[dict[str, str]] = {
    "up": "rises rise rising;rises rise rising;ascends ascend ascending;climbs climb climbing;"
    "lifts off,lift off,lifting off;takes off,take off,taking off;rises up,rise up,rising up;"
    "floats up,float up,floating up",
    "down": "falls fall falling;falls fall falling;drops drop dropping;descends descend descending;sinks sink sinking;"
    "falls down,fall down,falling down;comes down,come down,coming down",
    "circling": "circles circle circling;orbits orbit orbiting;loops loop looping;"
    "circles around,circle around,circling around",
    "bouncing": "bounces bounce bouncing;bounces bounce bouncing;"
    "bounces up and down,bounce up and down,bouncing up and down;"
    "hops hop hopping;jumps jump jumping;jumps up and down,jump up and down,jumping up and down;"
    "moves up and down,move up and down,moving up and down",
    "growing": "grows grow growing;grows grow growing;gets bigger,get bigger,getting bigger;"
    "gets larger,get larger,getting larger;expands expand expanding;swells swell swelling;"
    "becomes bigger,become bigger,becoming bigger;grows bigger,grow bigger,growing bigger;"
    "becomes larger,become larger,becoming larger;inflates inflate inflating;"
    "comes closer,come closer,coming closer",
    "shrinking": "shrinks shrink shrinking;shrinks shrink shrinking;gets smaller,get smaller,getting smaller;"
    "becomes smaller,become smaller,becoming smaller;gets tinier,get tinier,getting tinier;"
    "contracts contract contracting;grows smaller,grow smaller,growing smaller",
    "spinning": "spins spin spinning;spins spin spinning;rotates rotate rotating;rotates rotate rotating;"
    "turns turn turning;twirls twirl twirling;whirls whirl whirling;revolves revolve revolving;"
    "turns around,turn around,turning around;spins around,spin around,spinning around;"
    "spins in place,spin in place,spinning in place",
    "still": "stays still,stay still,staying still;stands still,stand still,standing still;"
    "does not move,do not move,not moving;rests rest resting;sits sit sitting;stays stay staying;stands stand standing;"
    "stays in place,stay in place,staying in place;is motionless,are motionless,motionless;is static,are static,static;"
    "hovers hover hovering;hangs hang hanging;lies lie lying",
}
_SCENE_WORDS: Final[dict[str, str]] = {
    "sea": "over the sea;on the sea;at sea;in the sea;in the ocean;over the ocean;on the ocean;on the water;over water;"
    "above the waves;on the waves;over blue waves;by the sea;on a lake;over a lake;in the water;at the seaside;"
    "over a calm sea;on a calm blue sea;with the sea in the background;across the sea;across the water",
    "meadow": "on the grass;over the grass;on grass;on green grass;over green grass;in the grass;on a meadow;"
    "in a meadow;over a meadow;on a green meadow;on a green field;in a field;over a field;on a lawn;in a park;"
    "in a garden;over a grassy field;on a grassy hill;across the grass;across a meadow;"
    "over grassland;in a green meadow",
    "snow": "in the snow;on the snow;over the snow;over snow;on a snowy field;in fresh snow;on fresh snow;"
    "through the snow;across the snow;across a snowy field;over a snowy landscape;in a snowy landscape;in winter;"
    "on a winter day;over ice;on ice;through fresh snow;on snow;in a snowy field;over white snow",
    "desert": "in the desert;over the desert;across the desert;on the sand;over sand;on sand;over the sand;"
    "over sand dunes;in a desert;on a sandy plain;across the dunes;over the dunes;in the sand;through the desert",
    "night": "at night;in the night;in the night sky;in a night sky;under the stars;in a starry sky;in space;"
    "in outer space;through space;among the stars;in front of a starry night sky;in a starry night;"
    "under a starry sky;over a starry night sky;in the dark night sky;across the night sky;between the stars;"
    "in front of the stars;on a starry night",
    "sky": "in the sky;in a clear sky;in a blue sky;in the blue sky;in the air;against a blue sky;"
    "in front of a blue sky;in a bright sky;across the sky;through the air;through the sky;up in the sky;"
    "in the clear blue sky",
    "sunset": "at sunset;at dusk;in the evening;in front of a sunset;against a sunset;at dawn;at sunrise;"
    "in a sunset sky;in the sunset;during sunset;over a sunset;in the evening sky;against the evening sky;"
    "in front of a sunset sky",
}
_PLAIN: Final = (
    "on a {} background;on a {} background;on a plain {} background;over a {} background;against a {} background;"
    "in front of a {} background;with a {} background;{} background;in front of a {} wall;the background is {};"
    "on a {} backdrop;against a {} backdrop;against a {} wall;on {};on a {} canvas;on a solid {} background;"
    "on a flat {} background;over {};against {};over a plain {} background;before a {} background"
)
_GRADIENT: Final = (
    "on a gradient from {} to {};over a gradient from {} to {};on a {} to {} gradient;on a {} and {} gradient;"
    "on a background that fades from {} to {};with a {} to {} gradient background;in front of a gradient of {} and {};"
    "against a {} to {} gradient;on a gradient background from {} to {};over a {} to {} gradient;"
    "with a background from {} to {};on a {} to {} background;on a background fading from {} to {}"
)
_OPENINGS: Final = (
    "a video of;an animation of;a clip of;an animated clip of;a cartoon of;show me;there is;we see;i want;"
    "a short video of;please draw;a scene with;a movie of;imagine;a picture of;a video showing;a simple animation of;"
    "make;generate;create;film of;an illustration of"
)
_EXTRAS: Final = (
    "slowly;quickly;gently;smoothly;fast;calmly;cinematic;soft light;4k;high quality;minimalist;smooth motion;"
    "flat design;cartoon style;bright colors;beautiful;simple;in the center;close up;steadily;peacefully;detailed;"
    "realistic;colorful;in slow motion;very slowly;cute;nice;happily;wide shot;8k;hd;vector art"
)
_THEM: Final = {True: ("it", "which"), False: ("they", "which")}


def _one(random: Random, options: str) -> str:
    return random.choice(options.split(";"))


def vocabulary() -> list[str]:
    """All words that a caption can have, sorted, without the ones that are not words."""
    texts = [
        *(*_COLOUR_WORDS.values(), *_KIND_WORDS.values(), *_SIZE_WORDS.values(), _GO, *_DIRECTIONS.values()),
        *(*_VERBS.values(), *_SCENE_WORDS.values(), _PLAIN, _GRADIENT, _OPENINGS, _EXTRAS),
        "a an the one two pair of and with both single another other that which is are it they next to beside another",
        *(_plural(word) for words in _KIND_WORDS.values() for word in words.split()),
    ]
    text = " ".join(texts)
    for mark in ";,{}":
        text = text.replace(mark, " ")
    return sorted(set(text.lower().split()))


#: What random clips show. The model card says what it has learned.
_SHOWN: Final = tuple(kind for kind in KINDS if kind not in NOT_TAUGHT)


def random_clip(random: Random, kinds: Sequence[str] = _SHOWN) -> Clip:
    """One object, or two in a third of the clips."""
    scene = _scene(random)
    first = random.choice(MOTIONS)
    colours = [colour for colour in COLOURS if colour not in _hidden_by(scene)]
    if random.random() > 0.34:
        size = random.choice(("small", "medium", "medium", "large"))
        thing = _placed(random, random.choice(kinds), random.choice(colours), size, first, None)
        return Clip((thing,), scene, random.getrandbits(30))
    # Things that move sideways get a height each, others a place from left to right each.
    sideways = first in ("left", "right")
    second = first
    if random.random() < 0.35:
        rest = ("spinning", "still", "growing", "shrinking")
        second = random.choice((("left", "right") if sideways else ("up", "down", "bouncing")) + rest)
    sizes = ("small", "small", "medium")
    kind, colour, size = random.choice(kinds), random.choice(colours), random.choice(sizes)
    places = [0.27, 0.73]
    random.shuffle(places)
    one = _placed(random, kind, colour, size, first, (places[0], sideways))
    if random.random() < 0.3 and second == first:
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
        x, y = (random.uniform(0.4, 0.6), y) if lane is None else (x, y)
    mirrored = motion == "left" if motion in ("left", "right") else random.random() < 0.5
    jitter = random.uniform(0.94, 1.06)
    return Thing(kind, colour, size, motion, x, y, random.random(), jitter, mirrored and kind in ("fish", "boat"))


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
            named += _one(random, " and ; and ; and ; next to ; with ; beside ") + _article(
                random, _name(random, rest[0])
            )
    if not shared:
        other = _article(random, _name(random, rest[0]))
        form = 1 if random.random() < 0.5 else 2
        parts = [
            f"{named} {_motion(random, first, 0 if form == 1 else 2)}",
            f"{other} {_motion(random, rest[0], 0 if form == 1 else 2)}",
        ]
        moved = " and ".join(parts)
    elif silent:
        moved = named
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
    verbs, directions = _VERBS.get(thing.motion), _DIRECTIONS.get(thing.motion)
    if verbs is not None and (directions is None or random.random() < 0.5):
        return _form(_one(random, verbs), form)
    return f"{_form(_one(random, _GO), form)} {_one(random, directions or '')}"


def _form(forms: str, form: int) -> str:
    return (forms.split(",") if "," in forms else forms.split())[form]


def _name(random: Random, thing: Thing, *, plural: bool = False) -> str:
    words = []
    if random.random() < (0.25 if thing.size == "medium" else 0.6):
        words.append(_word(random, _SIZE_WORDS[thing.size]) if thing.size != "medium" else "")
    if random.random() < 0.97:
        words.append(_word(random, _COLOUR_WORDS[thing.colour]))
    kind = _word(random, _KIND_WORDS[thing.kind])
    words.append(_plural(kind) if plural else kind)
    return " ".join(filter(None, words))


def _plural(word: str) -> str:
    if word.endswith("fish"):
        return word
    return word + ("es" if word.endswith(("x", "s")) else "s")


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
    """The sentence with its scene, and with words that mean nothing here."""
    text = moved
    if random.random() < 0.93:
        where = _where(random, clip.scene)
        text = f"{where}, {moved}" if random.random() < 0.15 else f"{moved} {where}"
    if random.random() < 0.25:
        text = f"{_one(random, _OPENINGS)} {text}"
    while random.random() < 0.25:
        text = f"{text} {_one(random, _EXTRAS)}"
    words = text.split()
    while random.random() < 0.12:
        letters = "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 8)))
        words.insert(random.choice((0, len(words))), letters)
    return " ".join(words)


def _where(random: Random, scene: tuple[str, ...]) -> str:
    if scene[0] in LANDSCAPES:
        return _one(random, _SCENE_WORDS[scene[0]])
    names = [_word(random, _COLOUR_WORDS[colour]) for colour in scene]
    return _one(random, _PLAIN if len(scene) == 1 else _GRADIENT).format(*names)
