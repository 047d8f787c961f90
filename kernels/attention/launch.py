"""Runs the fused attention: statistics, quantiser, kernel."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

from dma_diffusers.kernels.attention import hopper
from dma_diffusers.kernels.attention.kernel import attend
from dma_diffusers.kernels.attention.tuning import Tuning, tuning
from dma_diffusers.kernels.device.launch import Run, multiprocessors, run
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import LOWERINGS, TCGEN05_ARCHITECTURES, Storage, architecture
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.quantiser.launch import (
    Operand,
    Stored,
    encode,
    padded_dim,
    row_descriptor,
    scale_descriptor,
    statistics_of,
)
from dma_diffusers.kernels.quantiser.reference import Rope
from dma_diffusers.kernels.routing.launch import pooled, route
from dma_diffusers.kernels.routing.reference import Routing
from dma_diffusers.kernels.tiling.fine_mask import FineMask
from dma_diffusers.kernels.tiling.precision_map import TILE, PrecisionMap


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    precision_map: PrecisionMap,
    high: str,
    low: str,
    *,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    lowering: str,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    token_order: torch.Tensor | None = None,
    fine_mask: FineMask | None = None,
    masks_all: bool = True,
    skip_below: float | None = None,
    skipped: torch.Tensor | None = None,
    routing: Routing | None = None,
    return_lse: bool = True,
    target: str | None = None,
    run: Run = run,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The reference's call on the fused kernel, with the map on q's device.

    Only the classes that the map has are encoded and compiled. token_order: contiguous, and not checked: numbers that are
    no token's are as −1, tokens that it doesn't name are undefined in the output; spans or a key mask hide slots.
    masks_all: whether `key_mask` may hide keys of any tile, or of the map's MASKED ones alone.
    skip_below: a KV tile is skipped for a block of queries (64 in hopper.py, else the tuning's) if each probability
    there is less than this share of its row's largest so far, 0 < skip_below < 1; None never skips. skipped: int32
    `[B, H]`, to which the skipped tiles of each head are added, counted in blocks of 64 queries.
    routing: upgrades LOW pairs, for a map that has both classes, whose block lists are then not looked at.
    lowering: the name of one that has a kernel. target: the architecture to tune for, that of q's device by default.
    Returns the output, the natural log-sum-exp (None unless wanted), and how many rows of q and k are not what
    their format says, because e4m3 can't hold them (int32 `[1]`; None where that can't happen).
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads, k_length = k.shape[1:3]
    dim = padded_dim(head_dim)
    token_count = None
    if token_order is not None:
        token_count = None if len(token_order) == q_length else q_length
        q_length = k_length = len(token_order)
    q, k, v = (x if x.stride(-1) == 1 else _row_major(x) for x in (q, k, v))
    formats = precision_map.used(high, low)
    stores = next(candidate.stores for candidate in LOWERINGS if candidate.name == lowering)
    classes = tuple(name and Stored(get_format(name), stores[name]) for name in formats)
    target = target or architecture(q.device)
    tuned = tuning(target, dim, tuple(c and c.storage for c in classes))

    softmax_scale_log2 = quantiser.softmax_scale_log2(scale)
    smooths = quantiser.smooths(*formats)
    whole_mask = None if key_mask is None else _whole_tiles(key_mask, token_order)
    of_v = v if classes[1] else None
    known = statistics_of(k if smooths else None, of_v, k_rope, key_mask, run)
    q_amax, k_amax = None, None
    if any(c and c.format.has_tensor_scale for c in classes):
        q_amax, k_amax = _tensor_amax(q, k, softmax_scale_log2, q_rope, k_rope, key_mask)
    inexact_rows = torch.zeros(1, dtype=torch.int32, device=q.device) if lowering == "faithful" else None
    encoded = encode(
        q, k, of_v if token_order is None else v, classes, softmax_scale_log2, known,
        q_amax=q_amax, k_amax=k_amax, q_rope=q_rope, k_rope=k_rope, key_mask=whole_mask, token_order=token_order,
        wants_offset=smooths and (return_lse or "bf16" in formats), transposed_v=tuned.transposed_v,
        inexact_rows=inexact_rows, run=run,
        registers=64 if target == "sm_90" and dim == 128 else None,  # two programs share a multiprocessor
    )  # fmt: skip
    out = torch.empty(batch, q.shape[2], heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None
    in_gluon = takes_gluon(tuned, classes)
    descriptor = hopper.descriptor if in_gluon else row_descriptor
    high_operands, low_operands = (
        _tensors(c, *of_c, q, k, tuned, dim, descriptor)
        for c, of_c in zip(classes, zip(encoded.q, encoded.k, strict=True), strict=True)
    )
    v_high, v_low = None, None
    if classes[0]:
        values = (
            bf16_for_tma(quantiser.narrowed(v, torch.bfloat16)) if token_order is None else encoded.v_high
        )
        v_high = descriptor(values, TILE, dim)
    if classes[1]:
        v_low = descriptor(encoded.v, *((dim, TILE) if tuned.transposed_v else (TILE, dim)))
    if routing is not None:
        pools = pooled(
            q,
            k,
            v,
            known.mean,
            softmax_scale_log2,
            q_rope=q_rope,
            k_rope=k_rope,
            key_mask=whole_mask,
            token_order=token_order,
            run=run,
        )
        block_lists = route(pools, routing, is_shared=in_gluon, run=run)
    else:
        block_lists = precision_map.shared if in_gluon else precision_map
    arguments = (
        *high_operands, v_high, *low_operands, v_low,
        encoded.v_scale, softmax_scale_log2, encoded.offset, block_lists.indices, block_lists.bounds,
        whole_mask, fine_mask and fine_mask.packed, token_order, out, lse,
        heads, kv_heads, q_length, k_length, token_count, fine_mask and fine_mask.guards, head_dim,
        *(block_lists.bounds.stride(d) // 3 if block_lists.bounds.shape[d] > 1 else 0 for d in (0, 1)), block_lists.indices.shape[-1],
        *out.stride()[:3], None if skip_below is None else math.log2(skip_below), skipped,
    )  # fmt: skip
    multiplied = [constant for c in classes for constant in (c.multiplied if c else [None, None, None])]
    if in_gluon:
        run(
            hopper.attend_hopper, (-(-q_length // hopper.QUERIES) * batch * heads,), *arguments, *multiplied,
            CAUSAL=is_causal, MASKS_ALL=masks_all, D=dim, SLOTS=tuned.slots, REGISTERS=tuned.registers,
            num_warps=tuned.warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        loads_mask = key_mask is not None or fine_mask is not None
        blocks = -(-q_length // tuned.rows) * batch * heads
        most = blocks if tuned.programs is None else tuned.programs * multiprocessors(q.device)
        run(
            attend, (min(blocks, most),), *arguments, blocks, 0.0, *multiplied,
            CAUSAL=is_causal, MASKS_ALL=masks_all, V_TRANSPOSED=tuned.transposed_v, ROWS=tuned.rows, D=dim,
            EXP_SHARE=tuned.exp_share, TCGEN05=target in TCGEN05_ARCHITECTURES,
            STAGES=tuned.stages,
            MASKED_STAGES=tuned.stages if loads_mask and not is_causal else tuned.masked_stages,
            num_warps=tuned.warps, enable_fp_fusion=True,
            maxnreg=None if tuned.slots or skip_below is not None else tuned.registers,  # which would spill
        )  # fmt: skip
    return out, lse, inexact_rows


def takes_gluon(tuned: Tuning, classes: tuple[Stored | None, Stored | None]) -> bool:
    """Whether hopper.py runs such a call: the interpreter knows no Gluon, and hopper.py no tensor scales."""
    has_tensor_scale = any(c and c.format.has_tensor_scale for c in classes)
    return tuned.slots is not None and not has_tensor_scale and not triton.knobs.runtime.interpret


def bf16_for_tma(x: torch.Tensor) -> torch.Tensor:
    """x in bfloat16 with strides that TMA takes (multiples of 16 bytes); a copy only where x has others."""
    x = x.to(torch.bfloat16)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if aligned else _row_major(F.pad(x, (0, -x.shape[-1] % 8)))


def _row_major(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of its shape; `contiguous` leaves dimensions of size 1 any stride."""
    return x.clone(memory_format=torch.contiguous_format)


