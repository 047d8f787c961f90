"""Block formats re-encoded for FP8 and bf16 MMA multiply to the numbers that native block-scaled MMA gives."""

import pytest
import torch

from dma_diffusers.kernels.formats import fake_quantize, get_format
from dma_diffusers.kernels.lowerings import FAITHFUL, Storage

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dma_diffusers.kernels.attention.products import products  # noqa: E402

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]

# Hopper's FP8 MMA adds 32 products and the sum so far at a time. It aligns them to the largest exponent among them
# and keeps 13 bits below it, cutting off the rest (DeepSeek-V3, arXiv 2412.19437, section 3.5.2; binary point
# after the leading bit): each of the 33 loses less than 2^-13 of the largest.
PRODUCTS_PER_STEP = 32
LOST_PER_ADDEND = 2.0**-13


@triton.jit
def scores(q, k, q_scales, k_scales, out, ELEMENT: tl.constexpr, STORAGE: tl.constexpr, D: tl.constexpr):
    """The attention kernel's own products of one pair of tiles, with the rows' scales."""
    rows = tl.arange(0, 128)
    tile = tl.program_id(0)
    s = products(
        tl.reshape(q.load([0, 0, 0, 0]), (128, D)), None, tl.reshape(k.load([0, 0, 0, 0]), (128, D)),
        k_scales, tile, 0, 0.0, ELEMENT, STORAGE, None, D, False,
    )  # fmt: skip
    if STORAGE == "row":
        s *= tl.load(q_scales + rows)[:, None]
    tl.store(out + rows[:, None] * 128 + rows[None, :], s)


def multiplied(q: torch.Tensor, k: torch.Tensor, fmt: str) -> tuple[torch.Tensor, int]:
    """Scores of q and k `[128, D]` in `fmt`, quantised and multiplied by the kernels; inexact rows."""
    from dma_diffusers.kernels.quantiser.launch import Source, encode
    from dma_diffusers.kernels.quantiser.operands import Stored, row_descriptor

    stored, dim = Stored(get_format(fmt), FAITHFUL[fmt], Storage.PLAIN), q.shape[-1]
    inexact = torch.zeros(1, dtype=torch.int32, device=q.device)
    q, k = q[None, None], k[None, None]
    encoded = encode(Source(q, k), (stored, None), inexact_rows=inexact)
    a, b = encoded.q[0], encoded.k[0]
    out = torch.empty(128, 128, dtype=torch.float32, device=q.device)
    scores[(1,)](
        row_descriptor(a.elements, 128, dim), row_descriptor(b.elements, 128, dim), a.scales, b.scales, out,
        ELEMENT="e4m3" if stored.storage is Storage.ROW else "bf16", STORAGE=stored.storage.value, D=dim, num_warps=8,
    )  # fmt: skip
    return out, inexact.item()


def random(*shape: int, device: torch.device) -> torch.Tensor:
    """Rows of very different sizes, and blocks within them, as far apart as every format allows."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator).unflatten(-1, (-1, 32))
    x = x * torch.exp2(torch.randint(0, 7, x.shape[:-1], generator=generator).float())[..., None]
    x = x.flatten(-2) * torch.exp2(torch.randint(-12, 12, x.shape[:1], generator=generator).float())[:, None]
    return x.to(device)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2"])
def test_one_hot_rows_are_bit_equal(fmt, dim, kernel_device):
    """One product at a time: no sum, so nothing may be lost."""
    k = random(128, dim, device=kernel_device)
    for first in range(0, dim, 128):
        channel = (first + torch.arange(128, device=kernel_device)) % dim
        q = torch.zeros(128, dim, device=kernel_device)
        q[torch.arange(128, device=kernel_device), channel] = random(128, 128, device=kernel_device)[:, 5]
        out, inexact = multiplied(q, k, fmt)
        products = fake_quantize(q, fmt).double() @ fake_quantize(k, fmt).double().mT
        assert inexact == 0 and torch.equal(out.double(), products)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2"])
def test_full_rows_lose_no_more_than_the_accumulator(fmt, dim, kernel_device):
    q, k = (random(128, dim, device=kernel_device) for _ in range(2))
    out, inexact = multiplied(q, k.flip(0), fmt)
    a, b = fake_quantize(q, fmt).double(), fake_quantize(k.flip(0), fmt).double()
    products = a[:, None, :] * b[None, :, :]
    largest = torch.maximum(products.abs(), products.cumsum(-1).abs()).amax(-1)
    steps = dim / PRODUCTS_PER_STEP
    lost = LOST_PER_ADDEND if FAITHFUL[fmt] is Storage.ROW and kernel_device.type == "cuda" else 2.0**-23
    error = (out.double() - products.sum(-1)).abs() / largest
    assert inexact == 0
    assert error.max() <= steps * (PRODUCTS_PER_STEP + 1) * lost
