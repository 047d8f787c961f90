"""Rotations against Hadamard matrices made by another rule, in float64, and their refusals."""

import subprocess
import sys

import pytest
import torch

from dma_diffusers.kernels.formats import ROTATIONS, block_of, rotate, rotate_back, sign_is_changed
from tests.kernels.oracle import hadamard_matrix


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotations_are_hadamard_matrices_with_signs(rotation, head_dim):
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ hadamard_matrix(rotation, head_dim)
    torch.testing.assert_close(rotate(x, rotation).double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(rotate_back(rotate(x, rotation), rotation), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rotation", ROTATIONS[1:])
def test_products_stay_and_outliers_spread(rotation):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 64, 128, generator=generator)
    k[:, 17] *= 100
    rotated_q, rotated_k = rotate(q, rotation), rotate(k, rotation)
    torch.testing.assert_close(rotated_q @ rotated_k.mT, q @ k.mT, rtol=1e-5, atol=1e-3)
    assert rotated_k.abs().amax() < 0.4 * k.abs().amax()


def test_signs_are_the_same_in_every_process_and_about_half_of_them_change():
    changed = [sign_is_changed(channel) for channel in range(256)]
    assert 96 < sum(changed) < 160
    # every block of 16 has signs of its own
    assert len({tuple(changed[first : first + 16]) for first in range(0, 256, 16)}) == 16
    script = (
        "from dma_diffusers.kernels.formats import sign_is_changed as s; print([s(c) for c in range(256)])"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(changed)


def test_bf16_is_rotated_in_float32():
    x = torch.randn(4, 64).bfloat16()
    assert rotate(x, "hadamard32").dtype is torch.float32
    assert torch.equal(rotate(x, "hadamard32"), rotate(x.float(), "hadamard32"))


@pytest.mark.parametrize(
    ("rotation", "head_dim", "message"),
    [
        ("hadamard", 64, "unknown rotation 'hadamard': choose from none, hadamard16, hadamard32, head_dim"),
        ("hadamard32", 80, "rotation hadamard32 needs a head_dim that 32 divides, and head_dim is 80"),
        ("hadamard16", 72, "rotation hadamard16 needs a head_dim that 16 divides, and head_dim is 72"),
        (
            "head_dim", 96,
            "rotation head_dim needs a power of two, and head_dim is 96: take another",
        ),
    ],
)  # fmt: skip
def test_a_rotation_that_does_not_divide_head_dim_is_one_clear_line(rotation, head_dim, message):
    with pytest.raises(ValueError) as error:
        block_of(rotation, head_dim)
    assert str(error.value) == message
    with pytest.raises(ValueError, match="rotation"):
        rotate(torch.zeros(2, head_dim), rotation)
