"""Six-bit codes in files: four of them lie in three bytes."""

import torch
from torch import Tensor


def join_six_bits(codes: Tensor) -> Tensor:
    """The bytes (uint8 `[..., 3n]`) of right-aligned 6-bit codes (uint8 `[..., 4n]`), the first code lowest.

    Raises ValueError if the number of codes in a row is no multiple of four.
    """
    if codes.shape[-1] % 4:
        raise ValueError(f"6-bit codes are packed four to three bytes: got {codes.shape[-1]} in a row")
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), dim=-1).flatten(-2)


def split_six_bits(packed: Tensor) -> Tensor:
    """The codes (uint8 `[..., 4n]`, right-aligned) that `join_six_bits` packed into uint8 `[..., 3n]`."""
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack((x, x >> 6 | y << 2, y >> 4 | z << 4, z >> 2), dim=-1).flatten(-2) & 63
