"""Operands: the tensors of inputs and weights in block formats, which registered operators take as lists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.layout import COLUMNS, ROWS
from dma_diffusers.kernels.linears.weight import LinearWeight


class Operand(NamedTuple):
    """The tensors of `LinearWeight` by the same names, of a weight, or with an input's rows; None for absent ones."""

    narrow: Tensor | None = None
    narrow_scales: Tensor | None = None
    wide: Tensor | None = None
    wide_scales: Tensor | None = None
    row_scales: Tensor | None = None

    @property
    def elements(self) -> Tensor:
        """Elements that it has, `[rows, ...]`."""
        elements = self.wide if self.narrow is None else self.narrow
        assert elements is not None
        return elements

    @property
    def present(self) -> list[Tensor]:
        """The tensors that it has."""
        return [x for x in self if x is not None]

    @classmethod
    def of_weight(cls, weight: LinearWeight) -> "Operand":
        """The operand of a weight."""
        return cls(*(getattr(weight, name) for name in cls._fields))

    @classmethod
    def of_present(cls, present: Sequence[Tensor], groups: Groups, reencoded: bool = False) -> "Operand":
        """The operand that has these tensors `present`."""
        return cls(**dict(zip(_names(groups, reencoded), present, strict=True)))

    @classmethod
    def empty(cls, x: Tensor, groups: Groups, reencoded: bool) -> "Operand":
        """Room on its device for x `[rows, K]`: in the formats of its groups, or re-encoded in e4m3."""
        rows = x.shape[0]
        scale_dtype = torch.float8_e4m3fn if groups.has_row_scales else torch.uint8

        def scales(channels: int) -> Tensor:
            columns = -(-channels // (groups.block * COLUMNS))
            return x.new_empty((1, (rows + ROWS - 1) // ROWS, columns, 2, 256), dtype=scale_dtype)

        wide = groups.in_features if reencoded else groups.wide
        make = {
            "narrow": lambda: x.new_empty((rows, groups.narrow // 2), dtype=torch.uint8),
            "narrow_scales": lambda: scales(groups.narrow),
            "wide": lambda: x.new_empty((rows, wide), dtype=torch.float8_e4m3fn),
            "wide_scales": lambda: scales(groups.wide),
            "row_scales": lambda: x.new_empty((rows,), dtype=torch.float32),
        }
        return cls(**{name: make[name]() for name in _names(groups, reencoded)})


def _names(groups: Groups, reencoded: bool) -> list[str]:
    """The tensors that an operand with these groups has."""
    if reencoded:
        return ["wide", "row_scales"]
    narrow = ["narrow", "narrow_scales"] if groups.narrow else []
    wide = ["wide", "wide_scales"] if groups.wide else []
    return [*narrow, *wide, *(["row_scales"] if groups.has_row_scales else [])]
