"""This module finds the class of each pair of tiles again, in the plan that the kernels follow."""

import torch

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.tiling.precision_map import LOOPS, MEANS_TILES, Class, Phase, PrecisionMap


def tile_classes(made: plan.Plan) -> torch.Tensor:
    """Return the class in which each pair of tiles is computed: numbers of `Class`, `[1, H or 1, q_tiles, k_tiles]`."""
    block_lists = made.precision_map
    q_tiles = block_lists.indices.shape[-2]  # keys have as many, because they are the same tokens
    classes = torch.full((*block_lists.indices.shape[:-1], q_tiles + 1), int(Class.SKIP))
    place, start = torch.arange(block_lists.indices.shape[-1]), torch.zeros_like(block_lists.bounds[..., :1])
    of_phase = {
        Phase.HIGH: Class.HIGH,
        Phase.LOW: Class.LOW,
        Phase.MASKED: Class(int(not block_lists.has_high)),
    }
    for phase in LOOPS:
        end = block_lists.bounds[..., phase, None]
        tile = torch.where((place >= start) & (place < end), block_lists.indices, q_tiles)
        classes.scatter_(-1, tile.long(), int(of_phase[phase]))
        start = end
    return torch.where(taken_by_means(block_lists), int(Class.MEAN), classes[..., :-1])


def taken_by_means(precision_map: PrecisionMap) -> torch.Tensor:
    """Return which pairs of a square map are MEAN: bool `[B or 1, H or 1, q_tiles, k_tiles]`."""
    bounds, means = precision_map.bounds, precision_map.means
    q_tiles = bounds.shape[-2]  # keys have as many, because they are the same tokens
    if means is None:
        return torch.zeros(*bounds.shape[:-1], q_tiles, dtype=torch.bool)
    bits = means[..., None] >> torch.arange(MEANS_TILES) & 1
    return bits.flatten(-2)[..., :q_tiles] == 1
