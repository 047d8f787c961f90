"""The search proposes windows, strides and boxes for a grid, within a wanted cost."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from dma_diffusers.eval.simulator.count import Count, tally
from dma_diffusers.kernels.tiling.boxes import plan
from dma_diffusers.kernels.tiling.neighborhood import Axis

_BOXES = 3  # so many shapes are tried, from the planner's best
_WINDOWS = 32  # at most so many are tried in each dimension
_STRIDES = 8  # so many multiples of the Q tile's side are tried for each window
_UNEVEN = 2  # one dimension's window may hold so many times another's share of the grid


def search(
    axes: tuple[Axis, ...],
    cost: float,
    any_window: bool = True,
    any_stride: bool = True,
    q_tile: tuple[int, ...] | None = None,
    kv_tile: tuple[int, ...] | None = None,
    text: int = 0,
    limit: int = 8,
) -> list[Count]:
    """Return at most `limit` neighbourhoods of at most `cost` (`Count.cost`), no window twice.

    axes: lengths, dilation and causality; window and stride too, unless any will do: then the window is the largest to
    try. A box left out is as the other; both left out, they are the planner's of 128 tokens, as the kernel has them.
    Windows are whole boxes, about as large a share of the grid in every dimension. Strides are the smallest with which
    the window cuts no tile; where there is none, the smallest of those that visit least.

    Those that cut no tile come first, then larger windows. Raises ValueError where nothing is so cheap.
    """
    if not 0 < cost <= 1:
        raise ValueError(
            f"cost must be over 0 and at most 1, the share of dense attention to compute, got {cost}"
        )
    planned = [(box, box) for box in plan([max(axis.class_lengths) for axis in axes])[:_BOXES]]
    boxes = [(q_tile or kv_tile, kv_tile or q_tile)] if q_tile or kv_tile else planned
    Count(axes, *boxes[0], text)  # this refuses what can't be counted, before it is combined
    candidates = [
        Count(chosen, *pair, text)
        for pair in boxes
        for chosen in _neighborhoods(axes, *pair, any_window, any_stride)
    ]
    cheapest = min((candidate.cost for candidate in candidates), default=math.inf)
    if cheapest > cost:
        raise ValueError(
            f"no neighbourhood costs at most {cost:g}: the cheapest one found costs {cheapest:.3g}"
        )
    best: dict[tuple[int, ...], Count] = {}
    for candidate in sorted(candidates, key=_preference):
        if candidate.cost <= cost:
            best.setdefault(tuple(axis.window for axis in candidate.axes), candidate)
    return list(best.values())[:limit]


def _preference(candidate: Count) -> tuple:
    return candidate.cut > 0, -math.prod(axis.window for axis in candidate.axes), candidate.cost


def _neighborhoods(
    axes: tuple[Axis, ...],
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
    any_window: bool,
    any_stride: bool,
) -> Iterator[tuple[Axis, ...]]:
    """Yield combinations of each dimension's choices whose windows are even."""
    choices = []
    for axis, q_side, kv_side in zip(axes, q_tile, kv_tile, strict=True):
        windows = _windows(axis.window, kv_side) if any_window else [axis.window]
        sized = [replace(axis, window=window) for window in windows if window >= axis.stride]
        choices.append([_with_stride(one, q_side, kv_side) for one in sized] if any_stride else sized)
    for chosen in product(*choices):
        shares = [
            axis.window / axis.length for axis, among in zip(chosen, choices, strict=True) if len(among) > 1
        ]
        if not shares or max(shares) <= _UNEVEN * min(shares):
            yield chosen


def _windows(largest: int, kv_side: int) -> list[int]:
    step = kv_side * -(-largest // (kv_side * _WINDOWS))
    return [*range(step, largest, step), largest]


def _with_stride(axis: Axis, q_side: int, kv_side: int) -> Axis:
    strides = sorted(
        {1, *(q_side * times for times in range(1, _STRIDES + 1) if q_side * times <= axis.window)}
    )
    options = [replace(axis, stride=stride) for stride in strides]
    counted = [(tally(option, q_side, kv_side), option) for option in options]
    fitting = [option for visits, option in counted if visits.filled == visits.visited]
    return fitting[0] if fitting else min(counted, key=lambda pair: pair[0].most)[1]
