"""Runs the quantiser's kernels: from q, k and v to the operands that the attention kernel's descriptors read."""

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.device.launch import Run, multiprocessors, run
from dma_diffusers.kernels.formats import Format
from dma_diffusers.kernels.formats.element import E4M3
from dma_diffusers.kernels.formats.scale import fp32_tensor_scale
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.quantiser import kernel, statistics
from dma_diffusers.kernels.quantiser.reference import SAMPLED_TOKENS, Rope
from dma_diffusers.kernels.tiling.precision_map import TILE, tiles


@dataclass(frozen=True)
class Stored:
    """A format and how its numbers are stored."""

    format: Format
    storage: Storage

    def columns(self, dim: int) -> int:
        """Elements of a tensor in memory for `dim` channels: two e2m1 of a block format share a byte."""
        return dim // 2 if self.storage is Storage.BLOCK and self.format.bits == 4 else dim

    @property
    def quantised(self) -> list:
        """What the quantiser's kernel compiles in: element, block, storage, q_max and its bits, room in e4m3."""
        element = self.format.element
        if element is None:
            return [self.format.name, None, self.storage.value, 0.0, 0, 0]
        bits = struct.unpack("<i", struct.pack("<f", element.max))[0]
        room = math.floor(math.log2(E4M3.max / element.max))
        return [element.name, self.format.block, self.storage.value, element.max, bits, room]

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


@dataclass(frozen=True)
class Encoded:
    """What the attention kernel reads of one call; None where nothing is wanted.

    q, k: HIGH's operand and LOW's; None also for bf16 numbers that are read where the model has them.
    v: LOW's, e4m3 `[B, Hkv, tiles·128, D]`, or `[B, Hkv, D, tiles·128]` and in the MMA's order of tokens.
    v_high: HIGH's, bf16 `[B, Hkv, tiles·128, D]`; None also if it is read where the model has it.
    v_scale: float32 `[B·Hkv, D]`, powers of two; 1 for channels past the head dimension.
    offset: float32 `[B·H·tiles·128]`: what smoothing takes from the scores of each row, in base 2.
    """

    q: list[Operand | None]
    k: list[Operand | None]
    v: torch.Tensor | None
    v_high: torch.Tensor | None
    v_scale: torch.Tensor | None
    offset: torch.Tensor | None


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


