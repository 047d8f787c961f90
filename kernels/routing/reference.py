"""Routing in torch, which defines what is correct.

The error that low precision makes in a pair of tiles depends on its probabilities: the errors of many small ones are
independent, and add up to less than the error of a large one with the same sum. So the importance of a pair is the root
mean square of its probabilities times the spread of its values. What a skipped pair takes with it is its probability
itself, so where pairs are skipped, their importance is its sum. The probabilities are predicted from the means and
variances of Q tiles and of KV sub-tiles, as if scores within such a pair were Gaussian; or they are those of a sample
of each Q tile's rows over a sample of the keys.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.call import Memory
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, tiles
from dma_diffusers.kernels.tiling.precision_map import (
    MEANS_TILES,
    UNVISITED,
    Phase,
    PrecisionMap,
    map_of,
    means_of,
)

LN_2 = math.log(2)
# The standard deviation of scores (base 2) beyond which the largest of 32 scores outweighs the sum of the others: the
# largest of 32 Gaussian numbers lies 2.07 standard deviations above their mean, on average.
FARTHEST = 2.07 / LN_2
SUBTILES = TILE // SUBTILE  # of a KV tile
SAMPLE_STRIDE = 4  # a pool takes one of so many neighbouring tokens
ROWS = 16  # of a Q tile, whose probabilities are computed
KEYS = 32  # of a KV tile, with which scores are computed there
LARGEST = 1e30  # what is as large as that counts as infinite there
# Importance has levels: 64 binades from 2^-44 to 2^20, with 64 steps each.
BINS, LOWEST = 64, -44
LEVELS = BINS * BINS
LEAST_EXPONENT = -126  # of two, for a share of a sum


class Pools(NamedTuple):
    """Statistics of a sample of tokens; NaN where no token of the sample counts.

    q: float32 `[B, H, q_tiles, 2, D]`, the mean and the variance of each channel of q·softmax_scale_log2 in a tile.
    k: float32 `[B, Hkv, 4·k_tiles, 2, D]`, the same of k less its mean in a sub-tile.
    v: float32 `[B, Hkv, k_tiles]`, the sum of the variances of v's channels in a tile.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """The pairs among which a call routes, which are the LOW ones, and how many of them it may take more precisely.

    phases: uint8 `[1, H or 1, q_tiles, k_tiles]`, how the policy takes each pair; `UNVISITED` for not at all.
    visited: the number of pairs of `phases` that are not `UNVISITED`.
    budget: the share of all pairs visited by the heads of a batch entry that may become HIGH, where `rest` is None.
    rest: how LOW pairs beyond the shares of their Q tile are taken, `Phase.MEAN` or `UNVISITED`; None for LOW.
    shares: int32 `[1, H or 1, q_tiles, 2]`, how many LOW pairs of each Q tile become HIGH, and how many become HIGH or
        stay LOW; None where `rest` is.
    by_rows: importance is that of `ROWS` rows of each Q tile and `KEYS` keys of each KV tile, not predicted from pools.
    """

    phases: torch.Tensor
    visited: int
    budget: float
    rest: int | None = None
    shares: torch.Tensor | None = None
    by_rows: bool = False

    @classmethod
    def of(
        cls,
        phases: torch.Tensor,
        budget: float,
        low: float = 0.0,
        rest: int | None = None,
        by_rows: bool = False,
    ) -> "Routing":
        """The routing for the phases that `precision_map.visiting_phases` gives.

        low: with `rest`, the share of the pairs visited by each Q tile that stay LOW after `budget` became HIGH. Shares
        are rounded to whole pairs, and to at least one that becomes HIGH or stays LOW.
        """
        visited = phases != UNVISITED
        shares = None
        if rest is not None:
            count = visited.sum(-1, keepdim=True).double()
            wanted = torch.tensor([budget, budget + low], dtype=torch.float64)
            shares = (wanted * count + 0.5).floor().int()
            # Without `low` nothing stays LOW.
            shares[..., slice(1, None) if low else slice(None)].clamp_(min=1)
        return cls(phases.to(torch.uint8).contiguous(), int(visited.sum()), budget, rest, shares, by_rows)

    def to(self, device: torch.device) -> "Routing":
        """The same routing on `device`."""
        shares = None if self.shares is None else self.shares.to(device)
        return replace(self, phases=self.phases.to(device), shares=shares)

    @property
    def by_mass(self) -> bool:
        """True if importance is the sum of probabilities."""
        return self.rest == UNVISITED

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that kernels read of it."""
        return [x for x in (self.phases, self.shares) if x is not None]

    def allowed(self, heads: int) -> int:
        """The number of LOW pairs of a batch entry that may become HIGH, if q has `heads` heads; `rest` is None."""
        return int(self.budget * (self.visited * heads // self.phases.shape[1]))

    def make_room(self, memory: Memory, batch: int, heads: int) -> None:
        """Makes the tensors of a memory for calls of this shape, on the device of the routing."""
        *_, q_tiles, k_tiles = self.phases.shape
        shape = (batch, heads, q_tiles, -(-k_tiles // MEANS_TILES))
        high, left = (torch.zeros(shape, dtype=torch.int32, device=self.phases.device) for _ in range(2))
        memory.high, memory.left = high, None if self.rest is None else left


def sample(device: torch.device | None = None, count: int = TILE // SAMPLE_STRIDE) -> torch.Tensor:
    """The places of `count` tokens of a tile, int64 `[count]`: evenly spread, but for a stagger.

    One of every four tokens, for 32, is another one from four to four: the same one would be of the same few columns of
    a box again and again. Of 16, each stands in another one of 16 columns.
    """
    stride = TILE // count
    place = torch.arange(count, device=device)
    return place * stride + (place + place // stride) % stride


def pooled(x: torch.Tensor, counted: torch.Tensor | None = None, parts: int = 1) -> torch.Tensor:
    """The mean and the variance of each channel over a sample, float32 `[B, H, parts·tiles, 2, D]`.

    x: float32 `[B, H, S, D]`. counted: bool `[B or 1, S]`, True for slots whose tokens count; None for all.
    parts: into how many equal parts each tile goes.
    """
    if counted is None:
        counted = torch.ones_like(x[:1, 0, :, 0], dtype=torch.bool)
    whole_tiles = (0, 0, 0, -x.shape[-2] % TILE)
    x, counted = (
        F.pad(y, whole_tiles)
        .unflatten(-2, (-1, TILE))[..., sample(x.device), :]
        .flatten(-3, -2)
        .unflatten(-2, (-1, TILE // SAMPLE_STRIDE // parts))
        for y in (x, counted[:, None, :, None])
    )
    count = counted.sum(-2, keepdim=True)
    mean = torch.where(counted, x, 0).sum(-2, keepdim=True) / count
    variance = torch.where(counted, x - mean, 0).square().sum(-2, keepdim=True) / count
    return torch.cat((mean, variance), dim=-2)


def pools(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there=None, seen=None) -> Pools:
    """The pools of scaled q, of k less its mean, and of v, float32 `[B, H or Hkv, S, D]` each.

    there, seen: bool `[B or 1, S]`, the slots in which queries stand, and those whose keys are seen; None for all.
    """
    return Pools(pooled(q, there), pooled(k, seen, SUBTILES), pooled(v, seen)[..., 1, :].sum(-1))


def importance(pools: Pools, phases: torch.Tensor, by_mass: bool = False) -> torch.Tensor:
    """The log2 of the importance of each pair, float32 `[B, H, q_tiles, k_tiles]`.

    Sub-tiles with NaN count for nothing. It is NaN where all sub-tiles of a tile have it, or its values, or the Q tile.
    phases: those of a `Routing`. Probabilities are shares of the total over all pairs that a Q tile visits.
    by_mass: importance is the sum of probabilities.
    """
    group = pools.q.shape[1] // pools.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (pools.k, pools.v))
    (q_mean, q_variance), (k_mean, k_variance) = pools.q.unbind(-2), k.unbind(-2)
    score = q_mean @ k_mean.mT
    k_square = k_mean.square() + k_variance
    deviation = (q_variance @ k_square.mT + q_mean.square() @ k_variance.mT).sqrt()
    mean_exp, mean_square = score + log_mean_exp(deviation), 2 * score + log_mean_exp(2 * deviation)
    of_tiles = (x.unflatten(-1, (-1, SUBTILES)) for x in (mean_exp, mean_square))
    counts = ~mean_exp.isnan().unflatten(-1, (-1, SUBTILES))
    mean_exp, mean_square = (_log_sum_exp(torch.where(counts, x, -math.inf)) for x in of_tiles)
    total = _log_sum_exp(torch.where(phases != UNVISITED, mean_exp, -math.inf))[..., None]
    found = mean_exp - total if by_mass else mean_square / 2 - total + v.log2()[:, :, None] / 2
    return torch.where(counts.any(-1), found, math.nan)


def importance_of_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phases: torch.Tensor,
    by_mass: bool = False,
    there: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `importance`, of the probabilities of a sample of `ROWS` rows of each Q tile.

    The arguments are those of `pools`; scores are products of bf16 numbers, of these rows and of a sample of the keys.
    Rows and keys with NaN or infinity count for nothing, and neither do scores of −infinity, nor a row in a pair where
    one of its scores is infinity; whatever is as large as `LARGEST` is so. The result is NaN where no score of a pair
    counts, or no number of its values.
    """
    batch, heads, q_length, _ = q.shape
    q_tiles, k_tiles, group = tiles(q_length), tiles(k.shape[2]), heads // k.shape[1]
    if there is None:
        there = torch.ones_like(q[:1, 0, :, 0], dtype=torch.bool)
    if seen is None:
        seen = torch.ones_like(k[:1, 0, :, 0], dtype=torch.bool)
    rows, is_row = (_of_tiles(x, ROWS) for x in (q, there[:, None, :, None]))
    keys, is_key = (_of_tiles(x, KEYS) for x in (k, seen[:, None, :, None]))
    is_row, is_key = (
        (x.abs() < LARGEST).all(-1, keepdim=True) & y for x, y in ((rows, is_row), (keys, is_key))
    )
    keys, is_key = (x.repeat_interleave(group, dim=1) for x in (keys, is_key))
    scores = rows.bfloat16().float() @ keys.bfloat16().float().mT
    counts = is_row & is_key.mT & (scores > -LARGEST)
    scores = torch.where(counts, scores, -math.inf)
    scores = scores.view(batch, heads, q_tiles, ROWS, k_tiles, -1)
    scores = torch.where((scores < LARGEST).all(-1, keepdim=True), scores, -math.inf)
    mass = _log_sum_exp(scores)  # [B, H, q_tiles, rows, k_tiles]
    total = _log_sum_exp(torch.where(phases[..., None, :] != UNVISITED, mass, -math.inf))[..., None]
    power = 1 if by_mass else 2
    shares = torch.where(mass == -math.inf, mass, _log_sum_exp(power * scores) - power * total)
    counts = (mass > -math.inf) & (total > -math.inf)
    shares = torch.where(counts, shares.clamp(min=LEAST_EXPONENT), -math.inf)
    found = _log_sum_exp(shares.mT) - (total > -math.inf).sum(-2).log2()
    if not by_mass:
        spread = pooled(v, seen)[..., 1, :].sum(-1).repeat_interleave(group, dim=1)
        found = (found + spread.log2()[:, :, None]) / 2
    return torch.where(counts.any(-2), found, math.nan)


def _of_tiles(x: torch.Tensor, count: int) -> torch.Tensor:
    """A sample of so many tokens of each tile: `[B, H, count·tiles, D]` of `[B, H, S, D]`, zeros past its end."""
    in_tiles = F.pad(x, (0, 0, 0, -x.shape[-2] % TILE)).unflatten(-2, (-1, TILE))
    return in_tiles[..., sample(x.device, count), :].flatten(-3, -2)


def _log_sum_exp(x: torch.Tensor) -> torch.Tensor:
    """The log2 of the sum of 2^x over the last dimension."""
    return torch.logsumexp(x * LN_2, dim=-1) / LN_2


def log_mean_exp(deviation: torch.Tensor) -> torch.Tensor:
    """The log2 of the mean of 2^x over 32 Gaussian x with mean 0 and this standard deviation."""
    within = deviation.clamp(max=FARTHEST)
    return LN_2 * within * (deviation - within / 2)


def levels(importance: torch.Tensor) -> torch.Tensor:
    """The level of each pair, int32: its log2 importance in steps of 1/64 above −44, rounded down; −1 for NaN."""
    steps = (BINS * (importance - LOWEST)).clamp(0, LEVELS - 1)
    return torch.where(importance.isnan(), -1, steps.int())


def routed(levels: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The phases after routing: int32 `[B, H, q_tiles, k_tiles]`.

    Where `rest` is None, the most important LOW pairs of a batch entry become HIGH, as many as may, or fewer: pairs of
    one level become HIGH together or not at all. Else each Q tile has its shares; of equal levels the first come first.
    """
    phases = routing.phases.int().expand(levels.shape)
    if routing.rest is not None:
        offered = torch.where(phases == Phase.LOW, levels, -2)
        rank = offered.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        high, kept = routing.shares[..., None].unbind(-2)
        taken = torch.where(rank < kept, int(Phase.LOW), routing.rest)
        taken = torch.where(rank < high, int(Phase.HIGH), taken)
        return torch.where(phases == Phase.LOW, taken.int(), phases)
    allowed = routing.allowed(levels.shape[1])
    offered = torch.where(phases == Phase.LOW, levels, -1).flatten(1)
    ranked = F.pad(offered.sort(descending=True).values, (0, 1), value=-1)
    first_left = ranked[:, allowed, None]
    is_upgraded = (offered > first_left).view(levels.shape)
    return torch.where(is_upgraded, int(Phase.HIGH), phases)


def route(pools: Pools, routing: Routing) -> PrecisionMap:
    """The map of a call, with a block list for every batch entry and head. The same inputs give the same map."""
    found = levels(importance(pools, routing.phases, routing.by_mass))
    return map_of(routed(found, routing), has_high=True)


def route_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    routing: Routing,
    there: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    memory: Memory | None = None,
) -> PrecisionMap:
    """The map of a call, by pools or rows or memory, with a block list for every batch entry and head.

    The other arguments are those of `pools`. memory: read or written, as it says; None for none.
    """
    if memory is not None and memory.is_read:
        return map_of(recalled(memory, routing), has_high=True)
    if routing.by_rows:
        found = importance_of_rows(q, k, v, routing.phases, routing.by_mass, there, seen)
    else:
        found = importance(pools(q, k, v, there, seen), routing.phases, routing.by_mass)
    after = routed(levels(found), routing)
    if memory is not None:
        remember(after, routing, memory)
    return map_of(after, has_high=True)


def remember(after: torch.Tensor, routing: Routing, memory: Memory) -> None:
    """Writes the phases after routing into a memory."""
    was_low = routing.phases == Phase.LOW
    memory.high.copy_(means_of(was_low & (after == Phase.HIGH)))
    if memory.left is not None:
        memory.left.copy_(means_of((after == Phase.MEAN) | (was_low & (after == UNVISITED))))


def recalled(memory: Memory, routing: Routing) -> torch.Tensor:
    """The phases after routing, as a memory has them: int32 `[B, H, q_tiles, k_tiles]`."""
    phases = routing.phases.int()
    was_low, k_tiles = phases == Phase.LOW, phases.shape[-1]
    after = torch.where(was_low & _bits(memory.high, k_tiles), int(Phase.HIGH), phases)
    if routing.rest is None:
        return after
    return torch.where(was_low & _bits(memory.left, k_tiles), routing.rest, after)


def _bits(words: torch.Tensor, k_tiles: int) -> torch.Tensor:
    """The bits of words such as `means_of` makes: bool `[…, k_tiles]`."""
    places = torch.arange(MEANS_TILES, device=words.device)
    return (words[..., None] >> places & 1).bool().flatten(-2)[..., :k_tiles]
