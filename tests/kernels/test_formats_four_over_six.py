"""Four-over-six scales: each block of nvfp4 takes the better of two (arXiv 2512.02010)."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dma_diffusers.kernels.formats import fake_quantize, pack, unpack


def oracle(x: np.ndarray) -> np.ndarray:
    """x `[rows, columns]` by ml_dtypes and a loop over blocks, with both scales tried."""
    tensor_scale = np.float32(np.abs(x).max() / np.float32(256 * 6))
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            candidates = []
            for largest in (1.0, 1.5):
                ratio = np.float32(np.abs(block).max() * np.float32(largest)) / np.float32(6) / tensor_scale
                scale = np.float32(ratio.astype(ml_dtypes.float8_e4m3fn)) * tensor_scale
                codes = (block / scale if scale else block * 0).astype(ml_dtypes.float4_e2m1fn)
                candidates.append(codes.astype(np.float32) * scale)
            errors = [np.square(c - block).sum(dtype=np.float64) for c in candidates]
            out[row, start : start + 16] = candidates[int(errors[1] < errors[0])]
    return out


def test_it_is_what_trying_both_gives():
    x = torch.randn(40, 160, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    x[4, :16] *= 1e-4
    found = fake_quantize(x, "nvfp4", four_over_six=True)
    assert torch.equal(found, torch.from_numpy(oracle(x.numpy())))
    assert torch.equal(unpack(pack(x, "nvfp4", four_over_six=True)), found)


def test_it_gains_almost_a_decibel_on_gaussians():
    x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))

    def qsnr(**options):
        error = fake_quantize(x, "nvfp4", **options) - x
        return -10 * torch.log10(error.square().sum() / x.square().sum())

    assert qsnr(four_over_six=True) > qsnr() + 0.7


def test_a_block_in_which_four_is_better():
    """Scaled to 6, nothing lies between 4 and 6: 4.8 is rounded to 4; scaled to 4, all of it is exact."""
    block = torch.tensor([[40.0, 30.0, 20.0, 10.0] * 4])
    assert not torch.equal(fake_quantize(block, "nvfp4"), block)
    found = fake_quantize(block, "nvfp4", tensor_amax=torch.tensor([[1536.0]]), four_over_six=True)
    assert torch.equal(found, block)


@given(st.integers(0, 2**31), st.integers(-100, 100))
def test_it_stores_what_it_says(seed, exponent):
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    packed = pack(x, "nvfp4", four_over_six=True)
    assert torch.equal(unpack(packed), fake_quantize(x, "nvfp4", four_over_six=True))
    x[1, 20] = torch.nan
    assert fake_quantize(x, "nvfp4", four_over_six=True).isnan().sum() == 16


def test_other_formats_refuse():
    with pytest.raises(ValueError, match="four-over-six scales are those of nvfp4, not of mxfp4"):
        fake_quantize(torch.zeros(1, 32), "mxfp4", four_over_six=True)
