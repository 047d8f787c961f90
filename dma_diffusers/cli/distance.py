"""`dma-diffusers distance`: FID and KID of two folders of pictures."""

import math
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.console import EVAL_PACKAGES, Json, print_json, print_table, quiet, require
from dma_diffusers.progress import progress


def distance(
    folder: Annotated[Path, typer.Argument(help="Pictures, subfolders included.")],
    reference: Annotated[Path, typer.Argument(help="Pictures to compare them with.")],
    as_json: Json = False,
) -> None:
    """FID and KID of the pictures in FOLDER against those in REFERENCE."""
    require(EVAL_PACKAGES, "pip install 'dma-diffusers[eval]'")
    with quiet(), progress(not as_json) as on_step:
        import torch

        from dma_diffusers.eval.metrics.folders import distances

        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = distances(folder, reference, device, lambda done, total: on_step("pictures", done, total))
    intervals = {
        name: {key: bound if math.isfinite(bound) else None for key, bound in interval._asdict().items()}
        for name, interval in (("fid", found.fid), ("kid", found.kid))
    }
    if as_json:
        print_json({**found._asdict(), **intervals})
        return
    rows = [(name.upper(), *(f"{bound:.6g}" for bound in getattr(found, name))) for name in intervals]
    print_table(("", "estimate", "95 % from", "to"), rows)
    print(f"{found.pictures} pictures against {found.reference_pictures}")
    print("\n".join(found.notes))
