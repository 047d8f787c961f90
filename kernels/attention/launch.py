"""Runs the fused attention: statistics, quantiser, kernel."""

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.attention.kernel import attend
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import LOWERINGS, TCGEN05_ARCHITECTURES, Storage, architecture
from dma_diffusers.kernels.maps import TILE, PrecisionMap
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.quantiser.encode import (
    Operand,
    Stored,
    encode,
    encode_value,
    padded_dim,
    row_descriptor,
    scale_descriptor,
)
from dma_diffusers.kernels.quantiser.reference import Rope
from dma_diffusers.kernels.run import Run, run
from dma_diffusers.kernels.tuning import Tuning, tuning


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
    return_lse: bool = True,
    target: str | None = None,
    run: Run = run,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The reference's call on the fused kernel, with the map on q's device.

    Only the classes that the map has are encoded and compiled. lowering: the name of one that has a kernel.
    target: the architecture to tune for, that of q's device by default.
    Returns the output, the natural log-sum-exp (None unless wanted), and how many rows of q and k are not what
    their format says, because e4m3 can't hold them (int32 `[1]`; None where that can't happen).
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads, k_length = k.shape[1:3]
    dim = padded_dim(head_dim)
    q, k, v = (x if x.stride(-1) == 1 else _row_major(x) for x in (q, k, v))
    formats = precision_map.used(high, low)
    stores = next(candidate.stores for candidate in LOWERINGS if candidate.name == lowering)
    classes = tuple(name and Stored(get_format(name), stores[name]) for name in formats)
    target = target or architecture(q.device)
    tuned = tuning(target, dim, tuple(c and c.storage for c in classes))

    factor = quantiser.fold(scale)
    mean = quantiser.key_mean(k, k_rope) if quantiser.smooths(*formats) else None
    whole_mask = None if key_mask is None else _whole_tiles(key_mask)
    q_amax, k_amax = None, None
    if any(c and c.format.has_tensor_scale for c in classes):
        q_amax = quantiser.finite_amax(quantiser.rotate(q, q_rope) * factor, (-2, -1))
        smoothed = quantiser.rotate(k, k_rope) - mean
        if key_mask is not None:
            smoothed = torch.where(key_mask[:, None, :, None], smoothed, 0)
        k_amax = quantiser.finite_amax(smoothed, (-2, -1))
    wants_offset = mean is not None and (return_lse or "bf16" in formats)
    inexact_rows = torch.zeros(1, dtype=torch.int32, device=q.device) if lowering == "faithful" else None
    q_operands, offset = _operands(
        q, classes, q_amax, factor, rope=q_rope, inexact_rows=inexact_rows, run=run,
        key_mean=mean if wants_offset else None, rounds="bf16" in formats,
    )  # fmt: skip
    k_operands, _ = _operands(
        k, classes, k_amax, 1.0, is_key=True, mean=mean, key_mask=whole_mask, rope=k_rope,
        inexact_rows=inexact_rows, run=run,
    )  # fmt: skip
    v_high, v_low, v_scale = None, None, None
    if classes[0]:
        v_high = row_descriptor(bf16_for_tma(v), TILE, dim)
    if classes[1]:
        v_scale = F.pad(quantiser.value_scale(v), (0, dim - head_dim), value=1.0).contiguous()
        values = encode_value(v, v_scale, tuned.transposed_v, run)
        v_low = row_descriptor(values, *((dim, TILE) if tuned.transposed_v else (TILE, dim)))

    out = torch.empty(batch, q_length, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, q_length, dtype=torch.float32, device=q.device) if return_lse else None
    indices, bounds = precision_map.indices, precision_map.bounds
    blocks = -(-q_length // tuned.rows) * batch * heads
    programs = blocks if tuned.programs is None else min(blocks, tuned.programs * _multiprocessors(q.device))
    run(
        attend, (programs,),
        *_tensors(classes[0], q_operands[0], k_operands[0], tuned, dim), v_high,
        *_tensors(classes[1], q_operands[1], k_operands[1], tuned, dim), v_low,
        v_scale, _factors(classes, q_operands, k_operands, batch * heads, factor, q.device), offset,
        indices, bounds, whole_mask, out, lse,
        heads, kv_heads, q_length, k_length, head_dim,
        *(bounds.stride(d) // 3 if bounds.shape[d] > 1 else 0 for d in (0, 1)), indices.shape[-1],
        *out.stride()[:3], blocks, 0.0,
        *(constant for c in classes for constant in (c.multiplied if c else [None, None, None])),
        CAUSAL=is_causal, V_TRANSPOSED=tuned.transposed_v, ROWS=tuned.rows, D=dim,
        EXP_SHARE=tuned.exp_share, TCGEN05=target in TCGEN05_ARCHITECTURES,
        STAGES=tuned.stages,
        MASKED_STAGES=tuned.stages if key_mask is not None and not is_causal else tuned.masked_stages,
        num_warps=tuned.warps, maxnreg=tuned.registers, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse, inexact_rows


def _multiprocessors(device: torch.device) -> int:
    """How many multiprocessors there are; a few in the interpreter, so that programs have more than one block."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def bf16_for_tma(x: torch.Tensor) -> torch.Tensor:
    """x in bfloat16 with strides that TMA takes (multiples of 16 bytes); a copy only where x has others."""
    x = x.to(torch.bfloat16)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if aligned else _row_major(F.pad(x, (0, -x.shape[-1] % 8)))


def _row_major(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of its shape; `contiguous` leaves dimensions of size 1 any stride."""
    return x.clone(memory_format=torch.contiguous_format)


def _operands(
    x: torch.Tensor,
    classes: tuple[Stored | None, Stored | None],
    amax: torch.Tensor | None,
    factor: float,
    **options,
) -> tuple[list[Operand | None], torch.Tensor | None]:
    """`encode`, but bf16 is read where the model has it, if nothing has to be done to it."""
    as_it_is = [c is not None and c.format.name == "bf16" and options["rope"] is None for c in classes]
    to_encode = tuple(None if is_there else c for c, is_there in zip(classes, as_it_is, strict=True))
    operands, offset = [None, None], None
    if any(to_encode) or options.get("key_mean") is not None:
        operands, offset = encode(x, to_encode, amax, factor, **options)
    for index in range(2):
        if as_it_is[index]:
            operands[index] = Operand(bf16_for_tma(x), None, None)
    return operands, offset


def _tensors(stored: Stored | None, q: Operand | None, k: Operand | None, tuned: Tuning, dim: int) -> list:
    """Elements and scales of q and of k, as the kernel takes them: what its loops read comes by descriptors."""
    if stored is None:
        return [None] * 4
    is_blocks = stored.storage is Storage.BLOCK
    columns = stored.columns(dim)
    return [
        row_descriptor(q.elements, tuned.rows, columns), q.scales,
        row_descriptor(k.elements, TILE, columns), scale_descriptor(k.scales) if is_blocks else k.scales,
    ]  # fmt: skip


def _whole_tiles(key_mask: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, tiles·128]`, 0 past the keys."""
    return F.pad(key_mask.to(torch.uint8), (0, -key_mask.shape[-1] % TILE)).contiguous()


def _factors(
    classes: tuple[Stored | None, Stored | None],
    q: list[Operand | None],
    k: list[Operand | None],
    heads: int,
    fold: float,
    device: torch.device,
) -> torch.Tensor:
    """What products of q and k have to be multiplied by: float32 `[B·H, 2]`, HIGH then LOW."""
    factors = torch.ones(heads, len(q), dtype=torch.float32, device=device)
    for index, (stored, a, b) in enumerate(zip(classes, q, k, strict=True)):
        if stored and stored.format.name == "bf16":
            factors[:, index] = fold
        elif a and a.tensor_scale is not None:
            product = a.tensor_scale * b.tensor_scale.repeat_interleave(heads // len(b.tensor_scale))
            factors[:, index] = product.clamp_min(torch.finfo(torch.float32).smallest_normal)  # 0·−inf is NaN
    return factors
