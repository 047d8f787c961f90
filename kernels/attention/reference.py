"""The whole attention call in torch, in the kernel's order: it defines what is correct."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.formats import Rotations, rotate, rotate_back
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precision, Precisions
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import route_call
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, tiles
from dma_diffusers.kernels.tiling.precision_map import LOOPS, Phase, PrecisionMap

P_SHIFT = 8.0  # P is stored as exp2(s − m)·2^8, clear of e4m3's subnormals; it cancels in the division by l
LOWEST = -1.0e30
# Codes of e4m3 count eighths of a binade, if 1 + x/8 is taken for 2^(x/8): on average, they are too large by so many.
CODE_OF_ONE, CODE_EXCESS = 56.0, 0.4567
# After so many tiles in a row that it didn't skip, a block looks only at every so many, until it skips one.
PATIENCE, LOOKED_AT = 16, 8


def attention(
    call: Call,
    plan: Plan,
    precisions: Precisions,
    *,
    means_by_codes: bool = False,
    skip_rows: int = 64,
    keys_at_once: int = TILE,
    skipped: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with Q·K and P·V in the precision that the plan's map gives each tile.

    Returns the output, of q's shape and dtype, and the natural log-sum-exp `[B, H, Sq]`, float32. A row that sees no
    key gives zeros and −inf; finite numbers stay finite. A hidden key changes nothing, whatever k holds there, and
    whatever finite numbers v does. A class in bf16 multiplies q and k as they are, rounded to bf16; its scores lose
    afterwards what smoothing takes from those of the other class. Other formats store q and k with their channels
    rotated, if the call asks for it. In 8 bits v is stored less its mean: the accumulator then lacks l times the mean,
    which it loses before such a phase and gets back afterwards.
    A MEAN tile adds its four sub-tiles: of n keys that are seen in one, with the mean k̄ and values with the mean v̄, it
    adds n·exp(q·k̄) to the sum and as much of v̄ to the output, in the precision of `Precisions.of_means`. k̄ is smoothed
    in any precision, if another is.
    The sum that divides the output, and whose logarithm is returned, adds probabilities as V is multiplied by them:
    rounded to the format of P·V.
    means_by_codes: FP8 probabilities of means are rounded by `e4m3_power`, as hopper.py rounds them.
    skip_rows: so many queries, 64 or 128, skip a tile together under the plan's `skip_below`. A block that has kept
        `PATIENCE` tiles in a row looks at one of `LOOKED_AT`, so that looking costs little where nothing is skipped.
    keys_at_once: so many keys of a tile have one maximum, under which their probabilities are rounded.
    skipped: int32 `[B, H]`, to which the skipped tiles of each head are added, counted in blocks of 64 queries.
    Raises ValueError unless each token has one slot in the plan's token order, which is for Sq = Sk, not causal.
    Source: DMA, arXiv 2604.03950; skipping: BLASST, arXiv 2512.12087; means: Sol-Attn, arXiv 2607.24027.
    """
    slots = Slots.of(call, plan, precisions)
    precision_map = slots.map
    of_high, of_low = (slots.operands(precision) for precision in precisions)
    used = plan.used(precisions)
    low_phases = (Phase.LOW,) if precision_map.has_high else (Phase.LOW, Phase.MASKED)
    batch, heads, q_length, head_dim = slots.q.shape
    kv_heads, k_length = slots.k.shape[1:3]
    q_tiles, k_tiles = tiles(q_length), tiles(k_length)

    # One row per (batch, head, Q tile). Within a phase, rows with longer lists come first: the rows that still have
    # a KV tile to visit are then the first `count`.
    rows = batch * heads * q_tiles
    shape = (batch, heads, q_tiles)
    device = call.q.device
    indices = precision_map.indices.expand(*shape, -1).reshape(rows, -1).long().to(device)
    bounds = precision_map.bounds.expand(*shape, -1).reshape(rows, -1).to(device)
    row = torch.arange(rows, device=device)
    row_batch, row_head, row_tile = row // (heads * q_tiles), row // q_tiles % heads, row % q_tiles
    row_kv_head = row_batch * kv_heads + row_head // (heads // kv_heads)
    inner = torch.arange(TILE, device=device)
    has_block = torch.arange(0, q_tiles * TILE, skip_rows, device=device).view(q_tiles, -1) < q_length

    state = {"dtype": torch.float32, "device": device}
    m = torch.full((rows, TILE, 1), LOWEST, **state)
    l = torch.zeros(rows, TILE, 1, **state)
    accumulator = torch.zeros(rows, TILE, head_dim, **state)
    kept = torch.zeros(rows, TILE // skip_rows, dtype=torch.int32, device=device)  # tiles in a row
    start = torch.zeros_like(row)
    for phase in LOOPS:
        end = bounds[:, phase]
        length, longest_first = (end - start).sort(descending=True, stable=True)
        is_low = phase in low_phases
        operands = of_low if is_low else of_high
        phase_q, shift = operands.q[longest_first], operands.shift[longest_first]
        # Only a class that the map has takes V's mean away and gives it back: beside it the smallest sums are lost.
        units = operands.units_of(row_kv_head) if used[is_low] else None
        if units is not None:
            accumulator = (accumulator - l * units.mean) / units.scale
        m, l, accumulator, kept = (x[longest_first] for x in (m, l, accumulator, kept))
        still_active = (length[None, :] > torch.arange(int(length[0]), device=device)[:, None]).sum(-1)
        for step, count in enumerate(still_active.tolist()):
            active = longest_first[:count]
            tile = indices[active, start[active] + step]
            kv_tile = row_kv_head[active] * k_tiles + tile
            s = (phase_q[:count] @ operands.k[kv_tile].mT) * operands.factor - shift[:count]
            q_tokens, tokens = (x[:, None] * TILE + inner for x in (row_tile[active], tile))
            if phase is Phase.MASKED or slots.key_mask is not None:
                s = torch.where(slots.seen(row_batch[active], q_tokens, tokens, phase), s, -math.inf)
            state = (m, l, accumulator)
            old = [x[:count] for x in state]
            new = _added(*old, s, operands.v[kv_tile], operands.pv, keys_at_once)
            if plan.skip_below is not None:
                highest = s.amax(-1, keepdim=True) - P_SHIFT
                is_below = (highest < m[:count] + math.log2(plan.skip_below)) | ~slots.is_query[
                    row_tile[active]
                ]
                looks = (kept[:count] < PATIENCE) | (kept[:count] % LOOKED_AT == 0)
                skips = looks & is_below.view(count, -1, skip_rows).all(-1)
                kept[:count] = torch.where(skips, 0, kept[:count] + 1)
                if skipped is not None:
                    blocks = (skips & has_block[row_tile[active]]).sum(-1, dtype=torch.int32)
                    skipped.view(-1).index_add_(0, active // q_tiles, blocks * (skip_rows // 64))
                keeps = ~skips.repeat_interleave(skip_rows, -1)[..., None]
                new = [torch.where(keeps, *pair) for pair in zip(new, old, strict=True)]
            for x, updated in zip(state, new, strict=True):
                x[:count] = updated
        m, l, accumulator, kept = (
            torch.empty_like(x).index_copy_(0, longest_first, x) for x in (m, l, accumulator, kept)
        )
        if units is not None:
            accumulator = accumulator * units.scale + l * units.mean
        start = end

    if precision_map.means is not None:
        operands, log_counts = slots.means(used[2])
        units = operands.units_of(row_kv_head)
        if units is not None:
            accumulator = (accumulator - l * units.mean) / units.scale
        words = precision_map.means.expand(*shape, -1).reshape(rows, -1).to(device)
        for number, word in enumerate(words.unbind(-1)):
            tile = row_kv_head * words.shape[-1] + number
            s = (operands.q @ operands.k[tile].mT) * operands.factor
            counts = log_counts[row_batch, number * TILE : (number + 1) * TILE]
            is_taken = word[:, None] >> inner // (TILE // SUBTILE) & 1 == 1
            s = torch.where(is_taken[:, None], s + counts[:, None], -math.inf)
            v = operands.v[tile]
            m, l, accumulator = _added(m, l, accumulator, s, v, operands.pv, keys_at_once, means_by_codes)
        if units is not None:
            accumulator = accumulator * units.scale + l * units.mean

    out = accumulator / torch.where(l == 0, 1, l)
    out = out.reshape(batch, heads, -1, head_dim)[:, :, :q_length]
    lse = torch.where(l == 0, -math.inf, m + torch.log2(l)).reshape(batch, heads, -1)[:, :, :q_length]
    lse = (lse + slots.offset) * math.log(2)
    out = quantiser.narrowed(slots.of_tokens(out), call.q.dtype)
    if slots.rotations.v != "none":
        out = quantiser.narrowed(rotate_back(out, slots.rotations.v), call.q.dtype)
    return out, slots.of_tokens(lse)


def e4m3_power(x: torch.Tensor) -> torch.Tensor:
    """2^x of float32 x ≤ 8 in e4m3, without an exponential: a linear function of x is rounded to the number's code.

    The relative error has no mean, and is 3.1 % in the root mean square; that of 2^x rounded to e4m3 is 2.6 %. Below
    x = −6, where e4m3 has no exponents left, the result falls to 0 within a binade.
    """
    code = (8 * x + (CODE_OF_ONE - CODE_EXCESS)).clamp(min=0).half().float().round()
    return torch.where(code.isnan(), 127, code).to(torch.uint8).view(torch.float8_e4m3fn)


def _added(
    m: torch.Tensor,
    l: torch.Tensor,
    accumulator: torch.Tensor,
    s: torch.Tensor,
    v: torch.Tensor,
    pv: str,
    keys_at_once: int,
    by_codes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state of the online softmax, m, l and accumulator, after a tile with scores s `[rows, 128, 128]`."""
    for scores, values in zip(s.split(keys_at_once, -1), v.split(keys_at_once, -2), strict=True):
        m_new = torch.maximum(m, scores.amax(-1, keepdim=True) - P_SHIFT)
        if by_codes and pv == "fp8":
            p = e4m3_power(scores - m_new).float()
        else:
            p = quantiser.rounded_p(torch.exp2(scores - m_new), pv)
        rescale = torch.exp2(m - m_new)
        l = l * rescale + p.sum(-1, keepdim=True)
        accumulator = accumulator * rescale + p @ values
        m = m_new
    return m, l, accumulator


@dataclass(frozen=True)
class Operands:
    """One class's operands in tiles: q, k and v `[B·H or B·Hkv · tiles, 128, D]`, float32.

    factor, shift: products times factor, less shift, are scores in base 2. v_units: `[B·Hkv, 1, D]`, those that v is
    in; None for none. pv: the format of P·V.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    factor: float
    shift: torch.Tensor
    v_units: quantiser.ValueUnits | None
    pv: str

    def units_of(self, kv_heads: torch.Tensor) -> quantiser.ValueUnits | None:
        """The units of v in these heads."""
        return self.v_units and quantiser.ValueUnits(*(each[kv_heads] for each in self.v_units))


@dataclass(frozen=True)
class Slots:
    """A call's tensors in the order of slots, `[B, H or Hkv, slots, D]`, zeros in empty ones.

    q, k: behind norm and RoPE, float32. scaled: q times scale and log2 e; smoothed: k less its mean, zero where it is
    hidden. mean: what it lost, float32 `[B, Hkv, 1, D]`.
    offset: `[B, H, slots]`, what smoothing takes from the scores. taken: bool `[slots]`, where a token stands.
    rotations: of the channels of `scaled` and `smoothed`, before they are stored, and of `v`, which has had it.
    """

    plan: Plan
    map: PrecisionMap
    is_causal: bool
    softmax_scale_log2: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scaled: torch.Tensor
    smoothed: torch.Tensor
    mean: torch.Tensor
    v_units: dict[str, quantiser.ValueUnits]
    offset: torch.Tensor
    key_mask: torch.Tensor | None
    taken: torch.Tensor
    rotations: Rotations

    @classmethod
    def of(cls, call: Call, plan: Plan, precisions: Precisions) -> "Slots":
        """Raises ValueError unless each token has one slot."""
        q, k = quantiser.changed_q(call), quantiser.changed_k(call)
        v, key_mask, order = call.v, call.key_mask, plan.token_order
        used = [precision and precision.qk for precision in plan.used(precisions)]
        mean = torch.zeros_like(k[:, :, :1])
        if call.smooth_k and quantiser.smooths(*used):
            mean = quantiser.key_mean(k, key_mask=key_mask)
        rounded = q.bfloat16().float() if "bf16" in used else q
        offset = quantiser.key_offset(rounded, mean, call.softmax_scale_log2)
        scaled, smoothed = q * call.softmax_scale_log2, k - mean
        if key_mask is not None:  # a hidden key counts for no scale
            smoothed = torch.where(key_mask[:, None, :, None], smoothed, 0)
        rotations = call.rotations
        if all(precision is None or precision.pv == "bf16" for precision in plan.used(precisions)):
            rotations = rotations._replace(v="none")
        v_units = {
            pv: quantiser.value_units(quantiser.rotate_values(v, rotations.v), key_mask, call.smooth_v, pv)
            for pv in {precision.pv for precision in precisions} - {"bf16"}
        }
        taken = torch.ones(q.shape[2], dtype=torch.bool, device=q.device)
        if order is not None:
            order = order.to(q.device)
            taken, tokens = order >= 0, q.shape[2]
            if order[taken].sort().values.tolist() != list(range(tokens)):
                raise ValueError(f"the token order must name each of the {tokens} tokens once")
            if key_mask is not None or not taken.all():
                key_mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
                key_mask = F.pad(key_mask, (0, 1))[:, order]
            q, k, v, scaled, smoothed = (
                F.pad(x, (0, 0, 0, 1))[:, :, order] for x in (q, k, v, scaled, smoothed)
            )
            offset = F.pad(offset, (0, 1))[:, :, order]
        precision_map = plan.precision_map
        if plan.routing is not None:
            there = None if order is None else taken[None]
            seen = there if key_mask is None else key_mask
            precision_map = route_call(scaled, smoothed, v.float(), plan.routing, there, seen, call.memory)
        v = v if rotations.v == "none" else quantiser.rotate_values(v, rotations.v)
        return cls(
            plan, precision_map, call.is_causal, call.softmax_scale_log2,
            q, k, v, scaled, smoothed, mean, v_units, offset, key_mask, taken, rotations,
        )  # fmt: skip

    def operands(self, precision: Precision) -> Operands:
        """The numbers that a class of this precision multiplies."""
        is_bf16 = precision.qk == "bf16"
        k, shift = (self.k, self.offset) if is_bf16 else (self.smoothed, torch.zeros_like(self.offset))
        return self._multiplied(precision, k, self.v, shift)

    def means(self, precision: Precision) -> tuple[Operands, torch.Tensor]:
        """The same of the sub-tiles' means, and their `log_counts`, −inf up to whole tiles: `[B, tiles·128]`."""
        seen = (
            torch.ones_like(self.k[:, 0, :, 0], dtype=torch.bool) if self.key_mask is None else self.key_mask
        )
        means = quantiser.means_of(self.smoothed, self.v, seen)
        log_counts = F.pad(means.log_counts, (0, -means.log_counts.shape[-1] % TILE), value=-math.inf)
        return self._multiplied(precision, means.k, means.v, torch.zeros_like(self.offset)), log_counts

    def _multiplied(
        self, precision: Precision, k: torch.Tensor, v: torch.Tensor, shift: torch.Tensor
    ) -> Operands:
        is_bf16 = precision.qk == "bf16"
        q, factor = (self.q, self.softmax_scale_log2) if is_bf16 else (self.scaled, 1.0)
        if not is_bf16:
            q, k = rotate(q, self.rotations.qk), rotate(k, self.rotations.qk)
        if precision.pv == "bf16":
            v, units = quantiser.narrowed(v, torch.bfloat16), None
        else:
            units = self.v_units[precision.pv]
            v = quantiser.quantised_v(v, units, precision.pv)
            units = quantiser.ValueUnits(*(each.flatten(0, 1) for each in units))
        q, k = quantiser.quantised_q(q, precision.qk), quantiser.quantised_k(k, precision.qk)
        return Operands(
            _tiled(q), _tiled(k), _tiled(v.float()), factor, _tiled(shift[..., None]), units, precision.pv
        )

    def seen(
        self, batch: torch.Tensor, q_tokens: torch.Tensor, tokens: torch.Tensor, phase: Phase
    ) -> torch.Tensor:
        """Says which keys each query sees: bool `[pairs of tiles, 1 or 128, 128]`; arguments are `[pairs, …]`."""
        k_length = self.k.shape[2]
        seen = (tokens < k_length)[:, None, :]
        if self.key_mask is not None:
            seen = seen & self.key_mask[batch].gather(1, tokens.clamp(max=k_length - 1))[:, None, :]
        if self.is_causal:
            seen = seen & (tokens[:, None, :] <= q_tokens[:, :, None])
        if phase is Phase.MASKED and self.plan.fine_mask is not None:
            seen = seen & self.plan.fine_mask.seen(q_tokens[:, :, None], tokens[:, None, :])
        return seen

    @property
    def is_query(self) -> torch.Tensor:
        """Says which rows of each Q tile are a token's: bool `[q_tiles, 128, 1]`."""
        return F.pad(self.taken, (0, -len(self.taken) % TILE)).view(-1, TILE, 1)

    def of_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """x `[B, H, slots, …]` in the order of tokens."""
        order = self.plan.token_order
        if order is None:
            return x
        order = order.to(x.device)
        return x[:, :, self.taken.nonzero()[:, 0][order[self.taken].argsort()]]


def _tiled(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` as `[B·H·tiles, 128, D]`, padded with zeros."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % TILE))
    return x.reshape(-1, TILE, x.shape[-1])
