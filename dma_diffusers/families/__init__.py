"""The families of models: where the text stands, which grid the other tokens lie on, and what was published."""

from dataclasses import replace
from functools import partial

import torch

from dma_diffusers import grids
from dma_diffusers.families.family import Family
from dma_diffusers.families.published import DenseFirst, Published
from dma_diffusers.families.table import CONTROLNETS, FAMILIES, TRANSFORMERS

__all__ = [
    "CONTROLNETS", "FAMILIES", "TRANSFORMERS", "DenseFirst", "Family", "Published", "family_of", "known_family"
]  # fmt: skip


def known_family(model: torch.nn.Module) -> Family | None:
    """The family of `model`, which may be of a subclass; None if nobody knows it."""
    bases = (base.__name__ for base in type(model).__mro__)
    return next((FAMILIES[name] for name in bases if name in FAMILIES), None)


def family_of(model: torch.nn.Module, text: str | None = None, grid: grids.Grid | None = None) -> Family:
    """The family of `model`, with `grid` in place of what is known about it if given.

    text: where joint attention has its text; asked for where nobody knows the model.
    Modules of an unknown family that are called without `encoder_hidden_states` are taken to get text and
    image as one sequence: where that is wrong, a few tiles too many are HIGH.
    Raises ValueError for an unknown family without `text`, for a known one whose text stands elsewhere, and for one
    that can't be had.
    """
    kind, known = type(model).__name__, known_family(model)
    if known is None:
        if text is None:
            raise ValueError(
                f"{kind} is of no known family (dma_diffusers/families.md lists them): say where its joint attention "
                'has text, with text="first", "last" or "none" for none, and for policies that need it what the '
                "other tokens lie on, with grid=(rows, columns) or (frames, rows, columns)"
            )
        known = Family(text, single_stream=True)
    if known.refusal:
        raise ValueError(f"{kind} can't be had: {known.refusal}")
    if text not in (None, known.text):
        raise ValueError(
            f'text="{text}": {kind} has its text "{known.text}", as its family does: leave text out'
        )
    return replace(known, grid=partial(grids.given, grid), grid_on_device=False) if grid else known
