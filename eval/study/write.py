"""A study leaves three files: JSON with everything, CSV with its rows, and a page of plots."""

import csv
import io
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dma_diffusers.eval import provenance
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.eval.study import page
from dma_diffusers.eval.study.options import Options
from dma_diffusers.eval.study.recommend import FORMAT, VERSION, recommended
from dma_diffusers.eval.study.study import Study
from dma_diffusers.eval.study.theory import crossovers
from dma_diffusers.pipelines.files import write_atomically

NAMES = ("study.json", "study.csv", "study.html")


def document(found: Study, recordings: Recordings, options: Options, command: str) -> dict[str, Any]:
    """Return everything that a study found, as plain data.

    rows: `Study.rows`. crests: `Study.crest_rows`. summary: `Study.summary`. recommended: see there. head_dims: the
    channels of a head in each attention module. command: how the study was started, for the record.
    """
    rows = list(found.rows())
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": recordings.settings,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "prompts": len(found.prompts),
        "formats": list(options.formats),
        "rotations": list(options.rotations),
        "head_dims": {recording.module: recording.shape[-1] for recording in recordings},
        "crossovers": crossovers(),
        "recommended": recommended(rows),
        "summary": list(found.summary()),
        "crests": list(found.crest_rows()),
        "rows": rows,
        "notes": recordings.notes,
    }


def save(found: Mapping[str, Any], folder: Path) -> None:
    """Write the three files of `NAMES` into a folder, which is made. found: a `document`."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = (
        json.dumps(found, separators=(",", ":"), allow_nan=False),
        _csv(found["rows"]),
        page.html(found),
    )
    for name, text in zip(NAMES, contents, strict=True):
        write_atomically(folder / name, text.encode())


def _csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
