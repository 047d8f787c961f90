"""This module predicts what pairs of tiles cost on a GPU, and counts how many a policy visits; it measures nothing."""

from typing import NamedTuple

import torch

from dma_diffusers.eval.bench.bound import letters
from dma_diffusers.eval.classes import taken_by_means
from dma_diffusers.kernels import lowerings, plan
from dma_diffusers.kernels.ahead_of_time.sass import MATRIX_RATES, RATES
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.linears import lowering as linear_lowerings
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.lowerings import Lowering
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.routing.reference import KEYS, ROWS
from dma_diffusers.kernels.tiling.layout import TILE, Layout, tiles
from dma_diffusers.kernels.tiling.policies import By, Policy
from dma_diffusers.kernels.tiling.precision_map import Phase
from dma_diffusers.memory import EVERY

TARGETS = tuple(MATRIX_RATES)
_ROWS_SLOWER = 2.0  # on an H200: 2.4 at 16,384 tokens, 1.7 at 32,760 (eval/results/h200_routers.txt)


class Pairs(NamedTuple):
    """The pairs of tiles of each head are counted here by how they are taken, all float64 `[H or 1]`.

    high, low, mean: the pairs in each class. walked: the tiles of means that the kernel multiplies for those that are
    MEAN. One holds the means of 32 KV tiles, and a Q tile with any MEAN tile walks all of them.
    """

    high: torch.Tensor
    low: torch.Tensor
    mean: torch.Tensor
    walked: torch.Tensor


def pairs(policy: Policy, layout: Layout, is_causal: bool = False) -> Pairs:
    """Count the pairs that a policy's plan takes in each class.

    `Importance` takes its whole budget, and `SkipSoftmax` leaves nothing out. Raises ValueError as `plan.make` does.
    """
    made = plan.make(policy, layout, is_causal)
    precision_map, routing = made.precision_map, made.routing
    ends = precision_map.bounds[0].double()  # of each Q tile, as everything until the end
    visited = ends[..., Phase.MASKED]
    low = ends[..., Phase.LOW] - ends[..., Phase.HIGH] if precision_map.has_high else visited
    high, mean = visited - low, taken_by_means(precision_map)[0].sum(-1).double()
    if routing is not None and routing.shares is not None:
        routed = (routing.phases[0] == Phase.LOW).sum(-1)
        first, kept = torch.minimum(routing.shares[0], routed[..., None]).double().unbind(-1)
        high, low = high + first, kept - first
        if routing.rest == Phase.MEAN:  # the map has every routed pair among them
            mean = mean - kept
    words = 0 if precision_map.means is None else precision_map.means.shape[-1]
    walked = words * (mean > 0).sum(-1).double()
    high, low, mean = (of_rows.sum(-1) for of_rows in (high, low, mean))
    if routing is not None and routing.shares is None:
        upgraded = torch.minimum(routing.budget * (high + low + mean), low)
        high, low = high + upgraded, low - upgraded
    return Pairs(high, low, mean, walked)


def clocks_of_pairs(
    counted: Pairs, target: str, head_dim: int, high: str, low: str, left_out: float = 0.0
) -> torch.Tensor:
    """Predict the clocks of an SM for all pairs of each head, float64 `[H or 1]`.

    left_out: the share of LOW pairs that is left out, as `share_left` takes it. Raises ValueError as `tile_clocks` and
    `share_left` do.
    """
    of_high, of_low = tile_clocks(target, head_dim, high, low)
    of_low *= share_left(left_out, target, head_dim, high, low)
    of_means = means_clocks(target, head_dim, high, low, has_low=bool((counted.low > 0).any()))
    return counted.high * of_high + counted.low * of_low + counted.walked * of_means


def tile_clocks(target: str, head_dim: int, high: str, low: str) -> tuple[float, float]:
    """Predict the clocks of an SM for one pair of tiles in HIGH and in LOW: two products and the exponentials.

    The products run at their peak rates. The parts are summed, because in our kernels softmax and products hardly
    overlap. At the clock of its data sheet the sum predicts every time that an H200 has measured within 15 %
    (`simulator.predict`); for HIGH over LOW everywhere it gives 1.50 at head_dim 128 and 1.33 at 64, where 1.44 and
    1.32 were measured (`high` and `low` in eval/results/h200_hopper_variants.txt) and the larger of the two would give
    2.00 and 1.00. high, low: the words of precisions. Raises ValueError for a target without rates, or precisions that
    no kernel of it multiplies.
    """
    lowering = lowering_of(target, head_dim, high, low)
    precisions = Precisions.parse(high, low)
    return tuple(sum(clocks_of(target, head_dim, *letters(each, lowering))) for each in precisions)


