"""The attention call as one registered torch operator: plan, quantise, attend.

The operator takes tensors, numbers and names; the plan (the precision map on the call's device) is built once
for each length and kept, so `torch.compile` sees one node and a new length compiles nothing.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from dma_diffusers.kernels import lowerings, plan
from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import Choice
from dma_diffusers.kernels.quantiser.reference import Rope
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy, parse
from dma_diffusers.kernels.tiling.precision_map import TILE, Class, tiles

DIAGONAL = str(Diagonal())


def choose(device: torch.device, head_dim: int, high: str, low: str, lowering: str = "auto") -> Choice:
    """The lowering that calls on `device` take; raises ValueError as `lowerings.choose` does."""
    return lowerings.choose(lowerings.architecture(device), head_dim, high, low, lowering)


class Result(NamedTuple):
    """What an attention call gives.

    out: `[B, H, Sq, D]` in q's dtype. lse: the natural log-sum-exp, float32 `[B, H, Sq]`; empty unless wanted.
    inexact_rows: int32 `[1]` on the device, how many rows of q and k are not what their format says because e4m3
        and one power of two can't hold them; empty for lowerings other than `faithful`.
    """

    out: torch.Tensor
    lse: torch.Tensor
    inexact_rows: torch.Tensor


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    *,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    high: str = "mxfp8",
    low: str = "mxfp4",
    policy: Policy | str = DIAGONAL,
    grid: Sequence[int] = (),
    text_start: int = 0,
    text_stop: int = 0,
    masks_text: bool = False,
    mapped: bool = True,
    lowering: str = "auto",
    return_lse: bool = False,
) -> Result:
    """Mixed-precision attention: a policy says which tiles are HIGH, which LOW, and which are skipped.

    q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]`, bf16, fp16 or fp32, D ≤ 256, Hkv dividing H; any strides under
    which no two elements share memory.
    key_mask: bool `[B, Sk]`, True where a key is seen; a query that sees none gives zeros and −inf.
    scale: of the scores, D^-½ by default, more than 0.
    q_rope, k_rope: cosines and sines, each float32 `[S, D/2]`, by which channels 2i and 2i+1 are turned first.
    high, low: formats of Q·K by class. policy: one of `policies`, or its words; by default DMA (arXiv 2604.03950).
    grid: what the tokens that aren't text lie on, see `Layout`; policies on the grid need it, and Sq = Sk. Their tiles
    are boxes: the kernels gather tokens as they read them, and scatter what they write.
    text_start, text_stop: the text tokens, HIGH as keys and as queries. masks_text: key_mask hides none but these, so
    that other tiles need not look at it. mapped=False: every tile HIGH.
    Waits for no device, but plans in the first call with new lengths: a CUDA graph can't capture that one.
    Raises ValueError for what it can't take, before anything is launched.
    """
    _check(q, k, v, key_mask)
    _check_rope("q", q, q_rope)
    _check_rope("k", k, k_rope)
    get_format(high), get_format(low)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and more than 0, got {scale}")
    return Result(*torch.ops.dma_diffusers.attention(
        q, k, v, key_mask, *(q_rope or (None, None)), *(k_rope or (None, None)), scale, is_causal,
        high, low, str(policy), grid, text_start, text_stop, masks_text, mapped, lowering, return_lse,
    ))  # fmt: skip


def aliases(x: torch.Tensor) -> bool:
    """Whether elements of x share memory, as after `expand`."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check(q, k, v, key_mask) -> None:
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
    devices = [x.device for x in (q, k, v, key_mask) if x is not None]
    if any(device != q.device for device in devices):
        raise ValueError(f"q, k, v and key_mask must be on one device, got {', '.join(map(str, devices))}")


def _check_rope(name: str, x: torch.Tensor, rope: Rope | None) -> None:
    if rope is None:
        return
    if len(rope) != 2:
        raise ValueError(f"{name}_rope must be cosines and sines, got {len(rope)} tables")
    expected = (x.shape[2], x.shape[3] / 2)
    for table in rope:
        if table.shape != expected or table.dtype != torch.float32 or table.device != x.device:
            raise ValueError(
                f"{name}_rope must be two float32 tables [S, D/2] for {name} {list(x.shape)} on {x.device}, "
                f"got {table.dtype} {list(table.shape)} on {table.device}"
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


@cache  # for good: a captured CUDA graph goes on reading its map
def _plan(
    policy: Policy, layout: Layout, is_causal: bool, masks_text: bool, device: torch.device
) -> plan.Plan:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("call attention once with these lengths before capturing it in a CUDA graph")
    planned = plan.make(policy, layout, is_causal, masks_text).to(device)
    if lowerings.architecture(device) == "sm_90" and planned.routing is None:
        _ = planned.precision_map.shared  # the block lists of hopper.py, which no capture could make either
    return planned


@torch.library.custom_op("dma_diffusers::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    q_cos: torch.Tensor | None,
    q_sin: torch.Tensor | None,
    k_cos: torch.Tensor | None,
    k_sin: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    high: str,
    low: str,
    policy: str,
    grid: Sequence[int],
    text_start: int,
    text_stop: int,
    masks_text: bool,
    mapped: bool,
    lowering: str,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = Layout(q.shape[2], k.shape[2], (text_start, text_stop), tuple(grid))
    _check_memory(q, k, v)
    asked = parse(policy) if mapped else Dense(Class.HIGH)
    if asked.heads not in (None, q.shape[1]):
        raise ValueError(f"{policy} is for {asked.heads} heads, but q has {q.shape[1]}")
    chosen = choose(q.device, q.shape[3], high, low, lowering).lowering
    masks_text = masks_text and key_mask is not None and text_stop > text_start
    planned = _plan(asked, layout, is_causal, masks_text, q.device)
    call = {
        "key_mask": key_mask, "scale": scale, "is_causal": is_causal,
        "q_rope": None if q_cos is None else (q_cos, q_sin),
        "k_rope": None if k_cos is None else (k_cos, k_sin),
        "token_order": planned.token_order, "fine_mask": planned.fine_mask, "routing": planned.routing,
        "skip_below": planned.skip_below,
    }  # fmt: skip
    inexact_rows = None
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            result, lse = reference.attention(q, k, v, planned.precision_map, high, low, **call)
        out = _empty_output(q).copy_(result)
        lse = lse if return_lse else None
    else:
        from dma_diffusers.kernels.attention import launch

        call |= {"lowering": chosen, "masks_all": not masks_text, "return_lse": return_lse}
        out, lse, inexact_rows = launch.attention(q, k, v, planned.precision_map, high, low, **call)
    empty = torch.empty(0, dtype=torch.float32, device=q.device)
    return out, empty if lse is None else lse, empty.int() if inexact_rows is None else inexact_rows


@_attention.register_fake
def _(
    q,
    k,
    v,
    key_mask,
    q_cos,
    q_sin,
    k_cos,
    k_sin,
    scale,
    is_causal,
    high,
    low,
    policy,
    grid,
    text_start,
    text_stop,
    masks_text,
    mapped,
    lowering,
    return_lse,
):
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.float32)
    chosen = choose(q.device, q.shape[3], high, low, lowering).lowering
    counts = chosen == "faithful"
    return _empty_output(q), lse, q.new_empty(1 if counts else 0, dtype=torch.int32)


def _empty_output(q: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]`, laid out as `[B, S, H, D]`, which is what models go on with."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
