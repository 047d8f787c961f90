"""Runs the kernels of linear layers: inputs and weights as `LinearWeight` has them, whatever their sizes."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.linears import product, quantiser
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.layout import COLUMNS, ROWS
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.lowerings import TCGEN05_ARCHITECTURES


@dataclass(frozen=True)
class Tiles:
    """One variant of the product's kernel.

    rows, columns: of one program's tile; multiples of 128, as a tile of scales is. narrow, wide: channels that it loads
    at once, of 4 bits and of 8. beside: tiles of rows that go over the weight together.
    """

    rows: int = 128
    columns: int = 128
    narrow: int = 256
    wide: int = 128
    warps: int = 8
    stages: int = 4
    beside: int = 8


@cache
def tiles_for(target: str, groups: Groups) -> Tiles:
    """The variant for an architecture, from what the compiler makes of each: none of these spills."""
    if target in TCGEN05_ARCHITECTURES and not groups.has_row_scales:
        return Tiles(columns=256)
    return Tiles() if target in TCGEN05_ARCHITECTURES else Tiles(stages=3)


def quantise(
    x: Tensor,
    permutation: Tensor | None,
    groups: Groups,
    prologue: Prologue,
    reencodes: bool,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Operand:
    """x `[rows, K]`, bf16, fp16 or fp32, after its prologue and permutation, in the formats of its groups.

    The prologue's scale and shift are contiguous, and in the order of the permutation.
    """
    operand = Operand.empty(x, groups, reencodes)
    if len(x) == 0:
        return operand
    x = x if x.stride(1) == 1 else x.contiguous()
    scale, shift = prologue.scale, prologue.shift
    padded = _padded(groups)
    outputs = [y if y is None or y.ndim != 5 else y.view(torch.uint8) for y in operand]
    launcher(
        quantiser.quantise_rows, (len(x),),
        x, permutation, scale, shift, *outputs,
        x.stride(0), len(x) // (1 if scale is None else len(scale)), groups.in_features, *_ends(groups),
        prologue.norm_eps or 0.0,
        NORMALISES=prologue.norm_eps is not None, GELU=prologue.gelu, SIX=_six(groups), BLOCK=groups.block,
        REENCODES=reencodes, K=padded, num_warps=_warps(padded), enable_fp_fusion=False,
    )  # fmt: skip
    return operand


def reencode(
    weight: Operand,
    groups: Groups,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> tuple[Tensor, Tensor]:
    """A weight in MX formats as e4m3 `[N, K]`, and the power of two of each row, float32 `[N]`."""
    rows, device = len(weight.elements), weight.elements.device
    out = launcher.empty((rows, groups.in_features), torch.float8_e4m3fn, device)
    row_scales = launcher.empty((rows,), torch.float32, device)
    padded = _padded(groups)
    launcher(
        quantiser.reencode_rows, (rows,),
        *weight[:4], out, row_scales, groups.in_features, *_ends(groups),
        SIX=_six(groups), K=padded, num_warps=_warps(padded), enable_fp_fusion=False,
    )  # fmt: skip
    return out, row_scales


def multiply(
    x: Operand,
    weight: Operand,
    bias: Tensor | None,
    groups: Groups,
    dtype: torch.dtype,
    target: str,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Tensor:
    """x times weight plus bias, `[rows, N]` in `dtype`. target: the architecture."""
    tiles = tiles_for(target, groups)
    rows, out_features = len(x.elements), len(weight.elements)
    out = launcher.empty((rows, out_features), dtype, x.elements.device)
    if rows == 0:
        return out
    launcher(
        product.multiply, (-(-rows // tiles.rows) * -(-out_features // tiles.columns),),
        *_loaded(x, tiles.rows, tiles, groups), *_loaded(weight, tiles.columns, tiles, groups),
        bias, out, rows, out_features, groups.narrow, groups.wide, 0.0,
        BLOCK=groups.block, M=tiles.rows, N=tiles.columns, NARROW_K=tiles.narrow, WIDE_K=tiles.wide,
        BESIDE=tiles.beside, STAGES=tiles.stages, num_warps=tiles.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _loaded(
    operand: Operand, rows: int, tiles: Tiles, groups: Groups
) -> list[TensorDescriptor | Tensor | None]:
    """Descriptors that load tiles of an operand's elements and scales; its row scales as they are."""
    found: list[TensorDescriptor | Tensor | None] = []
    for elements, scales, channels, per_byte in (
        (operand.narrow, operand.narrow_scales, tiles.narrow, 2), (operand.wide, operand.wide_scales, tiles.wide, 1)
    ):  # fmt: skip
        if elements is None or scales is None:
            found += [None, None]
            continue
        blocks = channels // groups.block // COLUMNS
        found += [
            TensorDescriptor.from_tensor(elements.view(torch.uint8), [rows, channels // per_byte]),
            TensorDescriptor.from_tensor(scales, [1, rows // ROWS, blocks, 2, 256]),
        ]
    return [*found, operand.row_scales]


def _ends(groups: Groups) -> tuple[int, int]:
    """The channels before which 4-bit groups end, and 6-bit groups."""
    six = sum(channels.stop - channels.start for format, channels in groups.slices if format.bits == 6)
    return groups.narrow, groups.narrow + six


def _six(groups: Groups) -> str | None:
    """The element of the 6-bit group; None if there is none."""
    return next((format.element.name for format, _ in groups.slices if format.bits == 6), None)


def _padded(groups: Groups) -> int:
    """The columns with which a program that handles a row computes."""
    return max(128, 1 << (groups.in_features - 1).bit_length())


def _warps(columns: int) -> int:
    return min(max(1, columns // 512), 32)
