"""Pairs of tiles that policies visit, against counting what their reference classes say."""

import pytest
import torch

from dma_diffusers.eval.classes import tile_classes
from dma_diffusers.eval.cost import (
    Pairs,
    clocks_of_pairs,
    means_clocks,
    pairs,
    routing_clocks,
    share_left,
    tile_clocks,
)
from dma_diffusers.eval.simulator.predict import Call
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.routing.reference import routed
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse
from dma_diffusers.kernels.tiling.precision_map import Class, map_of
from dma_diffusers.kernels.tiling.tile_order import TileOrder

LAYOUT = Layout(1024 + 128, 1024 + 128, (0, 128), (32, 32))


def counted(words):
    policy = parse(words)
    places = TileOrder(LAYOUT, policy.box(LAYOUT.grid)) if policy.on_grid else None
    classes = policy.classes(places.layout if places else LAYOUT, tile_order=places)[0]
    return [(classes == one).sum((1, 2)).double() for one in (Class.HIGH, Class.LOW, Class.MEAN)]


@pytest.mark.parametrize("words", [
    "dense(everywhere=high)",
    "diagonal(window=384, sink=128)",
    "diagonal(window=0/128/640, sink=0)",
    "neighborhood(window=24x16, stride=8x16)",
    "neighborhood(window=24x16, stride=8x16, high=8x16)",
    "neighborhood(high=8x16, stride=8x16) | diagonal(window=128, sink=0)",
    "neighborhood(window=24x16, stride=8x16, beyond=mean)",
    "neighborhood(window=24x16, stride=8x16, high=8x16, beyond=mean)",
    "dense(everywhere=mean)",
])  # fmt: skip
def test_pairs_are_those_of_the_classes(words):
    found = pairs(parse(words), LAYOUT)
    for ours, expected in zip(found[:3], counted(words), strict=True):
        assert torch.equal(ours, expected)


def test_what_a_window_cuts_is_as_precise_as_the_most_precise():
    policy, without_text = parse("neighborhood(window=9x9)"), Layout(1024, 1024, (0, 0), (32, 32))
    high, low, mean, _ = pairs(policy, without_text)
    assert high == mean == 0 and low > 0
    with_text = pairs(policy, LAYOUT)
    text = 2 * 9 - 1
    assert with_text.high + with_text.low == low + text and with_text.high > text


def test_importance_takes_its_budget():
    layout = Layout(1024, 1024)
    assert pairs(parse("importance(budget=0.25)"), layout) == (16, 48, 0, 0)
    both = pairs(parse("diagonal(window=128, sink=0) | importance(budget=0.25)"), layout)
    assert both == (8 + 16, 56 - 16, 0, 0)


@pytest.mark.parametrize("words", [
    "importance(budget=0.05, low=0.1, beyond=mean)",
    "importance(budget=0.05, low=0.1, beyond=skip)",
    "importance(budget=0.3, beyond=mean)",
    "importance(budget=0, low=0.25, beyond=mean)",
    "importance(budget=0.9, low=0.1, beyond=mean)",
    "importance(budget=0.05, low=0.3, beyond=mean) | neighborhood(window=9x8x16, stride=1x8x16)",
    "importance(budget=0.25) | neighborhood(window=19x8x16, stride=1x8x16, beyond=mean)",
])  # fmt: skip
def test_routed_pairs_are_as_many_as_routing_takes(words):
    """Levels are random and all different, so that a budget is spent in full."""
    layout = Layout(37 * 128 + 40, 37 * 128 + 40, (0, 40), (37, 8, 16))
    policy = parse(words)
    routing = plan.make(policy, layout).routing
    shape = 1, 1, *routing.phases.shape[-2:]
    levels = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(0)).int().view(shape)
    made = plan.Plan(map_of(routed(levels, routing), has_high=True))
    classes = tile_classes(made)[0, 0]
    found = pairs(policy, layout)
    assert found[:3] == tuple((classes == one).sum() for one in (Class.HIGH, Class.LOW, Class.MEAN))
    assert found.walked == 2 * (classes == Class.MEAN).any(-1).sum()


def test_a_q_tile_with_means_walks_one_tile_of_means_for_32_tiles():
    for tiles, words in ((1, 1), (32, 1), (33, 2), (64, 2), (65, 3)):
        found = pairs(parse("dense(everywhere=mean)"), Layout(128 * tiles, 128 * tiles))
        assert found == (0, 0, tiles**2, words * tiles)
    with_text = pairs(parse("neighborhood(window=8x16, stride=8x16, beyond=mean)"), LAYOUT)
    assert with_text == (9 + 8, 8, 8 * 7, 8)  # the tile of text has no means


