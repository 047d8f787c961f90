"""Scores of batches on disk: an evaluation that was interrupted does not measure them again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dma_diffusers.eval import metrics, provenance
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.files import write_atomically


def stored(
    row: Pictures, exact: Pictures, batch: Sequence[Sample], measure: Callable[[], dict[str, list]]
) -> dict[str, list]:
    """What `measure` gives for a batch of `row` beside `exact`, from the row's folder where it is there already.

    Other pictures, other code of the metrics, and other versions or hardware have other files.
    """
    of = [_measured_by(), [pictures.checksums(batch) for pictures in (row, exact)]]
    digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    path = row.folder / "scores" / f"{digest}.json"
    if path.is_file():
        return json.loads(path.read_bytes())
    scores = measure()
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(scores).encode())
    return scores


@cache
def _measured_by() -> list[Any]:
    folder = Path(metrics.__file__).parent
    return [
        provenance.fingerprint(folder, "*.py", "lpips_alex.*"),
        provenance.versions(),
        provenance.hardware(),
    ]
