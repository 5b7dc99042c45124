"""The tables, lists and words of the documentation match the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from contract.errors import ErrorCode
from contract.settings import KNOWN_VARIABLES
from shim.errors import STATUS, ServerErrorCode
from tests.faults.forms import KINDS
from tools import api_page, plan_page, settings_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: The packages whose files docs/architecture.md lists.
PACKAGES = ("contract", "storage", "handler", "shim", "hunyuan", "tools")
#: Pages that we write. docs/api-reference.md is the given contract, and docs/api.md is generated.
WRITTEN = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted(DOCS.glob("*.md")) if page.name not in ("api-reference.md", "api.md")),
]
#: Private metaphors that no page uses. The glossary has the words that replace them.
RETIRED_WORDS = (
    r"bells?|rings?|life|minds?|rooms?|tether\w*|settles?d?|settling|patience|blameless(?:ly)?|lapses?d?|frenzy|told|"
    r"at work|the shim|is none|else as it was|what it is at|what they are at"
)
#: Names that the code no longer uses, because each needed its file to be understood.
RETIRED_NAMES = (
    r"look_again|forget_workers?|blameless|tether|Patience|rings|stops|use|"
    r"_held|_kept|_known|_insistently|_patiently|_unhurried|_tell|_settle"
)


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


@pytest.mark.parametrize("heading", settings_page.SETTINGS)
def test_every_setting_is_in_its_table(heading: str) -> None:
    rows = sections(settings_page.table(settings_page.SETTINGS[heading]))[""]
    assert sections((DOCS / "settings.md").read_text())[heading] == rows
    assert [row.split("`")[1] for row in rows] == [
        field.validation_alias for field in settings_page.SETTINGS[heading].model_fields.values()
    ]


def test_the_page_of_the_settings_matches_the_settings_classes() -> None:
    text = settings_page.PAGE.read_text()
    assert text == settings_page.page(text), "python -m tools.settings_page writes the tables"


def test_the_tables_of_the_plan_match_the_plan() -> None:
    text = plan_page.PAGE.read_text()
    assert text == plan_page.page(text), "python -m tools.plan_page writes the tables"
    assert "| fast | 1080p 10 s | 20 GB |" in text


def test_no_program_warns_of_a_variable_that_is_a_setting() -> None:
    """`contract.settings` lists the variables of every program."""
    fields = [field for model in settings_page.SETTINGS.values() for field in model.model_fields.values()]
    named = {name for field in fields if (name := str(field.validation_alias)).startswith("HUNYUAN_")}
    assert named <= KNOWN_VARIABLES, named - KNOWN_VARIABLES


def test_every_variable_of_the_api_reference_is_a_setting() -> None:
    reference = (DOCS / "api-reference.md").read_text()
    documented = set(re.findall(r"^export (\w+)=", reference, re.M))
    known = {
        str(field.validation_alias)
        for model in settings_page.SETTINGS.values()
        for field in model.model_fields.values()
    }
    assert documented <= known
    assert len(documented) == 9


def test_every_error_code_is_in_its_table_with_its_status() -> None:
    tables = sections((DOCS / "errors.md").read_text())
    responses = {cells[1].strip(" `"): int(cells[2]) for row in tables["Responses"] if (cells := row.split("|"))}
    assert responses == {code.value: status for code, status in STATUS.items()}
    failures = {row.split("|")[1].strip(" `") for row in tables["Failed tasks"]}
    assert set(responses) | failures == {code.value for code in (*ErrorCode, *ServerErrorCode)}


def test_every_error_code_of_the_api_reference_exists() -> None:
    reference = (DOCS / "api-reference.md").read_text()
    table = reference.partition("## Error Codes")[2].partition("---")[0].partition("## ")[0]
    codes = re.findall(r"^\| `(\w+)` \|", reference.partition("## Error Codes")[2].partition("\n## ")[0], re.M)
    assert table
    assert len(codes) == 6
    assert set(codes) <= {code.value for code in (*ErrorCode, *ServerErrorCode)}


def listed_files(tree: str) -> set[str]:
    """The paths of a tree drawn with an indentation of two spaces: directories end in a slash, files in .py."""
    paths, parents = set(), list[tuple[int, str]]()
    for line in tree.splitlines():
        match = re.match(r"( *)([\w.]+/|\w+\.py)(?= |$)", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = "".join(parent for _, parent in parents) + name
        if name.endswith("/"):
            parents.append((indent, name))
        else:
            assert path not in paths, f"{path} is listed twice"
            paths.add(path)
    return paths


def test_architecture_lists_every_file_of_the_packages_and_no_other() -> None:
    tree = (DOCS / "architecture.md").read_text().partition("## Files")[2].partition("```")[2].partition("```")[0]
    modules = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.stem != "__init__" and "migrations" not in path.parts
    }
    assert listed_files(tree) == modules


def test_every_function_that_architecture_names_exists() -> None:
    """`storage/videos.py:put_video` names a function or method of that file."""
    text = (DOCS / "architecture.md").read_text()
    named = re.findall(r"\b([a-z_]+(?:/[a-z_0-9]+)*\.py):(?:\w+\.)*(\w+)", text)
    assert len(named) >= 20
    for path, name in named:
        assert re.search(rf"\b(?:def|class) {name}\b", (ROOT / path).read_text()), f"{path}:{name}"


def test_every_word_of_the_glossary_is_used() -> None:
    glossary = DOCS / "glossary.md"
    words = re.findall(r"^\*\*(.+?)\*\*", glossary.read_text(), re.M)
    assert len(words) == len(set(words)) >= 20
    assert words == sorted(words, key=str.lower)
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    text = " ".join(path.read_text() for path in [*files, *WRITTEN] if path != glossary).lower()
    for word in words:
        assert re.search(rf"\b{re.escape(word.lower())}s?\b", text), word


def test_readme_and_architecture_link_to_the_glossary() -> None:
    assert "(docs/glossary.md)" in (ROOT / "README.md").read_text()
    assert "(glossary.md)" in (DOCS / "architecture.md").read_text()


def test_contributing_lists_every_kind_of_fault() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## The fault suite")[2]
    assert re.findall(r"^\| ([a-z ]+) \| [A-Z]", section, re.M) == list(KINDS)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_no_page_uses_a_retired_word_or_name(page: Path) -> None:
    prose = re.sub(r"\bHUNYUAN_STORE_PATIENCE\b", "", page.read_text())
    assert re.findall(rf"(?i)(?<![\w-])(?:{RETIRED_WORDS})(?![\w-])", prose) == []
    assert re.findall(rf"`(?:{RETIRED_NAMES})\b", prose) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_defines_a_retired_name(package: str) -> None:
    """Functions, classes, variables, parameters and attributes; words in texts are free."""
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = {getattr(node, key, None) for node in ast.walk(tree) for key in ("name", "id", "arg", "attr")}
        retired = {name for name in named if isinstance(name, str) and re.fullmatch(RETIRED_NAMES, name)}
        assert retired == set(), path


def test_the_page_of_the_api_matches_the_openapi_document() -> None:
    assert api_page.PAGE.read_text() == api_page.page(api_page.openapi()), "make api-page writes it"
