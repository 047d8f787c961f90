"""Runs the quantiser's kernel: from q and k to the operands that the attention kernel's descriptors read."""

import math
import struct
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.formats import Format
from dma_diffusers.kernels.formats.element import E4M3
from dma_diffusers.kernels.formats.scale import fp32_tensor_scale
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.maps import TILE, tiles
from dma_diffusers.kernels.quantiser.kernel import quantise, quantise_value
from dma_diffusers.kernels.quantiser.reference import Rope
from dma_diffusers.kernels.run import Run, run


@dataclass(frozen=True)
class Stored:
    """A format and how its numbers are stored."""

    format: Format
    storage: Storage

    def columns(self, dim: int) -> int:
        """Elements of a tensor in memory for `dim` channels: two e2m1 of a block format share a byte."""
        return dim // 2 if self.storage is Storage.BLOCK and self.format.bits == 4 else dim

    def quantised(self, is_key: bool) -> list:
        """What the quantiser's kernel compiles in: element, block, storage, q_max and its bits, room in e4m3."""
        element, storage = self.format.element, self.scaled(is_key)
        if element is None:
            return [self.format.name, None, storage.value, 0.0, 0, 0]
        bits = struct.unpack("<i", struct.pack("<f", element.max))[0]
        room = math.floor(math.log2(E4M3.max / element.max))
        return [element.name, self.format.block, storage.value, element.max, bits, room]

    def scaled(self, is_key: bool) -> Storage:
        """The storage, as it is of K or of Q: under `Storage.TILE` Q has scales for rows."""
        return Storage.ROW if self.storage is Storage.TILE and not is_key else self.storage

    @property
    def multiplied(self) -> list:
        """What the attention kernel compiles in: element of the MMA, storage, block.

        The element is "bf16" for the model's own numbers alone, which are not smoothed.
        """
        element = self.format.element
        match self.storage:
            case Storage.PLAIN:
                return [element.name if element else "bf16", self.storage.value, None]
            case Storage.ROW | Storage.TILE:
                return ["int8" if element.name == "int8" else "e4m3", self.storage.value, None]
            case Storage.BLOCK:  # e2m3 and e3m2 are stored as e4m3
                name = "e4m3" if element.bits == 6 else element.name
                return [name, self.storage.value, self.format.block]


@dataclass(frozen=True)
class Operand:
    """Q or K in one format, as the MMA reads it.

    elements: `[B, H, tiles·128, D]`: uint8 as `dot_scaled` reads it (two e2m1 to a byte, D/2), e4m3, int8 or bf16.
    scales: of blocks, one 128-row tile after the other, uint8 or e4m3, in tcgen05's layout
        `[1, B·H·tiles, columns/4, 2, 256]` where columns come in fours, else row by row,
        `[B·H·tiles, 128·columns]`; of rows, float32 `[B·H·tiles·128]`; of tiles, float32 `[B·H·tiles]`; None for
        plain numbers.
    tensor_scale: float32 `[B·H]`, None in formats without one.
    """

    elements: torch.Tensor
    scales: torch.Tensor | None
    tensor_scale: torch.Tensor | None


def padded_dim(head_dim: int) -> int:
    """The head dimension that the kernels compute with: 64, 128 or 256; the zeros added change no score."""
    return max(64, 1 << (head_dim - 1).bit_length())


