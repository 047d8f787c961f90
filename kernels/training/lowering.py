"""Lowerings of training: how the products of a recipe really run on one architecture."""

from types import ModuleType

from dma_diffusers.kernels.lowerings import Choice
from dma_diffusers.kernels.training import reference
from dma_diffusers.kernels.training.recipe import Recipe

LOWERINGS = ("reference",)


def products_of(lowering: str) -> ModuleType:
    """The module that multiplies: `reference` so far."""
    return reference


def choose(architecture: str, recipe: Recipe, lowering: str = "auto") -> Choice:
    """The lowering of a recipe on an architecture: the reference so far."""
    return Choice("reference", "torch")
