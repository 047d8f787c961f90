"""The log of a run: a line of JSON for each step."""

import json
from pathlib import Path
from typing import Any

from dma_diffusers.pipelines.files import write_atomically


class Log:
    """The file `loss.jsonl`. It is cut to the step from which a run goes on."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in self.read() if line["step"] <= step]
        write_atomically(path, b"".join(_line(line) for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, which has a `step`."""
        with self.path.open("ab") as file:
            file.write(_line(line))

    def read(self) -> list[dict[str, Any]]:
        """Return all lines; one that an interruption cut off is left out."""
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


def _line(line: dict[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"
