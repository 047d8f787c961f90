"""Splitting the last round of Hopper's programs: pieces cover each KV tile once, and shorten the last round."""

import pytest

pytest.importorskip("triton")

from dma_diffusers.kernels.attention.hopper_split import Split


def test_flux_at_1024_splits_the_programs_of_its_last_round_in_two():
    assert Split.of(576, 36, 132) == Split(528, 48, 2)


@pytest.mark.parametrize(("blocks", "tiles"), [(132, 36), (264, 300), (576, 1), (131, 36), (230, 36)])
def test_nothing_is_split_where_that_takes_longer(blocks, tiles):
    assert Split.of(blocks, tiles, 132) == Split(blocks, 0, 1)


@pytest.mark.parametrize("blocks", [1, 7, 66, 150, 576, 1000])
@pytest.mark.parametrize("tiles", [8, 36, 132, 928])
def test_every_block_is_whole_or_in_pieces(blocks, tiles):
    split = Split.of(blocks, tiles, 132)
    assert split.whole + split.rest == blocks
    assert split.programs == split.whole + split.rest * split.pieces
    assert split.pieces == 1 or split.rest == blocks % 132
