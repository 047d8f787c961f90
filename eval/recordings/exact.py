"""This module computes a recording's attention in float64: its output, and where its probability lies."""

import torch
import torch.nn.functional as F

from dma_diffusers.eval.recordings.store import Tensors
from dma_diffusers.kernels.tiling.layout import TILE, tiles

_SCORES = 2**25  # so many are in memory at once


def in_slots(tensors: Tensors, token_order: torch.Tensor) -> Tensors:
    """Put a call's tensors in tile order: int32 `[slots]`, the token that stands at each slot, −1 where none does.

    Empty slots hold queries and keys that are no token's, and the key mask hides them.
    """
    q, k, v, mask = tensors
    token_order = token_order.to(q.device)
    taken, token = token_order >= 0, token_order.clamp(min=0).long()
    mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
    return Tensors(q[:, :, token], k[:, :, token], v[:, :, token], mask[:, token] & taken)


def exact_attention(
    tensors: Tensors, scale: float | None, is_causal: bool, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, float64 `[B, H, S, D]`, and each pair of tiles' share of the probability.

    The shares, float64 `[B, H, q_tiles, k_tiles]`, sum to 1 over each head's pairs: every query that sees a key counts
    the same. A query that sees none gives zeros. Memory does not grow with the square of the length. counted: bool
    `[S]`, the queries whose probability is counted; all, by default.
    """
    q, k, v, mask = tensors
    batch, heads, q_length, head_dim = q.shape
    group, k_length = heads // k.shape[1], k.shape[2]
    rows = max(_SCORES // (batch * k_length * TILE), 1) * TILE
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    mass = torch.zeros(batch, heads, tiles(q_length), tiles(k_length), dtype=torch.float64, device=q.device)
    key = torch.arange(k_length, device=q.device)
    for head in range(heads):
        keys, values = (x[:, head // group].double() for x in (k, v))
        for start in range(0, q_length, rows):
            part = slice(start, min(start + rows, q_length))
            scores = q[:, head, part].double() @ keys.mT * scale
            if mask is not None:
                scores.masked_fill_(~mask[:, None], -torch.inf)
            if is_causal:
                scores.masked_fill_(key > key[part, None], -torch.inf)
            p = scores.softmax(-1).nan_to_num_(0) if mask is not None else scores.softmax(-1)
            out[:, head, part] = p @ values
            p = p if counted is None else p * counted[part, None]
            padded = F.pad(p, (0, -k_length % TILE, 0, -p.shape[1] % TILE))
            per_tile = padded.unflatten(2, (-1, TILE)).sum(-1).unflatten(1, (-1, TILE)).sum(2)
            mass[:, head, start // TILE : start // TILE + per_tile.shape[1]] = per_tile
    total = mass.sum((-2, -1), keepdim=True)
    return out, mass / torch.where(total == 0, 1, total)
