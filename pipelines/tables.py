"""Read the entries of a file that a user wrote, in the shapes that editors and spreadsheets give them."""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from dma_diffusers.pipelines.files import read_text

Entry = tuple[str, Any]
"""The position of an entry in its file, for messages, and the entry, or the exception that says why it is none."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_NO_DELIMITER = "\x1f"  # no text has this


def read_entries(path: Path, suffixes: Collection[str], what: str) -> list[Entry]:
    """Read the entries of a file; those that cannot be read are exceptions, and do not stop the others.

    A .txt file has a prompt in each line, a .jsonl file an object. A .json or .yaml file has a list of objects; .json
    may have objects by name, too. A .csv or .tsv file is a table with a header. Columns of a .csv are separated by
    commas, semicolons or tabs, whichever the header has, and quotes enclose cells; in a table of a single column commas
    are its text. Between the tabs of a .tsv, quotes are text, as in PartiPrompts. Rows without any text are skipped.
    Names of fields get small letters, and underscores for spaces.

    Args:
        suffixes: the suffixes that the file's name may have, in any case.
        what: names the entries in messages, as in "jobs".

    Raises ValueError, naming the file, for another suffix or encoding and for a file that is no list at all, OSError
    where it cannot be read.
    """
    text = read_text(path, suffixes, what)
    try:
        return [(where, _with_plain_names(entry)) for where, entry in _READERS[path.suffix.lower()](text)]
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _with_plain_names(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {_plain(name): value for name, value in entry.items()}


def _plain(name: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line; only line breaks end one, and not U+2028 as in `splitlines`."""
    return enumerate(io.StringIO(text, newline=None), 1)


def _read_prompts(text: str) -> Iterator[Entry]:
    return ((f"line {number}", {"prompt": line.strip()}) for number, line in _lines(text) if line.strip())


def _read_json_lines(text: str) -> Iterator[Entry]:
    for number, line in _lines(text):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                entry = ValueError(f"it is not JSON: {error}")
            yield f"line {number}", entry


def _read_json(text: str) -> Iterator[Entry]:
    entries = json.loads(text)
    if not isinstance(entries, dict | list):
        raise ValueError("it is neither a list of objects nor objects by name")
    named = entries.items() if isinstance(entries, dict) else enumerate(entries, 1)
    return ((f"entry {name}", entry) for name, entry in named)


def _read_yaml(text: str) -> Iterator[Entry]:
    entries = yaml.safe_load(text)
    if entries is not None and not isinstance(entries, list):
        raise ValueError("give a list of jobs, as in `- prompt: a cat`")
    return ((f"job {number}", entry) for number, entry in enumerate(entries or (), 1))


def _read_csv(text: str) -> Iterator[Entry]:
    named = re.match(r"sep=(.)\r?\n", text)  # Excel says so in a line of its own
    first = text[named.end() :] if named else text
    delimiter = named[1] if named else _delimiter(re.split(r"[\r\n]", first, maxsplit=1)[0])
    return _read_table(text, delimiter, quotes=True, skip=bool(named))


def _read_tsv(text: str) -> Iterator[Entry]:
    return _read_table(text, "\t", quotes=False)


def _delimiter(header: str) -> str:
    """Return the commonest delimiter of a table's header, outside of quotes; a single column has none."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    commonest = max(_DELIMITERS, key=unquoted.count)
    return commonest if commonest in unquoted else _NO_DELIMITER


def _read_table(text: str, delimiter: str, quotes: bool, skip: bool = False) -> Iterator[Entry]:
    rows = _rows(text, delimiter, quotes, int(skip))
    _, header = next(rows, ("", ()))
    if isinstance(header, Exception):
        raise header
    names = [_plain(name) for name in header]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise ValueError(f"the header has {', '.join(sorted(twice))} more than once")
    for where, row in rows:
        if isinstance(row, Exception):
            yield where, row
        elif any(cell.strip() for cell in row[len(names) :]):
            of_text = _DELIMITERS.get(delimiter, "delimiters")
            yield (
                where,
                ValueError(
                    f"it has {len(row)} cells, the header {len(names)}: cells whose text has {of_text} need quotes"
                ),
            )
        elif any(cell.strip() for cell in row):
            yield where, dict(zip(names, row, strict=False))


def _rows(text: str, delimiter: str, quotes: bool, start: int) -> Iterator[tuple[str, Any]]:
    """Yield the position and the cells of each row, or the exception that says why it has none.

    A quote that is not closed spoils its own line alone, not those that follow.
    """
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    while start < len(lines):
        rest = (lines[number] for number in range(start, len(lines)))
        rows = csv.reader(rest, delimiter=delimiter, quoting=quoting, strict=True)
        where = f"line {start + 1}"
        try:
            cells = next(rows, None)
        except csv.Error as error:
            what = "a quote opens here and is not closed" if "end of data" in str(error) else error
            yield where, ValueError(f"it is not CSV: {what}")
            start += 1
            continue
        if cells is None:
            return
        start += rows.line_num
        yield where, cells


_READERS: dict[str, Callable[[str], Iterator[Entry]]] = {
    ".txt": _read_prompts, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
    ".yaml": _read_yaml, ".yml": _read_yaml,
}  # fmt: skip
