"""Exact attention of a few queries, in float32: sampled outputs are compared with it."""

import math
from dataclasses import replace

import torch

from dma_diffusers.kernels.call import Call, Norms, Rope
from dma_diffusers.kernels.quantiser.reference import changed_k, changed_q

MOST_KEYS = 2**24
"""Numbers of K that are in float32 at once, unless a single head has more: heads take turns."""


def exact_rows(call: Call, rows: range) -> torch.Tensor:
    """The output of some queries, float32 `[B, H, rows, D]`; zeros for one that sees no key.

    rows: the places of the queries, a range that goes up. Nothing here waits for the device. Where the process allows
    TF32 in float32 products, they have it here too.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        q = changed_q(_of_rows(call, rows)) * call.scale
        heads = call.k.shape[1]
        q = q.unflatten(1, (heads, -1)).flatten(2, 3)
        at_once = max(1, MOST_KEYS // call.k[:, 0].numel())
        parts = [
            _attended(q[:, part], replace(call, k=call.k[:, part], v=call.v[:, part]), rows)
            for part in (slice(first, first + at_once) for first in range(0, heads, at_once))
        ]
        return torch.cat(parts, 1).unflatten(2, (-1, len(rows))).flatten(1, 2)


def of_rows(x: torch.Tensor, rows: range) -> torch.Tensor:
    """These rows of x `[…, S, D]`, as a view."""
    return x[..., rows.start : rows.stop : rows.step, :]


def _of_rows(call: Call, rows: range) -> Call:
    """The call with these queries alone, whose norms and angles go with them."""
    rope: Rope | None = None
    if call.q_rope is not None:
        rope = (of_rows(call.q_rope[0], rows), of_rows(call.q_rope[1], rows))
    norms: Norms | None = None
    if call.norms is not None:
        first = len(range(rows.start, min(rows.stop, call.norms.first), rows.step))
        norms = replace(call.norms, first=first)
    return replace(call, q=of_rows(call.q, rows), q_rope=rope, norms=norms)


def _attended(q: torch.Tensor, call: Call, rows: range) -> torch.Tensor:
    """The output of queries that are scaled, float32 `[B, Hkv, group·rows, D]` like q, over a call's keys."""
    scores, v = q @ changed_k(call).mT, call.v.float()
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None], -math.inf)
        v = v.masked_fill(~call.key_mask[:, None, :, None], 0)  # which may be NaN
    if call.is_causal:
        query = torch.arange(rows.start, rows.stop, rows.step, device=q.device)
        key = torch.arange(v.shape[2], device=q.device)
        hidden = key > query.repeat(q.shape[2] // len(rows))[:, None]
        scores = scores.masked_fill(hidden, -math.inf)
    sees_none = scores.amax(-1, keepdim=True) == -math.inf
    return scores.softmax(-1).masked_fill(sees_none, 0) @ v
