"""Compares what prompts ask for with what their videos show."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

from tools.demo_model.evaluation.motions import DIRECTIONS
from tools.demo_model.evaluation.prompts import AskedObject, Prompt
from tools.demo_model.evaluation.seen import Seen, SeenObject

#: What is judged, and the share of the prompts in which it must be right. None: reported only.
LIMITS: Final[dict[str, float | None]] = {
    "object colour": 0.95,
    "background": 0.95,
    "direction of motion": 0.90,
    "other motion": None,
    "kind": 0.80,
    "number of objects": 0.80,
}

Pair = tuple[AskedObject, SeenObject]


@dataclass(frozen=True)
class Score:
    """In how many prompts an aspect is right, of those that ask for it."""

    right: int
    of: int
    limit: float | None

    @property
    def share(self) -> float:
        """From 0 to 1; 1 if no prompt asks for it."""
        return self.right / self.of if self.of else 1.0

    @property
    def passes(self) -> bool:
        return self.limit is None or self.share >= self.limit


def judge(prompt: Prompt, seen: Seen) -> dict[str, bool]:
    """Whether each aspect that the prompt asks for is right.

    An aspect is right if it is so for every asked object that has a seen one as its partner. A missing or an additional
    object counts as a wrong number, and not against the rest. Where nothing is seen, all is wrong but the background.
    """
    pairs = _pairs(prompt.objects, seen.objects)
    judged = {
        "object colour": _all(pairs, lambda asked, shown: asked.colour == shown.colour),
        "background": prompt.scene in seen.background.names,
        "kind": _all(pairs, lambda asked, shown: asked.kind == shown.kind),
        "number of objects": len(prompt.objects) == len(seen.objects),
    }
    for aspect, directed in (("direction of motion", True), ("other motion", False)):
        if any((asked.motion in DIRECTIONS) is directed for asked in prompt.objects):
            moving = [pair for pair in pairs if (pair[0].motion in DIRECTIONS) is directed]
            judged[aspect] = _all(moving, lambda asked, shown: asked.motion == shown.motion)
    return {aspect: judged[aspect] for aspect in LIMITS if aspect in judged}


def _all(pairs: Sequence[Pair], right: Callable[[AskedObject, SeenObject], bool]) -> bool:
    return bool(pairs) and all(right(asked, seen) for asked, seen in pairs)


def _pairs(asked: Sequence[AskedObject], seen: Sequence[SeenObject]) -> list[Pair]:
    """Each asked object with a seen one, as many as there are, so that most of their properties agree."""
    if len(asked) <= len(seen):
        choices = [list(zip(asked, order, strict=True)) for order in permutations(seen, len(asked))]
    else:
        choices = [list(zip(order, seen, strict=True)) for order in permutations(asked, len(seen))]
    return max(choices, key=lambda pairs: sum(_agreement(*pair) for pair in pairs))


def _agreement(asked: AskedObject, seen: SeenObject) -> float:
    """How much agrees; colour first, which is the easiest to see."""
    return 1.1 * (asked.colour == seen.colour) + (asked.kind == seen.kind) + (asked.motion == seen.motion)


def total(judged: Iterable[dict[str, bool]]) -> dict[str, Score]:
    """The score of every aspect over all prompts."""
    each = list(judged)
    scores = {}
    for aspect, limit in LIMITS.items():
        right = [one[aspect] for one in each if aspect in one]
        scores[aspect] = Score(sum(right), len(right), limit)
    return scores


def share_right(judged: Iterable[dict[str, bool]]) -> float:
    """The share of all judged aspects that are right, from 0 to 1."""
    values = [value for one in judged for value in one.values()]
    return sum(values) / max(len(values), 1)


def table(scores: dict[str, Score]) -> str:
    """The scores in columns."""
    lines = [f"{'':22}{'right':>12}{'share':>9}{'limit':>9}"]
    for aspect, score in scores.items():
        limit = f"{score.limit:.0%}" if score.limit is not None else "none"
        missed = "" if score.passes else "  missed"
        lines.append(f"{aspect:22}{f'{score.right} of {score.of}':>12}{score.share:>9.1%}{limit:>9}{missed}")
    return "\n".join(lines)
