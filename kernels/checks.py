"""Checks of what a call is given, before anything is launched."""

import math

import torch

from dma_diffusers.kernels.call import Call, Rope
from dma_diffusers.kernels.formats import block_of
from dma_diffusers.kernels.tiling.layout import TILE, tiles


def aliases(x: torch.Tensor) -> bool:
    """Says whether elements of x share memory, as after `expand`."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check(q, k, v, key_mask) -> None:
    """Raises ValueError for tensors whose shapes or dtypes don't fit."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [B, H, Sq, D], k and v alike [B, Hkv, Sk, D], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if min(q.shape) < 1 or min(k.shape) < 1:
        raise ValueError(
            f"lengths must be at least 1, as batch, heads and D, got q {list(q.shape)}, k {list(k.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k {list(k.shape)} doesn't fit q {list(q.shape)}: B and D are equal, Hkv divides H")
    if {q.dtype, k.dtype, v.dtype} - {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"q, k and v must be bf16, fp16 or fp32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"key_mask must be bool [{k.shape[0]}, {k.shape[2]}], got {key_mask.dtype} {list(key_mask.shape)}"
        )


def check_call(call: Call) -> None:
    """Raises ValueError, in one line, for a call that the operator can't take."""
    check(call.q, call.k, call.v, call.key_mask)
    _check_rope("q", call.q, call.q_rope)
    _check_rope("k", call.k, call.k_rope)
    _check_norms(call)
    _check_memory(call.q, call.k, call.v)
    if not 0 < call.scale < math.inf:
        raise ValueError(f"scale must be finite and more than 0, got {call.scale}")
    for rotation in call.rotations:
        block_of(rotation, call.q.shape[-1])


def _check_rope(name: str, x: torch.Tensor, rope: Rope | None) -> None:
    if rope is None:
        return
    expected = (x.shape[2], x.shape[3] / 2)
    for table in rope:
        if table.shape != expected or table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(
                f"{name}_rope must be two float32 tables [S, D/2] for {name} {list(x.shape)} on {x.device}, "
                f"got {table.dtype} {list(table.shape)} on {table.device}"
            )


def _check_norms(call: Call) -> None:
    norms = call.norms
    if norms is None:
        return
    if not 0 <= norms.eps < math.inf:
        raise ValueError(f"norms: eps must be finite and not negative, got {norms.eps}")
    if norms.first < 0 or (norms.q_first is None) != (norms.k_first is None):
        raise ValueError(
            "norms: the first tokens, 0 or more, have weights of their own for q and for k or for neither, got "
            f"{norms.first} tokens with {sum(x is not None for x in (norms.q_first, norms.k_first))} weights"
        )
    for weight in norms.tensors:
        if weight is None:
            continue
        if weight.shape != call.q.shape[-1:] or weight.stride() != (1,) or weight.device != call.q.device:
            raise ValueError(
                f"norms: weights must be contiguous [{call.q.shape[-1]}] on {call.q.device}, "
                f"got {list(weight.shape)} on {weight.device}"
            )
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"norms: weights must be bf16, fp16 or fp32, got {weight.dtype}")
    for weight, first_weight in ((norms.q, norms.q_first), (norms.k, norms.k_first)):
        if first_weight is not None and first_weight.dtype != weight.dtype:
            raise ValueError(
                f"norms: the first tokens' weights must be {weight.dtype} like the others', got {first_weight.dtype}"
            )


def _check_memory(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if aliases(x):
            raise ValueError(
                f"elements of {name} share memory (shape {list(x.shape)}, strides {list(x.stride())}): "
                "give it fewer heads, or make it contiguous"
            )
        if x.shape[0] * x.shape[1] * tiles(x.shape[2]) * TILE >= 2**31:
            raise ValueError(
                f"{name} {list(x.shape)} has too many rows: heads times tokens must stay below 2^31"
            )
