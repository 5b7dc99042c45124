"""The evaluation of the demo model names what clips show that are drawn here, and compares it with prompts."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from contract.job import MAX_PROMPT_LENGTH, MIN_PROMPT_LENGTH
from tests.support.drawn_clips import COLOURS, FPS, GRADIENTS, SCENES, Drawn, clip, noisy, with_caption
from tools.demo_model.evaluation import oklab
from tools.demo_model.evaluation.backgrounds import Background
from tools.demo_model.evaluation.foreground import label
from tools.demo_model.evaluation.motions import MOTIONS
from tools.demo_model.evaluation.prompts import ASKED_KINDS, AskedObject, Prompt, held_out
from tools.demo_model.evaluation.scores import judge, table, total
from tools.demo_model.evaluation.seen import Seen, SeenObject, look_at
from tools.demo_model.evaluation.silhouettes import KINDS
from tools.demo_model.evaluation.wordings import SCENE_WORDS

TOOLS = Path(__file__).parents[3] / "tools" / "demo_model" / "evaluation"
#: The modules that the analysis consists of.
ANALYSIS = ("oklab", "foreground", "silhouettes", "motions", "backgrounds", "seen")

LEFT, RIGHT = (0.25, 0.5), (0.76, 0.5)
#: Every kind, motion and colour.
CLIPS: list[tuple[str, list[Drawn]]] = [
    ("sea", [Drawn("red", "boat", "right", 0.19, LEFT), Drawn("yellow", "sun", "right", 0.13, RIGHT)]),
    ("meadow", [Drawn("white", "house", "still", 0.19, LEFT), Drawn("orange", "ball", "bouncing", 0.13, RIGHT)]),
    ("snow", [Drawn("green", "tree", "shrinking", 0.19, LEFT), Drawn("black", "triangle", "down", 0.19, RIGHT)]),
    ("desert", [Drawn("purple", "star", "spinning", 0.25, LEFT), Drawn("turquoise", "moon", "circling", 0.19, RIGHT)]),
    ("night", [Drawn("pink", "heart", "up", 0.13, LEFT), Drawn("white", "diamond", "up", 0.13, RIGHT)]),
    ("gray", [Drawn("brown", "cross", "growing", 0.13, LEFT), Drawn("blue", "ring", "still", 0.27, RIGHT)]),
    ("yellow to purple", [Drawn("gray", "fish", "left", 0.19, LEFT), Drawn("green", "square", "left", 0.13, RIGHT)]),
    ("black", [Drawn("red", "ball", "down", 0.19, LEFT), Drawn("red", "ball", "down", 0.19, RIGHT)]),
]
#: Clips with noise, blur, JPEG's losses and a caption.
SPOILT = ("meadow", "night", "yellow to purple")


@pytest.mark.parametrize(("scene", "drawn"), CLIPS, ids=[scene for scene, _ in CLIPS])
def test_a_drawn_clip_is_seen_as_it_is(scene: str, drawn: list[Drawn]) -> None:
    frames = clip(scene, drawn)
    if scene in SPOILT:
        frames = with_caption(noisy(frames), "demo model: a red ball")
    seen = look_at(frames, FPS)
    asked = Counter((each.colour, each.kind, each.motion) for each in drawn)
    assert Counter((each.colour, each.kind, each.motion) for each in seen.objects) == asked
    assert scene in seen.background.names


@pytest.mark.parametrize("scene", [*COLOURS, *SCENES, *GRADIENTS, "night", "white to blue", "black to yellow"])
def test_a_background_has_its_name(scene: str) -> None:
    names = look_at(clip(scene, [], size=(72, 160), seconds=1), FPS).background.names
    assert scene in names
    assert not names & {*SCENES, *GRADIENTS, "night"} - {scene, "sky"}


def test_a_picture_without_objects_shows_none() -> None:
    assert look_at(clip("night", []), FPS).objects == ()


def test_the_drawn_clips_cover_every_colour_kind_and_motion() -> None:
    objects = [each for _, drawn in CLIPS for each in drawn]
    assert {each.colour for each in objects} == set(COLOURS) == set(oklab.COLOURS)
    assert {each.kind for each in objects} == set(KINDS)
    assert {each.motion for each in objects} == set(MOTIONS)


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_has_the_name_that_people_give_it(name: str) -> None:
    assert oklab.name(oklab.lab(np.array(COLOURS[name], np.uint8))) == name


def test_areas_that_touch_have_one_number() -> None:
    mask = np.array([[1, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], bool)
    assert label(mask).tolist() == [[1, 0, 1, 0, 2], [1, 1, 1, 0, 0], [0, 0, 0, 0, 3]]


def test_the_analysis_imports_nothing_of_the_generator() -> None:
    allowed = {f"tools.demo_model.evaluation.{module}" for module in ANALYSIS}
    for module in ANALYSIS:
        nodes = list(ast.walk(ast.parse((TOOLS / f"{module}.py").read_text())))
        imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                package = node.module or ""
                imported |= {
                    f"{package}.{name.name}" if package == "tools.demo_model.evaluation" else package
                    for name in node.names
                }
        ours = {name for name in imported if name.partition(".")[0] in ("tools", "handler", "contract", "tests")}
        assert ours <= allowed, module


def test_the_held_out_prompts_are_balanced_and_always_the_same() -> None:
    prompts = held_out()
    assert prompts == held_out()
    assert prompts != held_out(seed=2)
    assert len({prompt.text for prompt in prompts}) == 200
    assert all(MIN_PROMPT_LENGTH <= len(prompt.text) <= MAX_PROMPT_LENGTH for prompt in prompts)
    objects = [each for prompt in prompts for each in prompt.objects]
    for names, counted in (
        (oklab.COLOURS, Counter(each.colour for each in objects)),
        (ASKED_KINDS, Counter(each.kind for each in objects)),
        (MOTIONS, Counter(each.motion for each in objects)),
    ):
        assert set(counted) == set(names)
        assert max(counted.values()) < 2.5 * min(counted.values())
    assert {prompt.scene for prompt in prompts} > {*SCENE_WORDS, *oklab.COLOURS}
    assert 60 <= sum(len(prompt.objects) == 2 for prompt in prompts) <= 90


def seen_object(words: str) -> SeenObject:
    colour, kind, motion = words.split()
    return SeenObject(colour, kind, motion, place=(0.5, 0.5))


def judged(asked: list[str], seen: list[str], scene: str = "sea") -> dict[str, bool]:
    prompt = Prompt("", tuple(AskedObject(*words.split()) for words in asked), "sea")
    return judge(prompt, Seen(tuple(map(seen_object, seen)), Background(frozenset({scene, "blue"}))))


def test_all_is_right_in_whichever_order_the_objects_are_seen() -> None:
    right = judged(["red ball left", "blue star still"], ["blue star still", "red ball left"])
    assert list(right) == [
        "object colour", "background", "direction of motion", "other motion", "kind", "number of objects",
    ]  # fmt: skip
    assert all(right.values())


def test_one_wrong_object_of_two_is_wrong() -> None:
    right = judged(["red ball left", "blue star left"], ["blue star left", "red boat right"])
    assert {aspect for aspect, value in right.items() if not value} == {"kind", "direction of motion"}
    assert "other motion" not in right


def test_a_missing_object_counts_against_the_number_alone() -> None:
    right = judged(["red ball left", "blue star left"], ["blue star left"])
    assert {aspect for aspect, value in right.items() if not value} == {"number of objects"}


def test_where_nothing_is_seen_all_is_wrong_but_the_background() -> None:
    assert {aspect for aspect, value in judged(["red ball left"], []).items() if value} == {"background"}


def test_a_score_under_its_limit_is_named_in_the_table() -> None:
    right, wrong = judged(["red ball left"], ["red ball left"]), judged(["red ball left"], ["red star up"], "meadow")
    scores = total([right] * 9 + [wrong])
    assert {aspect for aspect, score in scores.items() if not score.passes} == {"background"}
    assert scores["direction of motion"].share == 0.9
    lines = table(scores).splitlines()
    assert [line.split()[0] for line in lines if line.endswith("missed")] == ["background"]
