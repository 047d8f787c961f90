"""The quantiser in torch: it defines what is correct."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.call import Call, Norms, Rope
from dma_diffusers.kernels.formats import Format, block_of, fake_quantize, get_format, rotate_blocks
from dma_diffusers.kernels.formats.element import E4M3, INT8
from dma_diffusers.kernels.formats.scale import Scale, fp32_scale
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE

SAMPLED_TOKENS = 1024
# So small that where hopper_means.py adds counts in whole products, these count for little.
SCALE_OF_ZEROS = 2.0**-24
MEANS_ANCHORED = 2.0**120  # means of larger numbers are summed as they are
ROTATED_MAX = (
    2.0**119
)  # larger values are brought to it before they are rotated: 256 of them add up to a float32


def changed_q(call: Call) -> torch.Tensor:
    """q of a call behind its norm and its RoPE, float32 `[B, H, Sq, D]`."""
    norms = call.norms
    return rotate(call.q if norms is None else normalise(call.q, norms, norms.q, norms.q_first), call.q_rope)


def changed_k(call: Call) -> torch.Tensor:
    """k of a call behind its norm and its RoPE, float32 `[B, Hkv, Sk, D]`."""
    norms = call.norms
    return rotate(call.k if norms is None else normalise(call.k, norms, norms.k, norms.k_first), call.k_rope)


def normalise(
    x: torch.Tensor, norms: Norms, weight: torch.Tensor, first_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[B, H, S, D]` behind RMSNorm, in its dtype: computed in float32 and rounded once, or twice (see `Norms`)."""
    y = x.float()
    deviation = (
        (y.square().mean(-1, keepdim=True) + norms.eps).double().sqrt().float()
    )  # in float32, MKL's may be off
    y = y * (1 / deviation)
    if norms.rounds_twice:
        y = y.to(x.dtype).float()
    weight = weight.float()
    if first_weight is not None:
        is_first = torch.arange(x.shape[-2], device=x.device)[:, None] < norms.first
        weight = torch.where(is_first, first_weight.float(), weight)
    return (y * weight).to(x.dtype)


