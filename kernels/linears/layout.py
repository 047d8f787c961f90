"""The layout of block scales in memory: the one in which tcgen05 reads them, 128 rows by 4 blocks at a time."""

import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 128, 4


def tiled_scales(scales: Tensor) -> Tensor:
    """Block scales `[rows, blocks]`, one byte each, as `[1, rows/128, blocks/4, 2, 256]`, padded with zeros.

    Each 128 × 4 scales are 512 bytes: 32 runs of 16, with four scales of each of the rows r, r+32, r+64 and r+96.
    """
    padding = (0, -scales.shape[1] % COLUMNS, 0, -scales.shape[0] % ROWS)
    tiles = F.pad(scales, padding).unflatten(1, (-1, COLUMNS)).unflatten(0, (-1, ROWS // 32, 32))
    return tiles.permute(0, 3, 2, 1, 4).reshape(1, tiles.shape[0], tiles.shape[3], 2, 256)


def plain_scales(tiled: Tensor, rows: int, blocks: int) -> Tensor:
    """Block scales `[rows, blocks]`, from what `tiled_scales` made of them."""
    tiles = tiled.reshape(tiled.shape[1], tiled.shape[2], 32, ROWS // 32, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, tiled.shape[2] * COLUMNS)[:rows, :blocks]
