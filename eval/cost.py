"""This module predicts what pairs of tiles cost on a GPU, and counts how many a policy visits; it measures nothing."""

from typing import NamedTuple

import torch

from dma_diffusers.eval.bench.bound import letters
from dma_diffusers.kernels import lowerings, plan
from dma_diffusers.kernels.ahead_of_time.sass import MATRIX_RATES, RATES
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.linears import lowering as linear_lowerings
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.lowerings import Lowering
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import TILE, Layout
from dma_diffusers.kernels.tiling.policies import Policy
from dma_diffusers.kernels.tiling.precision_map import Phase

TARGETS = tuple(MATRIX_RATES)


class Pairs(NamedTuple):
    """The pairs of tiles that each head visits in HIGH and in LOW are counted here, both float64 `[H or 1]`."""

    high: torch.Tensor
    low: torch.Tensor


def pairs(policy: Policy, layout: Layout, is_causal: bool = False) -> Pairs:
    """Count the pairs that a policy's plan visits.

    `Importance` takes its whole budget, and `SkipSoftmax` leaves nothing out. Raises ValueError as `plan.make` does.
    """
    made = plan.make(policy, layout, is_causal)
    precision_map, routing = made.precision_map, made.routing
    ends = precision_map.bounds[0].double().sum(1)
    visited = ends[:, Phase.MASKED]
    if routing is not None and routing.shares is not None:
        offered = (routing.phases[0] == Phase.LOW).sum(-1, keepdim=True)
        high, kept = torch.minimum(routing.shares[0], offered).double().sum(1).unbind(-1)
        return Pairs(visited + high, kept - high)
    low = ends[:, Phase.LOW] - ends[:, Phase.HIGH] if precision_map.has_high else visited
    routed = torch.minimum(policy.importance * visited, low)
    return Pairs(visited - low + routed, low - routed)


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
