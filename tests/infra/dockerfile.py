"""Parses a Dockerfile, and runs its instructions in directories, without a container engine.

Supports the instructions that our Dockerfile uses. A directory replaces /opt/hunyuan, and an empty virtual environment
of the running Python replaces the base images. Commands of the distribution (apt-get, useradd) are skipped and listed
in `Image.skipped`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_HOME = "/opt/hunyuan"
_OF_THE_DISTRIBUTION = ("apt-get", "useradd")
#: Variables of this machine that a build inherits: they tell pip how to reach its package index.
_FROM_HOST = re.compile(r"PIP_.*|HOME|LANG|SSL_CERT_FILE|\w+_proxy|\w+_PROXY")


@dataclass(frozen=True)
class Instruction:
    keyword: str
    argument: str

    @property
    def words(self) -> list[str]:
        """The words of the exec form, or of the shell form as a shell splits it."""
        if self.argument.startswith("["):
            words: list[str] = json.loads(self.argument)
            return words
        return shlex.split(self.argument)


@dataclass(frozen=True)
class Stage:
    base: str
    name: str
    instructions: tuple[Instruction, ...]

    def all(self, keyword: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]

    def last(self, keyword: str) -> Instruction:
        return self.all(keyword)[-1]


def parse(text: str) -> dict[str, Stage]:
    """The stages by name."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stages: dict[str, Stage] = {}
    for line in filter(None, lines.replace("\\\n", "").splitlines()):
        keyword, _, argument = line.partition(" ")
        if keyword == "FROM":
            base, _, name = argument.partition(" AS ")
            stages[name] = Stage(base, name, ())
            continue
        name, stage = stages.popitem()
        stages[name] = Stage(stage.base, name, (*stage.instructions, Instruction(keyword, argument.strip())))
    return stages


@dataclass
class Image:
    """A built stage. Its files are under `root`."""

    root: Path
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def here(self, text: str) -> str:
        """`text` with /opt/hunyuan replaced by its directory here."""
        return text.replace(_HOME, f"{self.root}{_HOME}")

    def path(self, inside: str) -> Path:
        return self.root / inside.lstrip("/")

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a shell command as RUN does."""
        return subprocess.run(
            ["sh", "-c", self.here(command)],
            env={**self.environment, **self.arguments, **environment},
            cwd=self.path(self.workdir),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )


class Builder:
    """Builds stages of a Dockerfile below `directory`, each once."""

    def __init__(self, stages: Mapping[str, Stage], context: Path, directory: Path) -> None:
        self._stages = stages
        self._context = context
        self._directory = directory
        self._built: dict[str, Image] = {}
        subprocess.run([sys.executable, "-m", "venv", directory / "base"], check=True)

    def build(self, name: str) -> Image:
        """Builds stage `name` and the stages that it copies from. Fails with the output of a command that fails."""
        if name in self._built:
            return self._built[name]
        host = {variable: value for variable, value in os.environ.items() if _FROM_HOST.fullmatch(variable)}
        path = f"{self._directory}/base/bin:/usr/bin:/bin"
        # Compiling every module takes half a minute; Python compiles on import instead. pip reads 0 as "don't compile".
        image = Image(self._directory / name, {**host, "PATH": path, "PIP_NO_COMPILE": "0"})
        image.root.mkdir()
        for instruction in self._stages[name].instructions:
            self._follow(image, instruction)
        self._built[name] = image
        return image

    def _follow(self, image: Image, instruction: Instruction) -> None:
        match instruction.keyword:
            case "RUN":
                self._run(image, instruction.argument)
            case "COPY":
                self._copy(image, instruction.words)
            case "ENV":
                image.environment |= _assignments(image, instruction)
                image.environment.pop(
                    "PIP_NO_CACHE_DIR", None
                )  # a cache would enlarge a layer; here it saves downloads
            case "ARG":
                image.arguments |= _assignments(image, instruction)
            case "WORKDIR":
                image.workdir = instruction.argument
                image.path(image.workdir).mkdir(parents=True, exist_ok=True)
            case "CMD":
                image.command = instruction.words
            case "HEALTHCHECK":
                _, _, command = instruction.argument.partition("CMD ")
                image.healthcheck = Instruction("CMD", command).words
            case "LABEL" | "USER" | "EXPOSE" | "STOPSIGNAL" | "ENTRYPOINT":
                pass
            case other:
                raise AssertionError(f"{other}: this parser does not support the instruction")

    def _run(self, image: Image, command: str) -> None:
        if command.startswith(_OF_THE_DISTRIBUTION):
            image.skipped.append(command.split()[0])
            return
        done = image.run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def _copy(self, image: Image, words: list[str]) -> None:
        source = self._context
        if words[0].startswith("--from="):
            source = self.build(words.pop(0).removeprefix("--from=")).root
        *names, target = words
        to = image.path(image.workdir) / target if target.startswith(".") else image.path(target)
        for name in names:
            found = source / name.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(found, to)


def _assignments(image: Image, instruction: Instruction) -> dict[str, str]:
    """The pairs of `NAME=value ...`, with $NAME and ${NAME:+value} expanded."""
    known = {**image.environment, **image.arguments}

    def value_of(match: re.Match[str]) -> str:
        name, alternative = match["name"] or match["plain"], match["alternative"]
        return known.get(name, "") if alternative is None else alternative * bool(known.get(name))

    pattern = re.compile(r"\$(?:\{(?P<name>\w+)(?::\+(?P<alternative>[^}]*))?\}|(?P<plain>\w+))")
    pairs = (word.partition("=") for word in instruction.words)
    return {name: image.here(pattern.sub(value_of, value)) for name, _, value in pairs}
