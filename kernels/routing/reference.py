"""Routing in torch, which defines what is correct.

The error that low precision makes in a pair of tiles depends on its probabilities: the errors of many small ones are
independent, and add up to less than the error of a large one with the same sum. So the importance of a pair is the root
mean square of its probabilities times the spread of its values. The probabilities are predicted from the means and
variances of the tiles, as if scores within a pair were Gaussian.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase, PrecisionMap, map_of

LN_2 = math.log(2)
# The standard deviation of scores (base 2) beyond which the largest of 128 scores outweighs the sum of the others
# (Derrida's random energy model, Phys. Rev. B 24, 2613).
FARTHEST = math.sqrt(2 * math.log(TILE)) / LN_2
SAMPLE_STRIDE = 4  # a pool takes every fourth token of its tile
# Importance has levels: 64 binades from 2^-44 to 2^20, with 64 steps each.
BINS, LOWEST = 64, -44
LEVELS = BINS * BINS


class Pools(NamedTuple):
    """Statistics of a sample of each tile's tokens; NaN for tiles with no token in the sample.

    q: float32 `[B, H, tiles, 2, D]`, the mean and the variance of each channel of q·softmax_scale_log2.
    k: float32 `[B, Hkv, tiles, 2, D]`, the same of k less its mean.
    v: float32 `[B, Hkv, tiles]`, the sum of the variances of v's channels.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """The pairs among which a call routes, and how many of them it may upgrade.

    phases: uint8 `[1, H or 1, q_tiles, k_tiles]`, the phase in which the policy visits each pair; `UNVISITED` for none.
    visited: the number of pairs of `phases` that are visited.
    budget: the share of all pairs visited by the heads of a batch entry that may become HIGH.
    """

    phases: torch.Tensor
    visited: int
    budget: float

    @classmethod
    def of(cls, phases: torch.Tensor, budget: float) -> "Routing":
        """The routing for the phases that `precision_map.visiting_phases` gives."""
        return cls(phases.to(torch.uint8).contiguous(), int((phases != UNVISITED).sum()), budget)

    def to(self, device: torch.device) -> "Routing":
        """The same routing on `device`."""
        return replace(self, phases=self.phases.to(device))

    def allowed(self, heads: int) -> int:
        """The number of LOW pairs of a batch entry that may become HIGH, if q has `heads` heads."""
        return int(self.budget * (self.visited * heads // self.phases.shape[1]))


def pooled(x: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """The mean and the variance of each channel over the sample of each tile, float32 `[B, H, tiles, 2, D]`.

    x: float32 `[B, H, S, D]`. counted: bool `[B or 1, S]`, True for slots whose tokens count; None for all.
    """
    if counted is None:
        counted = torch.ones_like(x[:1, 0, :, 0], dtype=torch.bool)
    whole_tiles = (0, 0, 0, -x.shape[-2] % TILE)
    x, counted = (
        F.pad(y, whole_tiles).unflatten(-2, (-1, TILE))[..., ::SAMPLE_STRIDE, :]
        for y in (x, counted[:, None, :, None])
    )
    count = counted.sum(-2, keepdim=True)
    mean = torch.where(counted, x, 0).sum(-2, keepdim=True) / count
    variance = torch.where(counted, x - mean, 0).square().sum(-2, keepdim=True) / count
    return torch.cat((mean, variance), dim=-2)


def importance(pools: Pools, phases: torch.Tensor) -> torch.Tensor:
    """The log2 of the importance of each pair, float32 `[B, H, q_tiles, k_tiles]`; NaN where pools are NaN.

    phases: those of a `Routing`. Probabilities are shares of the total over all pairs that a Q tile visits; pairs with
    NaN are left out of that total.
    """
    group = pools.q.shape[1] // pools.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (pools.k, pools.v))
    (q_mean, q_variance), (k_mean, k_variance) = pools.q.unbind(-2), k.unbind(-2)
    score = q_mean @ k_mean.mT
    k_square = k_mean.square() + k_variance
    deviation = (q_variance @ k_square.mT + q_mean.square() @ k_variance.mT).sqrt()
    mean_exp = score + log_mean_exp(deviation)
    visited = torch.where((phases != UNVISITED) & ~mean_exp.isnan(), mean_exp, -math.inf)
    total = torch.logsumexp(visited * LN_2, dim=-1, keepdim=True) / LN_2
    return score + log_mean_exp(2 * deviation) / 2 - total + v.log2()[:, :, None] / 2


def log_mean_exp(deviation: torch.Tensor) -> torch.Tensor:
    """The log2 of the mean of 2^x over 128 Gaussian x with mean 0 and this standard deviation."""
    within = deviation.clamp(max=FARTHEST)
    return LN_2 * within * (deviation - within / 2)


def levels(importance: torch.Tensor) -> torch.Tensor:
    """The level of each pair, int32: its log2 importance in steps of 1/64 above −44, rounded down; −1 for NaN."""
    steps = (BINS * (importance - LOWEST)).clamp(0, LEVELS - 1)
    return torch.where(importance.isnan(), -1, steps.int())


def routed(levels: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The phases after the most important LOW pairs became HIGH: int32 `[B, H, q_tiles, k_tiles]`.

    Each batch entry upgrades as many pairs as it may, or fewer: pairs of one level are upgraded together or not at all.
    """
    phases = routing.phases.int().expand(levels.shape)
    allowed = routing.allowed(levels.shape[1])
    offered = torch.where(phases == Phase.LOW, levels, -1).flatten(1)
    ranked = F.pad(offered.sort(descending=True).values, (0, 1), value=-1)
    first_left = ranked[:, allowed, None]
    is_upgraded = (offered > first_left).view(levels.shape)
    return torch.where(is_upgraded, int(Phase.HIGH), phases)


def route(pools: Pools, routing: Routing) -> PrecisionMap:
    """The map of a call, with a block list for every batch entry and head. The same inputs give the same map."""
    return map_of(routed(levels(importance(pools, routing.phases)), routing), has_high=True)
