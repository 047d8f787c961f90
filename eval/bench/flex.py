"""This module prepares FlexAttention in a neighbourhood, which takes the same block mask, on tokens in tile order."""

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
    """Prepare FlexAttention's calls for a plan in tile order.

    whole: permutes tokens into tile order, attends, and permutes the result back. kernel: attends alone. quantise:
    permutes alone.
    """
    plan = plan.to(copies[0][0].device)
    token, is_taken = plan.token_order.clamp(min=0).long(), plan.token_order >= 0
    slot = token.new_empty(copies[0][0].shape[2])
    slot[token[is_taken]] = is_taken.nonzero()[:, 0]
    mask = block_mask(plan)
    attend = _compiled()

    def gathered(number: int) -> list[torch.Tensor]:
        return [x[:, :, token] for x in copies[number % len(copies)]]

    boxed = [gathered(number) for number in range(len(copies))]
    visited = (mask.kv_num_blocks + mask.full_kv_num_blocks).double().mean().item()
    return Prepared(
        [Products(visited / mask.kv_indices.shape[-1], "H", "H")],
        whole=lambda number: attend(*gathered(number), block_mask=mask)[:, :, slot],
        kernel=lambda number: attend(*boxed[number % len(boxed)], block_mask=mask),
        quantise=lambda number: gathered(number)[0][:, :, slot],  # the output has q's shape
    )


def block_mask(plan: Plan) -> BlockMask:
    """Return a plan's map and fine mask in blocks of 128 slots: masked tiles are partial blocks, others full ones.

    Raises ValueError for a map with MEAN tiles.
    """
    if plan.precision_map.has_mean:
        raise ValueError("FlexAttention takes no tiles by their means: give a policy that skips them")
    indices, bounds = plan.precision_map.indices, plan.precision_map.bounds
    q_tiles = indices.shape[-2]
    indices = F.pad(indices, (0, q_tiles - indices.shape[-1]))
    full, visited = (bounds[..., phase].contiguous() for phase in (Phase.LOW, Phase.MASKED))
    after_full = (full[..., None] + torch.arange(q_tiles, device=full.device)).clamp(max=q_tiles - 1)
    # Each row is a tensor of its own, because the compiler reads single elements of a captured tensor.
    fine_mask = plan.fine_mask and replace(plan.fine_mask, packed=plan.fine_mask.packed.unbind())

    def sees(batch, head, query, key):
        return fine_mask.seen(query, key)

    # Without partial blocks no single keys are masked, which makes a leaner compiled kernel.
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
