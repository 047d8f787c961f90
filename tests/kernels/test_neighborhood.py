"""Neighbourhoods against brute force, and against the kinds of attention that they become at their limits."""

import random

import pytest
import torch

from dma_diffusers.kernels.tiling.neighborhood import Axis, mask, neighborhood, tile_map
from tests.kernels.neighborhoods import brute_mask, draw_axes, pairs_seen, tile_of_tokens


def test_the_mask_is_what_the_definition_says():
    rng = random.Random(0)
    drawn = [draw_axes(rng) for _ in range(600)]
    for axes in drawn:
        assert torch.equal(mask(axes), brute_mask(axes)), axes
    every = [axis for axes in drawn for axis in axes]
    assert {len(axes) for axes in drawn} == {1, 2, 3}
    for unusual in (
        lambda axis: axis.length % axis.window,
        lambda axis: axis.length % axis.dilation,
        lambda axis: 1 < axis.stride < axis.window and axis.window % axis.stride,
        lambda axis: axis.causal and axis.dilation > 1,
    ):
        assert sum(bool(unusual(axis)) for axis in every) > 50


def test_every_query_sees_a_whole_window():
    axes, _ = neighborhood((7, 13), (3, 6), (2, 5))
    assert (mask(axes).sum(-1) == 18).all()


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 3, 4), (3, 4, 5)])
def test_a_window_of_the_grid_is_dense(stride):
    axes, _ = neighborhood((3, 4, 5), (3, 4, 5), stride)
    assert mask(axes).all()
    axes, _ = neighborhood((12,), (12,), stride[:1], causal=(True,))
    assert torch.equal(mask(axes), torch.ones(12, 12).tril().bool())


def test_a_stride_of_the_window_is_blocked_attention():
    axes, _ = neighborhood((8, 12), (4, 3), (4, 3))
    token = torch.arange(96)
    block = token // 12 // 4 * 4 + token % 12 // 3
    assert torch.equal(mask(axes), block[:, None] == block)


def test_dilated_neighbours_are_of_one_residue_class():
    token = torch.arange(12)
    seen = mask([Axis(12, 4, dilation=3)])
    assert torch.equal(seen, token[:, None] % 3 == token % 3)


def test_tiles_visited_and_filled_are_those_of_the_mask():
    rng = random.Random(1)
    partial = 0
    for _ in range(300):
        axes = draw_axes(rng)
        q_tile, kv_tile = (tuple(rng.randint(1, 6) for _ in axes) for _ in range(2))
        seen, pairs = pairs_seen(
            brute_mask(axes), tile_of_tokens(axes, q_tile), tile_of_tokens(axes, kv_tile)
        )
        kv_tiles = [axis.tiles(side) for axis, side in zip(axes, kv_tile, strict=True)]
        for kind, expected in (("visited", seen > 0), ("filled", seen == pairs)):
            ranges = [getattr(axis, kind)(q, kv) for axis, q, kv in zip(axes, q_tile, kv_tile, strict=True)]
            assert torch.equal(tile_map(ranges, kv_tiles), expected), (kind, axes, q_tile, kv_tile)
        partial += any(axis.length % side for axis, side in zip(axes, kv_tile, strict=True))
    assert partial > 100


def test_a_window_beyond_the_grid_is_clamped_and_noted():
    axes, notes = neighborhood((16, 8), (4, 20), (2, 20))
    assert axes == (Axis(16, 4, 2), Axis(8, 8, 8))
    assert notes == ["window 20 in dimension 2 was clamped to the grid's 8"]


@pytest.mark.parametrize(("arguments", "words"), [
    (((8, 8), (4, 4), (2, 5)), "dimension 2 of grid 8×8: stride 5 exceeds window 4"),
    (((8, 8), (9, 9), (2, 10)), "stride 10 exceeds window 9"),
    (((8, 8), (4, 4), None, (1, 3)), "dilation 3 × window 4 = 12 exceeds length 8"),
    (((8, 8), (4, 10), None, (1, 2)), "dilation 2 × window 10 = 20 exceeds length 8"),
    (((8, 8), (0, 4)), "dimension 1 of grid 8×8: window must be at least 1, got 0"),
    (((8, 0), (4, 4)), "length must be at least 1, got 0"),
    (((8, 8), (4, 4), (0, 1)), "stride must be at least 1"),
    (((8, 8), (4, 4), None, (0, 1)), "dilation must be at least 1"),
    (((8, 8), (4,)), "window 4 is 1-D, but grid 8×8 is 2-D"),
    (((8, 8), (4, 4), None, None, (True,)), "causal 1 is 1-D"),
    (((2, 2, 2, 2), (1, 1, 1, 1)), "1 to 3 dimensions, got 4"),
    (((), ()), "1 to 3 dimensions, got 0"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, words):
    with pytest.raises(ValueError) as raised:
        neighborhood(*arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)
