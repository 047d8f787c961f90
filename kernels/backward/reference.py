"""The attention's backward in torch: it defines what is correct.

Quantisers let gradients through as they are. Scores are computed from the numbers that the forward multiplied. Values
meet the probabilities as the forward had rounded them, scores the unrounded ones. Then the rows of dS add up to zero
only if delta, which the gradient of the probabilities loses, is made of unrounded probabilities, too; the output's
product with its gradient is not. These don't quite add up to one, since the forward's sum has rounded ones: delta is
divided by what they add up to. Source: Attn-QAT, arXiv 2603.00040.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.attention.reference import Operands, Slots
from dma_diffusers.kernels.backward.int8 import AT_ONCE, is_in_int8, rounded_rows, rounded_tiles, row_scales
from dma_diffusers.kernels.call import Call, Rope
from dma_diffusers.kernels.formats import rotate_back
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser.reference import rotate
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, tiles
from dma_diffusers.kernels.tiling.policies import Policy
from dma_diffusers.kernels.tiling.precision_map import MEANS_TILES, Phase

SKIPS = "a softmax threshold has no backward, since nothing records what it skipped: leave skip_softmax out"
NORMS = "norms have no backward in the operator: let the model's own norm run, and its RoPE"


class Gradients(NamedTuple):
    """The gradients of q, k and v, each of their shape and dtype, laid out as `[B, S, H, D]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Part(NamedTuple):
    """The keys of one class that one head's queries see.

    q: `[Sq, D]`, times the factor that makes scores exponents of 2. k, v: `[Sk, D]`. exponents: `[Sq, Sk]`, the scores
    less the log-sum-exp, both in base 2; −inf where a query doesn't see a key. pv: the format of P·V. q_scales: of
    rows of q, `[Sq, 1]`, if the backward's products are in INT8; None if they are in bf16.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    exponents: torch.Tensor
    pv: str = "bf16"
    q_scales: torch.Tensor | None = None


def why_not(policy: Policy, has_norms: bool = False) -> str:
    """Why calls with this policy have no backward, in words; empty if they have one."""
    if policy.skip_below is not None:
        return SKIPS
    return NORMS if has_norms else ""


def check(call: Call, plan: Plan) -> None:
    """Raises ValueError, in one line, for a call that has no backward."""
    if plan.skip_below is not None:
        raise ValueError(SKIPS)
    if call.norms is not None:
        raise ValueError(NORMS)


def gradients(
    call: Call,
    plan: Plan,
    precisions: Precisions,
    lse: torch.Tensor,
    out_gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    products: str = "bf16",
    at_once: tuple[int, int] = AT_ONCE,
) -> Gradients:
    """The gradients of a call's q, k and v.

    lse: the forward's log-sum-exp, float32 `[B, H, Sq]`. out_gradient, lse_gradient: of the forward's results.
    products: "bf16", or "int8" for SageBwd (arXiv 2603.02170): classes whose Q·K is in INT8 then multiply all but the
    output's gradient and V in it, and delta is made of the forward's `out`, which costs no product of matrices. dS has
    one scale for each query and so many keys, Pᵀ and dSᵀ have one for each key and so many queries: `at_once`, both;
    the output's gradient has one for each tile. Raises ValueError for a softmax threshold, and for norms.
    """
    check(call, plan)
    call = without_hidden(call)
    slots = Slots.of(call, plan, precisions)
    batch, heads = slots.q.shape[:2]
    row_lse = torch.where(lse == -math.inf, math.inf, lse / math.log(2))
    # A row that sees no key has a log-sum-exp of −inf, which depends on nothing.
    row_gradient = (
        torch.zeros_like(row_lse) if lse_gradient is None else lse_gradient.where(lse > -math.inf, 0)
    )
    gradient = out_gradient.float()
    if plan.token_order is not None:
        order = plan.token_order.to(call.q.device)
        row_lse = F.pad(row_lse, (0, 1), value=math.inf)[:, :, order]
        row_gradient = F.pad(row_gradient, (0, 1))[:, :, order]
        gradient = F.pad(gradient, (0, 0, 0, 1))[:, :, order]
        out = out if out is None else F.pad(out, (0, 0, 0, 1))[:, :, order]
    classes = list(_classes(slots, plan, precisions, row_lse, products))
    by_out = any(each.int8 for each in classes)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (slots.q, slots.k, slots.v))
    for entry in range(batch):
        for head in range(heads):
            kv_head = head * slots.k.shape[1] // heads
            parts, own_row = [each.part(entry, head) for each in classes], row_gradient[entry, head][:, None]
            own_out = out[entry, head].float() if by_out and out is not None else None
            own = gradients_of_head(parts, gradient[entry, head], own_row, own_out, at_once)
            # The rows of dS add up to this, and so much of the mean has each row's log-sum-exp.
            dq[entry, head] += own_row * slots.mean[entry, kv_head] * call.scale
            for each, (ds, *of_part) in zip(classes, own, strict=True):
                of_q, of_k, of_v = each.of_slots(entry, *of_part)
                # Raw keys still have the mean that the others have lost.
                if each.is_raw:
                    of_q -= ds.sum(-1, keepdim=True) * slots.mean[entry, kv_head]
                dq[entry, head] += of_q * call.scale
                dk[entry, kv_head] += of_k
                dv[entry, kv_head] += of_v
    found = empty_gradients(call)
    for given, own in zip(found, (dq, dk, dv), strict=True):
        given.copy_(slots.of_tokens(own))
    return through_rope(found, call)


def empty_gradients(call: Call) -> Gradients:
    """Room for the gradients of q, k and v, in float32 where RoPE is still to be undone."""
    return Gradients(
        _empty(call.q, torch.float32 if call.q_rope else call.q.dtype),
        _empty(call.k, torch.float32 if call.k_rope else call.k.dtype),
        _empty(call.v, call.v.dtype),
    )


def through_rope(found: Gradients, call: Call) -> Gradients:
    """The gradients of q and k before their RoPE, from those behind it."""

    def turned_back(gradient: torch.Tensor, x: torch.Tensor, rope: Rope | None) -> torch.Tensor:
        return gradient if rope is None else _empty(x, x.dtype).copy_(rotate(gradient, (rope[0], -rope[1])))

    return Gradients(
        turned_back(found.q, call.q, call.q_rope), turned_back(found.k, call.k, call.k_rope), found.v
    )


def _empty(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, S, D]`, laid out as `[B, S, H, D]`."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)