@pytest.mark.parametrize(("target", "formats", "expected"), [
    ("sm_90", ("bf16", "int8"), 512 + 512 + 1024),
    ("sm_90", ("bf16", "int8/bf16"), 512 + 1024 + 1024),
    ("sm_100", ("mxfp8", "mxfp4"), 256 + 512 + 1024),  # HIGH's, because LOW has 4 bits
    ("sm_100", ("mxfp8", "mxfp8/fp8"), 256 + 256 + 1024),
])  # fmt: skip
def test_means_cost_what_the_class_costs_that_lends_its_precision(target, formats, expected):
    assert means_clocks(target, 128, *formats, has_low=True) == pytest.approx(expected)
    of_high = tile_clocks(target, 128, *formats)[0]
    assert means_clocks(target, 128, *formats, has_low=False) == pytest.approx(of_high)


@pytest.mark.parametrize(("gpu", "target", "formats", "clocks", "whole"), [
    ("h200", "sm_90", ("bf16", "int8"), 1.321, 1.280),
    ("b200", "sm_100", ("mxfp8", "mxfp4"), 1.409, 1.329),
])  # fmt: skip
def test_what_90_percent_mean_cost_beside_90_percent_skip_at_720p(gpu, target, formats, clocks, whole):
    """A row has 10 % LOW; 19 tiles of means stand beside its 59 tiles of keys."""
    tiles = 591  # of 75,600 tokens
    low, mean, walked, none = (
        torch.tensor([number], dtype=torch.float64)
        for number in (0.1 * tiles**2, 0.9 * tiles**2, 19 * tiles, 0)
    )
    with_means, skipped = (
        clocks_of_pairs(counted, target, 128, *formats)
        for counted in (Pairs(none, low, mean, walked), Pairs(none, low, none, none))
    )
    assert (with_means / skipped).item() == pytest.approx(clocks, abs=0.001)
    call = Call(gpu, 40, 75_600, 128, *formats)
    seconds = [call.whole(0, low.item(), walked) for walked in (19.0 * tiles, 0.0)]
    assert seconds[0] / seconds[1] == pytest.approx(whole, abs=0.001)


def test_importance_with_beyond_takes_each_tiles_shares():
    layout = Layout(1024, 1024)
    of = parse("importance(budget=0.125, low=0.25, beyond=mean)")
    assert pairs(of, layout) == (8, 16, 40, 8)
    both = pairs(parse("diagonal(window=128, sink=0)") | of, layout)
    assert both == (8 + 8, 16, 32, 8)
    skips = pairs(
        parse("importance(budget=0, low=0.25, beyond=skip)"), Layout(1024 + 128, 1024 + 128, (0, 128))
    )
    assert skips == (17, 8 * 2, 0, 0)


def test_causal_pairs():
    high, low, *_ = pairs(parse("dense(everywhere=low)"), Layout(1024, 1024), is_causal=True)
    assert (high, low) == (0, 36)
    assert pairs(parse("dense(everywhere=mean)"), Layout(1024, 1024), is_causal=True) == (0, 8, 28, 7)


@pytest.mark.parametrize(("target", "formats", "expected"), [
    ("sm_90", ("bf16", "int8"), 512 / 2048),
    ("sm_100", ("mxfp8", "mxfp4"), 128 / (128 + 256 + 1024)),
])  # fmt: skip
def test_pairs_left_out_cost_their_scores(target, formats, expected):
    assert share_left(0, target, 128, *formats) == 1
    assert share_left(1, target, 128, *formats) == pytest.approx(expected)
    assert share_left(0.5, target, 128, *formats) == pytest.approx((1 + expected) / 2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        share_left(1.5, target, 128, *formats)


def test_rows_and_memory_cost_what_they_multiply():
    """Sixteen rows by 32 keys are a 32nd of Q·K in bf16 and of the exponentials; a memory does so every sixth step.

    On an H200 with 132 multiprocessors at 1.83 GHz they took .26 ms for 24 heads of 128² pairs, 1.2 for 40 of 256².
    """
    layout = Layout(1280, 1280)
    rows, memory, pools, none = (
        routing_clocks(parse(words), layout, "sm_90", 128)
        for words in (
            "importance(budget=0.1, by=rows)", "importance(budget=0.1) | diagonal(window=128)",
            "importance(budget=0.1, by=pools)", "diagonal(window=128)",
        )
    )  # fmt: skip
    assert rows == pytest.approx(2 * 100 * (1024 + 1024) / 32) and rows == 6 * memory and pools == none == 0
    measured = [
        seconds * 1.83e9 * 132 / pairs for seconds, pairs in ((0.26e-3, 24 * 128**2), (1.2e-3, 40 * 256**2))
    ]
    assert measured[1] < rows / 100 < measured[0]
    with pytest.raises(ValueError, match="unknown target 'sm_1'"):
        routing_clocks(parse("importance(budget=0.1, by=rows)"), layout, "sm_1", 128)