def row_descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Loads `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns])


def scale_descriptor(scales: torch.Tensor) -> TensorDescriptor:
    """Loads the block scales of one tile."""
    one_tile = [1, *scales.shape[1:]] if scales.ndim == 2 else [1, 1, *scales.shape[2:]]
    return TensorDescriptor.from_tensor(scales, one_tile)


def _empty(stored: Stored, x: torch.Tensor, amax: torch.Tensor | None, is_key: bool) -> Operand:
    batch, heads, length, head_dim = x.shape
    dim, rows = padded_dim(head_dim), batch * heads * tiles(length)
    format, storage = stored.format, stored.storage
    tensor_scale = fp32_tensor_scale(amax.flatten(), format.element) if format.has_tensor_scale else None
    element_dtype, scales = torch.bfloat16, None
    if storage in (Storage.ROW, Storage.TILE):
        element_dtype = torch.int8 if format.name == "int8" else torch.float8_e4m3fn
        count = rows if stored.scaled(is_key) is Storage.TILE else rows * TILE
        scales = torch.empty(count, dtype=torch.float32, device=x.device)
    elif storage is Storage.BLOCK:
        element_dtype, blocks = torch.uint8, dim // format.block
        shape = (1, rows, blocks // 4, 2, 256) if blocks % 4 == 0 else (rows, TILE * blocks)
        scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
        scales = scales.view(torch.float8_e4m3fn) if format.has_tensor_scale else scales
    shape = (batch, heads, tiles(length) * TILE, stored.columns(dim))
    return Operand(torch.empty(shape, dtype=element_dtype, device=x.device), scales, tensor_scale)


def encode(
    x: torch.Tensor,
    classes: tuple[Stored | None, Stored | None],
    amax: torch.Tensor | None,
    factor: float,
    *,
    is_key: bool = False,
    mean: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_mean: torch.Tensor | None = None,
    rounds: bool = False,
    rope: Rope | None = None,
    inexact_rows: torch.Tensor | None = None,
    run: Run = run,
) -> tuple[list[Operand | None], torch.Tensor | None]:
    """(x − mean)·factor, or in bf16 x itself, for HIGH and LOW (None where nothing is wanted), in one pass.

    x: `[B, H, S, D]`, last dimension contiguous; it is rotated by `rope` first. amax: `[B, H, 1, 1]` of what is
    encoded, needed by formats with a tensor scale. is_key: x is K; then, mean `[B, H, 1, D]`, float32, and key_mask,
    uint8 `[B, tiles·128]`, 0 for what is encoded as zeros.
    key_mean: `[B, Hkv, 1, D]`, float32; with it, the second result is factor·x·key_mean, float32
        `[B·H·tiles·128]`, of x rounded to bf16 if `rounds`.
    inexact_rows: int32 `[1]`, counts the rows whose blocks' scales span too far for e4m3 and one power of two.
    """
    batch, heads, length, head_dim = x.shape
    rows = batch * heads * tiles(length)
    operands = [stored and _empty(stored, x, amax, is_key) for stored in classes]
    offset = None if key_mean is None else torch.empty(rows * TILE, dtype=torch.float32, device=x.device)
    cos, sin = rope or (None, None)
    if rope and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    arguments, constants = [], []
    for stored, operand in zip(classes, operands, strict=True):
        if operand is None:
            arguments += [None, None, None]
            constants += [None, None, None, None, None, None]
            continue
        scales = operand.scales
        if stored.storage is Storage.BLOCK:
            scales = scales.view(torch.uint8)
        arguments += [operand.elements, scales, operand.tensor_scale]
        constants += stored.quantised(is_key)
    run(
        quantise, (rows,),
        x, mean, factor, cos, sin, key_mean, key_mask, offset, *arguments, inexact_rows,
        heads, 1 if key_mean is None else heads // key_mean.shape[1], length, head_dim, *x.stride()[:3],
        *(cos.stride() if rope else (0, 0)), *constants,
        ROUND=rounds, D=padded_dim(head_dim), num_warps=8 if head_dim <= 64 else 16, enable_fp_fusion=False,
    )  # fmt: skip
    return operands, offset


def encode_value(v: torch.Tensor, v_scale: torch.Tensor, transposed: bool, run: Run = run) -> torch.Tensor:
    """v / v_scale in e4m3, `[B, H, tiles·128, D]`, or transposed and in the MMA's order of tokens.

    v_scale: `[B, H, 1, D]`, float32, padded.
    """
    batch, heads, length, head_dim = v.shape
    dim, padded = padded_dim(head_dim), tiles(length) * TILE
    shape = (batch, heads, dim, padded) if transposed else (batch, heads, padded, dim)
    elements = torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)
    run(
        quantise_value, (batch * heads * tiles(length),),
        v, v_scale, elements.view(torch.uint8), heads, length, head_dim, *v.stride()[:3],
        TRANSPOSED=transposed, D=dim, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return elements
