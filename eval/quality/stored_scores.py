"""Scores of batches are kept on disk, so that an evaluation that was interrupted does not measure them again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dma_diffusers.eval import provenance
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.files import write_atomically


def stored(
    row: Pictures, exact: Pictures, batch: Sequence[Sample], measure: Callable[[], dict[str, list]]
) -> dict[str, list]:
    """Return what `measure` gives for a batch of `row` beside `exact`, from the row's folder where it is there whole.

    Other pictures, other code of the metrics, and other versions or hardware have other files.
    """
    of = [_measured_by(), [pictures.checksums(batch) for pictures in (row, exact)]]
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    path = row.folder / "scores" / f"{digest}.json"
    with suppress(FileNotFoundError, ValueError):  # a former machine may have lost power while it wrote
        return json.loads(path.read_bytes())
    scores = measure()
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(scores).encode())
    return scores


@cache
def _measured_by() -> list[Any]:
    code = provenance.fingerprint(
        Path(__file__).parents[1], "metrics/*.py", "metrics/lpips_alex.*", "quality/scoring.py"
    )
    return [code, provenance.versions(), provenance.hardware()]
