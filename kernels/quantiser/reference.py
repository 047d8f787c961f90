"""What the quantiser computes, in torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dma_diffusers.kernels.formats import fake_quantize, get_format

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Statistics:
    """What one pass over the tokens of q, k, v gives, float32, before anything is encoded.

    k_mean `[B, Hkv, 1, D]`: subtracted from every key; softmax does not see it.
    v_scale `[B, Hkv, 1, D]`: power of two that brings each channel of v within e4m3.
    q_amax, k_amax `[B, H or Hkv, 1, 1]`: largest magnitude of folded q and of smoothed k; None where no format
        has a tensor scale.
    """

    k_mean: torch.Tensor
    v_scale: torch.Tensor
    q_amax: torch.Tensor | None
    k_amax: torch.Tensor | None


def fold(scale: float) -> float:
    """The factor folded into q, so that the kernel's exponentials are exp2."""
    return scale * math.log2(math.e)


def finite_amax(x: torch.Tensor, dim: tuple[int, ...]) -> torch.Tensor:
    """The largest magnitude among the finite elements, float32, dimensions kept."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim, keepdim=True)


def power_of_two_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """2^ceil(log2(amax / largest)); 1 where amax is 0."""
    mantissa, exponent = torch.frexp(amax / largest)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(amax), exponent)


def statistics(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, formats: Iterable[str]
) -> Statistics:
    """Statistics of q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]` that `formats` of Q·K need.

    Taken over finite elements only: one bad token must not reach rows that never attend to it.
    """
    finite = torch.isfinite(k)
    count = finite.sum(-2, keepdim=True).clamp(min=1)
    k_mean = torch.where(finite, k, 0).float().sum(-2, keepdim=True) / count
    v_scale = power_of_two_scale(finite_amax(v, (-2,)), E4M3_MAX)
    if not any(get_format(name).has_tensor_scale for name in formats):
        return Statistics(k_mean, v_scale, None, None)
    q_amax = finite_amax(q, (-2, -1)) * fold(scale)
    return Statistics(k_mean, v_scale, q_amax, finite_amax(k.float() - k_mean, (-2, -1)))


def quantised_q(q: torch.Tensor, fmt: str, scale: float, stats: Statistics) -> torch.Tensor:
    """q·scale·log2 e in `fmt`, as float32 values."""
    return fake_quantize(q.float() * fold(scale), fmt, tensor_amax=stats.q_amax)


def quantised_k(k: torch.Tensor, fmt: str, stats: Statistics) -> torch.Tensor:
    """Smoothed k in `fmt`, as float32 values."""
    return fake_quantize(k.float() - stats.k_mean, fmt, tensor_amax=stats.k_amax)


def quantised_v(v: torch.Tensor, stats: Statistics) -> torch.Tensor:
    """v / v_scale in e4m3."""
    return (v.float() / stats.v_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
