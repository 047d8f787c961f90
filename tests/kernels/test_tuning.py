"""The tuning table: complete, without dead rows, and nothing in it that the kernel cannot do."""

from itertools import product

import pytest

from dma_diffusers.kernels.attention.tuning import TABLE, tuning
from dma_diffusers.kernels.device.tritons import NEWEST_TESTED, OLDEST_TESTED
from dma_diffusers.kernels.lowerings import (
    BLOCK_SCALED_ARCHITECTURES,
    KERNEL_ARCHITECTURES,
    TCGEN05_ARCHITECTURES,
    Storage,
)

ARCHITECTURES = ("cpu", *KERNEL_ARCHITECTURES)
CLASSES = [classes for classes in product((None, *Storage), repeat=2) if any(classes)]
TRITONS = [(3, minor) for minor in range(OLDEST_TESTED[1], NEWEST_TESTED[1] + 1)]
VALUES = (Storage.CHANNEL, Storage.HALF, Storage.PLAIN)
CALLS = list(product(ARCHITECTURES, (64, 128, 256), CLASSES, VALUES, TRITONS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_call_has_a_row_the_kernel_can_build(architecture):
    for dim, classes, values, triton in product((64, 128, 256), CLASSES, VALUES, TRITONS):
        row = tuning(architecture, dim, classes, values, triton)
        assert row.keys == 128 or (row.keys == 64 and architecture not in TCGEN05_ARCHITECTURES)
        assert row.skipping.keys == 128, "a tile is skipped as a whole"
        assert row.slots is None or (
            architecture == "sm_90" and (values is Storage.CHANNEL or None in classes)
        )
        assert row.rows in (64, 128) and row.warps in (4, 8)
        assert 0 <= row.exp_share <= 32 and row.stages >= 1 and row.masked_stages >= 1
        if architecture in TCGEN05_ARCHITECTURES and Storage.BLOCK in classes:
            assert row.rows == 128, "block-scaled MMA of tcgen05 silently becomes bf16 at 64 rows"
        if architecture in TCGEN05_ARCHITECTURES:
            assert not row.transposed_v
        elif architecture in BLOCK_SCALED_ARCHITECTURES or (
            architecture == "sm_90" and Storage.BLOCK not in classes
        ):
            assert row.transposed_v, "FP8 MMA before tcgen05 wants V as [D, tokens]"
        assert row.unit_scales == (architecture == "sm_120"), "only there are block-scaled products faster"


def test_every_row_is_some_calls():
    taken = {id(tuning(*call)) for call in CALLS}
    assert [row for *_, row in TABLE if id(row) not in taken] == []


def test_b300_is_b200_without_polynomials():
    """A B300 has twice the exponentials: the same variants, no polynomials."""
    for dim, classes in product((64, 128), CLASSES):
        b200, b300 = tuning("sm_100", dim, classes), tuning("sm_103", dim, classes)
        assert (b200.exp_share, b300.exp_share) == (5, 0)
        assert (b200.rows, b200.warps, b200.stages) == (b300.rows, b300.warps, b300.stages)
