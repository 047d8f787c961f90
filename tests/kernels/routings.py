"""Random phases and levels of pairs of tiles, and what routing makes of them by brute force."""

import torch

from dma_diffusers.kernels.routing.reference import LEVELS
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_phases(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random phases, in most places LOW."""
    drawn = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn > UNVISITED, int(Phase.LOW), drawn)


def random_levels(*shape: int, seed: int = 0, top: int = LEVELS) -> torch.Tensor:
    drawn = torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return torch.where(random(*shape, seed=seed) > 2, -1, drawn)


def brute_force(phases, levels, routing):
    """The phases after each Q tile's LOW pairs, sorted by level and then by place, had their shares; in loops."""
    after = phases.expand(levels.shape).clone().int()
    for batch, head, q_tile in torch.cartesian_prod(*map(torch.arange, levels.shape[:3])).tolist():
        own = phases[0, min(head, phases.shape[1] - 1), q_tile].tolist()
        level = levels[batch, head, q_tile].tolist()
        ranked = sorted((-level[tile], tile) for tile, phase in enumerate(own) if phase == Phase.LOW)
        high, kept = routing.shares[0, min(head, phases.shape[1] - 1), q_tile].tolist()
        for place, (_, tile) in enumerate(ranked):
            phase = Phase.HIGH if place < high else Phase.LOW if place < kept else routing.rest
            after[batch, head, q_tile, tile] = int(phase)
    return after
