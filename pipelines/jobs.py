"""Job files: what to draw, one picture or clip a job."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.pipelines.clip import KINDS
from dma_diffusers.pipelines.files import read_text

_NAME = 200  # bytes of a file's name at most: systems allow 255, and an unfinished file has more in its name


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture or clip, as a file asks for it; None is for what neither it nor the command line says.

    where: the job's place in its file, for messages. number: counted from 1, over all jobs of the file.
    output: a file's name, without a folder. model: local folder or hub id, "demo" or "demo-video".
    size: (width, height) in pixels. fps: frames per second. image: the file of a picture to start from.
    config: how attention runs.
    """

    where: str
    number: int
    prompt: str
    output: str | None = None
    model: str | None = None
    seed: int = 0
    steps: int | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    image: str | None = None
    negative_prompt: str | None = None
    config: DMAConfig


@dataclass(frozen=True)
class Failure:
    """A job that was not drawn, by its number and place, and why, in one line."""

    number: int
    where: str
    error: str


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Job], list[Failure]]:
    """The jobs of a file, and what is wrong with those that are none.

    .jsonl: one object a line. .csv: a table with a header, whose empty cells say nothing. .yaml, .yml: a list of
    mappings. A job has `prompt`, and perhaps other fields of `Job`, with size as "WxH" or one number for a square,
    and what `DMAConfig.from_fields` takes but `model`. Empty text and null say nothing.
    defaults: fields of every job that does not give them; where a job gives a preset, it chooses its DMAConfig alone,
        and frames and fps are not for jobs whose output is a picture.
    Raises ValueError where the file is of no such kind, holds nothing, or the defaults are no fields of jobs, OSError
    where a file cannot be read.
    """
    readers = {".jsonl": _json_lines, ".csv": _table, ".yaml": _list, ".yml": _list}
    text = read_text(path, readers, "jobs")
    try:
        entries = list(readers[path.suffix](text))
    except (ValueError, csv.Error, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not entries:
        raise ValueError(f"{path} holds no jobs")
    parse({"prompt": "any"}, defaults)
    jobs, failures = [], []
    for number, (where, entry) in enumerate(entries, 1):
        try:
            if isinstance(entry, Exception):
                raise entry
            jobs.append(parse(entry, defaults, where, number))
        except (ValueError, TypeError, OSError) as error:
            failures.append(Failure(number, where, first_line(error)))
    return jobs, failures


def parse(entry: Any, defaults: Mapping[str, Any], where: str = "job 1", number: int = 1) -> Job:
    """The job that an entry of a file says, as `read_jobs` has it.

    Raises ValueError, TypeError or, for a policy file, OSError for what is none.
    """
    if not isinstance(entry, dict):
        raise ValueError('a job maps fields to values, as in {"prompt": "a cat"}')
    own = {str(name).strip().lower(): value for name, value in entry.items() if value not in (None, "")}
    if unknown := own.keys() - _READERS.keys() - _CONFIG:
        known = ", ".join([*_READERS, *sorted(_CONFIG)])
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}; there are {known}")
    others = _CONFIG if "preset" in own else set()
    if Path(str(own.get("output", ""))).suffix.lower() not in ("", *KINDS):
        others = others | {"frames", "fps"}
    given = {name: value for name, value in defaults.items() if name not in others} | own
    if "prompt" not in given:
        raise ValueError("a job needs a prompt")
    values: dict[str, Any] = {
        name: _READERS[name](name, value) for name, value in given.items() if name in _READERS
    }
    config = DMAConfig.from_fields({name: value for name, value in given.items() if name in _CONFIG})
    return Job(where=where, number=number, config=config, **values)


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # splitlines would cut at U+2028, too
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                entry = ValueError(f"it is not JSON: {error}")
            yield f"line {number}", entry


def _table(text: str) -> Iterator[tuple[str, Any]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip().lower() for name in next(rows, ())]
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise ValueError(f"the header has {', '.join(sorted(twice))} more than once")
    while True:
        where = f"line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield where, ValueError(f"it is not CSV: {error}")
            continue
        if row is None:
            return
        if any(row[len(header) :]):
            yield where, ValueError(f"it has {len(row)} cells, the header {len(header)}")
        elif any(row):
            yield where, {name: _cell(name, cell) for name, cell in zip(header, row, strict=False)}


def _cell(name: str, cell: str) -> Any:
    """Text where the field is text, else what JSON makes of the cell; spreadsheets write TRUE."""
    if name in _TEXTS:
        return cell
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell


def _list(text: str) -> Iterator[tuple[str, Any]]:
    entries = yaml.safe_load(text)
    if entries is not None and not isinstance(entries, list):
        raise ValueError("give a list of jobs, as in `- prompt: a cat`")
    return ((f"job {number}", entry) for number, entry in enumerate(entries or (), 1))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, got {value!r:.100}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can have it
        raise ValueError(f"{name} is no Unicode text: {value!r:.100}") from None
    return value.strip()


def _output(name: str, value: Any) -> str:
    value = _text(name, value)
    if Path(value).name != value or value == ".." or "\0" in value or len(value.encode()) > _NAME:
        raise ValueError(f"{name} must be a file's name, without a folder, got {value!r:.100}")
    return value


def _seed(name: str, value: Any) -> int:
    return _whole(name, value, 0, 2**63 - 1)


def _count(name: str, value: Any) -> int:
    return _whole(name, value, 1, 2**20)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.100}")
    return value


def _rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ValueError(f"{name} must be a number of frames per second up to 1000, got {value!r:.100}")
    return value


def _size(name: str, value: Any) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d{1,6})(?:[x×](\d{1,6}))?", str(value))
    if not sides or isinstance(value, bool):
        raise ValueError(f"{name} must be WIDTHxHEIGHT in pixels, as in 832x480, got {value!r:.100}")
    width, height = (_count(name, int(side)) for side in (sides[1], sides[2] or sides[1]))
    return width, height


_READERS = {
    "prompt": _text, "output": _output, "model": _text, "seed": _seed, "steps": _count, "size": _size,
    "frames": _count, "fps": _rate, "image": _text, "negative_prompt": _text,
}  # fmt: skip
_TEXTS = {name for name, read in _READERS.items() if read in (_text, _output, _size)}
_CONFIG = {field.name for field in fields(DMAConfig)} - {"model"} | {"preset", "quality"}
