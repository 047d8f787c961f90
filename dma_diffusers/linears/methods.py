"""The methods: which formats the input channels of a linear layer get."""

from pathlib import Path

from dma_diffusers.kernels.training.recipe import LINEARS

METHODS = ("fp8", "int8", "mxfp8", "mxfp4", "nvfp4", "micromix")
"""Each is the format of all channels, but for "micromix", which gives each channel 4, 6 or 8 bits by calibration."""
CALIBRATED = ("micromix", "fp8")
"""The methods that calibration is of use to: the first one needs it, fp8 gets fixed input scales from it."""
KEEPS_EIGHT = ("mxfp4", "nvfp4", "micromix")
"""The methods with fewer than eight bits, under which sensitive parts get `mxfp8`."""


def check_method(method: str) -> None:
    """Raises ValueError for a method that does not exist."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} for linear layers; there are {', '.join(METHODS)}")


def is_file(linears: str) -> bool:
    """Tells whether this names a file of `save_linears`, not a method, nor a recipe of fine-tuning.

    Raises ValueError for a single word that is neither.
    """
    if linears in (*METHODS, *LINEARS):
        return False
    if not Path(linears).suffix and Path(linears).name == linears:
        known = ", ".join((*METHODS, *LINEARS))
        raise ValueError(f"unknown linears {linears!r}; there are {known}, or a file that save_linears wrote")
    return True
