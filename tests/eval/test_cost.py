"""Pairs of tiles that policies visit, against counting what their reference classes say."""

import pytest
import torch

from dma_diffusers.eval.cost import pairs, share_left
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.kernels.tiling.tile_order import TileOrder

LAYOUT = Layout(1024 + 128, 1024 + 128, (0, 128), (32, 32))


def counted(words):
    policy = parse(words)
    places = TileOrder(LAYOUT, policy.box(LAYOUT.grid)) if policy.on_grid else None
    classes = policy.classes(places.layout if places else LAYOUT, tile_order=places)[0]
    return [(classes == one).sum((1, 2)).double() for one in (Class.HIGH, Class.LOW)]


@pytest.mark.parametrize("words", [
    "dense(everywhere=high)",
    "diagonal(window=384, sink=128)",
    "diagonal(window=0/128/640, sink=0)",
    "neighborhood(window=24x16, stride=8x16)",
    "neighborhood(window=24x16, stride=8x16, high=8x16)",
    "neighborhood(high=8x16, stride=8x16) | diagonal(window=128, sink=0)",
])  # fmt: skip
def test_pairs_are_those_of_the_classes(words):
    found = pairs(parse(words), LAYOUT)
    for ours, expected in zip(found, counted(words), strict=True):
        assert torch.equal(ours, expected)


def test_what_a_window_cuts_is_as_precise_as_the_most_precise():
    policy, without_text = parse("neighborhood(window=9x9)"), Layout(1024, 1024, (0, 0), (32, 32))
    high, low = pairs(policy, without_text)
    assert high == 0 and low > 0
    with_text = pairs(policy, LAYOUT)
    text = 2 * 9 - 1
    assert with_text.high + with_text.low == low + text and with_text.high > text


def test_importance_takes_its_budget():
    layout = Layout(1024, 1024)
    assert [number.item() for number in pairs(parse("importance(budget=0.25)"), layout)] == [16, 48]
    both = pairs(parse("diagonal(window=128, sink=0) | importance(budget=0.25)"), layout)
    assert [number.item() for number in both] == [8 + 16, 56 - 16]


def test_importance_with_beyond_takes_each_tiles_shares():
    layout = Layout(1024, 1024)
    of = parse("importance(budget=0.125, low=0.25, beyond=mean)")
    assert [number.item() for number in pairs(of, layout)] == [8, 16]
    both = pairs(parse("diagonal(window=128, sink=0)") | of, layout)
    assert [number.item() for number in both] == [8 + 8, 16]
    skips = pairs(parse("importance(budget=0, low=0.25, beyond=skip)"), Layout(1024 + 128, 1024 + 128, (0, 128)))
    assert [number.item() for number in skips] == [17, 8 * 2]


def test_causal_pairs():
    high, low = pairs(parse("dense(everywhere=low)"), Layout(1024, 1024), is_causal=True)
    assert (high, low) == (0, 36)


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
