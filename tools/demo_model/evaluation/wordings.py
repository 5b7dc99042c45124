"""The words of the held-out prompts: names, their synonyms, and sentences."""

from collections.abc import Mapping
from typing import Final

#: The plain name comes first and is used most.
COLOUR_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden", "lemon yellow"),
    "green": ("green", "emerald", "leaf green"),
    "turquoise": ("turquoise", "teal", "aqua"),
    "blue": ("blue", "azure", "cobalt blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy pink", "hot pink"),
    "brown": ("brown", "chocolate brown"),
    "white": ("white", "snow-white"),
    "gray": ("gray", "grey"),
    "black": ("black", "jet-black"),
}
#: Singular and plural.
KIND_WORDS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "ball": (("ball", "balls"), ("sphere", "spheres"), ("disc", "discs")),
    "square": (("square", "squares"), ("block", "blocks")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"), ("five-pointed star", "five-pointed stars")),
    "heart": (("heart", "hearts"),),
    "ring": (("ring", "rings"), ("hoop", "hoops")),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
    "diamond": (("diamond", "diamonds"), ("rhombus", "rhombuses")),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
    "fish": (("fish", "fish"),),
    "boat": (("boat", "boats"), ("sailboat", "sailboats")),
    "sun": (("sun", "suns"),),
    "house": (("house", "houses"), ("cottage", "cottages")),
    "tree": (("tree", "trees"), ("fir tree", "fir trees"), ("pine", "pines")),
}
#: "... drifts leftwards", "... drift leftwards" and "... drifting leftwards".
MOTION_WORDS: Final[Mapping[str, tuple[tuple[str, str, str], ...]]] = {
    "left": (
        ("moves to the left", "move to the left", "moving to the left"),
        ("drifts leftwards", "drift leftwards", "drifting leftwards"),
        ("glides from right to left", "glide from right to left", "gliding from right to left"),
    ),
    "right": (
        ("moves to the right", "move to the right", "moving to the right"),
        ("drifts rightwards", "drift rightwards", "drifting rightwards"),
        ("glides from left to right", "glide from left to right", "gliding from left to right"),
    ),
    "up": (
        ("moves upwards", "move upwards", "moving upwards"),
        ("rises slowly", "rise slowly", "rising slowly"),
        ("floats up", "float up", "floating up"),
    ),
    "down": (
        ("moves downwards", "move downwards", "moving downwards"),
        ("sinks slowly", "sink slowly", "sinking slowly"),
        ("comes down", "come down", "coming down"),
    ),
    "circling": (
        ("moves in a circle", "move in circles", "moving in a circle"),
        ("circles around", "circle around", "circling around"),
    ),
    "bouncing": (
        ("bounces up and down", "bounce up and down", "bouncing up and down"),
        ("hops on the spot", "hop on the spot", "hopping on the spot"),
    ),
    "growing": (
        ("grows larger", "grow larger", "growing larger"),
        ("gets bigger and bigger", "get bigger and bigger", "getting bigger and bigger"),
    ),
    "shrinking": (
        ("shrinks", "shrink", "shrinking"),
        ("gets smaller and smaller", "get smaller and smaller", "getting smaller and smaller"),
    ),
    "spinning": (
        ("spins around", "spin around", "spinning around"),
        ("rotates in place", "rotate in place", "rotating in place"),
    ),
    "still": (
        ("stays perfectly still", "stay perfectly still", "staying perfectly still"),
        ("does not move", "do not move", "resting motionless"),
    ),
}
#: Of backgrounds with names of their own.
SCENE_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "sea": ("over the ocean", "at sea", "above the waves of the sea"),
    "meadow": ("over a green meadow", "on a grassy field", "above the grass of a meadow"),
    "snow": ("in a snowy landscape", "over fresh snow", "on a field of snow"),
    "desert": ("in the desert", "over the sand of a desert", "above desert dunes"),
    "night": ("in a starry night sky", "at night under the stars", "against the night sky"),
    "sky": ("in a clear blue sky", "high up in the sky", "against the bright sky"),
    "sunset": ("at sunset", "in front of a sunset sky", "in the evening sky at sunset"),
}
#: With {scene} for a colour.
PLAIN_WORDS: Final = (
    "on a {scene} background",
    "against a plain {scene} backdrop",
    "in front of a solid {scene} background",
)
#: With {top} and {bottom} for colours.
GRADIENT_WORDS: Final = (
    "on a background that fades from {top} at the top to {bottom} at the bottom",
    "against a gradient from {top} to {bottom}",
)
SIZES: Final = ("", "", "", "small ", "little ", "large ", "big ", "medium-sized ")

#: With {who}, {does} (or {doing}), {where}. {Who} and {Where} begin a sentence.
SENTENCES: Final = (
    "{Who} {does} {where}",
    "{Where}, {who} {does}",
    "{Who} {doing} {where}",
    "A short clip of {who} {doing} {where}",
    "We see {who} {where}. Slowly, it unfolds: {who} {does}.",
    "{Where} there is {who}, {doing}",
    "An animation in which {who} {does} {where}",
    "{Who}, {where}, {does}.",
    "Show me {who} {doing} {where}, please",
    "Picture {who}: it is {doing} {where}",
)
#: The same for two objects with one motion.
PLURAL_SENTENCES: Final = (
    "{Who} {do} {where}",
    "{Where}, {who} {do}",
    "{Who} {doing} {where}",
    "A short clip of {who} {doing} {where}",
    "{Where} there are {who}, both {doing}",
    "An animation in which {who} {do} {where}",
    "Show me {who} {doing} {where}, please",
    "{Who} {do} together {where}",
)
#: For two objects with a motion each.
PAIR_SENTENCES: Final = (
    "{Who} {does} and {other} {other_does} {where}",
    "{Where}, {who} {does} while {other} {other_does}",
)
