"""The documentation's tables, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from contract.errors import ErrorCode
from handler.settings import WorkerSettings
from hunyuan.settings import ClientSettings, DeploySettings
from shim.errors import STATUS
from shim.settings import RemoteWorkerSettings, ShimSettings
from storage.settings import BucketSettings
from tools import api_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

SETTINGS: dict[str, type[BaseSettings]] = {
    "The server": ShimSettings,
    "The bucket": BucketSettings,
    "The worker": WorkerSettings,
    "A worker on another host": RemoteWorkerSettings,
    "The command line client": ClientSettings,
    "Deploying to RunPod": DeploySettings,
}


def settings_rows(settings: type[BaseSettings]) -> list[str]:
    rows = []
    for field in settings.model_fields.values():
        default = field.default
        if default is PydanticUndefined:
            shown = "required"
        elif default in (None, ()):
            shown = ""
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        rows.append(f"| `{field.validation_alias}` | {shown} | {field.description} |")
    return rows


def sections(markdown: str) -> dict[str, list[str]]:
    """The table rows under each heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in markdown.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| `"):
            found.setdefault(heading, []).append(line)
    return found


@pytest.mark.parametrize("heading", SETTINGS)
def test_every_setting_stands_in_its_table(heading: str) -> None:
    assert sections((DOCS / "settings.md").read_text())[heading] == settings_rows(SETTINGS[heading])


def test_every_variable_of_the_api_reference_is_a_setting() -> None:
    reference = (DOCS / "api-reference.md").read_text()
    documented = set(re.findall(r"^export (\w+)=", reference, re.M))
    known = {str(field.validation_alias) for model in SETTINGS.values() for field in model.model_fields.values()}
    assert documented <= known
    assert len(documented) == 9


def test_every_error_code_stands_in_its_table_with_its_status() -> None:
    tables = sections((DOCS / "errors.md").read_text())
    responses = {cells[1].strip(" `"): int(cells[2]) for row in tables["Responses"] if (cells := row.split("|"))}
    assert responses == {code.value: status for code, status in STATUS.items()}
    failures = {row.split("|")[1].strip(" `") for row in tables["Failed tasks"]}
    assert set(responses) | failures == {code.value for code in ErrorCode}


def test_every_error_code_of_the_api_reference_exists() -> None:
    reference = (DOCS / "api-reference.md").read_text()
    table = reference.partition("## Error Codes")[2].partition("---")[0].partition("## ")[0]
    codes = re.findall(r"^\| `(\w+)` \|", reference.partition("## Error Codes")[2].partition("\n## ")[0], re.M)
    assert table
    assert len(codes) == 6
    assert set(codes) <= {code.value for code in ErrorCode}


def test_the_files_that_architecture_names_exist_and_no_other() -> None:
    """The tree in docs/architecture.md lists every module of the three packages."""
    tree = (DOCS / "architecture.md").read_text().partition("## Rooms")[2].partition("```")[2].partition("```")[0]
    named = set(re.findall(r"\b(\w+)\.py\b", tree))
    modules = {
        path.stem
        for room in ("handler", "shim", "storage")
        for path in (ROOT / room).rglob("*.py")
        if path.stem != "__init__" and "migrations" not in path.parts
    }
    assert named == modules


def test_the_page_of_the_api_is_what_the_server_says_of_itself() -> None:
    assert api_page.PAGE.read_text() == api_page.page(api_page.openapi()), "make api-page writes it anew"