def without_hidden(call: Call) -> Call:
    """The call with zeros where the key mask hides keys, whatever these are: 0·NaN would be a gradient of NaN."""
    if call.key_mask is None:
        return call
    hidden = ~call.key_mask[:, None, :, None]
    return replace(call, k=call.k.masked_fill(hidden, 0), v=call.v.masked_fill(hidden, 0))


def rounded_p(p: torch.Tensor, pv: str) -> torch.Tensor:
    """Probabilities as the forward multiplies values with them, up to the power of two that it scales them by.

    It rounds e4m3 numbers under a running maximum, which the backward doesn't know: here they have e4m3's precision,
    and no smallest number; halves are rounded up.
    """
    match pv:
        case "fp8":
            mantissa, exponent = torch.frexp(p)
            return torch.ldexp((mantissa * 16 + 0.5).floor() / 16, exponent)
        case "int8":
            return (p * 255).round() / 255
    return p


@dataclass(frozen=True)
class _Class:
    """The operands of one class of tiles, and the pairs of tiles that are of it.

    is_taken: bool `[B, H, q_tiles, k_tiles]`, or for means `[B, H, q_tiles, sub-tiles]`. row_lse: `[B, H, Sq]`, base 2.
    is_raw: whether its keys are not smoothed. int8: the format of Q·K, if the backward's products are in INT8.
    log_counts: of means, `[B, sub-tiles]`; None for keys.
    """

    slots: Slots
    operands: Operands
    is_taken: torch.Tensor
    is_masked: torch.Tensor
    row_lse: torch.Tensor
    is_raw: bool
    rotation: str
    int8: str | None
    log_counts: torch.Tensor | None = None

    def part(self, entry: int, head: int) -> Part:
        """The keys of this class for one head."""
        (heads, q_length), (kv_heads, k_length) = self.slots.q.shape[1:3], self.slots.k.shape[1:3]
        kv_head = head * kv_heads // heads
        own = entry * kv_heads + kv_head
        q = self.operands.q.unflatten(0, (len(self.slots.q) * heads, -1))[entry * heads + head].flatten(0, 1)
        k, v = (
            x.unflatten(0, (len(self.slots.k) * kv_heads, -1))[own].flatten(0, 1)
            for x in (self.operands.k, self.operands.v)
        )
        units = self.operands.v_units
        if units is not None:
            v = v * units.scale[own] + units.mean[own]
        v = rotate_back(v, self.slots.rotations.v)
        q = q[:q_length] * self.operands.factor
        q_scales = None if self.int8 is None else row_scales(q, self.int8)
        exponents = q @ k.mT - self.row_lse[entry, head][:, None]
        query = torch.arange(q_length, device=q.device)
        if self.log_counts is not None:
            exponents = exponents + self.log_counts[entry]
            seen = self.is_taken[entry, head][query // TILE]
        else:
            k, v, exponents = k[:k_length], v[:k_length], exponents[:, :k_length]
            seen = self._seen(entry, head, query, torch.arange(k_length, device=q.device))
        return Part(q, k, v, torch.where(seen, exponents, -math.inf), self.operands.pv, q_scales)

    def _seen(self, entry: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Says which keys of this class each query sees: bool `[Sq, Sk]`."""
        of_entry = torch.tensor([entry], device=query.device)
        seen, masked = (
            self.slots.seen(of_entry, query[None], key[None], phase)[0]
            for phase in (Phase.HIGH, Phase.MASKED)
        )
        is_taken, is_masked = (
            x[entry, head][query[:, None] // TILE, key // TILE] for x in (self.is_taken, self.is_masked)
        )
        return torch.where(is_masked, masked, seen) & is_taken

    def of_slots(
        self, entry: int, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of q, k and v by slots: channels are turned back, and a mean's gradient goes to its keys."""
        dq, dk = (rotate_back(x, self.rotation) for x in (dq, dk))
        if self.log_counts is None:
            return dq, dk, dv
        k_length, seen = self.slots.k.shape[2], self.slots.key_mask
        share = torch.exp2(-self.log_counts[entry].clamp(min=0))[:, None]
        dk, dv = ((x * share).repeat_interleave(SUBTILE, 0)[:k_length] for x in (dk, dv))
        if seen is not None:
            dk, dv = (x * seen[entry][:, None] for x in (dk, dv))
        return dq, dk, dv


def _classes(
    slots: Slots, plan: Plan, precisions: Precisions, row_lse: torch.Tensor, products: str
) -> Iterator[_Class]:
    """The classes of a call that have tiles."""
    batch, heads, device = *slots.q.shape[:2], slots.q.device
    precision_map = slots.map
    phases = precision_map.phases(tiles(slots.k.shape[2])).to(device).expand(batch, heads, -1, -1)
    is_masked = phases == Phase.MASKED
    is_high, is_low = phases == Phase.HIGH, phases == Phase.LOW
    high, low = (is_high | is_masked, is_low) if precision_map.has_high else (is_high, is_low | is_masked)
    smoothed_lse = row_lse - slots.offset
    for precision, is_taken in zip(precisions, (high, low), strict=True):
        if is_taken.any():
            is_raw = precision.qk == "bf16"
            yield _Class(
                slots, slots.operands(precision), is_taken, is_masked, row_lse if is_raw else smoothed_lse, is_raw,
                "none" if is_raw else slots.rotations.qk, precision.qk if is_in_int8(precision.qk, products) else None,
            )  # fmt: skip
    if precision_map.has_mean:
        precision = plan.used(precisions)[2]
        operands, log_counts = slots.means(precision)
        number = torch.arange(log_counts.shape[-1], device=device)
        words = precision_map.means.to(device).expand(batch, heads, -1, -1)[..., number // TILE]
        is_taken = words >> number % TILE // (TILE // MEANS_TILES) & 1 == 1
        rotation = "none" if precision.qk == "bf16" else slots.rotations.qk
        int8 = precision.qk if is_in_int8(precision.qk, products) else None
        yield _Class(slots, operands, is_taken, is_masked, smoothed_lse, False, rotation, int8, log_counts)


def gradients_of_head(
    parts: list[Part],
    out_gradient: torch.Tensor,
    lse_gradient: torch.Tensor,
    out: torch.Tensor | None = None,
    at_once: tuple[int, int] = AT_ONCE,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each part dS, dS·K, dSᵀ·Q and Pᵀ·dO, where dS is the gradient of natural scores.

    out_gradient: `[Sq, D]`. lse_gradient: `[Sq, 1]`, of the natural log-sum-exp. out: `[Sq, D]`, the output that delta
    is made of; None for that of unrounded probabilities. at_once: of INT8's scales.
    """
    p = [part.exponents.exp2() for part in parts]
    dp = [out_gradient @ part.v.mT for part in parts]
    if out is None:
        total = sum(x.sum(-1, keepdim=True) for x in p)
        delta = sum((x * y).sum(-1, keepdim=True) for x, y in zip(p, dp, strict=True)) - lse_gradient
        delta = delta / torch.where(total > 0, total, 1)
    else:
        delta = (out_gradient * out).sum(-1, keepdim=True) - lse_gradient
    ds = [x * (y - delta) for x, y in zip(p, dp, strict=True)]
    return [
        (own_ds, *_multiplied(part, own_p, own_ds, out_gradient, at_once))
        for part, own_p, own_ds in zip(parts, p, ds, strict=True)
    ]


def _multiplied(
    part: Part, p: torch.Tensor, ds: torch.Tensor, out_gradient: torch.Tensor, at_once: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dS·K, dSᵀ·Q and Pᵀ·dO."""
    if part.q_scales is None:
        return ds @ part.k, ds.mT @ part.q * math.log(2), rounded_p(p, part.pv).mT @ out_gradient
    # dSᵀ·Q sums over rows of q, so their scales become a part of dS.
    integers, (keys, queries) = part.q / part.q_scales.where(part.q_scales > 0, 1), at_once
    return (
        rounded_rows(ds, keys) @ part.k,
        rounded_rows((ds * part.q_scales).mT, queries) @ integers * math.log(2),
        rounded_rows(p.mT, queries) @ rounded_tiles(out_gradient),
    )
