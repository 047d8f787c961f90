"""What the tokens of one attention call are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The tokens of one attention call: how many queries and keys, and which of them are text.

    `text` is the half-open range of text tokens in the joint sequence, `(0, 0)` where there is none; it holds
    for queries and keys alike.
    """

    q_length: int
    k_length: int
    text: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if self.q_length < 1 or self.k_length < 1:
            raise ValueError(f"lengths must be at least 1, got {self.q_length} queries, {self.k_length} keys")
        start, stop = self.text
        if not 0 <= start <= stop <= self.k_length:
            raise ValueError(f"text range {self.text} does not lie within the {self.k_length} keys")
