"""The tokens of one attention call, and the tiles of 128 tokens in which precision is chosen."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

TILE = 128  # tokens of a map tile
SUBTILE = 32  # tokens of a KV tile that MEAN takes together by their means
DIMENSIONS = 3  # of a grid, at most


def tiles(length: int) -> int:
    """The number of tiles that `length` tokens take; the last one may be partial."""
    return -(-length // TILE)


def tiles_with(tokens: torch.Tensor) -> torch.Tensor:
    """Says which tiles hold a token that is True. tokens: bool `[S]`; the result is bool `[tiles]`."""
    return F.pad(tokens, (0, -len(tokens) % TILE)).view(-1, TILE).any(-1)


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call: how many queries and keys there are, which are text, and the others' grid.

    text: the half-open range of text tokens in the joint sequence, `(0, 0)` where there is none. It holds for queries
        and keys alike, unless there are as many queries as tokens other than text: they are then the queries.
    grid: the shape on which all other tokens lie, in row-major order: (time, rows, columns), (rows, columns) or
        (tokens,); `()` where it isn't known.
    parts: the sequence is this many equal parts, one after the other, and `text` is the range within each of them, as
        after Ulysses' exchange between several GPUs, each of which had a part of the text and one of the other tokens.
    Raises ValueError where these contradict each other.
    """

    q_length: int
    k_length: int
    text: tuple[int, int] = (0, 0)
    grid: tuple[int, ...] = ()
    parts: int = 1

    def __post_init__(self):
        if self.q_length < 1 or self.k_length < 1:
            raise ValueError(f"lengths must be at least 1, got {self.q_length} queries, {self.k_length} keys")
        if self.parts < 1 or self.k_length % self.parts:
            raise ValueError(f"{self.k_length} keys are not {self.parts} equal parts")
        start, stop = self.text
        if not 0 <= start <= stop <= self.k_length // self.parts:
            of_part = f" of each of the {self.parts} parts" if self.parts > 1 else ""
            length = self.k_length // self.parts
            raise ValueError(f"text range {self.text} does not lie within the {length} keys{of_part}")
        if self.parts > 1 and self.q_length != self.k_length and not self.queries_omit_text:
            raise ValueError(
                f"{self.parts} parts need as many queries as keys, or as keys other than text: "
                f"got {self.q_length} queries, {self.k_length} keys, {self.text_length} of them text"
            )
        if self.grid:
            self._check_grid()

    def _check_grid(self) -> None:
        shape, others = "×".join(map(str, self.grid)), self.k_length - self.text_length
        if len(self.grid) > DIMENSIONS or min(self.grid) < 1:
            raise ValueError(f"a grid has 1 to {DIMENSIONS} dimensions of at least 1, got {shape}")
        if self.q_length != self.k_length:
            omitted = (
                ": a policy on the grid needs the text among the queries too"
                if self.queries_omit_text
                else ""
            )
            raise ValueError(
                f"a grid needs as many queries as keys, got {self.q_length} and {self.k_length}{omitted}"
            )
        if math.prod(self.grid) != others:
            raise ValueError(
                f"grid {shape} has {math.prod(self.grid)} tokens, but of the call's {self.k_length}, "
                f"{self.text_length} of them text, {others} are left for it"
            )

    @property
    def text_length(self) -> int:
        """The number of text tokens."""
        return self.parts * (self.text[1] - self.text[0])

    @property
    def queries_omit_text(self) -> bool:
        """True if the queries are the tokens other than text, which the keys hold too."""
        return 0 < self.text_length == self.k_length - self.q_length

    @property
    def is_text(self) -> torch.Tensor:
        """Says which keys are text: bool `[k_length]`."""
        start, stop = self.text
        place = torch.arange(self.k_length) % (self.k_length // self.parts)
        return (place >= start) & (place < stop)

    def query_places(self, is_causal: bool = False) -> torch.Tensor:
        """The place of each query in the sequence of keys, ascending: int64 `[q_length]`.

        is_causal: the mask compares the numbers of queries and keys, and these are then the places.
        """
        if self.queries_omit_text and not is_causal:
            return (~self.is_text).nonzero()[:, 0]
        return torch.arange(self.q_length)
