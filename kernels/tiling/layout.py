"""The tokens of one attention call, and the tiles of 128 tokens in which precision is chosen."""

import math
from dataclasses import dataclass

TILE = 128  # tokens of a map tile
DIMENSIONS = 3  # of a grid, at most


def tiles(length: int) -> int:
    """The number of tiles that `length` tokens take; the last one may be partial."""
    return -(-length // TILE)


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call: how many queries and keys there are, which are text, and the others' grid.

    text: the half-open range of text tokens in the joint sequence, `(0, 0)` where there is none; it holds for queries
        and keys alike.
    grid: the shape on which all other tokens lie, in row-major order: (time, rows, columns), (rows, columns) or
        (tokens,); `()` where it isn't known.
    Raises ValueError where these contradict each other.
    """

    q_length: int
    k_length: int
    text: tuple[int, int] = (0, 0)
    grid: tuple[int, ...] = ()

    def __post_init__(self):
        if self.q_length < 1 or self.k_length < 1:
            raise ValueError(f"lengths must be at least 1, got {self.q_length} queries, {self.k_length} keys")
        start, stop = self.text
        if not 0 <= start <= stop <= self.k_length:
            raise ValueError(f"text range {self.text} does not lie within the {self.k_length} keys")
        if self.grid:
            self._check_grid()

    def _check_grid(self) -> None:
        shape, others = "×".join(map(str, self.grid)), self.k_length - self.text_length
        if len(self.grid) > DIMENSIONS or min(self.grid) < 1:
            raise ValueError(f"a grid has 1 to {DIMENSIONS} dimensions of at least 1, got {shape}")
        if self.q_length != self.k_length:
            raise ValueError(f"a grid needs as many queries as keys, got {self.q_length} and {self.k_length}")
        if math.prod(self.grid) != others:
            raise ValueError(
                f"grid {shape} has {math.prod(self.grid)} tokens, but of the call's {self.k_length}, "
                f"{self.text_length} of them text, {others} are left for it"
            )

    @property
    def text_length(self) -> int:
        """The number of text tokens."""
        return self.text[1] - self.text[0]
