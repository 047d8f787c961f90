"""The linear layers of a configuration: what `apply` does about them."""

from collections.abc import Callable
from typing import Any

from dma_diffusers.kernels.training.recipe import LINEARS
from dma_diffusers.linears.files import load_linears, read_header
from dma_diffusers.linears.methods import is_file
from dma_diffusers.linears.quantise import (
    NEEDS_CALIBRATION,
    attachment_of,
    check_restorable,
    is_calibrated,
    quantisable,
    quantize_linears,
    restore_linears,
)
from dma_diffusers.linears.trained import round_as_trained


def prepare_linears(pipe_or_model: Any, linears: str | None) -> Callable[[], None]:
    """Checks that `linears` (as in `DMAConfig`) can be had; the function that it gives quantises the layers.

    Layers that are as asked for already stay as they are; others are put back first.
    Raises ValueError for a file that is none, or for another model, for "micromix" without calibration, and where
    others can't be put back; OSError where a file can't be read.
    """
    if linears is None:
        return lambda: None
    records = [attachment_of(model) for _, model in quantisable(pipe_or_model)]
    header = read_header(linears) if is_file(linears) else None
    # A file may have been written anew since it was loaded.
    in_file = list(header.models.values()) if header else [None] * len(records)
    present = [record and (record.method, record.of_file) for record in records]
    if present == [(linears, stored) for stored in in_file]:
        return lambda: None
    check_restorable(pipe_or_model)
    if header:
        header.check(pipe_or_model)
    elif linears == "micromix" and not is_calibrated(pipe_or_model):
        raise ValueError(NEEDS_CALIBRATION)

    def quantise() -> None:
        restore_linears(pipe_or_model)
        if is_file(linears):
            load_linears(pipe_or_model, linears)
        elif linears in LINEARS:
            round_as_trained(pipe_or_model, linears)
        else:
            quantize_linears(pipe_or_model, linears, progress=False)

    return quantise
