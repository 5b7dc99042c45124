"""Names of files and directories in a checkpoint, in diffusers' layout and in the original one."""

import json
from pathlib import Path
from typing import Final

from handler.weights.errors import WeightsError

TRANSFORMER: Final = "transformer"
UPSAMPLER: Final = "upsampler"
CONFIG_FILE: Final = "config.json"
PIPELINE_FILE: Final = "model_index.json"
INDEX_FILES: Final = "*.safetensors.index.json"


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names, sorted.

    Raises:
        WeightsError: it is not an index of shards.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [index.parent / name for name in sorted(names)]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightsError(f"{index} is not an index of shards; delete it and run the same command again") from exc
