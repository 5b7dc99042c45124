"""`make settings-page`: the tables of docs/settings.md, from the descriptions of the settings classes.

The text around the tables is written by hand. A new settings class needs a heading there and a line in `SETTINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from handler.settings import WorkerSettings
from hunyuan.settings import ClientSettings, DeploySettings
from shim.settings import RemoteWorkerSettings, ShimSettings
from storage.settings import BucketSettings

PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"
#: The heading of each table, and the settings that it lists.
SETTINGS: Final[Mapping[str, type[BaseSettings]]] = {
    "The server": ShimSettings,
    "The bucket": BucketSettings,
    "The worker": WorkerSettings,
    "A worker on another host": RemoteWorkerSettings,
    "The command line client": ClientSettings,
    "Deploying to RunPod": DeploySettings,
}
_TABLE: Final = re.compile(r"^\| variable \|.*?(?=^(?!\|)|\Z)", re.M | re.S)


def page(current: str) -> str:
    """`current` with the table under each heading of `SETTINGS` written anew."""
    head, *sections = re.split(r"^(?=## )", current, flags=re.M)
    return head + "".join(_section(section) for section in sections)


def _section(section: str) -> str:
    heading = section.partition("\n")[0].removeprefix("## ")
    return _TABLE.sub(lambda _: table(SETTINGS[heading]), section)


def table(settings: type[BaseSettings]) -> str:
    """A row for each variable: name, default, description."""
    rows = (
        f"| `{field.validation_alias}` | {_default(field)} | {field.description} |"
        for field in settings.model_fields.values()
    )
    return "\n".join(["| variable | default | |", "|---|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, ()):
        return ""
    if isinstance(field.default, tuple):
        return f"`{','.join(map(str, field.default))}`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
