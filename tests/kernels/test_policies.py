"""Policies: their words, their unions, the protection of text, and neighbourhoods' classes against masks."""

import math
import random

import pytest
import torch

from dma_diffusers.kernels.plan import make
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import mask, neighborhood
from dma_diffusers.kernels.tiling.policies import (
    KINDS,
    By,
    Dense,
    Diagonal,
    Importance,
    Neighborhood,
    SkipSoftmax,
    Union,
    parse,
)
from dma_diffusers.kernels.tiling.precision_map import Class, Phase
from dma_diffusers.kernels.tiling.tile_order import TileOrder

POLICIES = [
    (Dense(Class.LOW), "dense(everywhere=low)"),
    (Dense(Class.MEAN), "dense(everywhere=mean)"),
    (Diagonal(), "diagonal(window=128, sink=128)"),
    (Diagonal((0, 384), 0, "grid"), "diagonal(window=0/384, sink=0, near=grid)"),
    (Neighborhood((18, 24, 24), (16, 8, 8), (6, 8, 8)), "neighborhood(window=18x24x24, stride=16x8x8, high=6x8x8)"),
    (Neighborhood(high=50), "neighborhood(high=50)"),
    (Neighborhood((8, 8), beyond=Class.MEAN), "neighborhood(window=8x8, beyond=mean)"),
    (Importance(0.05), "importance(budget=0.05)"),
    (Importance(1), "importance(budget=1)"),
    (Importance(0.1, 0.2, Class.MEAN), "importance(budget=0.1, low=0.2, beyond=mean)"),
    (Importance(0, 0.2, Class.SKIP), "importance(budget=0, low=0.2, beyond=skip)"),
    (Importance(0.1, by=By.ROWS), "importance(budget=0.1, by=rows)"),
    (Importance(0.1, 0.2, Class.MEAN, By.POOLS), "importance(budget=0.1, low=0.2, beyond=mean, by=pools)"),
    (SkipSoftmax(1e-4), "skip_softmax(threshold=0.0001)"),
    (Neighborhood((8, 8)) | Importance(0.1) | SkipSoftmax(0.01),
     "neighborhood(window=8x8) | importance(budget=0.1) | skip_softmax(threshold=0.01)"),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "words"), POLICIES, ids=[words for _, words in POLICIES])
def test_words_make_the_policy(policy, words):
    assert str(policy) == words and parse(words) == policy
    assert parse(words.replace(" ", "")) == policy


