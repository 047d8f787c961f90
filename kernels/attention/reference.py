"""The whole attention call in torch, in the kernel's order: it defines what is correct."""

import math

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import Pools, Routing, pooled, route
from dma_diffusers.kernels.tiling.fine_mask import FineMask
from dma_diffusers.kernels.tiling.precision_map import TILE, Phase, PrecisionMap, tiles

P_SHIFT = 8.0  # P is stored as exp2(s − m)·2^8, clear of e4m3's subnormals; it cancels in the division by l
LOWEST = -1.0e30
# After so many tiles in a row that it didn't skip, a block looks only at every so many, until it skips one.
PATIENCE, LOOKED_AT = 16, 8


def _tiled(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` as `[B·H·tiles, 128, D]`, padded with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % TILE))
    return x.reshape(-1, TILE, x.shape[-1])


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
    q_rope: quantiser.Rope | None = None,
    k_rope: quantiser.Rope | None = None,
    token_order: torch.Tensor | None = None,
    fine_mask: FineMask | None = None,
    routing: Routing | None = None,
    sums_rounded: bool = False,
    skip_below: float | None = None,
    skip_rows: int = 64,
    skipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with Q·K in `high` or `low` as the map says of each tile; P·V in bf16 for HIGH, e4m3 for LOW.

    q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]`, Hkv dividing H; key_mask bool `[B, Sk]`, True where a key is
    seen. A hidden key changes nothing, whatever k holds there, and whatever finite numbers v does. q_rope, k_rope: q
    and k are rotated by them first. Returns the output, of q's shape and dtype, in which finite numbers stay finite,
    and the natural log-sum-exp `[B, H, Sq]`, float32. A row that sees no key gives zeros and −inf.
    A class in bf16 multiplies q and k as they are, rounded to bf16; its scores lose afterwards what smoothing
    takes from those of the other class.
    token_order: int32 `[slots]`, for Sq = Sk, not causal: which token stands at each slot, −1 where none does. The map is
    one of slots, everything else is in the tokens' own order. Raises ValueError unless each token has one slot.
    fine_mask: which slots see each other in MASKED tiles.
    routing: upgrades LOW pairs, for a map that has both classes, whose block lists are then not looked at.
    sums_rounded: LOW's probabilities are summed as rounded to e4m3, as hopper.py sums them, not before.
    skip_below: a KV tile counts as not visited by a block of `skip_rows` queries (64 or 128) where each probability
    is less than this share of its row's largest so far, 0 < skip_below < 1. skipped: int32 `[B, H]`, to which the
    skipped tiles of each head are added, counted in blocks of 64 queries. A block that has kept `PATIENCE` tiles in
    a row looks at one of `LOOKED_AT`: where nothing is to be skipped, looking is not to cost much.
    Source: DMA, arXiv 2604.03950; skipping: BLASST, arXiv 2512.12087.
    """
    batch, heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    device, dtype = q.device, q.dtype
    scale = head_dim**-0.5 if scale is None else scale
    q, k = quantiser.rotate(q, q_rope), quantiser.rotate(k, k_rope)
    used = precision_map.used(high, low)
    mean = (
        quantiser.key_mean(k, key_mask=key_mask)
        if quantiser.smooths(*used)
        else torch.zeros_like(k[:, :, :1])
    )
    offset = quantiser.key_offset(q.bfloat16().float() if "bf16" in used else q, mean, scale)
    folded, smoothed = q * quantiser.softmax_scale_log2(scale), k - mean
    if key_mask is not None:  # a hidden key counts for no scale
        smoothed = torch.where(key_mask[:, None, :, None], smoothed, 0)
    v_scale = quantiser.value_scale(v, key_mask)
    if token_order is not None:
        taken = token_order >= 0
        if token_order[taken].sort().values.tolist() != list(range(tokens)):
            raise ValueError(f"order must name each of the {tokens} tokens once")
        if key_mask is not None or not taken.all():
            key_mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
            key_mask = F.pad(key_mask, (0, 1))[:, token_order]
        q, k, v, folded, smoothed = (
            F.pad(x, (0, 0, 0, 1))[:, :, token_order] for x in (q, k, v, folded, smoothed)
        )
        offset = F.pad(offset, (0, 1))[:, :, token_order]
    q_length, k_length = q.shape[2], k.shape[2]
    q_tiles, k_tiles = tiles(q_length), tiles(k_length)
    if routing is not None:
        there = None if token_order is None else taken[None]
        seen = there if key_mask is None else key_mask
        values = pooled(v.float(), seen)[..., 1, :].sum(-1)
        precision_map = route(Pools(pooled(folded, there), pooled(smoothed, seen), values), routing)

    def operands(fmt: str, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v in tiles, and the factor and the offset that make products scores."""
        if fmt == "bf16":
            pair, factor, shift = (q, k), quantiser.softmax_scale_log2(scale), offset
        else:
            pair, factor, shift = (folded, smoothed), 1.0, torch.zeros_like(offset)
        pair = quantiser.quantised_q(pair[0], fmt), quantiser.quantised_k(pair[1], fmt)
        return *map(_tiled, (*pair, values.float())), factor, _tiled(shift[..., None])

    of_high = operands(high, quantiser.narrowed(v, torch.bfloat16))
    of_low = operands(low, quantiser.quantised_v(v, v_scale))
    low_phases = (Phase.LOW,) if precision_map.has_high else (Phase.LOW, Phase.MASKED)

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
    is_query = torch.arange(q_tiles * TILE, device=device) < q_length
    if token_order is not None:
        is_query &= F.pad(taken, (0, -q_length % TILE))
    is_query = is_query.view(q_tiles, TILE, 1)
    has_block = torch.arange(0, q_tiles * TILE, skip_rows, device=device).view(q_tiles, -1) < q_length

    state = {"dtype": torch.float32, "device": device}
    m = torch.full((rows, TILE, 1), LOWEST, **state)
    l = torch.zeros(rows, TILE, 1, **state)
    accumulator = torch.zeros(rows, TILE, head_dim, **state)
    v_unit = v_scale.reshape(-1, 1, head_dim)[row_kv_head]
    kept = torch.zeros(rows, TILE // skip_rows, dtype=torch.int32, device=device)  # tiles in a row
    start = torch.zeros_like(row)
    for phase in Phase:
        end = bounds[:, phase]
        length, longest_first = (end - start).sort(descending=True, stable=True)
        is_low = phase in low_phases
        phase_q, phase_k, phase_v, factor, shift = of_low if is_low else of_high
        phase_q, shift = phase_q[longest_first], shift[longest_first]
        if is_low:
            accumulator = accumulator / v_unit
        m, l, accumulator, kept = (x[longest_first] for x in (m, l, accumulator, kept))
        still_active = (length[None, :] > torch.arange(int(length[0]), device=device)[:, None]).sum(-1)
        for step, count in enumerate(still_active.tolist()):
            active = longest_first[:count]
            tile = indices[active, start[active] + step]
            kv_tile = row_kv_head[active] * k_tiles + tile
            s = (phase_q[:count] @ phase_k[kv_tile].mT) * factor - shift[:count]
            if phase is Phase.MASKED or key_mask is not None:
                tokens = tile[:, None] * TILE + inner
                seen = (tokens < k_length)[:, None, :]
                if key_mask is not None:
                    own_mask = key_mask[row_batch[active]]
                    seen = seen & own_mask.gather(1, tokens.clamp(max=k_length - 1))[:, None, :]
                q_tokens = row_tile[active][:, None] * TILE + inner
                if is_causal:
                    seen = seen & (tokens[:, None, :] <= q_tokens[:, :, None])
                if phase is Phase.MASKED and fine_mask is not None:
                    seen = seen & fine_mask.seen(q_tokens[:, :, None], tokens[:, None, :])
                s = torch.where(seen, s, -math.inf)
            highest = s.amax(-1, keepdim=True) - P_SHIFT
            m_new = torch.maximum(m[:count], highest)
            p = torch.exp2(s - m_new)
            rescale = torch.exp2(m[:count] - m_new)
            rounded = p.to(torch.float8_e4m3fn if is_low else torch.bfloat16).float()
            summed = rounded if is_low and sums_rounded else p
            updated = (
                (m, m_new),
                (l, l[:count] * rescale + summed.sum(-1, keepdim=True)),
                (accumulator, accumulator[:count] * rescale + rounded @ phase_v[kv_tile]),
            )
            if skip_below is not None:
                is_below = (highest < m[:count] + math.log2(skip_below)) | ~is_query[row_tile[active]]
                looks = (kept[:count] < PATIENCE) | (kept[:count] % LOOKED_AT == 0)
                skips = looks & is_below.view(count, -1, skip_rows).all(-1)
                kept[:count] = torch.where(skips, 0, kept[:count] + 1)
                if skipped is not None:
                    blocks = (skips & has_block[row_tile[active]]).sum(-1, dtype=torch.int32)
                    skipped.view(-1).index_add_(0, active // q_tiles, blocks * (skip_rows // 64))
                keeps = ~skips.repeat_interleave(skip_rows, -1)[..., None]
                updated = tuple((old, torch.where(keeps, new, old[:count])) for old, new in updated)
            for old, new in updated:
                old[:count] = new
        m, l, accumulator, kept = (
            torch.empty_like(x).index_copy_(0, longest_first, x) for x in (m, l, accumulator, kept)
        )
        if is_low:
            accumulator = accumulator * v_unit
        start = end

    out = accumulator / torch.where(l == 0, 1, l)
    out = out.reshape(batch, heads, -1, head_dim)[:, :, :q_length]
    out = quantiser.narrowed(out, dtype)
    lse = torch.where(l == 0, -math.inf, m + torch.log2(l)).reshape(batch, heads, -1)[:, :, :q_length]
    lse = (lse + offset) * math.log(2)
    if token_order is not None:
        of_token = taken.nonzero()[:, 0][token_order[taken].argsort()]
        out, lse = out[:, :, of_token], lse[:, :, of_token]
    return out, lse
