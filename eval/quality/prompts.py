"""A prompt set is the built-in one, or a file in a shape that published sets come in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL
from dma_diffusers.pipelines.tables import read_entries

BUILT_IN = DEMO_MODEL.parent / "prompts.jsonl"
BUILT_IN_OF_CLIPS = VIDEO_DEMO_MODEL.parent / "prompts.jsonl"
FEWEST = 3  # an interval needs so many different prompts
_SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".json")
_PROMPT_KEYS = ("prompt", "prompts", "text", "caption")  # DrawBench says Prompts, PartiPrompts says Prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt says what a picture is asked for, and its set's name for the kind of prompt, "" if it has none."""

    text: str
    category: str = ""


def built_in(model: str | Path) -> Path:
    """Return held-out prompts: those of the embedded model of clips for that model, those of pictures for others."""
    return BUILT_IN_OF_CLIPS if model == VIDEO_DEMO_MODEL else BUILT_IN


def read_prompts(path: Path, count: int | None = None, fewest: int = FEWEST) -> tuple[list[Prompt], int]:
    """Return the first `count` different prompts of a file (None: all), and how many repeated ones were left out.

    Files are read as by `pipelines.tables.read_entries`, .txt, .jsonl, .json (MJHQ-30K), .csv and .tsv (DrawBench,
    PartiPrompts). Entries hold `prompt` (or `prompts`, `text`, `caption`) and perhaps `category`.

    Raises ValueError, naming the file and the line, for an entry without a prompt, and for fewer than `fewest` prompts.
    """
    found = [_prompt(entry, f"{path}: {where}") for where, entry in read_entries(path, _SUFFIXES, "prompts")]
    different: dict[str, Prompt] = {}
    for prompt in found:
        different.setdefault(prompt.text, prompt)
    if len(different) < fewest:
        needed = f": intervals need at least {fewest}" if fewest > 1 else ""
        raise ValueError(f"{path} holds {len(different) or 'no'} prompts{needed}")
    return list(different.values())[:count], len(found) - len(different)


def _prompt(entry: Any, where: str) -> Prompt:
    if isinstance(entry, Exception):
        raise ValueError(f"{where} {str(entry).removeprefix('it ')}") from entry
    fields = entry if isinstance(entry, dict) else {}
    text = next((fields[key] for key in _PROMPT_KEYS if key in fields), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no prompt: give it one as {', '.join(_PROMPT_KEYS)}")
    return Prompt(text.strip(), str(fields.get("category") or "").strip())
