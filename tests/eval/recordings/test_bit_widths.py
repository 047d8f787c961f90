"""Ways to choose the pairs of tiles that have 8 bits rather than 4."""

import pytest
import torch

from dma_diffusers.eval.recordings.bit_widths import SHARES, errors
from dma_diffusers.eval.recordings.routers import Call


@pytest.fixture(scope="module")
def found():
    """Attention that looks at one KV tile of six, whose keys are no larger than others: δ doesn't show which."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 768, 64, generator=generator) for _ in range(3))
    direction = torch.randn(64, generator=generator)
    q, k[:, 256:384] = q * 0.3 + direction, k[:, 256:384] * 0.3 + direction
    return errors(Call(q * 0.3, k - k.mean(1, keepdim=True), v), text_tiles=0)


def test_more_pairs_of_eight_bits_err_less(found):
    (none,), (everything,) = found["none"], found["all"]
    assert none > 3 * everything > 0
    for router in ("oracle", "pools of 32, staggered", "at random"):
        assert len(found[router]) == len(SHARES)
        fewer, more = [none, *found[router]], [*found[router], everything]
        assert all(after < before * 1.001 for before, after in zip(fewer, more, strict=True))


def test_probability_says_where_bits_count_and_amax_does_not(found):
    at = SHARES.index(0.25)
    assert found["oracle"][at] < 0.5 * found["none"][0]
    assert found["pools of 32, staggered"][at] < 1.1 * found["oracle"][at]
    assert found["δ of the tiles of Q and of K"][at] > 1.5 * found["oracle"][at]


def test_tiles_of_text_have_eight_bits():
    generator = torch.Generator().manual_seed(0)
    call = Call(*(torch.randn(1, 256, 64, generator=generator) for _ in range(3)))
    found = errors(call, text_tiles=1)
    assert found["oracle"] == found["all"] * len(SHARES)  # the one pair without text is that of each share
    assert found["all"][0] < found["none"][0] < 0.8 * errors(call, text_tiles=0)["none"][0]
