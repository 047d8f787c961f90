"""Fine masks against the masks that they pack."""

import math
import random

import pytest
import torch

from dma_diffusers.kernels.tiling.fine_mask import fine_mask, hide_empty_slots
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import Axis
from dma_diffusers.kernels.tiling.tile_order import TileOrder
from tests.kernels.neighborhoods import brute_mask


def test_a_neighborhood_by_brute_force():
    rng = random.Random(0)
    for _ in range(150):
        longest = rng.choice(((60,), (8, 9), (4, 5, 5)))
        axes = tuple(_axis(rng, rng.randint(1, length)) for length in longest)
        grid = tuple(axis.length for axis in axes)
        text, tokens = rng.choice((0, 3)), math.prod(grid)
        box = {1: (128,), 2: (64, 2), 3: (32, 2, 2)}[len(grid)]
        tile_order = TileOrder(Layout(tokens + text, tokens + text, (0, text), grid), box)
        token_order = tile_order.token_order
        expected = torch.ones(tokens + text, tokens + text, dtype=torch.bool)
        expected[text:, text:] = brute_mask(axes)
        slot, taken, token = torch.arange(len(token_order)), token_order >= 0, token_order.long()
        found = fine_mask(token_order, tile_order.coordinates, axes).seen(slot[:, None], slot)
        assert torch.equal(found[taken][:, taken], expected[token[taken]][:, token[taken]]), axes
        assert not found[:, ~taken].any()


def test_long_sides():
    """The longest sides that the fields hold, at both of their ends."""
    for axes, at in (
        ((Axis(511, 7),) * 3, 510),
        ((Axis(16383, 9),) * 2, 16382),
        ((Axis(2**20, 5),), 2**20 - 1),
    ):
        coordinates = torch.tensor([[0, at, at - 1, 0]] * len(axes))
        seen = fine_mask(torch.arange(4), coordinates, axes).seen(torch.arange(4)[:, None], torch.arange(4))
        assert torch.equal(
            seen, torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]).bool()
        )
    with pytest.raises(ValueError, match="3 dimensions takes up to 511 tokens in each, got 512"):
        fine_mask(torch.arange(1), torch.zeros(3, 1), (Axis(512, 7),) * 3)


def test_only_empty_slots_are_hidden():
    token_order = torch.tensor([3, -1, 0, 2, 1])
    seen = hide_empty_slots(token_order).seen(torch.arange(128)[:, None], torch.arange(128))
    assert torch.equal(seen, (torch.arange(128) < 5).logical_and(torch.arange(128) != 1).expand(128, -1))


def _axis(rng: random.Random, length: int) -> Axis:
    window = rng.randint(1, length)
    return Axis(length, window, rng.randint(1, window), causal=rng.random() < 0.3)
