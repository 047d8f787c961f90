"""Layers that round as in training, in the place of stock ones."""

from collections import Counter
from collections.abc import Mapping

import torch

from dma_diffusers.finetune.module import QuartetLinear
from dma_diffusers.kernels.training.recipe import Recipe
from dma_diffusers.linears.exclusions import block_of
from dma_diffusers.linears.quantise import set_layer


def put_in(model: torch.nn.Module, layers: Mapping[str, torch.nn.Linear], recipe: Recipe) -> None:
    """Puts a layer that rounds into the place of each of these, with the very same parameters."""
    seeds: Counter[str] = Counter()
    for name, layer in layers.items():
        # Numbers are alike in all blocks, for blocks that are compiled once; gradients tell their layers apart.
        block, *_ = block_of(model, name)
        set_layer(model, name, QuartetLinear(layer, recipe, seeds[block]))
        seeds[block] += 1
