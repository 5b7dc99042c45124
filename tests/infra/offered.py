"""What deployment files may name: settings, commands, and where the files are."""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import typer.main
from pydantic_settings import BaseSettings

import handler.settings
import shim.settings
import storage.settings
from hunyuan.cli.main import app
from tests.infra.dockerfile import parse

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "infra" / "compose.yaml"
ENV_EXAMPLE = ROOT / "infra" / ".env.example"
KUBERNETES = ROOT / "infra" / "kubernetes"
SCRIPTS = Path(sysconfig.get_path("scripts"))

STAGES = parse(DOCKERFILE.read_text())
VERSION = version("hunyuan-video-service")
#: What starts with one of these is a setting of ours.
OUR_PREFIXES = ("HUNYUAN_", "BUCKET_")


def _variables(module: ModuleType) -> set[str]:
    return {
        str(field.validation_alias)
        for settings in vars(module).values()
        if isinstance(settings, type) and issubclass(settings, BaseSettings)
        for field in settings.model_fields.values()
    }


SETTINGS = frozenset().union(*map(_variables, (shim.settings, handler.settings, storage.settings)))
SUBCOMMANDS = frozenset(typer.main.get_group(app).commands)


def check_command(words: list[str]) -> None:
    """That it is one of ours and exists; of others, nothing is known here."""
    match words:
        case ["hunyuan", subcommand, *_]:
            assert subcommand in SUBCOMMANDS, words
        case ["python", "-u", "-m", module] | ["python", "-m", module, *_]:
            assert (ROOT / module / "__main__.py").exists(), words
        case ["hunyuan"]:
            raise AssertionError("hunyuan alone shows its help and ends")
