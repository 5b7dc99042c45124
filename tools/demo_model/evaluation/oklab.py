"""Names of colours, from pixels.

Distances are in OKLab, where equal distances look equally large. Source: https://bottosson.github.io/posts/oklab/.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

#: Colours in OKLab, float32 of shape (..., 3): lightness 0 to 1, green to red, blue to yellow.
Lab: TypeAlias = npt.NDArray[np.float32]

_RGB_TO_LMS: Final = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]], np.float32,
)  # fmt: skip
_LMS_TO_LAB: Final = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]], np.float32,
)  # fmt: skip
_LEVELS: Final = np.arange(256, dtype=np.float32) / 255
_LINEAR: Final = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)

#: What people call by each name: sRGB examples, from dark to pale. A colour has the name of its nearest example.
_EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "red": ("8b0000", "b01020", "c81e1e", "dc143c", "e53935", "ff0000", "f04040"),
    "orange": ("d2691e", "e06c10", "f57c00", "ff8c00", "ffa030", "ffb060"),
    "yellow": ("d8b400", "e6c619", "f2d024", "ffd700", "ffe135", "ffff00", "fff08c"),
    "green": ("004d00", "006400", "1b7f3b", "228b22", "2e9e4f", "3cb44b", "4caf50", "6fbf3f", "00c800", "90ee90"),
    "turquoise": ("007f7f", "009999", "17a2a2", "20b2aa", "2ac8c0", "40e0d0", "00ced1", "80e8e0"),
    "blue": ("000080", "10309a", "1e50b4", "1e5ae0", "0000ff", "2f6fe0", "4169e1", "4a90e2", "6aa8f0", "87ceeb"),
    "purple": ("4b0082", "5e2590", "6a1b9a", "800080", "8a3cc0", "8e44ad", "9370db", "a060d0", "b48ce0"),
    "pink": ("d81b70", "e83e8c", "ff1493", "ff69b4", "f078a8", "f48fb1", "ff9ec0", "ffb6c1", "ffc0cb"),
    "brown": ("4a2c12", "5c3317", "6b4423", "7b4a20", "8b4513", "8b5a2b", "966035", "a0683a"),
    "white": ("ececec", "f5f5f5", "ffffff", "faf6ee", "f0f4fa"),
    "gray": ("585858", "696969", "808080", "909090", "a0a0a0", "b4b4b4", "c4c4c4", "7a828c"),
    "black": ("000000", "101010", "1c1c1c", "282828", "1a1a22", "221a1a"),
}
COLOURS: Final = tuple(_EXAMPLES)


def lab(rgb: npt.NDArray[np.uint8]) -> Lab:
    """OKLab of sRGB pixels, (..., 3)."""
    colours: Lab = np.cbrt(_LINEAR[rgb] @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
    return colours


def distance(one: Lab, other: Lab) -> npt.NDArray[np.float32]:
    """How far apart colours look: about 0.02 is just visible, black to white is 1."""
    difference = one - other
    apart: npt.NDArray[np.float32] = np.sqrt(np.einsum("...c,...c", difference, difference))
    return apart


_NAMES: Final = tuple(name for name, examples in _EXAMPLES.items() for _ in examples)
_POINTS: Final = lab(
    np.array([list(bytes.fromhex(code)) for examples in _EXAMPLES.values() for code in examples], np.uint8)
)


def name(colour: Lab) -> str:
    """The name of one colour (3,), one of `COLOURS`."""
    return _NAMES[int(distance(_POINTS, colour).argmin())]