def rotate(x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """x `[B, H, S, D]` as float32, channels 2i and 2i+1 turned by the angle i of their token (RoFormer, 2104.09864)."""
    x = x.float()
    if rope is None:
        return x
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def smooths(*formats: str | None) -> bool:
    """Says whether K's mean is subtracted: every format but bf16 multiplies smoothed keys."""
    return any(name not in (None, "bf16") for name in formats)


def key_mean(k: torch.Tensor, rope: Rope | None = None, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The vector that is subtracted from every key, float32 `[B, Hkv, 1, D]`: softmax does not see it.

    It is the mean over a regular sample of some 1024 tokens, of those keys in it that the bool key_mask `[B, Sk]`
    shows; zero if it shows none. Only finite numbers count: one bad token must not reach rows that never attend to
    it. The sum is in float64, so that another order gives the same float32. Values have the same mean.
    """
    step = max(1, k.shape[-2] // SAMPLED_TOKENS)
    k = rotate(k[..., ::step, :], rope and (rope[0][::step], rope[1][::step]))
    counts = torch.isfinite(k)
    if key_mask is not None:
        counts = counts & key_mask[:, None, ::step, None]
    total = torch.where(counts, k, 0).sum(-2, keepdim=True, dtype=torch.float64).float()
    return total / counts.sum(-2, keepdim=True).clamp(min=1)


class ValueUnits(NamedTuple):
    """The numbers v is stored by in 8 bits, as (v − mean) / scale; each float32 `[B, Hkv, 1, D]`.

    scale: in fp8 normal powers of two, 1 for a channel of zeros. mean: zero where it is not taken.
    """

    scale: torch.Tensor
    mean: torch.Tensor


def rotate_values(v: torch.Tensor, rotation: str) -> torch.Tensor:
    """v in float32 with its channels rotated; what is finite stays so, also where a hidden key's value is huge."""
    v = v.float()
    if rotation == "none":
        return v
    v = torch.where(v.isfinite(), v.clamp(-ROTATED_MAX, ROTATED_MAX), v)
    return rotate_blocks(v, block_of(rotation, v.shape[-1]))


def value_units(
    v: torch.Tensor, key_mask: torch.Tensor | None = None, smooths: bool = True, pv: str = "fp8"
) -> ValueUnits:
    """The mean of each channel of v, and what brings the rest within the format of P·V: in fp8 a power of two.

    In fp16 both are fp8's, under which nothing overflows. In fp8 the mean is a multiple of two such units, which is the
    step of v's largest bfloat16 numbers: v less it lies halfway between two e4m3 numbers as often as v itself, and
    ties to even cancel. Other means would break all ties in one direction, which adds up over the keys. So does, a
    little, any shift of a symmetric v: a mean of less than a 32nd of the range, which may be the sample's chance,
    stays.

    Only values that the bool key_mask `[B, Sk]` shows count. What is left is at most the largest value and the mean; a
    channel where float32 can't add these keeps its mean.
    """
    seen = v if key_mask is None else torch.where(key_mask[:, None, :, None], v, 0)
    amax = finite_amax(seen, (-2,))
    mean = key_mean(v, key_mask=key_mask) if smooths else torch.zeros_like(amax)
    mean = torch.where(amax + mean.abs() < math.inf, mean, 0)
    if pv == "int8":
        rest = finite_amax(torch.where(seen.isfinite(), seen - mean, 0), (-2,))
        scale = fp32_scale(rest, INT8).clamp_min(torch.finfo(torch.float32).smallest_normal)
        return ValueUnits(torch.where(rest == 0, 1, scale), mean)
    amax = amax + mean.abs()
    mantissa, exponent = torch.frexp(amax / E4M3.max)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=-126))
    rounded = (mean / (2 * scale)).round() * (2 * scale)
    return ValueUnits(scale, torch.where(mean.abs() < amax / 32, 0, rounded))