@pytest.mark.parametrize(("words", "message"), [
    ("", "'' is no policy: give dense"),
    ("diagonal", "'diagonal' is no policy"),
    ("window=128", "'window=128' is no policy"),
    ("diagonal(width=3)", "diagonal(width=3): give window=…, sink=…, near=…"),
    ("diagonal(128)", "diagonal(128): give window=…"),
    ("diagonal(window=12.5)", "window must be a whole number of tokens, 0 or more, got 12.5"),
    ("diagonal(near=text)", "near must be sequence or grid, got 'text'"),
    ("dense(everywhere=skip)", "everywhere must be high, low or mean, got skip"),
    ("importance(budget=0.1, by=oracle)", "by must be pools, rows or memory, got oracle"),
    ("importance(budget=0.1, by=1)", "by must be pools, rows or memory, got 1"),
    ("neighborhood()", "needs a window, or one that is HIGH"),
    ("neighborhood(window=wide)", "window must be sides of at least 1 token"),
    ("neighborhood(window=0x4)", "window must be sides of at least 1 token, got (0, 4)"),
    ("neighborhood(high=4x4, stride=2x2x9)", "window, stride and high must have as many sides as each other"),
    ("diagonal(window=low)", "window must be a whole number of tokens, 0 or more, got 'low'"),
    ("importance(budget=low)", "budget must be over 0 and at most 1, got 'low'"),
    ("dense(everywhere=1)", "everywhere must be high, low or mean, got 1"),
    ("neighborhood(window=8x8, stride=8x9)", "stride 9 exceeds window 8"),
    ("neighborhood(window=8x8) | neighborhood(window=4x4)", "two neighbourhoods can't unite"),
    ("diagonal(window=0/128) | diagonal(window=0/128/0)", "policies for different numbers of heads"),
    ("neighborhood(window=8x8, beyond=low)", "beyond must be mean or skip, got low"),
    ("neighborhood(window=8x8, beyond=2)", "beyond must be mean or skip, got 2"),
    ("neighborhood(window=8x8, beyond=far)", "beyond must be mean or skip, got far"),
    ("importance()", "importance needs budget"),
    ("importance(budget=0)", "budget must be over 0 and at most 1, got 0"),
    ("importance(budget=5)", "budget must be over 0 and at most 1, got 5"),
    ("importance(budget=0, beyond=mean)", "budget must be over 0 and at most 1, got 0"),
    ("importance(budget=-0.1, low=0.2, beyond=mean)", "budget must be over 0 and at most 1, got -0.1"),
    ("importance(budget=0.1, low=0.2)", "low=0.2 needs beyond=mean or beyond=skip: without it all the rest is LOW"),
    ("importance(budget=0.1, low=0, beyond=mean)", "low must be over 0 and at most 1, got 0"),
    ("importance(budget=0.1, low=all, beyond=mean)", "low must be over 0 and at most 1, got 'all'"),
    ("importance(budget=0.7, low=0.4, beyond=mean)", "shares of the same pairs, at most 1 together"),
    ("importance(budget=0.1, beyond=low)", "beyond must be mean or skip, got low"),
    ("importance(budget=0.1, beyond=3)", "beyond must be mean or skip, got 3"),
    ("importance(budget=0.1, beyond=skip) | importance(budget=0.2)", "two importances can't unite if one"),
    ("skip_softmax(threshold=1)", "threshold must be over 0 and under 1, got 1"),
])  # fmt: skip
def test_bad_words_are_one_line(words, message):
    with pytest.raises(ValueError) as raised:
        parse(words)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_neighborhood_has_three_classes_of_tiles():
    """Tiles that touch the window are visited; its edge cuts masked ones; those that touch `high` are HIGH."""
    rng = random.Random(0)
    for _ in range(60):
        grid = rng.choice(((300,), (14, 20), (4, 7, 9)))
        window = tuple(rng.randint(1, length) for length in grid)
        stride = tuple(rng.randint(1, side) for side in window)
        high = tuple(rng.randint(1, side) for side in window) if rng.random() < 0.7 else None
        text = rng.choice((0, 20))
        policy, tokens = Neighborhood(window, stride, high), math.prod(grid)
        layout = Layout(tokens + text, tokens + text, (0, text), grid)
        tile_order = TileOrder(layout, policy.box(grid))
        classes = policy.classes(tile_order.layout, tile_order=tile_order)[0, 0]
        inner = (
            _visits(grid, high, [min(s, h) for s, h in zip(stride, high, strict=True)], tile_order)[0]
            if high
            else None
        )
        visited, filled = _visits(grid, window, stride, tile_order)
        assert torch.equal(classes != Class.SKIP, visited)
        is_text = torch.zeros_like(visited)
        is_text[: tile_order.text_tiles] = is_text[:, : tile_order.text_tiles] = True
        assert torch.equal(classes == Class.HIGH, is_text | inner if high else is_text)
        planned = make(policy, layout).precision_map
        for q_tile in range(len(visited)):
            bounds = [0, *planned.bounds[0, 0, q_tile].tolist()]
            masked = planned.indices[0, 0, q_tile, bounds[Phase.MASKED] : bounds[Phase.MASKED + 1]].tolist()
            assert masked == (visited & ~filled)[q_tile].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("text", [0, 20])
