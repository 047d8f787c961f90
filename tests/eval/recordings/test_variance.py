"""A term for the variance of scores within the sub-tiles of MEAN tiles."""

import pytest
import torch

from dma_diffusers.eval.recordings.routers import Call
from dma_diffusers.eval.recordings.variance import errors


def call(spread: float, tiles: int = 4) -> Call:
    """Keys that lie so far around one of each sub-tile, all of whose values are equal."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 128 * tiles, 64, generator=generator) * 0.3
    k, v = (torch.randn(2, 4 * tiles, 64, generator=generator).repeat_interleave(32, 1) for _ in range(2))
    return Call(q, k + spread * torch.randn(k.shape, generator=generator), v)


@pytest.mark.parametrize("router", ["oracle", "pools"])
@pytest.mark.parametrize("share", ["0.25", "0.5"])
def test_the_variance_mends_what_small_differences_between_keys_lose(router, share):
    equal, small = errors(call(0), 0), errors(call(0.2), 0)
    terms = ("none", "diagonal", "full")
    assert all(equal[f"{router} {share} {term}"] < 1e-5 for term in terms)
    none, diagonal, full = (small[f"{router} {share} {term}"] for term in terms)
    assert full < 0.3 * none and diagonal < 0.5 * none


def test_tiles_of_text_are_exact():
    """The one pair without text is that of each share, so that nothing is taken by its means."""
    assert max(errors(call(1, tiles=2), 1).values()) < 1e-5 < min(errors(call(1, tiles=8), 0).values())