def _tensor_amax(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_scale_log2: float,
    q_rope: Rope | None,
    k_rope: Rope | None,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The finite amax of what is encoded of q and of k, `[B, H or Hkv, 1, 1]`."""
    smoothed = quantiser.rotate(k, k_rope) - quantiser.key_mean(k, k_rope, key_mask)
    if key_mask is not None:
        smoothed = torch.where(key_mask[:, None, :, None], smoothed, 0)
    folded = quantiser.rotate(q, q_rope) * softmax_scale_log2
    return quantiser.finite_amax(folded, (-2, -1)), quantiser.finite_amax(smoothed, (-2, -1))


def _tensors(
    stored: Stored | None,
    q: Operand | None,
    k: Operand | None,
    model_q: torch.Tensor,
    model_k: torch.Tensor,
    tuned: Tuning,
    dim: int,
    descriptor: Callable,
) -> list:
    """Elements, scales and tensor scale of q and of k, as the kernel takes them: what its loops read by descriptors."""
    if stored is None:
        return [None] * 6
    q, k = q or Operand(bf16_for_tma(model_q), None, None), k or Operand(bf16_for_tma(model_k), None, None)
    is_blocks = stored.storage is Storage.BLOCK
    columns = stored.columns(dim)
    return [
        descriptor(q.elements, tuned.rows, columns), q.scales, q.tensor_scale,
        descriptor(k.elements, TILE, columns), scale_descriptor(k.scales) if is_blocks else k.scales,
        k.tensor_scale,
    ]  # fmt: skip


def _whole_tiles(key_mask: torch.Tensor, token_order: torch.Tensor | None) -> torch.Tensor:
    """uint8 `[B, tiles·128]`, 0 past the keys, and where the order names none."""
    if token_order is not None:
        hidden = key_mask.shape[1]  # what −1, or another number that is no token's, finds
        key_mask = F.pad(key_mask, (0, 1))[:, token_order.clamp(-1, hidden)]
    return F.pad(key_mask.to(torch.uint8), (0, -key_mask.shape[-1] % TILE)).contiguous()
