"""The attention call as one registered torch operator: plan, quantise, attend.

The operator takes tensors, numbers and names; the plan (the precision map on the call's device) is built once
for each length and kept, so `torch.compile` sees one node and a new length compiles nothing.
"""

from functools import lru_cache

import torch

from dma_diffusers.kernels import lowerings
from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.layout import Layout
from dma_diffusers.kernels.lowerings import Choice
from dma_diffusers.kernels.maps import Class, PrecisionMap, build_map
from dma_diffusers.kernels.policies import Dense, Diagonal, Policy


def choose(device: torch.device, head_dim: int, high: str, low: str, lowering: str = "auto") -> Choice:
    """The lowering that calls on `device` take; raises ValueError as `lowerings.choose` does."""
    return lowerings.choose(lowerings.architecture(device), head_dim, high, low, lowering)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    high: str = "mxfp8",
    low: str = "mxfp4",
    window: int = 128,
    sink: int = 128,
    text_start: int = 0,
    text_stop: int = 0,
    mapped: bool = True,
    lowering: str = "auto",
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal-tiled mixed-precision attention (DMA, arXiv 2604.03950).

    q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]`, any strides, bf16, fp16 or fp32, D ≤ 256, Hkv dividing H.
    key_mask: bool `[B, Sk]`, True where a key is seen. scale: of the scores, D^-½ by default.
    high, low: formats of Q·K by class. window, sink: tokens, see `Diagonal`. text_start, text_stop: the text
    tokens, HIGH as keys and as queries. mapped=False: every tile HIGH.
    Returns the output (q's shape and dtype) and the natural log-sum-exp, float32 `[B, H, Sq]` if asked for,
    else empty. Raises ValueError for what it can't take.
    """
    _check(q, k, v, key_mask)
    get_format(high), get_format(low)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.dma_diffusers.attention(
        q, k, v, key_mask, scale, is_causal,
        high, low, window, sink, text_start, text_stop, mapped, lowering, return_lse,
    )  # fmt: skip


def _check(q, k, v, key_mask) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [B, H, Sq, D], k and v alike [B, Hkv, Sk, D], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k {list(k.shape)} doesn't fit q {list(q.shape)}: B and D are equal, Hkv divides H")
    if {q.dtype, k.dtype, v.dtype} - {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"q, k and v must be bf16, fp16 or fp32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"key_mask must be bool [{k.shape[0]}, {k.shape[2]}], got {key_mask.dtype} {list(key_mask.shape)}"
        )


@lru_cache(maxsize=256)
def _plan(policy: Policy, layout: Layout, is_causal: bool, device: torch.device) -> PrecisionMap:
    return build_map(policy.classes(layout, is_causal), layout, is_causal).to(device)


@torch.library.custom_op("dma_diffusers::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    high: str,
    low: str,
    window: int,
    sink: int,
    text_start: int,
    text_stop: int,
    mapped: bool,
    lowering: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = Layout(q.shape[2], k.shape[2], (text_start, text_stop))
    policy = Diagonal(window, sink) if mapped else Dense(Class.HIGH)
    chosen = choose(q.device, q.shape[3], high, low, lowering).lowering
    precision_map = _plan(policy, layout, is_causal, q.device)
    call = {"key_mask": key_mask, "scale": scale, "is_causal": is_causal}
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            result, lse = reference.attention(q, k, v, precision_map, high, low, **call)
        out = _empty_output(q).copy_(result)
    else:
        from dma_diffusers.kernels.attention import launch

        call |= {"emulated": chosen == "emulated", "return_lse": return_lse}
        out, lse = launch.attention(q, k, v, precision_map, high, low, **call)
    return out, lse if return_lse else lse.new_empty(0)


@_attention.register_fake
def _(
    q,
    k,
    v,
    key_mask,
    scale,
    is_causal,
    high,
    low,
    window,
    sink,
    text_start,
    text_stop,
    mapped,
    lowering,
    return_lse,
):
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    return _empty_output(q), lse


def _empty_output(q: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]`, laid out as `[B, S, H, D]`, which is what models go on with."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
