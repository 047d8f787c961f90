"""The tuning table: how the attention kernel is built for each architecture, head dimension and pair of storages.

sm_90: from times on an H200. All others: from what the compiler makes of each variant (ahead_of_time/instructions.md).
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache

from dma_diffusers.kernels.device.tritons import TRITON, Version
from dma_diffusers.kernels.lowerings import TCGEN05_ARCHITECTURES, WITHOUT_TMA, Storage


@dataclass(frozen=True)
class Tuning:
    """One variant of the attention kernel.

    rows: queries that are handled together; 64 or the map tile's 128 (block-scaled MMA of tcgen05 wants 128).
    keys: of a KV tile that are handled together, 64 or all 128; all where tiles may be skipped, and on tcgen05.
    warps: of one program. skipping_warps, skipping_rows, skipping_stages: of one that may skip tiles, where these are
        others; it keeps V beside K for as many tiles, also in the loop over MASKED ones.
    stages: pipeline stages of the loops over HIGH and LOW tiles, such that K, V and their scales have two buffers
        or more on tcgen05. masked_stages: of the loop over MASKED tiles; with a key mask or empty slots alone, Triton
        loads that first, and the loop takes `stages`. The loop over tiles of means, which no list names, has as many.
    registers: the most that a thread may use; None leaves it to the compiler. 208 is what Triton 3.6 and 3.7 need to
        spill nothing on tcgen05; one program of eight warps fits a multiprocessor with it, as with 190 or 255.
    programs: persistent programs on each multiprocessor; None starts one program for each block of rows.
    transposed_v: whether LOW reads V as [D, tokens], which FP8 MMA before tcgen05 wants.
    unit_scales: whether FP8 P·V is a block-scaled product under scales of one: sm_120 has twice the rate for those.
    exp_share: of every 32 exponentials, how many are polynomials (exponential.py).
    slots: of hopper.py's ring, which then runs in place of kernel.py, with `registers` for its second and third
        warpgroup. The rest is for kernel.py, where Gluon can't run: in the interpreter, and under tensor scales.
    """

    rows: int = 128
    keys: int = 128
    warps: int = 8
    skipping_warps: int | None = None
    skipping_rows: int | None = None
    skipping_stages: int | None = None
    stages: int = 5
    masked_stages: int = 3
    registers: int | None = None
    programs: int | None = None
    transposed_v: bool = False
    unit_scales: bool = False
    exp_share: int = 0
    slots: int | None = None

    @property
    def skipping(self) -> "Tuning":
        """The variant for calls that may skip tiles, which are looked at as a whole."""
        stages = self.skipping_stages or self.stages
        return replace(
            self,
            keys=128,
            warps=self.skipping_warps or self.warps,
            rows=self.skipping_rows or self.rows,
            stages=stages,
            masked_stages=min(stages, self.masked_stages),
        )


_HOPPER = {"rows": 64, "warps": 4, "transposed_v": True, "masked_stages": 2}
_SM_120 = {"rows": 64, "warps": 4, "skipping_warps": 8, "transposed_v": True, "unit_scales": True}
# A tile that may be skipped is held whole, K and V: more would be too much for the shared memory of sm_86 and 89.
_SKIPPING = {"skipping_rows": 64, "skipping_warps": 8, "skipping_stages": 2}
_AMPERE = {"rows": 128, "warps": 8, "keys": 64, "transposed_v": True, **_SKIPPING}
_AMPERE_128 = _AMPERE | {"skipping_stages": 1}
_GLUON = Tuning(**_HOPPER, stages=2, registers=160, slots=4)
# HIGH in bf16 numbers, LOW in e4m3 or int8.
GLUON_CLASSES = ("-|tile", "-|row", "plain|tile", "plain|row", "plain|-")
TABLE = (
    # The first row that fits: architectures, Triton, head dimension, storages of HIGH|LOW (- without tiles), to which
    # /plain is added if LOW has P·V in bf16 or fp16, variant.
    # sm_103 has twice the exponentials of sm_100 a clock.
    (("sm_103",), "*", 64, "*", Tuning(registers=208, programs=1)),
    # Three buffers of K and V in bf16 fill the shared memory.
    (("sm_103",), "*", 128, "*|plain*", Tuning(stages=4, masked_stages=2, registers=208, programs=1)),
    (
        ("sm_100",),
        "*",
        128,
        "*|plain*",
        Tuning(exp_share=5, stages=4, masked_stages=2, registers=208, programs=1),
    ),
    (("sm_103",), "*", 128, "plain|*", Tuning(stages=4, masked_stages=2, programs=1)),
    (("sm_100",), "*", 128, "plain|*", Tuning(exp_share=5, stages=4, masked_stages=2, programs=1)),
    (("sm_103",), "*", 128, "*", Tuning(registers=208, programs=1)),
    (("sm_100",), "*", 64, "*", Tuning(exp_share=5, registers=208, programs=1)),
    (("sm_100",), "*", 128, "*", Tuning(exp_share=5, registers=208, programs=1)),
    (TCGEN05_ARCHITECTURES, "*", 256, "*", Tuning(stages=1, masked_stages=1)),
    # Triton 3.6 spills with more stages, and any where four warps may skip tiles; eight would share 64 rows poorly.
    (("sm_120",), "3.6", 128, "*", Tuning(**_SM_120, keys=64, stages=1, masked_stages=1)),
    (("sm_120",), "*", 128, "*", Tuning(**_SM_120, keys=64, stages=3, masked_stages=2)),
    (("sm_120",), "*", 64, "*", Tuning(**_SM_120, stages=3, masked_stages=2)),
    (("sm_120",), "*", 256, "*", Tuning(**_SM_120 | {"warps": 8}, stages=1, masked_stages=1)),
    (
        ("sm_90",),
        "*",
        "*",
        "*block*",
        Tuning(stages=1, masked_stages=1),
    ),  # widened by Triton: for tests alone
    *((("sm_90",), "*", dim, classes, _GLUON) for dim in (64, 128) for classes in GLUON_CLASSES),
    *((("sm_90",), "*", dim, "-|*/plain", Tuning(**_HOPPER, stages=3)) for dim in (64, 128)),
    (("sm_90",), "*", 128, "*/plain", Tuning(**_HOPPER, stages=2)),
    (("sm_90",), "*", 64, "*", Tuning(**_HOPPER, stages=2)),
    (("sm_90",), "*", 128, "*", Tuning(stages=2, masked_stages=2, transposed_v=True)),
    (("sm_90",), "*", 256, "*", Tuning(**_HOPPER | {"masked_stages": 1}, stages=1)),
    (WITHOUT_TMA, "*", 256, "*", Tuning(**_AMPERE_128 | {"rows": 64}, stages=1, masked_stages=1)),
    # Five stages of K and V in bf16 for both classes would take more than the 99 KB of sm_86 and 89.
    (("sm_89",), "*", 128, "plain|plain*", Tuning(**_AMPERE_128 | {"rows": 64, "warps": 4}, stages=3)),
    (WITHOUT_TMA, "*", 128, "plain|plain*", Tuning(**_AMPERE_128, stages=3)),
    # Numbers that were multiplied out take shared memory beside those that arrive.
    (("sm_80", "sm_86", "sm_87"), "*", 128, "*packed*", Tuning(**_AMPERE_128, stages=2)),
    # A block of 128 rows would spill with FP8 P·V, whose sums take registers of their own.
    (("sm_89",), "*", 128, "*", Tuning(**_AMPERE_128 | {"rows": 64, "warps": 4})),
    (WITHOUT_TMA, "*", 128, "*", Tuning(**_AMPERE_128)),
    (WITHOUT_TMA, "*", "*", "*", Tuning(**_AMPERE)),
    (("*",), "*", "*", "*", Tuning(stages=1, masked_stages=1)),
)


@cache
def tuning(
    architecture: str,
    dim: int,
    classes: tuple[Storage | None, Storage | None],
    low_values: Storage | None = Storage.CHANNEL,
    triton: Version = TRITON,
) -> Tuning:
    """The first row of the table that fits.

    dim is 64, 128 or 256, classes are the storages of HIGH and LOW, low_values is that of V in LOW, triton is the
    compiler's version.
    """
    storages = "|".join(storage or "-" for storage in classes)
    if low_values in (Storage.PLAIN, Storage.HALF):
        storages += "/plain"
    version = ".".join(map(str, triton))
    return next(
        row
        for architectures, tritons, dims, pattern, row in TABLE
        if any(fnmatch(architecture, name) for name in architectures)
        and tritons in (version, "*")
        and dims in (dim, "*")
        and fnmatch(storages, pattern)
    )
