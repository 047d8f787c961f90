"""Read job files; each job asks for one picture or clip."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.pipelines.clip import KINDS
from dma_diffusers.pipelines.tables import read_entries

_SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")
CALL_FIELDS = ("negative_prompt", "guidance_scale", "true_cfg_scale", "max_sequence_length")
"""Fields of a job that go to the pipeline's call as they are."""
_MAX_NAME_BYTES = 200  # file systems allow 255, and an unfinished file has a longer name


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture or clip that a job file asks for; a field is None if neither the file nor the command line sets it.

    where: the job's position in its file, for messages. number: its number among the jobs of the file, from 1.
    output: a file name without a folder. model: a local folder or hub id, "demo" or "demo-video".
    size: (width, height) in pixels. fps: frames per second. image: the path of a picture to start from, relative to
    `folder`, that of the job file.
    negative_prompt, guidance_scale, true_cfg_scale, max_sequence_length: arguments of the pipeline's call.
    lora: LoRA files, each with a weight if need be, as in "style.safetensors:0.8", relative to `folder`.
    config: the configuration of attention.
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
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    lora: tuple[str, ...] = ()
    config: DMAConfig
    folder: Path = field(default=Path(), compare=False)


@dataclass(frozen=True)
class Failure:
    """A job that was not drawn.

    number, where: as in `Job`. error: the reason in one line.
    """

    number: int
    where: str
    error: str


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Job], list[Failure]]:
    """Read the valid jobs of a file, and a failure for each entry that is not a valid job.

    Files are read as by `read_entries`. A job needs a `prompt`. It may have other fields of `Job`, with size as "WxH"
    or one number for a square, and the fields that `DMAConfig.from_fields` takes, except `model` and `weights`. Empty
    text, empty cells and null count as not given, and a number that is whole may be written as 3.0.

    Args:
        defaults: values for the fields that a job does not give. A job with a preset ignores the defaults about
            attention, and a job whose output is a picture ignores those for frames and fps.

    Raises ValueError if the file has another format, holds no jobs, or if the defaults are not valid fields, OSError
    if a file cannot be read.
    """
    entries = read_entries(path, _SUFFIXES, "jobs")
    if not entries:
        raise ValueError(f"{path} holds no jobs")
    parse({"prompt": "any"}, defaults)
    jobs, failures = [], []
    for number, (where, entry) in enumerate(entries, 1):
        try:
            if isinstance(entry, Exception):
                raise entry
            if path.suffix.lower() == ".csv":
                entry = {name: _parse_cell(name, cell) for name, cell in entry.items()}
            jobs.append(replace(parse(entry, defaults, where, number), folder=path.parent))
        except (ValueError, TypeError, OSError) as error:
            failures.append(Failure(number, where, first_line(error)))
    return jobs, failures


def parse(entry: Any, defaults: Mapping[str, Any], where: str = "job 1", number: int = 1) -> Job:
    """Make a job from one entry of a job file, by the rules of `read_jobs`.

    Raises ValueError or TypeError if it is not a valid job, OSError if its policy file cannot be read.
    """
    if not isinstance(entry, dict):
        raise ValueError('a job maps fields to values, as in {"prompt": "a cat"}')
    own = {name: value for name, value in entry.items() if value not in (None, "")}
    if unknown := own.keys() - _FIELDS.keys() - _CONFIG_FIELDS:
        known = ", ".join([*_FIELDS, *sorted(_CONFIG_FIELDS)])
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}; there are {known}")
    ignored = _CONFIG_FIELDS if "preset" in own else set()
    if Path(str(own.get("output", ""))).suffix.lower() not in ("", *KINDS):
        ignored = ignored | {"frames", "fps"}
    given = {name: value for name, value in defaults.items() if name not in ignored} | own
    if "prompt" not in given:
        raise ValueError("a job needs a prompt")
    values: dict[str, Any] = {
        name: _FIELDS[name](name, value) for name, value in given.items() if name in _FIELDS
    }
    config = DMAConfig.from_fields({name: value for name, value in given.items() if name in _CONFIG_FIELDS})
    return Job(where=where, number=number, config=config, **values)


def _parse_cell(name: str, cell: str) -> Any:
    """Return the cell as it is if the field is text, else parse it as JSON.

    Spreadsheets write TRUE for true, and where semicolons separate cells a comma for the decimal point.
    """
    if name in _TEXT_FIELDS or not cell.strip():
        return cell.strip()
    cell = re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", cell.strip())
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, got {value!r:.100}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON allows half of a surrogate pair
        raise ValueError(f"{name} is no Unicode text: {value!r:.100}") from None
    return value.strip()


def _output(name: str, value: Any) -> str:
    value = _text(name, value)
    if Path(value).name != value or value == ".." or "\0" in value or len(value.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f"{name} must be a file's name, without a folder, got {value!r:.100}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_text(name, each) for each in (value if isinstance(value, list | tuple) else [value]))


def _seed(name: str, value: Any) -> int:
    return _integer(name, value, 0, 2**63 - 1)


def _count(name: str, value: Any) -> int:
    return _integer(name, value, 1, 2**20)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.100}")
    return value


def _rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
        raise ValueError(f"{name} must be a number of frames per second up to 1000, got {value!r:.100}")
    return value


def _scale(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
        raise ValueError(f"{name} must be a number from 0 to 1000, got {value!r:.100}")
    return value


def _size(name: str, value: Any) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d{1,6})(?:\.0)?(?:\s*[xX×]\s*(\d{1,6}))?", str(value))
    if not sides or isinstance(value, bool):
        raise ValueError(f"{name} must be WIDTHxHEIGHT in pixels, as in 832x480, got {value!r:.100}")
    width, height = (_count(name, int(side)) for side in (sides[1], sides[2] or sides[1]))
    return width, height


_FIELDS = {
    "prompt": _text, "output": _output, "model": _text, "seed": _seed, "steps": _count, "size": _size,
    "frames": _count, "fps": _rate, "image": _text, "negative_prompt": _text,
    "guidance_scale": _scale, "true_cfg_scale": _scale, "max_sequence_length": _count, "lora": _texts,
}  # fmt: skip
_TEXT_FIELDS = {name for name, read in _FIELDS.items() if read in (_text, _output, _size, _texts)}
_CONFIG_FIELDS = {field.name for field in fields(DMAConfig)} - {"model", "weights"} | {"preset", "quality"}
