"""Keep the log of a batch, which has a line of JSON for each job that ended, drawn or not."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any


class Results:
    """The file `results.jsonl` in a batch's folder, to which several processes may append.

    A line that was cut off by an interruption is ignored. Lines are flushed to the disk as outputs are.
    """

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"

    def append(self, result: dict[str, Any]) -> None:
        """Append a result as one line; raises a one-line OSError if the disk is full."""
        line = json.dumps(result, allow_nan=False).encode() + b"\n"
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(f"cannot write {self.path}: no space is left")
            os.fsync(file.fileno())

    def last(self) -> dict[str, dict[str, Any]]:
        """Return the last result of each output."""
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        found = {}
        for line in lines:
            try:
                result = json.loads(line)
                found[result["output"]] = result
            except (ValueError, KeyError, TypeError):
                continue
        return found
