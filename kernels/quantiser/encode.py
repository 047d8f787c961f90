"""Runs the quantiser's kernel: from q and k to the operands that the attention kernel's descriptors read."""

import struct
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.formats.scale import fp32_tensor_scale
from dma_diffusers.kernels.maps import TILE, tiles
from dma_diffusers.kernels.quantiser.kernel import quantise, quantise_value
from dma_diffusers.kernels.run import Run, run


@dataclass(frozen=True)
class Operand:
    """Q or K in one format, as the MMA reads it.

    elements: uint8 `[heads·tiles·128, D or D/2]`, two e2m1 to a byte.
    scales: one 128-row tile after the other, uint8 or e4m3, in tcgen05's layout
        `[1, heads·tiles, columns/4, 2, 256]` where columns come in fours, else row by row,
        `[heads·tiles, 128·columns]`.
    tensor_scale: float32 `[heads]`, None in formats without one.
    """

    elements: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor | None

    def descriptors(self) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Descriptors that load one tile of elements and one tile of scales."""
        rows = [TILE, self.elements.shape[1]]
        one_tile = [1, *self.scales.shape[1:]] if self.scales.ndim == 2 else [1, 1, *self.scales.shape[2:]]
        return (
            TensorDescriptor.from_tensor(self.elements, rows),
            TensorDescriptor.from_tensor(self.scales, one_tile),
        )


def padded_dim(head_dim: int) -> int:
    """The head dimension that the kernels compute with: 64, 128 or 256; the zeros added change no score."""
    return max(64, 1 << (head_dim - 1).bit_length())


def _empty(fmt: str, heads: int, rows: int, dim: int, x: torch.Tensor, amax: torch.Tensor | None) -> Operand:
    format = get_format(fmt)
    columns = dim // format.block
    row_bytes = dim * format.bits // 8
    shape = (1, heads * rows, columns // 4, 2, 256) if columns % 4 == 0 else (heads * rows, TILE * columns)
    scale_dtype = torch.float8_e4m3fn if format.has_tensor_scale else torch.uint8
    tensor_scale = fp32_tensor_scale(amax.flatten(), format.element) if format.has_tensor_scale else None
    return Operand(
        torch.empty(heads * rows * TILE, row_bytes, dtype=torch.uint8, device=x.device),
        torch.empty(shape, dtype=torch.uint8, device=x.device).view(scale_dtype),
        tensor_scale,
    )


def encode(
    x: torch.Tensor,
    formats: tuple[str | None, str | None],
    amax: torch.Tensor | None,
    factor: float,
    mean: torch.Tensor | None,
    run: Run = run,
) -> list[Operand | None]:
    """(x − mean)·factor in each of `formats` (HIGH, LOW; None where the map has no such tile), in one pass.

    x `[B, H, S, D]`, last dimension contiguous; amax `[B, H, 1, 1]` of what is encoded, needed by formats with a
    tensor scale; mean `[B, H, 1, D]`, contiguous; both float32.
    """
    batch, heads, length, head_dim = x.shape
    dim, rows = padded_dim(head_dim), tiles(length)
    operands = [fmt and _empty(fmt, batch * heads, rows, dim, x, amax) for fmt in formats]
    arguments, constants = [], []
    for fmt, operand in zip(formats, operands, strict=True):
        if operand is None:
            arguments += [None, None, None]
            constants += [None, None, None, None]
            continue
        element = get_format(fmt).element
        bits = struct.unpack("<i", struct.pack("<f", element.max))[0]
        arguments += [operand.elements, operand.scales.view(torch.uint8), operand.tensor_scale]
        constants += [element.name, get_format(fmt).block, element.max, bits]
    run(
        quantise, (rows, batch * heads),
        x, mean, factor, *arguments, heads, length, head_dim, *x.stride()[:3], *constants,
        SMOOTH=mean is not None, D=dim, num_warps=8 if dim == 64 else 16,
    )  # fmt: skip
    return operands


def encode_value(v: torch.Tensor, v_scale: torch.Tensor, run: Run = run) -> torch.Tensor:
    """v / v_scale in e4m3, `[B·H·tiles·128, D]`; v_scale `[B, H, 1, D]`, float32, padded."""
    batch, heads, length, head_dim = v.shape
    dim, rows = padded_dim(head_dim), tiles(length)
    elements = torch.empty(batch * heads * rows * TILE, dim, dtype=torch.float8_e4m3fn, device=v.device)
    run(
        quantise_value, (rows, batch * heads),
        v, v_scale, elements.view(torch.uint8), heads, length, head_dim, *v.stride()[:3], D=dim, num_warps=8,
    )  # fmt: skip
    return elements