def finite_amax(x: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude among the finite elements, float32, dimensions kept."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim, keepdim=True)


def encoded_amax(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The finite amax of what is encoded of q and of k in formats other than bf16, `[B, H or Hkv, 1, 1]`."""
    smoothed = changed_k(call)
    if call.smooth_k:
        smoothed = smoothed - key_mean(smoothed, key_mask=call.key_mask)
    if call.key_mask is not None:
        smoothed = torch.where(call.key_mask[:, None, :, None], smoothed, 0)
    q, k = (
        rotate_blocks(x, call.rotated_block) for x in (changed_q(call) * call.softmax_scale_log2, smoothed)
    )
    return finite_amax(q, (-2, -1)), finite_amax(k, (-2, -1))


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a float `dtype`, where finite numbers stay finite: those beyond its range become its largest."""
    largest = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max > largest:
        x = torch.where(x.isfinite(), x.clamp(-largest, largest), x)
    return x.to(dtype)


def quantised_q(q: torch.Tensor, fmt: str) -> torch.Tensor:
    """q `[B, H, S, D]` in `fmt`, as float32 values; each head has a tensor scale of its own."""
    return _quantised(q, get_format(fmt), get_format(fmt).block_rows)


def quantised_k(k: torch.Tensor, fmt: str) -> torch.Tensor:
    """k `[B, Hkv, S, D]` in `fmt`, as float32 values; where q has one scale for each row, k has one for each tile."""
    return _quantised(k, get_format(fmt), TILE)


def _quantised(x: torch.Tensor, format: Format, rows: int) -> torch.Tensor:
    if format.name == "bf16":
        return x.bfloat16().float()
    if format.scale is Scale.FP32:
        return _under_shared_scales(x.float(), format, rows)
    return fake_quantize(x.float(), format, tensor_amax=finite_amax(x, (-2, -1)))


def _under_shared_scales(x: torch.Tensor, format: Format, rows: int) -> torch.Tensor:
    """x with one scale for each run of `rows` rows, multiplied by its inverse rather than divided by it.

    What isn't finite counts for no scale. It becomes NaN alone if the element has NaN and several rows share the
    scale, otherwise with all that shares it.
    """
    runs = F.pad(x, (0, 0, 0, -x.shape[-2] % rows)).unflatten(-2, (-1, rows))
    amax = finite_amax(runs, (-2, -1))
    scale = fp32_scale(amax, format.element).clamp_min(torch.finfo(torch.float32).smallest_normal)
    scale = torch.where(amax == 0, SCALE_OF_ZEROS, scale)
    spoilt = ~runs.isfinite()
    if rows == 1 or format.element is not E4M3:
        spoilt = spoilt.any((-2, -1), keepdim=True)
    values = format.element.round(runs * (1 / scale)) * scale
    return values.masked_fill(spoilt, math.nan).flatten(-3, -2)[..., : x.shape[-2], :]


def quantised_v(v: torch.Tensor, units: ValueUnits, pv: str = "fp8") -> torch.Tensor:
    """v in these units: numbers of e4m3, of int8, or of float16, where infinity stays infinite, as float32."""
    if pv == "fp16":
        largest = torch.finfo(
            torch.float16
        ).max  # a hidden value may be beyond it, and beyond float32's in these units
        x = (v.float() - units.mean) / units.scale
        return torch.where(v.isfinite(), x.clamp(-largest, largest), x).half().float()
    return (INT8 if pv == "int8" else E4M3).round((v.float() - units.mean) / units.scale)


def rounded_p(p: torch.Tensor, pv: str) -> torch.Tensor:
    """Probabilities p, from 0 to 2^8, as the format of P·V has them, float32; int8's are unsigned, in 255 steps."""
    match pv:
        case "fp8":
            return p.to(torch.float8_e4m3fn).float()
        case "int8":
            return (p * (255 / 256)).round() * (256 / 255)
        case "fp16":
            return p.half().float()
    return p.bfloat16().float()


class Means(NamedTuple):
    """The means of the sub-tiles, which the kernels read as further keys and values.

    k, v: of the keys that are seen in a sub-tile and of their values, float32 `[B, Hkv, 4·k_tiles, D]`; zero where none
        is seen. log_counts: log2 of how many are seen, float32 `[B, 4·k_tiles]`; −inf for none.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_counts: torch.Tensor


def means_of(k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> Means:
    """The means of k and v `[B, Hkv, S, D]`; k is smoothed, if any class is. seen: bool `[B, S]`.

    A term, x/n, is first rounded to a multiple of one number for each sub-tile and channel, 2^-22 of the largest x or
    less: then a float32 sum is exact in any order, and no mean falls to a format's neighbouring number.
    """
    seen = F.pad(seen, (0, -seen.shape[-1] % TILE)).unflatten(-1, (-1, TILE // SUBTILE, SUBTILE))
    counts = seen.sum(-1).float()
    inverse = (1 / counts.clamp(min=1))[:, None, ..., None, None]

    def mean(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x.float(), (0, 0, 0, -x.shape[-2] % TILE)).unflatten(-2, seen.shape[1:])
        x = torch.where(seen[:, None, ..., None], x, 0)
        mantissa, exponent = torch.frexp(x.abs().amax(-2, keepdim=True))
        power = torch.where(mantissa == 0, 0, torch.ldexp(torch.ones_like(mantissa), exponent - 1))
        anchor = torch.where(power <= MEANS_ANCHORED, 6 * power, 0)  # 1.5·2^2 times the power of two
        return (x * inverse + anchor - anchor).sum(-2).flatten(-3, -2)

    return Means(mean(k), mean(v), counts.flatten(1).log2())


def key_offset(q: torch.Tensor, mean: torch.Tensor, scale: float) -> torch.Tensor:
    """The part that smoothing takes from each row's scores, in the kernel's base 2: float32 `[B, H, S]`.

    scale: the factor of the scores times log2 e.
    """
    mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], dim=1)
    return (q * mean).sum(-1) * scale
