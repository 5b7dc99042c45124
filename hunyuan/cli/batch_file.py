"""The prompts of `hunyuan batch`, from text, CSV or JSON Lines. Every request is checked before one is submitted."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final

from contract.job import InvalidInputError, JobRequest, parse_request, plain_type
from hunyuan.cli.exits import CommandError, ExitCode
from hunyuan.images import local_image

#: What a cell of a spreadsheet may have for true and false.
_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
#: Errors that are printed; a file with the wrong format has one in every line.
_SHOWN: Final = 10


@dataclass(frozen=True)
class Row:
    """One video of a batch. `line` is where the file asks for it."""

    line: int
    request: Mapping[str, object]


class RowError(ValueError):
    """The row is not a request."""


def read(path: Path, options: Mapping[str, object]) -> list[Row]:
    """The requests of a file, in its order. A row's own fields go before `options`.

    Raises:
        CommandError: the file can't be read, is empty, or has a request that the API does not take.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandError(f"cannot read {path}: {exc}", ExitCode.USAGE) from exc
    kinds = {".csv": _of_csv, ".jsonl": _of_json_lines, ".ndjson": _of_json_lines}
    rows, errors = [], []
    for line, fields in kinds.get(path.suffix.lower(), _of_text)(text):
        try:
            rows.append(Row(line, _request(fields, options)))
        except (RowError, InvalidInputError, OSError) as exc:
            errors.append(f"{path}, line {line}: {exc}")
    if errors:
        more = [f"and {len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else []
        raise CommandError("\n".join(["nothing was submitted", *errors[:_SHOWN], *more]), ExitCode.USAGE)
    if not rows:
        raise CommandError(f"{path} has no prompts", ExitCode.USAGE)
    return rows


def _request(fields: object, options: Mapping[str, object]) -> dict[str, object]:
    if isinstance(fields, Exception):
        raise fields
    if not isinstance(fields, Mapping):
        raise RowError(f"expected a JSON object with a prompt, got {json.dumps(fields)[:60]}")
    request = {**options, **fields}
    try:
        is_file = local_image(request.get("image")) is not None
        parse_request({name: value for name, value in request.items() if not (is_file and name == "image")})
    except ValueError as exc:
        raise RowError(str(exc)) from exc
    return request


def _of_text(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _of_json_lines(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                fields = json.loads(line)
            except ValueError as exc:
                fields = RowError(f"not JSON: {exc}")
            yield number, {"prompt": fields} if isinstance(fields, str) else fields


def _of_csv(text: str) -> Iterator[tuple[int, object]]:
    """The first line names the fields; an empty cell leaves its field out."""
    reader = csv.DictReader(StringIO(text, newline=""), restkey="", strict=True)
    if "prompt" not in (reader.fieldnames or ()):
        yield 1, RowError("the first line must name the columns, and one of them must be prompt")
        return
    for cells in reader:
        yield reader.line_num, _fields_of_cells(cells)


def _fields_of_cells(cells: Mapping[str, Any]) -> object:
    if "" in cells:
        return RowError("more cells than columns; a prompt with a comma needs quotation marks around it")
    try:
        return {name: _value(name, cell.strip()) for name, cell in cells.items() if cell and cell.strip()}
    except RowError as exc:
        return exc


def _value(name: str, cell: str) -> object:
    kind = plain_type(JobRequest.model_fields[name].annotation) if name in JobRequest.model_fields else str
    if kind is bool:
        if cell.lower() not in _BOOLEANS:
            raise RowError(f"{name} must be true or false; got {cell!r}")
        return _BOOLEANS[cell.lower()]
    if kind not in (int, float):
        return cell
    try:
        return kind(cell)
    except ValueError:
        raise RowError(f"{name} must be a number; got {cell!r}") from None
