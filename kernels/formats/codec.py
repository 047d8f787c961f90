"""Conversion to a format and back: `fake_quantize` keeps the tensor's dtype, `pack` stores real codes and scales.

All arithmetic is float32 on the tensor's device, and never waits for it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .element import E4M3, Element
from .format import Format, get_format
from .scale import (
    FOUR_OVER_SIX_MAX,
    Scale,
    ScaleRounding,
    decode_scales,
    encode_e4m3,
    encode_e8m0,
    fp32_scale,
    fp32_tensor_scale,
)


@dataclass(frozen=True)
class Packed:
    """A tensor as stored in a format. A row is padded with zeros to whole blocks.

    data: uint8 codes `[..., rows, columns]`; 4-bit codes lie two to a byte, the even index in the low nibble;
        6-bit codes lie one to a byte, right-aligned, as sm_100's `kind::mxf8f6f4` reads them. With `bf16` it is the
        tensor itself.
    scales: `[..., rows / block_rows, blocks]`, uint8 (E8M0 and E4M3 codes) or float32; None with `bf16`.
    tensor_scale: float32, of the shape of `tensor_amax`, or None in formats without one.
    shape: the shape of the tensor, without padding.
    """

    data: Tensor
    scales: Tensor | None
    tensor_scale: Tensor | None
    format: Format
    shape: torch.Size


def fake_quantize(
    x: Tensor,
    format: str | Format,
    rounding: str = "ceil",
    *,
    tensor_amax: Tensor | None = None,
    four_over_six: bool = False,
) -> Tensor:
    """`x` rounded to what `format` can store, along its last dimension (OCP MX v1.0, section 6.3).

    A block that holds NaN or ±inf becomes NaN as a whole, a block of zeros stays zero, and a finite input gives a
    finite result. Where rows share a scale (`int8_tile`, the tensor scale), only finite numbers determine it, and
    NaN or ±inf spoils no more than its own row (`int8_tile`) or block.

    x: `[..., columns]`, any float dtype (float64 is first rounded to float32); `int8_tile` needs
        `[..., rows, columns]`. `bf16` returns x itself, whatever its dtype.
    rounding: a `ScaleRounding`; it matters to E8M0 scales only.
    tensor_amax: the finite amax from which the tensor scale is made, instead of x's own: `[..., 1]`, broadcastable
        against x. Formats without a tensor scale ignore it.
    four_over_six: gives each block the better of two scales, by squared error: one that brings its amax to the
        element's maximum, and one that is half as large again (arXiv 2512.02010, 2601.22813). It is for `nvfp4`.
    The result has the shape and dtype of x. Raises ValueError for an unknown format or rounding, an empty x or one of
    too few dimensions; raises TypeError for a dtype that is no float.
    """
    format, rounding = _checked(x, format, rounding, four_over_six)
    if format.element is None:
        return x
    scaled, factor, _, _ = _scale_down(x, format, format.element, rounding, tensor_amax, four_over_six)
    return _join(format.element.round(scaled) * factor, x.shape, x.dtype)


def pack(
    x: Tensor,
    format: str | Format,
    rounding: str = "ceil",
    *,
    tensor_amax: Tensor | None = None,
    four_over_six: bool = False,
) -> Packed:
    """`x` as codes and scales; `unpack(pack(x, …), x.dtype)` equals `fake_quantize(x, …)` bit for bit.

    Arguments and errors are those of `fake_quantize`; rows of `int4` need an even number of columns. A block with
    NaN or ±inf stores NaN as its scale (E8M0 255, E4M3 0x7F, FP32 NaN); with `int8_tile`, where rows share a scale,
    the codes of that row store it.
    """
    format, rounding = _checked(x, format, rounding, four_over_six)
    if format.element is None:
        return Packed(x, None, None, format, x.shape)
    scaled, _, scales, tensor_scale = _scale_down(
        x, format, format.element, rounding, tensor_amax, four_over_six
    )
    codes = format.element.encode(scaled).flatten(-2)
    if format.bits == 4:
        if codes.shape[-1] % 2:
            raise ValueError(
                f"{format.name} stores two numbers in a byte: a row needs an even number of columns, got {x.shape[-1]}"
            )
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return Packed(codes, scales, tensor_scale, format, x.shape)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `packed` stores, of shape `packed.shape`, in `dtype`."""
    format, codes = packed.format, packed.data
    if format.element is None or packed.scales is None:
        return packed.data.to(dtype)
    if format.bits == 4:
        codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    factor = _factor(packed.scales, packed.tensor_scale, format, packed.shape)
    blocks = codes.unflatten(-1, (factor.shape[-2], -1))
    return _join(format.element.decode(blocks) * factor, packed.shape, dtype)


