"""Operands: how the numbers that the matrix products read lie in memory, and the descriptors that load them."""

import math
import struct
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.formats import Format, IntElement, get_format
from dma_diffusers.kernels.formats.element import E4M3
from dma_diffusers.kernels.formats.scale import fp32_tensor_scale
from dma_diffusers.kernels.lowerings import UNPACKED, Lowering, Storage
from dma_diffusers.kernels.precision import Precision
from dma_diffusers.kernels.tiling.layout import TILE, tiles


@dataclass(frozen=True)
class Stored:
    """The storage of one class of tiles: the format of Q and K, its storage, and the storage of V.

    in_bytes: integers of four bits lie in a byte each.
    """

    format: Format
    storage: Storage
    values: Storage
    in_bytes: bool = False

    @classmethod
    def by(cls, lowering: Lowering, precision: Precision, target: str) -> "Stored":
        """The storage that `lowering` has for a class of this precision on an architecture."""
        storage, values = lowering.storage(precision.qk, target), lowering.stores_values[precision.pv]
        return cls(get_format(precision.qk), storage, values, in_bytes=target in UNPACKED)

    def columns(self, dim: int) -> int:
        """Elements of a tensor in memory for `dim` channels: two of four bits share a byte."""
        return dim // 2 if self.is_packed else dim

    @property
    def is_packed(self) -> bool:
        """Says whether elements have four bits in memory: the even channel's are the lower half of a byte."""
        is_byte = self.in_bytes and isinstance(self.format.element, IntElement)
        return self.format.bits == 4 and self.storage not in (Storage.PLAIN, Storage.ROW) and not is_byte

    @property
    def element_name(self) -> str:
        """The kernels' name of the numbers in memory: int4 in bytes are int8."""
        in_bytes = self.format.element.name == "int4" and not self.is_packed
        return "int8" if in_bytes else self.format.element.name

    @property
    def quantised(self) -> list:
        """The constants of the quantiser's kernel: element, block, storage, q_max and its bits, room in e4m3."""
        element = self.format.element
        if element is None:
            return [self.format.name, None, self.storage.value, 0.0, 0, 0]
        bits = struct.unpack("<i", struct.pack("<f", element.max))[0]
        room = math.floor(math.log2(E4M3.max / element.max))
        return [self.element_name, self.format.block, self.storage.value, element.max, bits, room]

    @property
    def multiplied(self) -> list:
        """The constants of the attention kernel: element of the MMA of Q·K, its storage and block, storage of V.

        The element is "bf16" for the model's own numbers alone, which are not smoothed; others in bf16 are "plain".
        """
        element = self.format.element
        match self.storage:
            case Storage.PLAIN:
                name, block = "plain" if element else "bf16", None
            case Storage.ROW | Storage.TILE | Storage.SHARED:
                name, block = self.element_name if isinstance(element, IntElement) else "e4m3", None
            case Storage.PACKED:
                name, block = element.name, self.format.block
            case Storage.BLOCK:  # e2m3 and e3m2 are stored as e4m3
                name, block = "e4m3" if element.bits == 6 else element.name, self.format.block
        return [name, self.scales.value, block, self.values.value]

    @property
    def scales(self) -> Storage:
        """The storage as the attention kernel knows it: where tokens of Q share a scale, it lies there for each."""
        return Storage.TILE if self.storage is Storage.SHARED else self.storage


Classes = tuple[Stored | None, Stored | None]
"""The storages of HIGH and LOW; None for a class without tiles."""


@dataclass(frozen=True)
class Operand:
    """Q or K in one format, as the MMA reads it.

    elements: `[B, H, tiles·128, D]`: uint8 as `dot_scaled` reads it (two e2m1 to a byte, D/2), e4m3, int8 (two int4 to
        a byte, D/2) or bf16.
    scales: of blocks, one 128-row tile after the other, uint8 or e4m3, in tcgen05's layout
        `[1, B·H·tiles, columns/4, 2, 256]` where columns come in fours, else row by row,
        `[B·H·tiles, 128·columns]`; of rows, float32 `[B·H·tiles·128]`; of tiles, float32 `[B·H·tiles]`; None for
        plain numbers.
    tensor_scale: float32 `[B·H]`, None in formats without one.
    """

    elements: torch.Tensor
    scales: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        launcher: Launcher,
        stored: Stored,
        x: torch.Tensor,
        length: int,
        amax: torch.Tensor | None,
        is_key: bool,
    ) -> "Operand":
        """Room for x `[B, H, S, D]` at `length` slots. amax: of each head of x, for formats with a tensor scale."""
        batch, heads, _, head_dim = x.shape
        dim, rows = padded_dim(head_dim), batch * heads * tiles(length)
        format, storage = stored.format, stored.storage
        tensor_scale = fp32_tensor_scale(amax.flatten(), format.element) if format.has_tensor_scale else None
        element_dtype, scales = torch.bfloat16, None
        if storage in (Storage.ROW, Storage.TILE, Storage.SHARED):
            element_dtype = torch.int8 if isinstance(format.element, IntElement) else torch.float8_e4m3fn
            count = rows if is_key and storage is not Storage.ROW else rows * TILE
            scales = launcher.empty((count,), torch.float32, x.device)
        elif storage in (Storage.BLOCK, Storage.PACKED):
            element_dtype, blocks = (
                torch.uint8 if storage is Storage.BLOCK else torch.int8,
                dim // format.block,
            )
            shape = (1, rows, blocks // 4, 2, 256) if blocks % 4 == 0 else (rows, TILE * blocks)
            scales = launcher.empty(
                shape, torch.float8_e4m3fn if format.has_tensor_scale else torch.uint8, x.device
            )
        shape = (batch, heads, tiles(length) * TILE, stored.columns(dim))
        return cls(launcher.empty(shape, element_dtype, x.device), scales, tensor_scale)

    @property
    def pointers(self) -> list[torch.Tensor | None]:
        """Elements, scales and tensor scale, as the quantiser's kernel writes them: E4M3 scales as bytes."""
        is_e4m3 = self.tensor_scale is not None and self.scales is not None
        return [self.elements, self.scales.view(torch.uint8) if is_e4m3 else self.scales, self.tensor_scale]


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
