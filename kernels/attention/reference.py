"""The whole attention call in torch, in the kernel's order: it defines what is correct."""

import math

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.maps import TILE, Phase, PrecisionMap, tiles
from dma_diffusers.kernels.quantiser import reference as quantiser

P_SHIFT = 8.0  # P is stored as exp2(s − m)·2^8, clear of e4m3's subnormals; it cancels in the division by l
LOWEST = -1.0e30


def _tiled(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` as `[B·H·tiles, 128, D]`, padded with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % TILE))
    return x.reshape(-1, TILE, x.shape[-1])


def _operand(x: torch.Tensor, fmt: str) -> torch.Tensor:
    return x.to(torch.bfloat16).float() if fmt == "bf16" else x


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    precision_map: PrecisionMap,
    high: str,
    low: str,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with Q·K in `high` or `low` as the map says of each tile; P·V in bf16 for HIGH, e4m3 for LOW.

    q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]`, Hkv dividing H; key_mask bool `[B, Sk]`, True where a key is
    seen. Returns the output, of q's shape and dtype, and the natural log-sum-exp `[B, H, Sq]`, float32.
    A row that sees no key gives zeros and −inf. Source: DMA, arXiv 2604.03950.
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads, k_length = k.shape[1:3]
    q_tiles, k_tiles = tiles(q_length), tiles(k_length)
    device = q.device
    scale = head_dim**-0.5 if scale is None else scale
    stats = quantiser.statistics(q, k, v, scale, (high, low))

    high_qk = [_operand(quantiser.quantised_q(q, high, scale, stats), high),
               _operand(quantiser.quantised_k(k, high, stats), high)]  # fmt: skip
    low_qk = [_operand(quantiser.quantised_q(q, low, scale, stats), low),
              _operand(quantiser.quantised_k(k, low, stats), low)]  # fmt: skip
    high_operands = [*map(_tiled, high_qk), _tiled(v.to(torch.bfloat16)).float()]
    low_operands = [*map(_tiled, low_qk), _tiled(quantiser.quantised_v(v, stats).float())]
    operands = {Phase.HIGH: high_operands, Phase.LOW: low_operands, Phase.MASKED: high_operands}

    # One row per (batch, head, Q tile). Within a phase, rows with longer lists come first: the rows that still have
    # a KV tile to visit are then the first `count`.
    rows = batch * heads * q_tiles
    shape = (batch, heads, q_tiles)
    indices = precision_map.indices.expand(*shape, -1).reshape(rows, -1).long().to(device)
    bounds = precision_map.bounds.expand(*shape, -1).reshape(rows, -1).to(device)
    row = torch.arange(rows, device=device)
    row_batch, row_head, row_tile = row // (heads * q_tiles), row // q_tiles % heads, row % q_tiles
    row_kv_head = row_batch * kv_heads + row_head // (heads // kv_heads)
    inner = torch.arange(TILE, device=device)

    m = torch.full((rows, TILE, 1), LOWEST, device=device)
    l = torch.zeros(rows, TILE, 1, device=device)
    accumulator = torch.zeros(rows, TILE, head_dim, device=device)
    v_unit = stats.v_scale.reshape(-1, 1, head_dim)[row_kv_head]
    start = torch.zeros_like(row)
    for phase in Phase:
        end = bounds[:, phase]
        length, order = (end - start).sort(descending=True, stable=True)
        phase_q, phase_k, phase_v = operands[phase]
        phase_q = phase_q[order]
        if phase is Phase.LOW:
            accumulator = accumulator / v_unit
        m, l, accumulator = m[order], l[order], accumulator[order]
        still_active = (length[None, :] > torch.arange(int(length[0]), device=device)[:, None]).sum(-1)
        for step, count in enumerate(still_active.tolist()):
            active = order[:count]
            tile = indices[active, start[active] + step]
            kv_tile = row_kv_head[active] * k_tiles + tile
            s = phase_q[:count] @ phase_k[kv_tile].mT
            if phase is Phase.MASKED or key_mask is not None:
                tokens = tile[:, None] * TILE + inner
                seen = (tokens < k_length)[:, None, :]
                if key_mask is not None:
                    own_mask = key_mask[row_batch[active]]
                    seen = seen & own_mask.gather(1, tokens.clamp(max=k_length - 1))[:, None, :]
                if is_causal:
                    q_tokens = row_tile[active][:, None] * TILE + inner
                    seen = seen & (tokens[:, None, :] <= q_tokens[:, :, None])
                s = torch.where(seen, s, -math.inf)
            m_new = torch.maximum(m[:count], s.amax(-1, keepdim=True) - P_SHIFT)
            p = torch.exp2(s - m_new)
            rescale = torch.exp2(m[:count] - m_new)
            l[:count] = l[:count] * rescale + p.sum(-1, keepdim=True)
            p = p.to(torch.float8_e4m3fn if phase is Phase.LOW else torch.bfloat16).float()
            accumulator[:count] = accumulator[:count] * rescale + p @ phase_v[kv_tile]
            m[:count] = m_new
        m, l, accumulator = (torch.empty_like(x).index_copy_(0, order, x) for x in (m, l, accumulator))
        if phase is Phase.LOW:
            accumulator = accumulator * v_unit
        start = end

    out = accumulator / torch.where(l == 0, 1, l)
    out = out.reshape(batch, heads, -1, head_dim)[:, :, :q_length].to(q.dtype)
    lse = torch.where(l == 0, -math.inf, m + torch.log2(l)).reshape(batch, heads, -1)[:, :, :q_length]
    return out, natural_lse(lse, q, stats.k_mean, scale)


def natural_lse(lse: torch.Tensor, q: torch.Tensor, k_mean: torch.Tensor, scale: float) -> torch.Tensor:
    """From the kernel's log2 of the smoothed scores to the natural log-sum-exp of the call's own scores."""
    groups = q.shape[1] // k_mean.shape[1]
    smoothed = (q.float() * k_mean.repeat_interleave(groups, dim=1)).sum(-1) * scale
    return lse * math.log(2) + smoothed
