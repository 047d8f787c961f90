"""Calibration chooses among these policies, at each of these ranges of noise levels."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.tiling.layout import TILE, tiles
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Importance, Neighborhood, Policy
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.schedule import MOST_ENTRIES

EVERY_KEY = 2**20  # a window this wide is HIGH everywhere, at any length
SINKS = (0, TILE)
BUDGETS = (0.05, 0.2)
"""Shares of pairs that are HIGH by content, where all others are LOW."""
SHARES = ((0.0, 0.1), (0.0, 0.25), (0.1, 0.25), (0.1, 0.5))
"""Shares of pairs that are HIGH and LOW by content, where all others are MEAN or SKIP."""
FRACTIONS = (4, 2)
"""Neighbourhoods have the grid's sides over these."""


class Range(NamedTuple):
    """A range of noise levels reaches from `above` (0 to 1) up to the range before, and has these recorded steps."""

    above: float
    steps: tuple[int, ...]


def policies(recordings: Recordings) -> list[list[Policy]]:
    """Return the policies in groups: the heads of a module all take policies of one group, each head its own.

    A diagonal has a window for each head; policies of other kinds are the same for all heads, and stand alone.
    """
    diagonals = [[*(Diagonal(width, sink) for width in _windows(recordings)), Dense()] for sink in SINKS]
    by_content = [Importance(budget) for budget in BUDGETS]
    beyond = Class.MEAN, Class.SKIP
    by_content += [Importance(high, low, rest) for high, low in SHARES for rest in beyond]
    near = [Neighborhood(window, beyond=rest) for window in _neighborhoods(recordings) for rest in beyond]
    return [*diagonals, *([policy] for policy in (*by_content, *near))]


def joined(of_heads: list[Policy]) -> Policy:
    """Return the policy of a module whose heads have these, which are of one group."""
    if len(set(of_heads)) == 1:
        return of_heads[0]
    widths = tuple(policy.window if isinstance(policy, Diagonal) else EVERY_KEY for policy in of_heads)
    return Diagonal(widths, next(policy.sink for policy in of_heads if isinstance(policy, Diagonal)))


def ranges(recordings: Recordings) -> list[Range]:
    """Return ranges of the recorded noise levels, falling, as many as a schedule can have, or fewer.

    Where noise levels are not known there is one.
    """
    sigma = {recording.step: recording.sigma for recording in recordings}
    levels = sorted({level for level in sigma.values() if level is not None}, reverse=True)
    if not levels or None in sigma.values():
        return [Range(0.0, tuple(recordings.steps))]
    parts = [part.tolist() for part in np.array_split(levels, min(len(levels), MOST_ENTRIES))]
    above = [*(_between(lower[0], upper[-1]) for upper, lower in pairwise(parts)), 0.0]
    steps = [tuple(step for step in recordings.steps if sigma[step] in part) for part in parts]
    return [Range(*both) for both in zip(above, steps, strict=True)]


def _between(lower: float, upper: float) -> float:
    """Return a number between these, near the middle, with as few digits as will do."""
    middle = (lower + upper) / 2
    rounded = (round(middle, digits) for digits in range(2, 9))
    return next((level for level in rounded if lower < level < upper), middle)


def _windows(recordings: Recordings) -> list[int]:
    """Return the windows to choose from: no band, the diagonal tile, and bands that double."""
    last = max(tiles(recording.shape[2]) for recording in recordings) - 1
    reach, windows = 0, [0]
    while reach < last:
        windows.append((2 * reach + 1) * TILE)
        reach = 2 * reach + 1
    return windows


def _neighborhoods(recordings: Recordings) -> list[tuple[int, ...]]:
    """Return the windows on the grid, if all calls have the same one, and none is causal."""
    grid, *others = {() if recording.is_causal else recording.grid for recording in recordings}
    if others or not grid:
        return []
    return [tuple(-(-side // fraction) for side in grid) for fraction in FRACTIONS]
