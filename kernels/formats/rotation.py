"""Rotations of channels: q and k that share one have the same products, and their outliers are spread over a block.

v may have one of its own, since P·(V·H)·Hᵀ is P·V: the output is turned back.

A rotation changes the signs of some channels, always of the same ones, and multiplies each block of n neighbouring
channels by Sylvester's Hadamard matrix over √n. Sources: QuIP#, arXiv 2402.04396; INT versus FP, arXiv 2510.25602.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ROTATIONS = ("none", "hadamard16", "hadamard32", "head_dim")
"""The names: no rotation, blocks of 16 or of 32 channels, and all channels of a head in one block."""

_BLOCKS = {"none": 1, "hadamard16": 16, "hadamard32": 32}


class Rotations(NamedTuple):
    """The rotation that q and k share, and that of v, by name.

    In words it is `hadamard32`, or `hadamard32/head_dim` where v has one too.
    """

    qk: str
    v: str = "none"

    @classmethod
    def parse(cls, words: str) -> "Rotations":
        """The rotations that these words say.

        Raises ValueError, in one line, for words of another form, or an unknown name.
        """
        parts = words.split("/") if isinstance(words, str) else ()
        if not 1 <= len(parts) <= 2 or not set(parts) <= set(ROTATIONS):
            raise ValueError(
                f"unknown rotation {words!r}: choose from {', '.join(ROTATIONS)}, for Q and K, or as in none/head_dim "
                f"for V too"
            )
        return cls(*parts)


def block_of(rotation: str, head_dim: int) -> int:
    """The number of channels in a block of this rotation, 1 for none.

    Raises ValueError, in one line, for an unknown name, or a block that doesn't divide `head_dim`.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"unknown rotation {rotation!r}: choose from {', '.join(ROTATIONS)}")
    block = _BLOCKS.get(rotation, head_dim)
    if block & (block - 1):
        raise ValueError(f"rotation head_dim needs a power of two, and head_dim is {head_dim}: take another")
    if head_dim % block:
        raise ValueError(
            f"rotation {rotation} needs a head_dim that {block} divides, and head_dim is {head_dim}"
        )
    return block


def sign_is_changed(channel: int) -> bool:
    """Says whether the rotation changes the sign of this channel: a pseudo-random bit of the channel's number."""
    mixed = (channel + 1) * 0x9E3779B1 & 0xFFFFFFFF
    return (mixed ^ mixed >> 15) * 0x85EBCA77 >> 31 & 1 == 1


def rotate(x: Tensor, rotation: str) -> Tensor:
    """`x` with its channels rotated, in float32; equal bit for bit on every device.

    x: `[..., head_dim]`, any float dtype. Raises ValueError like `block_of`.
    """
    return rotate_blocks(x, block_of(rotation, x.shape[-1]))


def rotate_blocks(x: Tensor, block: int) -> Tensor:
    """`rotate`, by the number of channels in a block: a power of two that divides x's, 1 for no rotation."""
    x = x.to(torch.float32)
    return x if block == 1 else hadamard(x * _signs(x), block)


def rotate_back(x: Tensor, rotation: str) -> Tensor:
    """The tensor of which `x` is `rotate(…, rotation)`, up to float32's rounding; arguments are `rotate`'s."""
    block = block_of(rotation, x.shape[-1])
    x = x.to(torch.float32)
    return x if block == 1 else hadamard(x, block) * _signs(x)


def _signs(x: Tensor) -> Tensor:
    signs = [-1.0 if sign_is_changed(channel) else 1.0 for channel in range(x.shape[-1])]
    return torch.tensor(signs, device=x.device)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Each `block` of channels by the symmetric Hadamard matrix over √block: sums and differences of neighbours first.

    x: `[..., channels]`, of any float dtype, which it keeps.
    """
    shape, distance = x.shape, 1
    while distance < block:
        first, second = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance).unbind(-2)
        x = torch.stack((first + second, first - second), -2)
        distance *= 2
    return x.reshape(shape) * block**-0.5
