"""The exponentials that the multiply-add units take, against exp2 in float64."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dma_diffusers.kernels.attention.exponential import shared_exp2  # noqa: E402

pytestmark = pytest.mark.kernel


@triton.jit
def exponentials(x, out, SHARE: tl.constexpr):
    place = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + place, shared_exp2(tl.load(x + place), SHARE))


def computed(x: torch.Tensor, share: int) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    exponentials[(1,)](x, out, share)
    return out


@pytest.mark.parametrize("share", [1, 5, 8, 32])
def test_error_and_share(share, kernel_device):
    x = torch.empty(128, 128).uniform_(-100, 8, generator=torch.Generator().manual_seed(share))
    error = (computed(x.to(kernel_device), share).cpu().double() / torch.exp2(x.double()) - 1).abs()
    assert error.max() < 7.6e-5
    by_polynomial = error.amax(0) > 1e-5  # exp2 itself is good to 1e-6
    assert by_polynomial.reshape(4, 32).sum(1).tolist() == [share] * 4


def test_what_is_no_number(kernel_device):
    x = torch.zeros(128, 128, device=kernel_device)
    x[0], x[1], x[2] = -torch.inf, torch.nan, -1000.0
    out = computed(x, 32)
    assert (out[0] == 0).all() and out[1].isnan().all() and (out[2] == 0).all()
    torch.testing.assert_close(out[3:], torch.ones_like(out[3:]), rtol=7.6e-5, atol=0)
