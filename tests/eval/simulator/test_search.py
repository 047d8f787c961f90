"""Proposals."""

import pytest

from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.eval.simulator.search import search
from dma_diffusers.kernels.tiling.neighborhood import Axis, neighborhood


def axes_of(grid, **kwargs) -> tuple[Axis, ...]:
    return neighborhood(grid, **kwargs)[0]


def windows(found: list[Count]) -> list[tuple[int, ...]]:
    return [tuple(axis.window for axis in count.axes) for count in found]


@pytest.mark.parametrize("grid", [(256, 256), (30, 48, 80), (21, 45, 80), (1, 64, 96), (4096,), (131, 153)])
@pytest.mark.parametrize("cost", [0.1, 0.4])
def test_proposals_cost_what_was_wanted_and_come_in_order(grid, cost):
    found = search(axes_of(grid), cost)
    assert 1 <= len(found) <= 8 and len(set(windows(found))) == len(found)
    assert all(count.cost <= cost for count in found)
    sizes = [(count.cut > 0, -_tokens(count)) for count in found]
    assert sizes == sorted(sizes)
    assert all(count.q_tile == count.kv_tile for count in found)


def _tokens(count: Count) -> int:
    tokens = 1
    for axis in count.axes:
        tokens *= axis.window
    return tokens


def test_it_finds_the_published_flux_window():
    best = search(axes_of((256, 256)), 0.1)[0]
    assert best.axes == neighborhood((256, 256), (80, 80), (16, 16))[0]
    assert best.cut == 0


def test_what_is_given_is_kept():
    axes, _ = neighborhood((30, 48, 80), (18, 24, 24))
    found = search(axes, 0.1, any_window=False, q_tile=(4, 8, 8), kv_tile=(2, 8, 8))
    assert [tuple(axis.stride for axis in count.axes) for count in found] == [(16, 8, 8)]
    axes = axes_of((30, 48, 80), stride=(5, 9, 17))  # some windows are smaller
    found = search(axes, 0.3, any_stride=False, text=512)
    assert all(
        axis.stride == given.stride for count in found for axis, given in zip(count.axes, axes, strict=True)
    )
    assert all(count.text == 512 for count in found)
    found = search(axes_of((64, 64), dilation=(2, 2)), 0.2, kv_tile=(8, 8))
    assert all(axis.dilation == 2 for count in found for axis in count.axes)
    assert {count.kv_tile for count in found} == {(8, 8)}


def test_a_cost_that_nothing_meets():
    with pytest.raises(ValueError, match=r"at most 1e-05: the cheapest one found costs 0\.00"):
        search(axes_of((256, 256)), 0.00001)
    for cost in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="cost must be over 0 and at most 1"):
            search(axes_of((256, 256)), cost)
