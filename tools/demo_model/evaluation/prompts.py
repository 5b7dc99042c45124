"""The held-out prompts of `make eval-demo`, each with what its video must show.

They are held out from training: the sentences, the synonyms and the hand-written prompts come from here and from
`wordings`, the training captions from the generator, and neither was written from the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from tools.demo_model.evaluation.handwritten import HANDWRITTEN
from tools.demo_model.evaluation.motions import MOTIONS
from tools.demo_model.evaluation.oklab import COLOURS
from tools.demo_model.evaluation.silhouettes import KINDS
from tools.demo_model.evaluation.wordings import (
    COLOUR_WORDS,
    GRADIENT_WORDS,
    KIND_WORDS,
    MOTION_WORDS,
    PAIR_SENTENCES,
    PLAIN_WORDS,
    PLURAL_SENTENCES,
    SCENE_WORDS,
    SENTENCES,
    SIZES,
)

HELD_OUT: Final = 200
#: Turning a ball or a ring changes no pixel.
_ROUND: Final = ("ball", "ring")
#: Of every ten prompts: scenes with a name of their own, plain colours and gradients.
_SCENES_OF_TEN: Final = ("named",) * 5 + ("plain",) * 3 + ("gradient",) * 2
#: Of every ten prompts: one object, twins, two that move alike, and two that move each in its own way.
_FORMS_OF_TEN: Final = ("one",) * 6 + ("twins", "two", "two", "pair")
#: Colours that are hard to tell apart, so that nobody asks for one in front of the other.
_ALIKE: Final = (
    {"red", "orange"}, {"red", "pink"}, {"red", "brown"}, {"orange", "yellow"}, {"orange", "brown"}, {"pink", "purple"},
    {"blue", "purple"}, {"blue", "turquoise"}, {"green", "turquoise"}, {"white", "gray"}, {"white", "yellow"},
    {"white", "pink"}, {"gray", "black"}, {"brown", "black"},
)  # fmt: skip
#: The colours of the scenes with a name, and those that are hard to see in front of them.
_COLOURS_OF_SCENE: Final = {
    "sea": {"blue", "turquoise", "gray", "white"},
    "meadow": {"blue", "green", "turquoise"},
    "snow": {"white", "gray", "blue"},
    "desert": {"yellow", "orange", "brown", "white", "gray"},
    "night": {"black", "blue", "purple", "brown"},
    "sky": {"blue", "white", "turquoise", "gray"},
    "sunset": {"purple", "orange", "pink", "red", "brown", "yellow"},
}
#: The kinds that the model was trained on.
ASKED_KINDS: Final = tuple(kind for kind in KINDS if kind not in ("diamond", "moon"))

T = TypeVar("T")


@dataclass(frozen=True)
class AskedObject:
    """An object that a prompt asks for."""

    colour: str
    kind: str
    motion: str

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}, {self.motion}"


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its video must show. `scene` is "blue", "blue to white", or a name such as "sea"."""

    text: str
    objects: tuple[AskedObject, ...]
    scene: str


def held_out(number: int = HELD_OUT, seed: int = 1) -> list[Prompt]:
    """The first prompts of those with this seed: the hand-written ones among those made of words, always the same."""
    draw = random.Random(seed)
    made = _Maker(draw)
    mixed = [_parsed(*each) for each in HANDWRITTEN]
    mixed += [made.prompt() for _ in range(max(HELD_OUT, number) - len(mixed))]
    draw.shuffle(mixed)
    return mixed[:number]


def _parsed(text: str, objects: str, scene: str) -> Prompt:
    """`objects` is "red ball left", or two of these with " + " between them."""
    return Prompt(text, tuple(AskedObject(*each.split()) for each in objects.split(" + ")), scene)


class _Deck(Generic[T]):
    """Draws every card once before it draws one again."""

    def __init__(self, cards: Sequence[T], draw: random.Random) -> None:
        self._cards, self._draw = cards, draw
        self._left: list[T] = []

    def take(self, fits: Callable[[T], bool] = lambda _: True) -> T:
        """The next card that fits. Those before it stay for later."""
        while True:
            for card in self._left:
                if fits(card):
                    self._left.remove(card)
                    return card
            self._left += self._draw.sample(self._cards, len(self._cards))


