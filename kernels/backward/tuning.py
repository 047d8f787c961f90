"""The tuning table of the backward's kernels: how they are built for each architecture and head dimension.

sm_90: from times on an H200; for dK and dV of 64 channels, of one shape alone. All others: from what the compiler makes
of them. Nothing spills where a map has one class, with Triton 3.6; with several and FP8 P·V, sm_90 spills 32 bytes at
most. With Triton 3.8, maps of several classes or with MEAN tiles spill up to 40 bytes on sm_90, 104 on sm_120 at 64
channels, and 144 on sm_100 and sm_103 at 128. INT8 products gain nothing on an H200 (eval/results/recovery.md), and
spill in sm_90's dK and dV of 128 channels: 64 bytes, 120 with Triton 3.8.
"""

from dataclasses import dataclass
from functools import cache

from dma_diffusers.kernels.lowerings import TCGEN05_ARCHITECTURES, WITHOUT_TMA


@dataclass(frozen=True)
class Blocks:
    """One kernel's variant.

    rows, keys: queries and keys of a block, which divide the map tile's 128. warps: of one program. stages: of its
        pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """The variants of the kernel for dQ, and of the one for dK and dV.

    by_pointers: whether operands are read by pointers, which suits mma.sync, and not through tensor descriptors.
    """

    of_queries: Blocks
    of_keys: Blocks
    by_pointers: bool = False

    @property
    def at_once(self) -> tuple[int, int]:
        """The keys, and the queries, that are summed over at once, as the reference's `at_once` has them."""
        return self.of_queries.keys, self.of_keys.rows


_WITH_MMA_SYNC = (*WITHOUT_TMA, "sm_120")
# With more rows or keys at once, both classes would take more shared memory than these have.
_WITH_99_KB = ("sm_86", "sm_89", "sm_120")
TABLE = (
    # The first row that fits: architectures, head dimension, variant.
    (_WITH_99_KB, 256, Tuning(Blocks(32, 32, 8, 1), Blocks(32, 16, 8, 1), by_pointers=True)),
    (TCGEN05_ARCHITECTURES, 256, Tuning(Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1))),
    # Two sums of 64 rows would fill wgmma's registers.
    (("sm_90", *_WITH_MMA_SYNC), 256, Tuning(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), by_pointers=True)),
    (("sm_90",), 128, Tuning(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))),
    (("sm_90",), 64, Tuning(Blocks(64, 128, 4, 2), Blocks(64, 64, 4, 2))),
    (_WITH_99_KB, 128, Tuning(Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2), by_pointers=True)),
    (_WITH_MMA_SYNC, "*", Tuning(Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), by_pointers=True)),
    ("*", "*", Tuning(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2))),
)

IN_INT8 = (
    # Such rows come first where a class has INT8 products, whose results are sums of their own before they are scaled.
    (TCGEN05_ARCHITECTURES, 256, Tuning(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), by_pointers=True)),
    (TCGEN05_ARCHITECTURES, 128, Tuning(Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2))),
)


@cache
def tuning(architecture: str, dim: int, in_int8: bool = False) -> Tuning:
    """The first row of the table that fits. dim: 64, 128 or 256. in_int8: whether a class has INT8 products."""
    return next(
        row
        for architectures, dims, row in (*(IN_INT8 if in_int8 else ()), *TABLE)
        if (architectures == "*" or architecture in architectures) and dims in (dim, "*")
    )
