"""This module lists the shapes of attention calls that are timed: some are named after models, others are free."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dma_diffusers.kernels.lowerings import MAX_HEAD_DIM

# Each is heads, tokens and head_dim of one sequence; a model that comes in two sizes has two.
NAMED = {
    "flux-1k": ((24, 4608, 128),),
    "flux-2k": ((24, 16_896, 128),),
    "flux-4k": ((24, 66_048, 128),),
    "wan-480p": ((12, 32_760, 128), (40, 32_760, 128)),
    "wan-720p": ((40, 75_600, 128),),
    "hunyuan-720p": ((24, 118_800, 128),),
    "cogvideox": ((48, 17_776, 64),),
}
# Each has a named model's text tokens, which come first, and the grid that all others lie on.
GRIDS = {
    "flux-1k": (512, (64, 64)),
    "flux-2k": (512, (128, 128)),
    "flux-4k": (512, (256, 256)),
    "wan-480p": (0, (21, 30, 52)),
    "wan-720p": (0, (21, 45, 80)),
    "hunyuan-720p": (0, (33, 45, 80)),
    "cogvideox": (226, (13, 30, 45)),
}
BATCHES = (1, 2)
_LEAST_ELEMENTS = 2**20  # a smaller shape would need hundreds of copies to leave the L2 cache


class Shape(NamedTuple):
    """q, k and v of a call have this shape, `[batch, heads, tokens, head_dim]`; `model` is empty for a free shape."""

    model: str
    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.tokens, self.head_dim

    @property
    def label(self) -> str:
        """Return the label that results are filed under."""
        return f"{self.model} {'×'.join(map(str, self.size))}".strip()

    @property
    def flop(self) -> float:
        """Return the floating-point operations of Q·K and P·V."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim


def parse(texts: Sequence[str], batch: int = 1) -> list[Shape]:
    """Return the shapes that `texts` name: keys of `NAMED`, which take `batch`, or BxHxNxD, such as 1x24x4608x128.

    Raises ValueError, in one line, for anything else, and for a shape that can't be timed.
    """
    return list(dict.fromkeys(shape for text in texts for shape in _parsed(text, batch)))


def _parsed(text: str, batch: int) -> Iterator[Shape]:
    if text in NAMED:
        yield from (Shape(text, batch, *size) for size in NAMED[text])
        return
    if not re.fullmatch(r"\d+(x\d+){3}", text):
        raise ValueError(
            f"unknown shape {text!r}: choose from {', '.join(NAMED)}, or BxHxNxD (1x24x4608x128)"
        )
    shape = Shape("", *map(int, text.split("x")))
    if shape.batch not in BATCHES:
        raise ValueError(f"shape {text}: the batch must be {' or '.join(map(str, BATCHES))}")
    if not 1 <= shape.head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"shape {text}: head_dim must be 1 to {MAX_HEAD_DIM}")
    if (elements := shape.batch * shape.heads * shape.tokens * shape.head_dim) < _LEAST_ELEMENTS:
        raise ValueError(
            f"shape {text}: {elements} elements are too few to time, {_LEAST_ELEMENTS} are needed"
        )
    yield shape
