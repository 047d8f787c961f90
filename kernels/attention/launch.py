"""Runs the fused attention: statistics, quantiser, kernel."""

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.attention.kernel import attend
from dma_diffusers.kernels.attention.reference import natural_lse
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.maps import TILE, PrecisionMap, tiles
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.quantiser.encode import Operand, encode, encode_value, padded_dim
from dma_diffusers.kernels.run import Run, run


def _stages(dim: int, loads_first: bool, emulated: bool) -> int:
    """Pipeline stages of a loop, such that on sm_100 operands and scales of every loop have two buffers or more.

    loads_first: whether Triton pipelines small loads (a tile's index, the key mask) ahead of the operands, which
    takes two stages more: it does in every loop but MASKED without a key mask.
    """
    if dim == 256:
        return 1  # more don't fit shared memory
    if emulated:
        return 2
    return 5 if loads_first else 3


def bf16_for_tma(v: torch.Tensor) -> torch.Tensor:
    """v in bfloat16 with strides that TMA takes (multiples of 16 bytes); a copy only where v has others."""
    v = v.to(torch.bfloat16)
    aligned = v.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in v.stride()[:-1])
    return v if aligned else F.pad(v, (0, -v.shape[-1] % 8)).contiguous()


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
    emulated: bool,
    return_lse: bool = True,
    run: Run = run,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's call on the fused kernel, with the map on q's device.

    Only the classes that the map has are encoded and compiled. emulated: the device has no block-scaled MMA.
    Without `return_lse`, what stands in its place means nothing.
    """
    classes = _classes(precision_map, high, low, emulated)
    batch, heads, q_length, head_dim = q.shape
    kv_heads, k_length = k.shape[1:3]
    dim = padded_dim(head_dim)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    stats = quantiser.statistics(q, k, v, scale, filter(None, classes))
    q_operands = encode(q, classes, stats.q_amax, quantiser.fold(scale), None, run)
    k_operands = encode(k, classes, stats.k_amax, 1.0, stats.k_mean.contiguous(), run)
    v_scale = F.pad(stats.v_scale, (0, dim - head_dim), value=1.0).contiguous()

    def operands(index: int) -> list[TensorDescriptor | None]:
        q_operand, k_operand = q_operands[index], k_operands[index]
        if q_operand is None:
            return [None] * 4
        return [*q_operand.descriptors(), *k_operand.descriptors()]

    def constants(fmt: str | None) -> list:
        if fmt is None:
            return [None, None, False]
        format = get_format(fmt)
        return [format.element.name, format.block, decodes_nvfp4 and format.has_tensor_scale]

    # dot_scaled takes E4M3 scales for E8M0 in the interpreter, and asserts on sm_90 before Triton 3.8.
    decodes_nvfp4 = emulated or triton.knobs.runtime.interpret
    v_high = classes[0] and TensorDescriptor.from_tensor(bf16_for_tma(v), [1, 1, TILE, dim])
    v_low = classes[1] and TensorDescriptor.from_tensor(encode_value(v, v_scale, run), [TILE, dim])
    out = torch.empty(batch, q_length, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(batch, heads, q_length, dtype=torch.float32, device=q.device)
    indices, bounds = precision_map.indices, precision_map.bounds
    run(
        attend, (tiles(q_length), batch * heads),
        *operands(0), v_high, *operands(1), v_low,
        v_scale, _factors(q_operands, k_operands, batch * heads, q.device), indices, bounds,
        lse if key_mask is None else _whole_tiles(key_mask), out, lse,
        heads, kv_heads, q_length, k_length, head_dim,
        *(bounds.stride(d) // 3 if bounds.shape[d] > 1 else 0 for d in (0, 1)), indices.shape[-1],
        *out.stride()[:3], 0.0,
        *constants(classes[0]), *constants(classes[1]),
        CAUSAL=is_causal, KEY_MASK=key_mask is not None, D=dim,
        STAGES=_stages(dim, True, emulated), MASKED_STAGES=_stages(dim, key_mask is not None, emulated),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return out, natural_lse(lse, q, stats.k_mean, scale) if return_lse else lse


def _whole_tiles(key_mask: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, tiles·128]`, 0 past the keys."""
    return F.pad(key_mask.to(torch.uint8), (0, -key_mask.shape[-1] % TILE))


def _classes(
    precision_map: PrecisionMap, high: str, low: str, emulated: bool
) -> tuple[str | None, str | None]:
    """The formats of HIGH and LOW, None for a class that is not needed."""
    # Triton 3.6 miscompiles LOW alone for sm_90 at head_dim 128: from the second tile on, scores are garbage.
    needs_high = precision_map.has_high or not precision_map.has_low or emulated
    return high if needs_high else None, low if precision_map.has_low else None


def _factors(
    q: list[Operand | None], k: list[Operand | None], heads: int, device: torch.device
) -> torch.Tensor:
    """What undoes the tensor scales of q and k: float32 `[B·H, 2]`, HIGH then LOW."""
    factors = torch.ones(heads, len(q), device=device)
    for index, (a, b) in enumerate(zip(q, k, strict=True)):
        if a and a.tensor_scale is not None:
            factors[:, index] = a.tensor_scale * b.tensor_scale.repeat_interleave(
                heads // len(b.tensor_scale)
            )
    return factors
