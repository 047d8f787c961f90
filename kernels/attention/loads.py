"""Loads operands of the attention kernel: through tensor descriptors, or by pointers where a GPU has no TMA.

Pointers are of what the quantiser wrote, in whole tiles.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.quantiser.kernel import scale_place
from dma_diffusers.kernels.tiling import layout

TILE = tl.constexpr(layout.TILE)


@triton.jit
def load_block_scales(descriptor, tile, part, KEYS: tl.constexpr, COLUMNS: tl.constexpr):
    """The scales of a tile's part-th run of KEYS keys, [KEYS, COLUMNS]; those of the whole tile are loaded."""
    if COLUMNS % 4 == 0:
        scales = tl.reshape(descriptor.load([0, tile, 0, 0, 0]), (1, COLUMNS // 4, 32, 4, 4))
        scales = tl.reshape(tl.trans(scales, 0, 3, 2, 1, 4), (TILE, COLUMNS))
    else:
        scales = tl.reshape(descriptor.load([tile, 0]), (TILE, COLUMNS))
    if KEYS < TILE:
        runs = tl.reshape(scales.to(tl.uint8, bitcast=True), (TILE // KEYS, KEYS, COLUMNS))
        is_own = (tl.arange(0, TILE // KEYS) == part)[:, None, None]
        own = tl.sum(tl.where(is_own, runs.to(tl.int32), 0), axis=0)
        scales = own.to(tl.uint8).to(scales.dtype, bitcast=True)
    return scales


@triton.jit
def load_row_scales(scales, tile, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The scales of some rows of one tile, [ROWS, COLUMNS], by pointers."""
    place = scale_place((first + tl.arange(0, ROWS))[:, None], tl.arange(0, COLUMNS)[None, :], COLUMNS)
    return tl.load(scales + tile.to(tl.int64) * (TILE * COLUMNS) + place)


@triton.jit
def load_rows(
    operand, batch, head, heads, first, length, ARE_WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows `first` and following of one head, [ROWS, COLUMNS].

    operand: a descriptor, or a pointer to [B, heads, length, COLUMNS]. ARE_WHOLE: the length is one of whole tiles. By
    a pointer, rows past another length are its last row again.
    """
    if isinstance(operand, tl.tensor):
        rows = tl.arange(0, ROWS)
        if not ARE_WHOLE:
            rows = tl.minimum(rows, length - 1 - first)
        base = operand + ((batch * heads + head).to(tl.int64) * length + first) * COLUMNS
        x = tl.load(base + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    else:
        x = operand.load([batch, head, first, 0])
        x = tl.reshape(x, (ROWS, x.shape[3]))
    return x


@triton.jit
def load_values(
    v, batch, head, heads, first, length, TRANSPOSED: tl.constexpr, ARE_WHOLE: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """V of KEYS keys from `first` on, [KEYS, D], of [.., length, D] or, in whole tiles, TRANSPOSED [.., D, length]."""
    if TRANSPOSED and isinstance(v, tl.tensor):
        base = v + (batch * heads + head).to(tl.int64) * length * D + first
        value = tl.trans(tl.load(base + tl.arange(0, D)[:, None] * length + tl.arange(0, KEYS)[None, :]))
    elif TRANSPOSED:
        value = tl.trans(tl.reshape(v.load([batch, head, 0, first]), (D, KEYS)))
    else:
        value = load_rows(v, batch, head, heads, first, length, ARE_WHOLE, KEYS, D)
    return value