def _checked(
    x: Tensor, format: str | Format, rounding: str, four_over_six: bool
) -> tuple[Format, ScaleRounding]:
    format = format if isinstance(format, Format) else get_format(format)
    if four_over_six and format.name != "nvfp4":
        raise ValueError(f"four-over-six scales are those of nvfp4, not of {format.name}")
    if not x.is_floating_point():
        raise TypeError(f"{format.name} stores floats: got {x.dtype}")
    if x.numel() == 0 or x.dim() < (2 if format.block_rows > 1 else 1):
        raise ValueError(f"{format.name} needs rows and columns: got shape {list(x.shape)}")
    return format, ScaleRounding(rounding)


def _scale_down(
    x: Tensor,
    format: Format,
    element: Element,
    rounding: ScaleRounding,
    tensor_amax: Tensor | None,
    four_over_six: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x divided by its scales `[..., blocks, block]`, the factor that undoes this, stored scales, the tensor scale."""
    x = x.to(torch.float32)
    block = format.block or x.shape[-1]
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1)
    tensor_scale = None
    match format.scale:
        case Scale.E8M0:
            scales = encode_e8m0(amax, element, rounding)
        case Scale.E4M3:
            tensor_amax = _finite_abs(x).amax() if tensor_amax is None else tensor_amax.to(torch.float32)
            tensor_scale = fp32_tensor_scale(
                tensor_amax, element, FOUR_OVER_SIX_MAX if four_over_six else E4M3.max
            )
            scales = encode_e4m3(amax, element, tensor_scale)
            if four_over_six:
                larger = encode_e4m3(1.5 * amax, element, tensor_scale)
                errors = [_squared_error(blocks, s, tensor_scale, format, element) for s in (scales, larger)]
                scales = torch.where(errors[1] < errors[0], larger, scales)
        case Scale.FP32:
            shared = amax if format.block_rows == 1 else _amax_of_rows(blocks, format.block_rows)
            scales = fp32_scale(shared, element)
    factor = _factor(scales, tensor_scale, format, x.shape)
    # A block with NaN or ±inf becomes NaN, even where other rows share its scale.
    divisor = _divisor(factor).masked_fill(~amax.isfinite().unsqueeze(-1), math.nan)
    return blocks / divisor, factor, scales, tensor_scale


def _divisor(factor: Tensor) -> Tensor:
    """The number by which elements are divided: a block whose scale is zero becomes zero."""
    return factor.masked_fill(factor == 0, math.inf)


def _squared_error(
    blocks: Tensor, scales: Tensor, tensor_scale: Tensor, format: Format, element: Element
) -> Tensor:
    """The squared error of each block `[..., blocks, block]` under these scales."""
    factor = _factor(scales, tensor_scale, format, blocks.shape)
    return (element.round(blocks / _divisor(factor)) * factor - blocks).square().sum(-1)


def _amax_of_rows(blocks: Tensor, rows: int) -> Tensor:
    """The finite amax of each run of `rows` rows: from `[..., rows, blocks, block]` to `[..., runs, blocks]`."""
    amax = _finite_abs(blocks).amax(-1)
    return F.pad(amax, (0, 0, 0, -amax.shape[-2] % rows)).unflatten(-2, (-1, rows)).amax(-2)


def _finite_abs(x: Tensor) -> Tensor:
    return x.abs().nan_to_num(nan=0.0, posinf=0.0)


def _factor(scales: Tensor, tensor_scale: Tensor | None, format: Format, shape: torch.Size) -> Tensor:
    """The factor that multiplies the elements of each block: float32 `[..., blocks, 1]`."""
    factor = decode_scales(scales, format.scale)
    if tensor_scale is not None:
        factor = factor * tensor_scale
    if format.block_rows > 1:
        factor = factor.repeat_interleave(format.block_rows, dim=-2)[..., : shape[-2], :]
    return factor.unsqueeze(-1)


def _join(blocks: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Rows made of blocks, without padding; they saturate, since rounding up may exceed the maximum of `dtype`."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return blocks.flatten(-2)[..., : shape[-1]].clamp(-limit, limit).to(dtype)