class _Maker:
    """Makes prompts in which every colour, kind, motion and scene is about as frequent as every other."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._colours, self._kinds, self._motions = _Deck(COLOURS, draw), _Deck(ASKED_KINDS, draw), _Deck(MOTIONS, draw)
        self._behind, self._named = _Deck(COLOURS, draw), _Deck(tuple(SCENE_WORDS), draw)
        self._scene_types, self._forms = _Deck(_SCENES_OF_TEN, draw), _Deck(_FORMS_OF_TEN, draw)

    def prompt(self) -> Prompt:
        """The next prompt."""
        scene, where, taken = self._scene()
        form = self._forms.take()
        first = self._object(taken)
        if form == "one":
            return Prompt(self._one(first, where), (first,), scene)
        if form == "twins":
            return Prompt(self._twins(first, where), (first, first), scene)
        second = self._other(first, taken, same_motion=form == "two")
        return Prompt(self._two(first, second, where), (first, second), scene)

    def _scene(self) -> tuple[str, str, set[str]]:
        """A background: its name, its words, and the colours that nobody would put in front of it."""
        match self._scene_types.take():
            case "named":
                name = self._named.take()
                return name, self._draw.choice(SCENE_WORDS[name]), _COLOURS_OF_SCENE[name]
            case "plain":
                colour = self._behind.take()
                return colour, self._draw.choice(PLAIN_WORDS).format(scene=self._colour(colour)), _alike(colour)
            case _:
                top = self._behind.take()
                bottom = self._behind.take(lambda colour: colour not in _alike(top))
                words = self._draw.choice(GRADIENT_WORDS).format(top=top, bottom=bottom)
                return f"{top} to {bottom}", words, _alike(top) | _alike(bottom)

    def _object(self, taken: set[str]) -> AskedObject:
        motion = self._motions.take()
        kind = self._kinds.take(lambda kind: _shows(kind, motion))
        return AskedObject(self._colours.take(lambda colour: colour not in taken), kind, motion)

    def _other(self, first: AskedObject, taken: set[str], *, same_motion: bool) -> AskedObject:
        """An object with another colour and another kind than the first."""
        motion = first.motion if same_motion else self._motions.take(lambda motion: motion != first.motion)
        kind = self._kinds.take(lambda kind: kind != first.kind and _shows(kind, motion))
        colour = self._colours.take(lambda colour: colour not in taken | _alike(first.colour))
        return AskedObject(colour, kind, motion)

    def _one(self, asked: AskedObject, where: str) -> str:
        does, _, doing = self._draw.choice(MOTION_WORDS[asked.motion])
        return _sentence(self._draw.choice(SENTENCES), who=self._who(asked), does=does, doing=doing, where=where)

    def _twins(self, asked: AskedObject, where: str) -> str:
        _, do, doing = self._draw.choice(MOTION_WORDS[asked.motion])
        _, plural = self._plain_first(KIND_WORDS[asked.kind])
        who = f"two {self._draw.choice(SIZES)}{self._colour(asked.colour)} {plural}"
        return _sentence(self._draw.choice(PLURAL_SENTENCES), who=who, do=do, doing=doing, where=where)

    def _two(self, first: AskedObject, second: AskedObject, where: str) -> str:
        does, do, doing = self._draw.choice(MOTION_WORDS[first.motion])
        who, other = self._who(first), self._who(second)
        if first.motion == second.motion:
            sentence = self._draw.choice(PLURAL_SENTENCES)
            return _sentence(sentence, who=f"{who} and {other}", do=do, doing=doing, where=where)
        other_does = self._draw.choice(MOTION_WORDS[second.motion])[0]
        sentence = self._draw.choice(PAIR_SENTENCES)
        return _sentence(sentence, who=who, does=does, other=other, other_does=other_does, where=where)

    def _who(self, asked: AskedObject) -> str:
        singular, _ = self._plain_first(KIND_WORDS[asked.kind])
        words = f"{self._draw.choice(SIZES)}{self._colour(asked.colour)} {singular}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def _colour(self, name: str) -> str:
        return self._plain_first(COLOUR_WORDS[name])

    def _plain_first(self, words: Sequence[T]) -> T:
        """The plain word six times of ten, otherwise a synonym."""
        return words[0] if len(words) == 1 or self._draw.random() < 0.6 else self._draw.choice(words[1:])


def _alike(colour: str) -> set[str]:
    """The colour and those that are hard to tell from it."""
    return {colour}.union(*(pair for pair in _ALIKE if colour in pair))


def _shows(kind: str, motion: str) -> bool:
    return motion != "spinning" or kind not in _ROUND


def _sentence(pattern: str, **words: str) -> str:
    capital = {name.capitalize(): text[0].upper() + text[1:] for name, text in words.items()}
    return pattern.format(**words, **capital)
