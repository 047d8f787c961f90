"""FlashAttention-3's FP8 attention, with a scale for each head that torch operations measure."""

from types import ModuleType
from typing import NamedTuple

import torch

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Quantised(NamedTuple):
    """q, k and v as e4m3 `[B, S, H, D]`, and the scale of each head, float32 `[B, H]`."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Quantised:
    """Return q, k and v `[B, H, S, D]` in e4m3; the largest number of each head becomes the format's largest."""
    tensors, scales = [], []
    for x in (q, k, v):
        amax = torch.linalg.vector_norm(x, torch.inf, dim=(2, 3), dtype=torch.float32)
        scale = amax.clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        tensors.append((x / scale[..., None, None]).to(torch.float8_e4m3fn).transpose(1, 2).contiguous())
        scales.append(scale)
    return Quantised(tuple(tensors), tuple(scales))


def attend(module: ModuleType, quantised: Quantised) -> torch.Tensor:
    """Return attention in bf16, `[B, H, S, D]`."""
    q_scale, k_scale, v_scale = quantised.scales
    out = module.flash_attn_func(*quantised.tensors, q_descale=q_scale, k_descale=k_scale, v_descale=v_scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