@pytest.mark.parametrize(("grid", "sides"), [((700,), (90,)), ((14, 40), (5, 9)), ((6, 7, 9), (2, 3, 4))])
def test_beyond_a_window_tiles_are_mean(grid, sides, text):
    """Tiles that the window reaches are whole: MASKED are those with empty slots alone, and no mask cuts others."""
    near, far = Neighborhood(sides), Neighborhood(sides, beyond=Class.MEAN)
    tokens = math.prod(grid) + text
    layout = Layout(tokens, tokens, (0, text), grid)
    tile_order = TileOrder(layout, near.box(grid))
    assert far.box(grid) == near.box(grid) and far.leaves_out
    classes, others = (
        policy.classes(tile_order.layout, tile_order=tile_order)[0, 0] for policy in (near, far)
    )
    assert torch.equal(others, torch.where(classes == Class.SKIP, int(Class.MEAN), classes))
    assert (others == Class.MEAN).any()
    planned, slots = make(far, layout), (tile_order.token_order >= 0).nonzero()[:, 0]
    if planned.fine_mask is not None:
        assert planned.fine_mask.seen(slots[:, None], slots[None, :]).all()
    has_empty = (tile_order.token_order < 0).view(-1, 128).any(-1)
    bounds, indices = planned.precision_map.bounds[0, 0], planned.precision_map.indices[0, 0]
    for q_tile, (_, low, masked) in enumerate(bounds.tolist()):
        expected = (has_empty & (others[q_tile] != Class.MEAN)).nonzero()[:, 0].tolist()
        assert indices[q_tile, low:masked].tolist() == expected


def test_a_neighborhood_without_far_tiles_says_so():
    note = "beyond=mean changes nothing: the window reaches every tile"
    assert Neighborhood((8, 8), beyond=Class.MEAN).notes((40, 40)) == []
    assert Neighborhood((40, 40), beyond=Class.MEAN).notes((40, 40)) == [note]
    assert Neighborhood(high=(8, 8), beyond=Class.MEAN).notes((40, 40)) == [note]
    clamped = Neighborhood((50, 40), beyond=Class.MEAN).notes((40, 40))
    assert clamped == ["window 50 in dimension 1 was clamped to the grid's 40", note]


@pytest.mark.parametrize(("words", "notes"), [
    ("importance(budget=0.5, low=0.5, beyond=mean)", ["beyond=mean changes nothing: budget and low take every tile"]),
    ("importance(budget=1, beyond=mean)", ["beyond=mean changes nothing: budget and low take every tile"]),
    ("importance(budget=0.5, low=0.4, beyond=mean)", []),
    ("importance(budget=1)", []),
    ("dense(everywhere=low) | neighborhood(window=8x8, beyond=mean)",
     ["beyond=mean changes nothing: dense(everywhere=low) computes every tile"]),
    ("neighborhood(window=8x8, beyond=mean) | diagonal(window=0, sink=128)",
     ["beyond=mean changes nothing: diagonal(window=0, sink=128) computes every tile"]),
    ("dense(everywhere=mean) | diagonal(window=128, sink=128)",
     ["everywhere=mean changes nothing: diagonal(window=128, sink=128) computes every tile"]),
    ("dense() | importance(budget=0.1, beyond=mean)",
     ["beyond=mean changes nothing: dense(everywhere=high) computes every tile"]),
    ("dense(everywhere=low) | importance(budget=0.1, beyond=mean)", []),
    ("neighborhood(window=8x8, beyond=mean) | importance(budget=0.1)", []),
    ("dense(everywhere=mean) | neighborhood(window=8x8)", []),
    ("neighborhood(high=8x8, beyond=mean)", ["beyond=mean changes nothing: the window reaches every tile"]),
])  # fmt: skip
def test_means_that_no_tile_is_taken_by_are_noted(words, notes):
    policy, layout = parse(words), Layout(1600, 1600, grid=(40, 40))
    assert policy.notes((40, 40)) == notes
    tile_order = TileOrder(layout, policy.box((40, 40)))
    takes_means = (policy.classes(tile_order.layout, tile_order=tile_order) == Class.MEAN).any()
    if (routing := make(policy, layout).routing) and routing.rest == Phase.MEAN:
        takes_means |= (routing.shares[..., 1] < routing.phases.shape[-1]).any()
    assert takes_means == ("mean" in words and not notes)


