"""A prompt set is the built-in one, or a file in a shape that published sets come in."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dma_diffusers.pipelines.files import read_text
from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL

BUILT_IN = DEMO_MODEL.parent / "prompts.jsonl"
BUILT_IN_OF_CLIPS = VIDEO_DEMO_MODEL.parent / "prompts.jsonl"
FEWEST = 3  # an interval needs so many different prompts
_PROMPT_KEYS = ("prompt", "prompts", "text", "caption")  # DrawBench says Prompts, PartiPrompts says Prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt says what a picture is asked for, and its set's name for the kind of prompt, "" if it has none."""

    text: str
    category: str = ""


def built_in(model: str | Path) -> Path:
    """Return held-out prompts: those of the embedded model of clips for that model, those of pictures for others."""
    return BUILT_IN_OF_CLIPS if model == VIDEO_DEMO_MODEL else BUILT_IN


def read_prompts(path: Path, count: int | None = None) -> tuple[list[Prompt], int]:
    """Return the first `count` different prompts of a file (None: all), and how many repeated ones were left out.

    .txt: one prompt a line. .jsonl: one object a line. .csv and .tsv: a table with a header (DrawBench, PartiPrompts),
    where quotes enclose fields between commas, and are a prompt's own between tabs. .json: a list of objects, or
    objects by name (MJHQ-30K). Objects and tables hold `prompt` (or `prompts`, `text`, `caption`) and perhaps
    `category`, in any case. Raises ValueError for anything else, and where fewer than three prompts are left.
    """
    readers = {".txt": _lines, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table, ".json": _json}
    text = read_text(path, readers, "prompts")
    try:
        found = list(readers[path.suffix](text))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    different: dict[str, Prompt] = {}
    for prompt in found:
        different.setdefault(prompt.text, prompt)
    if len(different) < FEWEST:
        raise ValueError(f"{path} holds {len(different) or 'no'} prompts: intervals need at least {FEWEST}")
    return list(different.values())[:count], len(found) - len(different)


def _lines(text: str) -> Iterable[Prompt]:
    return (Prompt(line.strip()) for line in io.StringIO(text, newline=None) if line.strip())


def _json_lines(text: str) -> Iterable[Prompt]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # splitlines would cut at U+2028 too
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            yield _prompt(entry, f"line {number}")


def _json(text: str) -> Iterable[Prompt]:
    entries = json.loads(text)
    if not isinstance(entries, dict | list):
        raise ValueError("it is neither a list of objects nor objects by name")
    named = entries.items() if isinstance(entries, dict) else enumerate(entries, 1)
    return (_prompt(entry, f"entry {name}") for name, entry in named)


def _table(text: str) -> Iterable[Prompt]:
    dialect: dict[str, Any] = {}
    if "\t" in text.partition("\n")[0]:
        dialect = {
            "delimiter": "\t",
            "quoting": csv.QUOTE_NONE,
        }  # PartiPrompts has a prompt that begins with "
    rows = csv.DictReader(io.StringIO(text, newline=""), **dialect)
    for row in rows:
        yield _prompt({key: value for key, value in row.items() if key}, f"line {rows.line_num}")


def _prompt(entry: Any, where: str) -> Prompt:
    fields = (
        {str(key).strip().lower(): value for key, value in entry.items()} if isinstance(entry, dict) else {}
    )
    text = next((fields[key] for key in _PROMPT_KEYS if key in fields), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no prompt: give it one as {', '.join(_PROMPT_KEYS)}")
    return Prompt(text.strip(), str(fields.get("category") or "").strip())
