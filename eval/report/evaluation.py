"""evaluation.json is read, and checked before anything is drawn from it."""

import gzip
import json
import math
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

BASELINE, NOISE_FLOOR, CONFIGURATION = "baseline", "noise floor", "configuration"

_NUMBER = (float, None)  # null stands for infinite
_TEXT = (str, None)
# A report needs this. {str: x} has any keys, [x] any length, a tuple lists alternatives, "key?" may be absent.
_SHAPE = {
    "command": str,
    "created": str,
    "settings": {"model": str, "prompts": int, "seeds": int, "frames?": int},
    "versions": {str: object},
    "hardware": str,
    "sources": {str: object},
    "prompts": [{"text": str, "category?": _TEXT}],
    "notes": [str],
    "metrics": {str: {"title": str, "better": ("higher", "lower"), "digits": int}},
    "rows": {
        str: {
            "role": (BASELINE, NOISE_FLOOR, CONFIGURATION),
            "label?": _TEXT,
            "config?": ({str: object}, None),
            "seconds_per_picture?": _NUMBER,
            "predicted_cost?": _NUMBER,
            "ran?": _NUMBER,
            "summary": {
                str: {
                    "estimate": _NUMBER,
                    "low?": _NUMBER,
                    "high?": _NUMBER,
                    "n?": (int, None),
                    "identical?": int,
                }
            },
            "pictures?": {str: [_NUMBER]},
            "frames?": {str: [_NUMBER]},
            "steps?": ([_NUMBER], None),
            "receipt?": ({"modules": [{"module": str, "lowering": _TEXT}]}, None),
        }
    },
    "layers?": (
        {"prompts?": int, "modules": [str], "steps": [int], "relative_l2": {str: [[_NUMBER]]}},
        None,
    ),
    "worst?": (
        [
            {
                "row": str,
                "prompt": int,
                "seed": int,
                "metric": str,
                "value": _NUMBER,
                "pictures": {str: str},
            }
        ],
        None,
    ),
}
_KINDS = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def read(path: Path) -> dict[str, Any]:
    """Read the evaluation in a JSON file, which may be gzipped (`.gz`).

    Raises ValueError where it holds none, FileNotFoundError where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: name a folder that `dma-diffusers eval` wrote")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        evaluation = json.loads(data, parse_constant=_refuse)
    except (ValueError, OSError, EOFError) as error:  # broken JSON and UTF-8, or broken gzip
        raise ValueError(f"{path} is no whole JSON file: {error}") from None
    try:
        check(evaluation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return evaluation


def check(evaluation: Any) -> None:
    """Raise ValueError, naming the place, unless a report can be made from `evaluation`."""
    for complaint in chain(_misshapen(evaluation, _SHAPE, "evaluation"), _contradictions(evaluation)):
        raise ValueError(f"this is no evaluation that `dma-diffusers eval` wrote: {complaint}")


def baseline(evaluation: dict[str, Any]) -> str:
    """Return the name of the row that all others are compared with."""
    return next(name for name, row in evaluation["rows"].items() if row["role"] == BASELINE)


def noun(evaluation: dict[str, Any]) -> str:
    """Return the word for what was drawn: "picture" or "clip"."""
    return "clip" if "frames" in evaluation["settings"] else "picture"


def number(value: float | None) -> float:
    """Return a stored value, which is None where it is infinite."""
    return math.inf if value is None else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _misshapen(value: Any, shape: Any, at: str) -> Iterator[str]:
    """Say in words where `value` differs from `shape`."""
    if isinstance(shape, tuple):
        complaints = [list(_misshapen(value, alternative, at)) for alternative in shape]
        if all(complaints):
            yield complaints[0][0]
    elif isinstance(shape, type):
        fits = isinstance(value, (int, float) if shape is float else shape)
        if not fits or (isinstance(value, bool) and shape is not object):
            yield f"{at} is not {_KINDS[shape]}"
    elif shape is None or isinstance(shape, str):
        if value != shape:
            yield f"{at} is {str(value)[:80]!r}"
    elif type(value) is not type(shape):
        yield f"{at} is not {_KINDS[type(shape)]}"
    elif isinstance(shape, list):
        for index, item in enumerate(value):
            yield from _misshapen(item, shape[0], f"{at}[{index}]")
    elif str in shape:
        for key, item in value.items():
            yield from _misshapen(item, shape[str], f"{at}[{key!r}]")
    else:
        for key, expected in shape.items():
            name = key.rstrip("?")
            if name in value:
                yield from _misshapen(value[name], expected, f"{at}.{name}")
            elif name == key:
                yield f"{at} lacks {name!r}"


def _contradictions(evaluation: dict[str, Any]) -> Iterator[str]:
    """Say in words where the parts of a well-shaped evaluation do not fit together."""
    prompts, rows, metrics = evaluation["prompts"], evaluation["rows"], evaluation["metrics"]
    try:
        datetime.fromisoformat(evaluation["created"])
    except ValueError:
        yield f"created is {evaluation['created'][:80]!r}, not a date and time"
    roles = [row["role"] for row in rows.values()]
    if roles.count(BASELINE) != 1:
        yield f"{roles.count(BASELINE)} rows have the role 'baseline', not one"
    if len(prompts) != evaluation["settings"]["prompts"]:
        yield f"settings say {evaluation['settings']['prompts']} prompts, there are {len(prompts)}"
    pictures = len(prompts) * evaluation["settings"]["seeds"]
    for name, row in rows.items():
        for metric in row["summary"] | row.get("pictures", {}) | row.get("frames", {}):
            if metric not in metrics:
                yield f"row {name!r} has {metric!r}, which is none of the metrics"
        for metric, values in row.get("frames", {}).items():
            if len(values) != evaluation["settings"].get("frames"):
                yield f"row {name!r} has {len(values)} frames of {metric!r}, settings say another number"
        for metric, values in row.get("pictures", {}).items():
            if len(values) != pictures:
                yield f"row {name!r} has {len(values)} values of {metric!r} for {pictures} pictures"
    if layers := evaluation.get("layers"):
        steps = len(layers["steps"])
        for name, errors in layers["relative_l2"].items():
            if len(errors) != len(layers["modules"]) or any(len(row) != steps for row in errors):
                yield f"layers of {name!r} are not {len(layers['modules'])} modules × {steps} steps"
    for worst in evaluation.get("worst") or ():
        if worst["row"] not in rows or not 0 <= worst["prompt"] < len(prompts):
            yield f"a worst picture is of row {worst['row']!r}, prompt {worst['prompt']}, which is not there"
        elif not {baseline(evaluation), "row"} <= worst["pictures"].keys():
            yield f"a worst picture of row {worst['row']!r} lacks a file for itself or for the baseline"
