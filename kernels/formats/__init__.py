"""Number formats: `FORMATS` lists them, `fake_quantize` rounds to one, `pack` and `unpack` store in one.

`rotate` spreads outliers before that.

>>> fake_quantize(torch.tensor([0.1, 2.5, -6.0]), "mxfp4")
tensor([ 0.,  2., -6.])
"""

from .codec import Packed, fake_quantize, pack, unpack
from .element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT6, INT8, Element, FloatElement, IntElement
from .format import FORMATS, Format, get_format
from .rotation import (
    ROTATIONS,
    Rotations,
    block_of,
    hadamard,
    rotate,
    rotate_back,
    rotate_blocks,
    sign_is_changed,
)
from .scale import Scale, ScaleRounding
from .six_bits import join_six_bits, split_six_bits

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FORMATS",
    "INT4",
    "INT6",
    "INT8",
    "ROTATIONS",
    "Element",
    "FloatElement",
    "Format",
    "IntElement",
    "Packed",
    "Rotations",
    "Scale",
    "ScaleRounding",
    "block_of",
    "fake_quantize",
    "get_format",
    "hadamard",
    "join_six_bits",
    "pack",
    "rotate",
    "rotate_back",
    "rotate_blocks",
    "sign_is_changed",
    "split_six_bits",
    "unpack",
]
