"""PyTorch's FlexAttention in a neighbourhood, on tokens in tile order: the peer that takes the same block mask."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dma_diffusers.eval.bench.bound import Products
from dma_diffusers.eval.bench.entries import Prepared, Tensors
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.precision_map import Phase


def prepare(plan: Plan, copies: Sequence[Tensors]) -> Prepared:
    """What FlexAttention makes of a plan in tile order.

    whole: tokens into tile order, attention, and back; kernel: attention alone; quantise: the permutation alone.
    """
    plan = plan.to(copies[0][0].device)
    token, is_taken = plan.token_order.clamp(min=0).long(), plan.token_order >= 0
    place = token.new_empty(copies[0][0].shape[2])
    place[token[is_taken]] = is_taken.nonzero()[:, 0]
    mask = block_mask(plan)
    attend = _compiled()

    def gathered(number: int) -> list[torch.Tensor]:
        return [x[:, :, token] for x in copies[number % len(copies)]]

    boxed = [gathered(number) for number in range(len(copies))]
    visited = (mask.kv_num_blocks + mask.full_kv_num_blocks).double().mean().item()
    return Prepared(
        [Products(visited / mask.kv_indices.shape[-1], "H", "H")],
        whole=lambda number: attend(*gathered(number), block_mask=mask)[:, :, place],
        kernel=lambda number: attend(*boxed[number % len(boxed)], block_mask=mask),
        quantise=lambda number: gathered(number)[0][:, :, place],  # q for the output, which has its shape
    )


def block_mask(plan: Plan) -> BlockMask:
    """A plan's map and spans, in blocks of 128 places: masked tiles are partial blocks, all others full ones."""
    indices, bounds = plan.precision_map.indices, plan.precision_map.bounds
    q_tiles = indices.shape[-2]
    indices = F.pad(indices, (0, q_tiles - indices.shape[-1]))
    full, visited = (bounds[..., phase].contiguous() for phase in (Phase.LOW, Phase.MASKED))
    after_full = (full[..., None] + torch.arange(q_tiles, device=full.device)).clamp(max=q_tiles - 1)
    # Rows of their own: what the compiler takes of a captured tensor is its elements.
    fine_mask = plan.fine_mask and replace(plan.fine_mask, packed=plan.fine_mask.packed.unbind())

    def sees(batch, head, query, key):
        return fine_mask.seen(query, key)

    # Without partial blocks there is no mask of single keys, and the compiled kernel is the leaner for it.
    return BlockMask.from_kv_blocks(
        visited - full,
        indices.gather(-1, after_full.long()),
        full,
        indices,
        TILE,
        sees if fine_mask else None,
    )


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)
