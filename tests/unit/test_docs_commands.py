"""Commands, code blocks, variables and links of the pages: they parse, pass linters, and name things that exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

import hunyuan
from handler.settings import WorkerSettings
from hunyuan.cli.main import app
from hunyuan.settings import ClientSettings, DeploySettings
from shim.settings import RemoteWorkerSettings, ShimSettings
from storage.settings import BucketSettings
from tests.support.s3_servers import SCRIPTS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SETTINGS = (ShimSettings, WorkerSettings, BucketSettings, RemoteWorkerSettings, ClientSettings, DeploySettings)
VARIABLES = {str(field.validation_alias) for settings in SETTINGS for field in settings.model_fields.values()}
#: The reader copies it from infra/.env.example.
MADE_BY_THE_READER = "infra/.env"
#: Languages of the pages' code blocks. A test below checks each of them.
LANGUAGES = {"", "bash", "console", "ini", "javascript", "json", "python", "text", "yaml"}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each code block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
        yield match[1], match[2]


def code(page: Path, language: str) -> list[str]:
    return [text for found, text in blocks(page) if found == language]


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each shell command in the page's blocks, without comments and heredocs."""
    for block in code(page, "bash"):
        text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", block, flags=re.M | re.S).replace("\\\n", " ")
        for line in text.splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            try:
                words = list(lexer)
            except ValueError:  # a quotation over several lines; shellcheck still reads it
                continue
            part: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set("|&;()"):
                    if part:
                        yield part
                    part = []
                else:
                    part.append(word)


def program(words: list[str]) -> list[str]:
    """`words` from the program on, without assignments, `exec` and the like before it."""
    while words and (re.match(r"^[A-Z_][A-Z0-9_…]*=", words[0]) or words[0] in ("exec", "export", "sudo", "time")):
        words = words[1:]
    return words


by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_page
def test_every_block_is_in_a_language_that_is_checked_here(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= LANGUAGES


@by_page
def test_every_shell_block_passes_shellcheck(page: Path) -> None:
    # SC2034: a page sets variables for the reader. SC2164, SC2148: a block is not a script.
    command = [str(SCRIPTS / "shellcheck"), "--shell=bash", "--severity=warning", "--exclude=SC2034,SC2164,SC2148", "-"]
    for block in code(page, "bash"):
        done = subprocess.run(command, input=block.replace("…", "x"), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_every_script_passes_shellcheck() -> None:
    scripts = [ROOT / ".ci" / "run", *ROOT.glob("examples/*.sh"), *ROOT.glob("infra/**/*.sh")]
    done = subprocess.run(
        [str(SCRIPTS / "shellcheck"), *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@by_page
def test_every_json_and_yaml_block_can_be_read(page: Path) -> None:
    for block in code(page, "json"):
        json.loads(block)
    for block in code(page, "yaml"):
        list(yaml.safe_load_all(block))


@by_page
def test_every_python_block_compiles_and_imports_only_what_exists(page: Path) -> None:
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hunyuan":
                assert {alias.name for alias in node.names} <= set(dir(hunyuan))
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in modules:
                assert importlib.util.find_spec(module) is not None, module


@by_page
def test_every_hunyuan_command_exists_with_its_options(page: Path) -> None:
    root = typer.main.get_command(app)
    commands = [words for line in command_lines(page) if (words := program(line)) and words[0].endswith("hunyuan")]
    commands += [shlex.split(text) for text in re.findall(r"`(hunyuan [^`…]+)`", page.read_text())]
    for words in commands:
        command = root
        rest = words[1:]
        while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, " ".join(words)
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= known, " ".join(words)


@by_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for line in command_lines(page) if (words := program(line))[:1] == ["make"] and len(words) > 1}
    named |= set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    assert named <= targets


@by_page
def test_every_variable_is_a_setting(page: Path) -> None:
    named = set(re.findall(r"\b((?:HUNYUAN|BUCKET)_[A-Z][A-Z0-9_]*[A-Z0-9])\b", page.read_text()))
    assert named <= VARIABLES


@by_page
def test_every_path_in_code_spans_exists(page: Path) -> None:
    directories = r"(?:contract|handler|hunyuan|shim|storage|tools|tests|benchmarks|infra|docs|examples|\.runpod|\.ci)"
    for path in re.findall(rf"`({directories}/[A-Za-z0-9_./-]+)(?:::[^`]*)?`", page.read_text()):
        assert (ROOT / path).exists() or path == MADE_BY_THE_READER, path


@by_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://[\w.-]+\.[a-z]+(/|$)", target):
            continue  # well formed; the tests need no network
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_example_scripts_are_executable() -> None:
    for script in ROOT.glob("examples/*.sh"):
        assert os.access(script, os.X_OK), script
