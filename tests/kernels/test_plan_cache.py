"""The plans of the sizes that were used last are kept."""

import torch

from dma_diffusers.kernels.plan_cache import PlanCache
from dma_diffusers.kernels.tiling.policies import Diagonal

CPU = torch.device("cpu")


def sizes(cache: PlanCache, *lengths: int) -> list:
    return [cache.size(length, length, (0, 0), (), CPU) for length in lengths]


def test_the_sizes_used_last_are_kept():
    cache = PlanCache(most=2)
    first, second = sizes(cache, 100, 200)
    assert sizes(cache, 100, 300) == [first, cache.size(300, 300, (0, 0), (), CPU)]  # drops 200, not 100
    assert sizes(cache, 100)[0] is first and sizes(cache, 200)[0] is not second


def test_a_size_keeps_a_plan_for_each_policy():
    (size,) = sizes(PlanCache(), 300)
    plan = size.plan(Diagonal(128), False, False)
    assert size.plan(Diagonal(128), False, False) is plan
    assert (
        size.plan(Diagonal(384), False, False) is not plan
        and size.plan(Diagonal(128), True, False) is not plan
    )
    assert len(size.plans) == 3


def test_twenty_prompt_lengths_leave_few_maps():
    cache = PlanCache(most=8)
    for size in sizes(cache, *range(300, 320)):
        size.plan(Diagonal(), False, False)
    assert len(cache._sizes) == 8
