"""The tuning table of the backward's kernels: sizes that compile without spills."""

from dataclasses import dataclass
from functools import cache

from dma_diffusers.kernels.lowerings import WITHOUT_TMA


@dataclass(frozen=True)
class Blocks:
    """One kernel's variant.

    rows, keys: queries and keys of a block, 64 or the map tile's 128. warps: of one program. stages: of its pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """The variants of the kernel for dQ, and of the one for dK and dV."""

    of_queries: Blocks
    of_keys: Blocks


TABLE = (
    # The first row that fits: architectures, head dimension, variant.
    (("sm_90",), 64, Tuning(Blocks(64, 128, 4, 2), Blocks(64, 128, 8, 2))),
    (("sm_90",), 128, Tuning(Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2))),
    (WITHOUT_TMA, 256, Tuning(Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1))),
    ("*", 256, Tuning(Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1))),
    ("*", "*", Tuning(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))),
)


@cache
def tuning(architecture: str, dim: int) -> Tuning:
    """The first row of the table that fits. dim: 64, 128 or 256."""
    return next(
        row
        for architectures, dims, row in TABLE
        if (architectures == "*" or architecture in architectures) and dims in (dim, "*")
    )
