"""RunPod's Hub requires a file of this name. It does what the image's command `python -u -m handler` does."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # replaces this directory, in which `handler` is this file

from handler.__main__ import main  # noqa: E402

if __name__ == "__main__":
    main()
