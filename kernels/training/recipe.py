"""Recipes: which quantiser each operand of a linear layer's three products has while it trains."""

from dataclasses import dataclass
from enum import StrEnum


class Quantiser(StrEnum):
    """A way to round an operand along the inner dimension of its product."""

    NONE = "none"
    """Numbers stay as they are."""
    QUEST = "quest"
    """MXFP4 whose scales follow the standard deviation of a block: what lies beyond them is clipped, and masked."""
    NEAREST = "nearest"
    """MXFP4 of ¾·x under a scale that follows amax, to nearest even: nothing is clipped."""
    STOCHASTIC = "stochastic"
    """The same, rounded up or down by chance, so that the mean is right."""
    FOUR_OVER_SIX = "four_over_six"
    """NVFP4 whose blocks take the better of two scales."""
    MS_EDEN = "ms_eden"
    """NVFP4 to nearest even, with scales that are corrected by chance, so that the mean over rotations is right."""
    MXINT8 = "mxint8"
    """MXINT8, symmetric: scales are rounded up, and nothing is clipped."""

    @property
    def format(self) -> str:
        """The name of its format."""
        return _FORMATS[self]

    @property
    def is_random(self) -> bool:
        """True if it draws a number for each element, or each scale."""
        return self in (Quantiser.STOCHASTIC, Quantiser.MS_EDEN)

    @property
    def is_rotated(self) -> bool:
        """True if, in the backward pass, both operands of a product are rotated along its inner dimension."""
        return self in (Quantiser.NEAREST, Quantiser.STOCHASTIC, Quantiser.MS_EDEN)

    @property
    def outside(self) -> float:
        """The factor that its numbers still need, in every row: 4/3 undoes ¾."""
        return 4 / 3 if self in (Quantiser.NEAREST, Quantiser.STOCHASTIC) else 1.0


_FORMATS = {
    Quantiser.NONE: "bf16",
    Quantiser.QUEST: "mxfp4",
    Quantiser.NEAREST: "mxfp4",
    Quantiser.STOCHASTIC: "mxfp4",
    Quantiser.FOUR_OVER_SIX: "nvfp4",
    Quantiser.MS_EDEN: "nvfp4",
    Quantiser.MXINT8: "mxint8",
}


@dataclass(frozen=True)
class Recipe:
    """The quantisers of a layer.

    forward: of input and weight. backward: of the four operands of the two products behind the gradients; NONE
    multiplies there what the forward pass multiplied, with a gradient that is not rounded.
    rotates: whether the forward pass rotates blocks of 32 channels of input and weight, always in the same way.
    """

    forward: Quantiser
    backward: Quantiser
    rotates: bool = False


LINEARS = ("qat", "quartet", "quartet2", "mxint8")
"""The names of recipes."""
ROUNDINGS = ("nearest", "stochastic")
"""How "quartet" rounds the operands of its backward pass."""


def recipe_of(linears: str, rounding: str = "nearest") -> Recipe:
    """The recipe of this name.

    "qat": MXFP4 by QuEST in the forward pass, and 16-bit products in the backward one (arXiv 2502.05003).
    "quartet": MXFP4 in all three products (arXiv 2505.14669 v4); `rounding` is that of the backward pass.
    "quartet2": NVFP4 in all three, with four-over-six scales forward and MS-EDEN backward (arXiv 2601.22813).
    "mxint8": MXINT8 in all three, symmetric (arXiv 2510.25602).
    Raises ValueError, in one line, for another name, another rounding, or a rounding where there is nothing to choose.
    """
    if linears not in LINEARS:
        raise ValueError(f"unknown linears {linears!r} to train with: choose from {', '.join(LINEARS)}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}: choose from {', '.join(ROUNDINGS)}")
    if rounding == "stochastic" and linears != "quartet":
        raise ValueError(f'rounding="stochastic" is for quartet: {linears} {_OWN_ROUNDING[linears]}')
    match linears:
        case "qat":
            return Recipe(Quantiser.QUEST, Quantiser.NONE, rotates=True)
        case "quartet":
            return Recipe(Quantiser.QUEST, Quantiser(rounding), rotates=True)
        case "quartet2":
            return Recipe(Quantiser.FOUR_OVER_SIX, Quantiser.MS_EDEN)
        case _:
            return Recipe(Quantiser.MXINT8, Quantiser.MXINT8)


_OWN_ROUNDING = {
    "qat": "doesn't round in its backward pass",
    "quartet2": "rounds its scales by chance already, and nothing else",
    "mxint8": "rounds to nearest",
}

RECIPES = {name: recipe_of(name) for name in LINEARS} | {
    "quartet, stochastic": recipe_of("quartet", "stochastic")
}
"""Every recipe by its name, and by its rounding where there is a choice."""