def _empty(stored: Stored, x: torch.Tensor, length: int, amax: torch.Tensor | None, is_key: bool) -> Operand:
    batch, heads, _, head_dim = x.shape
    dim, rows = padded_dim(head_dim), batch * heads * tiles(length)
    format, storage = stored.format, stored.storage
    tensor_scale = fp32_tensor_scale(amax.flatten(), format.element) if format.has_tensor_scale else None
    element_dtype, scales = torch.bfloat16, None
    if storage in (Storage.ROW, Storage.TILE):
        element_dtype = torch.int8 if format.name == "int8" else torch.float8_e4m3fn
        count = rows if is_key and storage is Storage.TILE else rows * TILE
        scales = torch.empty(count, dtype=torch.float32, device=x.device)
    elif storage is Storage.BLOCK:
        element_dtype, blocks = torch.uint8, dim // format.block
        shape = (1, rows, blocks // 4, 2, 256) if blocks % 4 == 0 else (rows, TILE * blocks)
        scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
        scales = scales.view(torch.float8_e4m3fn) if format.has_tensor_scale else scales
    shape = (batch, heads, tiles(length) * TILE, stored.columns(dim))
    return Operand(torch.empty(shape, dtype=element_dtype, device=x.device), scales, tensor_scale)


def _operands(
    x: torch.Tensor | None,
    classes: tuple[Stored | None, Stored | None],
    amax: torch.Tensor | None,
    rope: Rope | None,
    token_order: torch.Tensor | None,
    is_key: bool,
) -> list[Operand | None]:
    """Room for one tensor's operands; none for bf16 numbers to which nothing has to be done."""
    stays = rope is None and token_order is None
    return [
        None
        if x is None or stored is None or (stored.format.name == "bf16" and stays)
        else _empty(stored, x, x.shape[2] if token_order is None else len(token_order), amax, is_key)
        for stored in classes
    ]


def _pointers(operands: list[Operand | None]) -> list[torch.Tensor | None]:
    """Elements, scales and tensor scale of both classes; E4M3 scales as bytes."""
    pointers = []
    for operand in operands:
        if operand is None:
            pointers += [None, None, None]
            continue
        is_e4m3 = operand.tensor_scale is not None and operand.scales is not None
        scales = operand.scales.view(torch.uint8) if is_e4m3 else operand.scales
        pointers += [operand.elements, scales, operand.tensor_scale]
    return pointers


def tables_of(rope: Rope | None) -> tuple[list[torch.Tensor | None], tuple[int, int]]:
    """Cosines and sines, and the strides that both have."""
    if rope is None:
        return [None, None], (0, 0)
    cos, sin = rope if rope[0].stride() == rope[1].stride() else (x.contiguous() for x in rope)
    return [cos, sin], cos.stride()


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def chunks(heads: int, device: torch.device) -> int:
    """Into how many chunks the statistics divide each of B·Hkv heads: few, but enough for every multiprocessor."""
    wanted = 2 * multiprocessors(device) // heads
    return min(max(4, 1 << wanted.bit_length()), 32)


class Statistics(NamedTuple):
    """Of each head: K's mean and V's scales, float32 `[B·Hkv, D]`."""

    mean: torch.Tensor | None
    v_scale: torch.Tensor | None


def statistics_of(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rope: Rope | None = None,
    key_mask: torch.Tensor | None = None,
    run: Run = run,
) -> Statistics:
    """K's mean and V's scales, as quantiser/reference.py defines them; None for a tensor that is None.

    k, v: `[B, Hkv, S, D]`, last dimension contiguous; k is rotated by `rope` first. key_mask: bool `[B, S]`, True for
    keys that are seen, in the order of k and v, any strides.
    """
    x = v if k is None else k
    if x is None:
        return Statistics(None, None)
    batch, heads, length, head_dim = x.shape
    dim, of_all, device = padded_dim(head_dim), batch * heads, x.device
    count = chunks(of_all, device)
    partials = torch.empty(4, of_all, count, dim, dtype=torch.float32, device=device)
    finished = torch.zeros(2, of_all, dtype=torch.int32, device=device)
    mean, v_scale = (
        None if y is None else torch.empty(of_all, dim, dtype=torch.float32, device=device) for y in (k, v)
    )
    tables, rope_strides = tables_of(None if k is None else rope)
    programs = of_all * ((0 if k is None else count // 2) + (0 if v is None else count))
    run(
        statistics.statistics, (programs,),
        k, v, partials, finished, mean, v_scale, *tables, None if key_mask is None else key_mask.view(torch.uint8),
        of_all, heads, length, max(1, length // SAMPLED_TOKENS),
        *_strides(k), *_strides(v), *rope_strides, *((0, 0) if key_mask is None else key_mask.stride()),
        CHUNKS=count, HEAD_DIM=head_dim, D=dim, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return Statistics(mean, v_scale)


def encode(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    classes: tuple[Stored | None, Stored | None],
    factor: float,
    known: Statistics = Statistics(None, None),  # noqa: B008 (it never changes)
    *,
    q_amax: torch.Tensor | None = None,
    k_amax: torch.Tensor | None = None,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    key_mask: torch.Tensor | None = None,
    token_order: torch.Tensor | None = None,
    wants_offset: bool = False,
    transposed_v: bool = False,
    inexact_rows: torch.Tensor | None = None,
    registers: int | None = None,
    run: Run = run,
) -> Encoded:
    """q·factor and k less its mean for HIGH and LOW (None: a class without tiles), in bf16 q and k as they are; v.

    q, k, v: `[B, H or Hkv, S, D]`, last dimension contiguous, None where nothing is wanted of them; q and k are
    rotated by q_rope and k_rope first. known: `statistics_of` k and v, as far as they are encoded.
    q_amax, k_amax: `[B, H or Hkv, 1, 1]` of what is encoded, needed by formats with a tensor scale.
    key_mask: uint8 `[B, tiles·128]`, 0 for keys that are encoded as zeros.
    token_order: int32 `[slots]`, the token of q, k and v that stands at each slot, −1 where none does; what is encoded, and
        key_mask, stands in that order. HIGH's bf16 numbers are then copied too.
    wants_offset: whether `offset` is, of q rounded to bf16 if one of the classes is in bf16.
    inexact_rows: int32 `[1]`, counts the rows whose blocks' scales span too far for e4m3 and one power of two.
    registers: the most that a thread may use; None leaves it to the compiler.
    """
    q_operands = _operands(q, classes, q_amax, q_rope, token_order, is_key=False)
    k_operands = _operands(k, classes, k_amax, k_rope, token_order, is_key=True)
    first = next(x for x in (v, k, q) if x is not None)
    device, (batch, kv_heads, k_length, head_dim) = first.device, first.shape
    heads, q_length = (kv_heads, 1) if q is None else q.shape[1:3]
    token_count = None
    if token_order is not None:
        token_count = None if len(token_order) == k_length else k_length
        q_length = k_length = len(token_order)
    dim = padded_dim(head_dim)
    offset, values, v_high = None, None, None
    if wants_offset:
        offset = torch.empty(batch * heads * tiles(q_length) * TILE, dtype=torch.float32, device=device)
    rows = tiles(k_length) * TILE
    if v is not None and known.v_scale is not None:
        shape = (batch, kv_heads, dim, rows) if transposed_v else (batch, kv_heads, rows, dim)
        values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if v is not None and token_order is not None and classes[0]:
        v_high = torch.empty(batch, kv_heads, rows, dim, dtype=torch.bfloat16, device=device)
    encoded = Encoded(q_operands, k_operands, values, v_high, known.v_scale, offset)
    q = q if wants_offset or any(q_operands) else None
    k = k if any(k_operands) else None
    v = None if values is None and v_high is None else v
    of_keys = kv_heads * tiles(k_length)
    programs = batch * (
        (0 if v is None else of_keys)
        + (0 if k is None else of_keys)
        + (0 if q is None else heads * tiles(q_length))
    )
    if programs == 0:
        return encoded
    (q_tables, q_rope_strides), (k_tables, k_rope_strides) = tables_of(q_rope), tables_of(k_rope)
    run(
        kernel.encode, (programs,),
        q, k, v, *known, factor, *q_tables, *k_tables, key_mask, offset,
        *_pointers(q_operands), *_pointers(k_operands),
        v_high, values, token_order, inexact_rows,
        heads, kv_heads, batch * kv_heads, q_length, k_length, token_count, *_strides(q), *_strides(k), *_strides(v),
        *q_rope_strides, *k_rope_strides,
        *(constant for c in classes for constant in (c.quantised if c else [None] * 6)),
        ROUND=any(c is not None and c.format.name == "bf16" for c in classes), TRANSPOSED=transposed_v,
        HEAD_DIM=head_dim, D=dim,
        num_warps=8 if head_dim <= 64 else 16, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return encoded
