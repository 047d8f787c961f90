"""What the quantiser computes, in torch."""

import math

import torch

from dma_diffusers.kernels.formats import fake_quantize
from dma_diffusers.kernels.formats.element import E4M3

SAMPLED_TOKENS = 4096

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each float32 `[S, D/2]`: one angle for each pair of neighbouring channels of each token."""


def fold(scale: float) -> float:
    """The factor folded into q, so that the kernel's exponentials are exp2."""
    return scale * math.log2(math.e)


def rotate(x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """x `[B, H, S, D]` as float32, channels 2i and 2i+1 turned by the angle i of their token (RoFormer, 2104.09864)."""
    x = x.float()
    if rope is None:
        return x
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def smooths(*formats: str | None) -> bool:
    """Whether K's mean is subtracted: bf16 multiplies the model's own numbers, every other format smoothed ones."""
    return any(name not in (None, "bf16") for name in formats)


def key_mean(k: torch.Tensor, rope: Rope | None = None) -> torch.Tensor:
    """What is subtracted from every key, float32 `[B, Hkv, 1, D]`: softmax does not see it.

    The mean over a regular sample of some 4096 tokens. Taken over finite numbers only: one bad token must not
    reach rows that never attend to it.
    """
    step = max(1, k.shape[-2] // SAMPLED_TOKENS)
    k = rotate(k[..., ::step, :], rope and (rope[0][::step], rope[1][::step]))
    finite = torch.isfinite(k)
    return torch.where(finite, k, 0).sum(-2, keepdim=True) / finite.sum(-2, keepdim=True).clamp(min=1)


def value_scale(v: torch.Tensor) -> torch.Tensor:
    """The power of two that brings each channel of v within e4m3, float32 `[B, Hkv, 1, D]`; 1 for zeros."""
    mantissa, exponent = torch.frexp(finite_amax(v, (-2,)) / E4M3.max)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def finite_amax(x: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude among the finite elements, float32, dimensions kept."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim, keepdim=True)


def quantised(x: torch.Tensor, fmt: str, amax: torch.Tensor) -> torch.Tensor:
    """x `[B, H, S, D]` in `fmt`, as float32 values; amax of each head, `[B, H, 1, 1]`, for a tensor scale."""
    return x.bfloat16().float() if fmt == "bf16" else fake_quantize(x.float(), fmt, tensor_amax=amax)


def quantised_v(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """v / scale in e4m3."""
    return (v.float() / scale).clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)


def key_offset(q: torch.Tensor, mean: torch.Tensor, scale: float) -> torch.Tensor:
    """What smoothing takes from the scores of each row, in the kernel's base 2: float32 `[B, H, S]`."""
    mean = mean.repeat_interleave(q.shape[1] // mean.shape[1], dim=1)
    return (q * mean).sum(-1) * fold(scale)