def means_clocks(target: str, head_dim: int, high: str, low: str, has_low: bool) -> float:
    """Predict the clocks of an SM for one tile of means: those of a tile of the class that lends MEAN its operands.

    An H200 takes .9 to 1.2 times as long. has_low: says if the map has LOW tiles. Raises ValueError as `tile_clocks`
    does.
    """
    lowering = lowering_of(target, head_dim, high, low)
    return sum(clocks_of(target, head_dim, *letters(Precisions.parse(high, low).of_means(has_low), lowering)))


def routing_clocks(policy: Policy, layout: Layout, target: str, head_dim: int) -> float:
    """Predict the clocks of an SM for finding a head's important pairs.

    Pools count as nothing: they take 2 to 3 % of LOW. Rows of each Q tile are multiplied with some keys of each KV tile
    in bf16, and take `_ROWS_SLOWER` times what peak rates would. A memory counts as if it did so in every `EVERY`th
    step; drawings of few steps do so oftener, and models whose noise level is not known in every call. Raises
    ValueError for a target without rates.
    """
    check_target(target)
    if policy.router is None or policy.router.by is By.POOLS:
        return 0.0
    products, exponentials = clocks_of(target, head_dim, "H", "H")
    of_pair = _ROWS_SLOWER * (products / 2 + exponentials) * ROWS * KEYS / TILE**2
    return tiles(layout.q_length) * tiles(layout.k_length) * of_pair / (EVERY if policy.remembers else 1)


def share_left(left_out: float, target: str, head_dim: int, high: str, low: str) -> float:
    """Predict what a LOW pair costs on average, in units of a whole one, where `SkipSoftmax` leaves pairs out.

    left_out: the share of pairs that is left out, 0 to 1; of those, Q·K alone is computed. Raises ValueError for
    another share, and as `tile_clocks` does.
    """
    if not 0 <= left_out <= 1:
        raise ValueError(f"the share left out must lie between 0 and 1, got {left_out}")
    qk, _ = letters(Precisions.parse(high, low).low, lowering_of(target, head_dim, high, low))
    scores = clocks_of(target, head_dim, qk, qk)[0] / 2
    return 1 - left_out * (1 - scores / tile_clocks(target, head_dim, high, low)[1])


def clocks_of(target: str, head_dim: int, qk: str, pv: str) -> tuple[float, float]:
    """Predict the clocks of an SM for one pair of tiles: those of its two products, and those of its exponentials.

    qk, pv: letters of MATRIX_RATES.
    """
    rates = MATRIX_RATES[target]
    product = 2 * head_dim * TILE * TILE
    return product / rates[qk] + product / rates[pv], TILE * TILE / RATES[target]["mufu"]


def linear_clocks(
    target: str, rows: float, out_features: int, in_features: int, groups: Groups | None
) -> float:
    """Predict the clocks of an SM for a linear layer's product with so many rows; None is bf16, as it is.

    Products run at the peak rates of their formats, as `tile_clocks` has them for attention; quantising is left out.
    Raises ValueError for a target without rates, or groups that it has no fast product for.
    """
    check_target(target)
    rates = MATRIX_RATES[target]
    if groups is None:
        return 2 * rows * out_features * in_features / rates["H"]
    lowering = linear_lowerings.choose(target, groups, out_features=out_features).lowering
    if lowering == "reference":
        raise ValueError(f"{' | '.join(groups.formats)} has no fast product on {target}")
    clocks = 0.0
    for name, width in zip(groups.formats, groups.widths, strict=True):
        narrow = lowering == "native" and get_format(name).bits == 4
        letter = "I" if lowering == "int_mm" else "O" if narrow else "Q"
        clocks += 2 * rows * out_features * width / rates[letter]
    return clocks


def lowering_of(target: str, head_dim: int, high: str, low: str) -> Lowering:
    """Return the lowering of the target's kernel for these precisions; raises ValueError as `tile_clocks` does."""
    check_target(target)
    chosen = lowerings.choose(target, head_dim, high, low)
    if chosen.lowering == "reference":
        raise ValueError(f"{high}|{low} has no kernel on {target}, head_dim {head_dim}: {chosen.reason}")
    return lowerings.named(chosen.lowering)


def check_target(target: str) -> None:
    """Raise ValueError for an architecture whose rates are not known."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")


def current_target() -> str:
    """Return the architecture of this process's GPU if its rates are known, else sm_100."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = lowerings.architecture(device)
    return architecture if architecture in TARGETS else "sm_100"
