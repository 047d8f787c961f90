"""How the attention kernel is built for each architecture, head dimension and pair of storages: data, not search."""

from dataclasses import dataclass

from dma_diffusers.kernels.lowerings import Storage

BLOCK, ROW, PLAIN = Storage.BLOCK, Storage.ROW, Storage.PLAIN
Classes = tuple[Storage | None, Storage | None]


@dataclass(frozen=True)
class Tuning:
    """One variant of the attention kernel.

    rows: queries that one program handles; it divides the map's tile, and block scales need all 128.
    warps: of one program.
    stages: pipeline stages of the loops over HIGH and LOW tiles, such that K, V and their scales have two buffers
        or more. masked_stages: of the loop over MASKED tiles, where there is no key mask.
    transposed_v: whether LOW reads V as [D, tokens], which FP8 MMA before tcgen05 wants.
    exp_share: of every 32 exponentials of LOW tiles, how many are polynomials (exponential.py).
    warp_specialize: whether Triton gives loads, MMA and softmax of the LOW loop to different warps.
    registers: the most that a thread may use; None leaves it to the compiler.
    """

    rows: int = 128
    warps: int = 8
    stages: int = 5
    masked_stages: int = 3
    transposed_v: bool = False
    exp_share: int = 0
    warp_specialize: bool = False
    registers: int | None = None


TABLE: dict[tuple[str, int, Classes], Tuning] = {}


def tuning(architecture: str, dim: int, classes: Classes) -> Tuning:
    """The row for the storages of HIGH and LOW (None for a class without tiles); dim is 64, 128 or 256."""
    if (architecture, dim, classes) in TABLE:
        return TABLE[architecture, dim, classes]
    if architecture in ("sm_100", "sm_103", "sm_120"):
        if dim == 256:
            return Tuning(stages=1, masked_stages=1)
        return Tuning()
    if BLOCK in classes:
        return Tuning(stages=2 if dim < 256 else 1, masked_stages=2 if dim < 256 else 1, transposed_v=True)
    if dim == 256:
        return Tuning(rows=64, warps=4, stages=1, masked_stages=1, transposed_v=True)
    return Tuning(rows=64, warps=4, stages=3, masked_stages=3, transposed_v=True)
