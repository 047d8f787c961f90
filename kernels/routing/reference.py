"""Routing in torch: it defines what is correct.

A pair of tiles errs by what its probabilities weigh: many small ones, whose errors are independent, add up to less than
one large one of the same sum. So a pair's importance is the root mean square of its probabilities, predicted from the
tiles' means and variances, times how far its values lie apart. Scores within a pair are taken as Gaussian.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.precision_map import TILE, UNVISITED, Phase, PrecisionMap, map_of

LN_2 = math.log(2)
# Among 128 scores there is none that lies much farther out, in base 2: from there on, the largest is all that counts
# (Derrida's random energy model, Phys. Rev. B 24, 2613).
FARTHEST = math.sqrt(2 * math.log(TILE)) / LN_2
SAMPLED = 4  # of so many tokens, pools take one
# Importance is told apart in 64 binades from 2^-44 to 2^20, in 64 steps each.
BINS, LOWEST = 64, -44
LEVELS = BINS * BINS


class Pools(NamedTuple):
    """What a sample of each tile's tokens has in common; NaN for tiles with none in it.

    q, k: float32 `[B, H or Hkv, tiles, 2, D]`, mean and variance of each channel, of q·factor and of k less its mean.
    v: float32 `[B, Hkv, tiles]`, the sum of the channels' variances.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """What a call can route.

    phases: uint8 `[1, H or 1, q_tiles, k_tiles]`, the phase that visits each pair by policy, `precision_map.UNVISITED` for none.
    visited: how many pairs of `phases` are. budget: of all pairs that the heads of a batch entry visit, the share that
    may become HIGH.
    """

    phases: torch.Tensor
    visited: int
    budget: float

    @classmethod
    def of(cls, phases: torch.Tensor, budget: float) -> "Routing":
        """phases: as `precision_map.visiting_phases` gives them."""
        return cls(phases.to(torch.uint8).contiguous(), int((phases != UNVISITED).sum()), budget)

    def to(self, device: torch.device) -> "Routing":
        """The same on `device`."""
        return replace(self, phases=self.phases.to(device))

    def allowed(self, heads: int) -> int:
        """How many LOW pairs of a batch entry may become HIGH."""
        return int(self.budget * (self.visited * heads // self.phases.shape[1]))


def pooled(x: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and variance of each channel over the sample of each tile, float32 `[B, H, tiles, 2, D]`.

    x: float32 `[B, H, S, D]`. there: bool `[B or 1, S]`, which tokens count; None for all.
    """
    if there is None:
        there = torch.ones_like(x[:1, 0, :, 0], dtype=torch.bool)
    whole_tiles = (0, 0, 0, -x.shape[-2] % TILE)
    x, counts = (
        F.pad(y, whole_tiles).unflatten(-2, (-1, TILE))[..., ::SAMPLED, :]
        for y in (x, there[:, None, :, None])
    )
    count = counts.sum(-2, keepdim=True)
    mean = torch.where(counts, x, 0).sum(-2, keepdim=True) / count
    variance = torch.where(counts, x - mean, 0).square().sum(-2, keepdim=True) / count
    return torch.cat((mean, variance), dim=-2)


def importance(pools: Pools, phases: torch.Tensor) -> torch.Tensor:
    """log2 of that of each pair, float32 `[B, H, q_tiles, k_tiles]`; NaN where pools are.

    Probabilities are shares of what each Q tile visits; pairs with NaN count for nothing in it.
    """
    group = pools.q.shape[1] // pools.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (pools.k, pools.v))
    (q_mean, q_variance), (k_mean, k_variance) = pools.q.unbind(-2), k.unbind(-2)
    score = q_mean @ k_mean.mT
    square = k_mean.square() + k_variance
    deviation = (q_variance @ square.mT + q_mean.square() @ k_variance.mT).sqrt()
    mass = score + log_mean_exp(deviation)
    counted = torch.where((phases != UNVISITED) & ~mass.isnan(), mass, -math.inf)
    whole = torch.logsumexp(counted * LN_2, dim=-1, keepdim=True) / LN_2
    return score + log_mean_exp(2 * deviation) / 2 - whole + v.log2()[:, :, None] / 2


def log_mean_exp(deviation: torch.Tensor) -> torch.Tensor:
    """log2 of the mean of 2^x, for 128 Gaussian x around 0 of this standard deviation."""
    within = deviation.clamp(max=FARTHEST)
    return LN_2 * within * (deviation - within / 2)


def levels(importance: torch.Tensor) -> torch.Tensor:
    """Of log2 of importance, rounded down, as int32 that are ordered alike; −1 for NaN."""
    steps = (BINS * (importance - LOWEST)).clamp(0, LEVELS - 1)
    return torch.where(importance.isnan(), -1, steps.int())


def routed(levels: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The phases with the most important LOW pairs HIGH: int32 `[B, H, q_tiles, k_tiles]`.

    Of each batch entry as many as are allowed; fewer where that would part pairs of one level, which go together.
    """
    phases = routing.phases.int().expand(levels.shape)
    allowed = routing.allowed(levels.shape[1])
    offered = torch.where(phases == Phase.LOW, levels, -1).flatten(1)
    ranked = F.pad(offered.sort(descending=True).values, (0, 1), value=-1)
    beyond = ranked[:, allowed, None]
    is_upgraded = (offered > beyond).view(levels.shape)
    return torch.where(is_upgraded, int(Phase.HIGH), phases)


def route(pools: Pools, routing: Routing) -> PrecisionMap:
    """The map of a call, of heads and batch entries of their own. Same inputs, same map."""
    return map_of(routed(levels(importance(pools, routing.phases)), routing), has_high=True)
