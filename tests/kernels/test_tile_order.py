"""Tile orders against the definition, token by token."""

import math
import random

import pytest
import torch

from dma_diffusers.kernels.tiling import boxes
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.tile_order import TileOrder


def random_tile_order(rng: random.Random) -> TileOrder:
    grid = tuple(rng.randint(1, 20) for _ in range(rng.randint(1, 3)))
    text, tokens = rng.choice((0, 0, 5, 128, 200)), math.prod(grid)
    start = rng.choice((0, tokens, rng.randint(0, tokens))) if text else 0
    layout = Layout(tokens + text, tokens + text, (start, start + text), grid)
    return TileOrder(layout, rng.choice(boxes.plan(grid)))


def test_gather_then_scatter_is_the_identity():
    rng = random.Random(0)
    for _ in range(200):
        tile_order = random_tile_order(rng)
        token_order = tile_order.token_order
        x = torch.randn(tile_order.tokens.k_length)
        tokens = token_order[token_order >= 0].long()
        scattered = torch.full_like(x, torch.nan)
        scattered[tokens] = x[tokens]
        assert torch.equal(scattered, x) and len(tokens) == len(x)
        assert len(token_order) == tile_order.layout.k_length and len(token_order) % 128 == 0


def test_tiles_are_text_or_boxes():
    rng = random.Random(1)
    for _ in range(100):
        tile_order = random_tile_order(rng)
        grid, (start, stop) = tile_order.tokens.grid, tile_order.tokens.text
        others = [token for token in range(tile_order.tokens.k_length) if not start <= token < stop]
        for number, tile in enumerate(tile_order.token_order.view(-1, 128).tolist()):
            own = [token for token in tile if token >= 0]
            if number < tile_order.text_tiles:
                assert own == list(range(start, stop))[128 * number : 128 * (number + 1)]
                continue
            at = [torch.unravel_index(torch.tensor(others.index(token)), grid) for token in own]
            box = torch.tensor(at).view(-1, len(grid)) // torch.tensor(tile_order.box)
            assert (box == box[0]).all()
            coordinates = tile_order.coordinates[:, number * 128 : (number + 1) * 128]
            found = coordinates.T[torch.tensor(tile) >= 0]
            assert torch.equal(found, torch.tensor(at, dtype=torch.int32).view(-1, len(grid)))
        assert (tile_order.coordinates[0] >= 0).sum() == math.prod(grid)


@pytest.mark.parametrize(("layout", "box", "words"), [
    (Layout(64, 64), (128,), "needs the grid"),
    (Layout(64, 64, grid=(8, 8)), (16, 16), "2 sides and 128 tokens, got \\(16, 16\\)"),
    (Layout(64, 64, grid=(8, 8)), (128,), "2 sides"),
])  # fmt: skip
def test_bad_boxes_are_one_line(layout, box, words):
    with pytest.raises(ValueError, match=words):
        TileOrder(layout, box)
