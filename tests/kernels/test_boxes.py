"""The choice of boxes."""

import math

import pytest

from dma_diffusers.kernels.tiling.boxes import padding, plan


@pytest.mark.parametrize(("grid", "box", "expected"), [
    ((21, 45, 80), (4, 8, 8), 0.22),
    ((21, 45, 80), (1, 8, 16), 0.07),
    ((30, 48, 80), (2, 8, 8), 0.0),
    ((5,), (8,), 0.6),
])  # fmt: skip
def test_padding(grid, box, expected):
    assert padding(grid, box) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("grid", "expected"), [
    ((21, 45, 80), (1, 8, 16)), ((30, 48, 80), (2, 8, 8)), ((256, 256), (8, 16)), ((4096,), (128,)),
    ((1, 64, 64), (1, 8, 16)),
])  # fmt: skip
def test_the_best_box(grid, expected):
    assert plan(grid)[0] == expected


def test_every_shape_is_there_once_and_holds_its_tokens():
    shapes = plan((21, 45, 80), 128)
    assert len(shapes) == len(set(shapes)) == math.comb(9, 2)  # 7 factors of 2 among 3 sides
    assert all(math.prod(shape) == 128 for shape in shapes)
    wasted = [padding((21, 45, 80), shape) for shape in shapes]
    assert wasted == sorted(wasted)
    assert {math.prod(shape) for shape in plan((9, 9), 12)} == {12}
