"""Routing in torch: it defines what is correct.

A pair of tiles errs by what its probabilities weigh: many small ones, whose errors are independent, add up to less than
one large one of the same sum. So a pair's importance is the root mean square of its probabilities, predicted from the
tiles' means and variances, times how far its values lie apart. Scores within a pair are taken as Gaussian.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.maps import TILE, UNVISITED, Phase, PrecisionMap, map_of
from dma_diffusers.kernels.quantiser.reference import Pools

LN_2 = math.log(2)
# Among 128 scores there is none that lies much farther out, in base 2: from there on, the largest is all that counts
# (Derrida's random energy model, Phys. Rev. B 24, 2613).
FARTHEST = math.sqrt(2 * math.log(TILE)) / LN_2
LEVELS = 1 << 15


@dataclass(frozen=True)
class Routing:
    """What a call can route.

    phases: uint8 `[1, H or 1, q_tiles, k_tiles]`, the phase that visits each pair by policy, `maps.UNVISITED` for none.
    visited: how many pairs of `phases` are. budget: of all pairs that the heads of a batch entry visit, the share that
    may become HIGH.
    """

    phases: torch.Tensor
    visited: int
    budget: float

    @classmethod
    def of(cls, phases: torch.Tensor, budget: float) -> "Routing":
        """phases: as `maps.visiting_phases` gives them."""
        return cls(phases.to(torch.uint8).contiguous(), int((phases != UNVISITED).sum()), budget)

    def to(self, device: torch.device) -> "Routing":
        """The same on `device`."""
        return replace(self, phases=self.phases.to(device))

    def allowed(self, heads: int) -> int:
        """How many LOW pairs of a batch entry may become HIGH."""
        return int(self.budget * (self.visited * heads // self.phases.shape[1]))


def importance(pools: Pools, phases: torch.Tensor) -> torch.Tensor:
    """Of each pair, float32 `[B, H, q_tiles, k_tiles]`; NaN where pools are.

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
    return torch.exp2(score + log_mean_exp(2 * deviation) / 2 - whole) * v.sqrt()[:, :, None]


def log_mean_exp(deviation: torch.Tensor) -> torch.Tensor:
    """log2 of the mean of 2^x, for 128 Gaussian x around 0 of this standard deviation."""
    within = deviation.clamp(max=FARTHEST)
    return LN_2 * within * (deviation - within / 2)


def levels(importance: torch.Tensor) -> torch.Tensor:
    """Importance to 8 bits, as int32 that are ordered alike: bfloat16's bits, rounded down. −1 for NaN."""
    bits = importance.contiguous().view(torch.int32) >> 16
    return torch.where(importance.isnan(), -1, bits)


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
