"""Numbers in INT8 as the backward multiplies them, in torch.

Source: SageBwd, arXiv 2603.02170: of the seven products only dO·Vᵀ stays in 16 bits. There a block of P, or of dS, has
one scale. Here each row of it has, which costs no more, since a thread finds it without asking other warps.
"""

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.formats import FORMATS
from dma_diffusers.kernels.formats.element import IntElement
from dma_diffusers.kernels.lowerings import NATIVE, Storage
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import TILE

PRODUCTS = ("bf16", "int8")
"""The formats of the backward's products."""
AT_ONCE = (64, 64)
"""So many keys of a row of dS share a scale, and so many queries of a row of Pᵀ or dSᵀ, as in most kernels' blocks."""
LARGEST = 127.0
FORMATS_IN_INT8 = tuple(
    name
    for name, format in FORMATS.items()
    if isinstance(format.element, IntElement) and NATIVE.get(name) in (Storage.TILE, Storage.SHARED)
)
"""The formats of Q·K whose numbers are integers under scales of tokens or tiles."""


def is_in_int8(qk: str, products: str) -> bool:
    """Says whether a class with this format of Q·K has its backward's products in INT8."""
    return products == "int8" and qk in FORMATS_IN_INT8


def check_products(products: str, high: str, low: str, rotation: str = "none") -> None:
    """Raises ValueError, in one line, for products that the backward of these precisions doesn't have."""
    if products not in PRODUCTS:
        raise ValueError(f"backward must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if products == "bf16":
        return
    known = ", ".join(FORMATS_IN_INT8)
    if not any(is_in_int8(precision.qk, products) for precision in Precisions.parse(high, low)):
        raise ValueError(
            f"backward=int8 multiplies the numbers of classes in {known}, got {high} | {low}: choose backward=bf16"
        )
    if rotation != "none":
        raise ValueError(f"backward=int8 turns no channels, got rotation={rotation}: choose backward=bf16")


def rounded_rows(x: torch.Tensor, at_once: int) -> torch.Tensor:
    """x `[rows, columns]` in INT8 under one scale for each row of `at_once` columns, as float32 values."""
    runs = F.pad(x, (0, -x.shape[-1] % at_once)).unflatten(-1, (-1, at_once))
    return _rounded(runs, (-1,)).flatten(-2)[:, : x.shape[-1]]


def rounded_tiles(x: torch.Tensor) -> torch.Tensor:
    """x `[.., slots, D]` in INT8 under one scale for each tile, as float32 values."""
    runs = F.pad(x, (0, 0, 0, -x.shape[-2] % TILE)).unflatten(-2, (-1, TILE))
    return _rounded(runs, (-2, -1)).flatten(-3, -2)[..., : x.shape[-2], :]


def row_scales(q: torch.Tensor, fmt: str) -> torch.Tensor:
    """The scale of each row of q `[slots, D]`, which has a format's numbers, `[slots, 1]`; 0 for a row of zeros."""
    format, amax = FORMATS[fmt], q.abs().amax(-1, keepdim=True)
    runs = F.pad(amax, (0, 0, 0, -len(q) % format.block_rows)).unflatten(0, (-1, format.block_rows))
    shared = runs.amax(1, keepdim=True).expand_as(runs).flatten(0, 1)[: len(q)]
    return torch.where(amax == 0, 0, shared / format.element.max)


def _rounded(x: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    amax = x.abs().amax(dim, keepdim=True)
    return (x * torch.where(amax == 0, 0, LARGEST / amax)).round() * (amax / LARGEST)
