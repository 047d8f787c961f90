"""This module lists the shapes of linear layers that are timed: some are those of models, others are free."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# Each model's tokens in one step, and the input and output channels of the linear layers that all of them pass.
_MODELS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "flux-dev": (4608, ((3072, 9216), (3072, 12_288), (12_288, 3072), (3072, 21_504), (15_360, 3072))),
    "qwen-image": (4096, ((3072, 3072), (3072, 12_288), (12_288, 3072))),
    "wan-14b": (75_600, ((5120, 5120), (5120, 13_824), (13_824, 5120))),
    "hunyuan": (119_056, ((3072, 3072), (3072, 12_288), (12_288, 3072), (15_360, 3072))),
}
NAMED = tuple(_MODELS)
_LEAST, _MULTIPLE = 128, 32


class LinearShape(NamedTuple):
    """A layer of `inputs` and `outputs` channels is called on so many rows; `model` is empty for a free shape."""

    model: str
    rows: int
    inputs: int
    outputs: int

    @property
    def label(self) -> str:
        """Return the label that results are filed under."""
        return f"{self.model} {self.rows}×{self.inputs}×{self.outputs}".strip()

    @property
    def flop(self) -> float:
        """Return the floating-point operations of the product."""
        return 2.0 * self.rows * self.inputs * self.outputs


def parse(texts: Sequence[str]) -> list[LinearShape]:
    """Return the shapes that `texts` name: a model's, or rows x inputs x outputs, such as 4608x3072x9216.

    Raises ValueError, in one line, for anything else, and for a shape that can't be timed.
    """
    found = []
    for text in texts:
        if text in _MODELS:
            rows, layers = _MODELS[text]
            found += [LinearShape(text, rows, *layer) for layer in layers]
            continue
        if not re.fullmatch(r"\d+(x\d+){2}", text):
            raise ValueError(
                f"unknown shape {text!r}: choose from {', '.join(NAMED)}, or rows x inputs x outputs (4608x3072x9216)"
            )
        shape = LinearShape("", *map(int, text.split("x")))
        if min(shape[1:]) < _LEAST or shape.inputs % _MULTIPLE or shape.outputs % _MULTIPLE:
            raise ValueError(
                f"shape {text}: rows must be {_LEAST} or more, channels so many too, and multiples of {_MULTIPLE}"
            )
        found.append(shape)
    return list(dict.fromkeys(found))