def _visits(grid, window, stride, tile_order: TileOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of tiles in which some query sees some key, and pairs in which every query sees every key."""
    text = tile_order.tokens.text_length
    seen = torch.ones(tile_order.tokens.k_length, tile_order.tokens.k_length, dtype=torch.bool)
    seen[text:, text:] = mask(neighborhood(grid, window, stride)[0])
    taken, token = tile_order.token_order >= 0, tile_order.token_order.long().clamp(min=0)
    of_slots = seen[token][:, token]
    some = (of_slots & taken[:, None] & taken).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    every = ((of_slots | ~taken[:, None]) & taken).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    return some.any(3).any(1), every.all(3).all(1)


def test_unions_take_the_more_precise_class():
    layout = Layout(1024, 1024, (0, 100), (28, 33))
    near, sink = Neighborhood((8, 8), high=(4, 4)), Diagonal(0, 384)
    united = near | sink
    tile_order = TileOrder(layout, united.box(layout.grid))
    both = [policy.classes(tile_order.layout, tile_order=tile_order) for policy in (near, sink)]
    assert torch.equal(united.classes(tile_order.layout, tile_order=tile_order), torch.minimum(*both))
    assert united.axes(layout.grid) == () and near.axes(layout.grid)  # the diagonal sees every key


def test_policies_by_content_set_no_classes_in_a_union():
    layout = Layout(1024, 1024, (0, 100), (28, 33))
    near = Neighborhood((8, 8), high=(4, 4))
    united = near | Importance(0.1) | SkipSoftmax(0.01)
    tile_order = TileOrder(layout, united.box(layout.grid))
    assert torch.equal(
        *(policy.classes(tile_order.layout, tile_order=tile_order) for policy in (near, united))
    )
    assert united.axes(layout.grid) == near.axes(layout.grid)
    assert (united.importance, united.skip_below) == (0.1, 0.01)
    assert (near | Importance(0.1) | Importance(0.3)).importance == 0.3
    assert Importance(0.1, 0.2, Class.MEAN).leaves_out and Importance(0.1, 0.2, Class.SKIP).leaves_out
    assert (Diagonal() | Importance(0.1, beyond=Class.SKIP)).leaves_out and not (
        Diagonal() | Importance(0.1)
    ).leaves_out
    alone = Importance(0.1).classes(layout)
    assert (alone[..., 1:, 1:] == Class.LOW).all() and (alone[..., 0] == Class.HIGH).all()


def test_a_window_beyond_the_grid_is_noted():
    notes = ["window 20 in dimension 2 was clamped to the grid's 8"]
    notes.append("high: window 9 in dimension 2 was clamped to the grid's 8")
    assert Neighborhood((8, 20), high=(3, 9)).notes((8, 8)) == notes


@pytest.mark.parametrize("policy", [
    Diagonal(0, 0), Diagonal((0, 0), 0), Diagonal(0, 0, "grid"), Neighborhood((2, 2)), Importance(0.1),
    SkipSoftmax(0.1), Diagonal(0, 0) | Dense(Class.LOW), Neighborhood((2, 2)) | Importance(0.1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("start", [0, 300, 924])
def test_tiles_with_text_are_high(policy, start):
    layout, tile_order = Layout(1000, 1000, (start, start + 76), (28, 33)), None
    if policy.on_grid:
        tile_order = TileOrder(layout, policy.box(layout.grid))
        layout = tile_order.layout
    is_high = (policy.classes(layout, tile_order=tile_order) == Class.HIGH)[0]
    first, last = layout.text[0] // 128, (layout.text[1] - 1) // 128
    has_text = torch.zeros(is_high.shape[-1], dtype=torch.bool)
    has_text[first : last + 1] = True
    expected = has_text[:, None] | has_text
    assert is_high[:, expected].all() and not is_high.all()


def test_only_dense_has_no_exceptions():
    layout = Layout(1000, 1000, (0, 76))
    for policy in (Dense(Class.LOW), Dense(Class.LOW) | Dense(Class.LOW), Dense(Class.LOW) | Importance(0.1)):
        assert (policy.classes(layout) == Class.LOW).all()
    overriding = [kind for kind in (*KINDS.values(), Union) if "classes" in vars(kind)]
    assert not overriding, "such a policy could forget the text"
    assert [name for name, kind in KINDS.items() if "protects_text" in vars(kind)] == ["dense"]
