"""Importance by rows: the reference is compared with probabilities in float64, the kernel with the reference."""

import math

import pytest
import torch

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.call import Memory
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import (
    ROWS,
    Routing,
    importance_of_rows,
    levels,
    pooled,
    recalled,
    remember,
    route_call,
    routed,
    sample,
)
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.policies import parse
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase, map_of
from tests.kernels.calls import Call
from tests.kernels.routings import random, random_levels, random_phases
from tests.kernels.test_routing_kernels import Recorded, assert_same_lists

HOW = [{}, {"rest": int(Phase.MEAN), "low": 0.2}, {"rest": UNVISITED}]


def memory_of(routing: Routing, batch: int, heads: int) -> Memory:
    memory = Memory()
    routing.make_room(memory, batch, heads)
    return memory


def test_sampled_rows_stand_in_every_column_of_a_box_as_often():
    place = sample(count=ROWS)
    assert place.div(TILE // ROWS, rounding_mode="floor").tolist() == list(range(ROWS)) and place[0] == 0
    for columns in (4, 8, 16):
        assert (place % columns).bincount().tolist() == [ROWS // columns] * columns


@pytest.mark.parametrize("by_mass", [False, True])
def test_importance_is_that_of_true_probabilities(by_mass):
    """They are in float64, over the sampled keys; hidden ones, empty slots and pairs not visited count for nothing."""
    q, k, v = (random(2, heads, 300, 24, seed=heads).bfloat16().float() for heads in (4, 2, 2))
    q *= 0.5
    v[:, :, 128:256] *= 4
    phases = random_phases(1, 4, 3, 3, seed=1)
    phases[..., 0] = Phase.LOW
    there, seen = random(1, 300, seed=2) > -1, random(2, 300, seed=3) > -1
    there[:, 0] = True
    seen[1, 128:256] = False
    sampled = torch.zeros(3, TILE, dtype=torch.bool)
    sampled[:, sample()] = True
    sampled = sampled.flatten()[:300]
    found = importance_of_rows(q, k, v, phases, by_mass, there, seen)
    spread = pooled(v, seen)[..., 1, :].sum(-1)
    for batch, head, q_tile in torch.cartesian_prod(*map(torch.arange, (2, 4, 3))).tolist():
        rows = q_tile * TILE + sample(count=ROWS)
        rows = rows[rows < 300]
        rows = rows[there[0, rows]]
        scores = q[batch, head, rows].double() @ k[batch, head // 2].double().T
        visited = (phases[0, head, q_tile] != UNVISITED).repeat_interleave(TILE)[:300]
        total = torch.where(seen[batch] & sampled & visited, scores.exp2(), 0).sum(-1, keepdim=True)
        p = torch.where(seen[batch] & sampled, scores.exp2(), 0) / total
        for k_tile in range(3):
            of_pair = p[:, k_tile * TILE : (k_tile + 1) * TILE]
            expected = of_pair.sum() / len(rows)
            if not by_mass:
                expected = (of_pair.square().sum() / len(rows) * spread[batch, head // 2, k_tile]).sqrt()
            own = found[batch, head, q_tile, k_tile]
            if (batch, k_tile) == (1, 1):
                assert own.isnan()
            else:
                assert own.item() == pytest.approx(expected.log2().item(), abs=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_numbers_that_are_not_finite_spoil_no_other_pair(bad):
    q, k, v = (random(1, 1, 512, 16, seed=seed) for seed in range(3))
    phases = torch.full((1, 1, 4, 4), int(Phase.LOW))
    q[:, :, 128:256] = k[:, :, 128:256] = bad
    found = importance_of_rows(q, k, v, phases)
    others = torch.arange(4) != 1
    assert found[0, 0, 1].isnan().all() and found[..., 1].isnan().all()
    assert found[0, 0][others][:, others].isfinite().all()


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_memory_gives_back_the_pairs_that_were_written(how):
    phases = random_phases(1, 3, 5, 70)
    routing = Routing.of(phases, 0.2, **how)
    after = routed(random_levels(2, 3, 5, 70), routing)
    memory = memory_of(routing, 2, 3)
    remember(after, routing, memory)
    assert torch.equal(recalled(memory, routing), after)
    assert all(x.shape == (2, 3, 5, 3) for x in memory.tensors)
    assert (memory.left is None) == (routing.rest is None)


def routed_by_kernel(call, device, routing, memory=None, is_shared=False, run=None):
    """The lists that the kernels make of a call's tensors, and the reference's arguments for the same."""
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.quantiser.launch import Source
    from dma_diffusers.kernels.quantiser.operands import padded_dim
    from dma_diffusers.kernels.routing.launch import route_call as route_by_kernel

    q, k, v, mask = call.tensors(device)
    ropes, mean = call.ropes(device), random(call.batch, call.kv_heads, 1, call.head_dim).to(device)
    slots = call.layout.k_length
    there = (
        torch.ones(1, slots, dtype=torch.bool) if call.token_order is None else (call.token_order >= 0)[None]
    )
    there = there.to(device)
    seen = there
    if mask is not None:
        seen = there & call.in_slots(mask[..., None].expand(-1, -1, 1))[..., 0]
    whole = torch.nn.functional.pad(seen.to(torch.uint8), (0, -slots % TILE)).contiguous()
    padded = torch.nn.functional.pad(mean, (0, padded_dim(call.head_dim) - call.head_dim))
    source = Source(
        q,
        k,
        v,
        0.3,
        **ropes,
        key_mask=None if mask is None else whole,
        token_order=call.token_order_on(device),
    )
    lists = route_by_kernel(
        source, padded.flatten(0, 2).contiguous(), routing.to(device), memory, is_shared,
        launcher=Launcher(run) if run else Launcher(),
    )  # fmt: skip
    scaled, smoothed = (quantiser.rotate(x, rope) for x, rope in zip((q, k), ropes.values(), strict=True))
    given = (call.in_slots(x) for x in (scaled * 0.3, smoothed - mean, v))
    return lists, (*given, routing.to(device), None if call.token_order is None else there, seen)


CALLS = [
    (Call(140, 140, 64, batch=2, heads=2, kv_heads=1), {}, False),
    (
        Call(200, 200, 72, has_rope=True, masks_keys=True, has_token_order=True, empty_slots=100, kv_heads=1),
        HOW[1],
        True,
    ),
    (Call(1100, 1100, 64, heads=2, kv_heads=1), {}, False),
    (Call(1100, 100, 128, heads=2, dtype=torch.bfloat16), HOW[2], False),
    (Call(100, 100, 256, heads=1, kv_heads=1), HOW[1], False),
]


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("call", "how", "is_shared"), CALLS)
def test_rows_as_the_reference(call, how, is_shared, kernel_device, monkeypatch):
    """Levels agree within the rounding of the products; the same levels give the same lists, means and memory.

    Of the longest call, each of two programs takes two blocks of rows, and finds its room for notes again.
    """
    from dma_diffusers.kernels.routing import launch

    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    q_tiles, k_tiles = (-(-length // TILE) for length in (call.layout.q_length, call.layout.k_length))
    phases = random_phases(1, 1, q_tiles, k_tiles)
    phases[..., 0] = Phase.LOW
    routing = Routing.of(phases, 0.3, **how, by_rows=True)
    recorded = Recorded(is_guarded=True)
    memory = memory_of(routing.to(kernel_device), call.batch, call.heads)
    found, given = routed_by_kernel(call, kernel_device, routing, memory, is_shared, recorded)
    by_kernel = recorded.given["score_rows"]["levels"].int()
    assert recorded.given["score_rows"]["blocks"] == 4 or call.q_length < 1100
    q, k, v, routing, there, seen = given
    expected = levels(importance_of_rows(q, k, v, routing.phases, routing.by_mass, there, seen))
    is_low = (routing.phases == Phase.LOW).expand(by_kernel.shape)
    assert (by_kernel[~is_low] == -1).all() and torch.equal((by_kernel < 0)[is_low], (expected < 0)[is_low])
    off = (by_kernel - expected)[is_low].abs()
    assert off.max() <= 3
    after = routed(by_kernel, routing)
    chosen = map_of(after.cpu(), has_high=True)
    assert_same_lists(found, (chosen.shared if is_shared else chosen).to(kernel_device))
    assert torch.equal(recalled(memory, routing), after)
    before = [x.clone() for x in memory.tensors]
    memory.is_read = True
    recorded.given.clear()
    read, _ = routed_by_kernel(call, kernel_device, routing, memory, is_shared, recorded)
    assert list(recorded.given) == ["write_block_lists"]
    assert_same_lists(read, found)
    assert all(map(torch.equal, before, memory.tensors))


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38, 1e20])
def test_rows_leave_out_what_the_reference_does(bad, kernel_device):
    """That is numbers which are not finite, and pairs (of 1e20) whose scores aren't."""
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.quantiser.launch import Source
    from dma_diffusers.kernels.routing.launch import route_call as route_by_kernel

    q, k, v = (random(1, 1, 512, 64, seed=seed).to(kernel_device) for seed in range(3))
    q[:, :, 128:256] = k[:, :, 256:384] = bad
    routing = Routing.of(torch.full((1, 1, 4, 4), int(Phase.LOW)), 0.2, by_rows=True).to(kernel_device)
    recorded = Recorded(is_guarded=True)
    route_by_kernel(Source(q, k, v), None, routing, launcher=Launcher(recorded))
    found = recorded.given["score_rows"]["levels"].int()[0, 0]
    expected = levels(importance_of_rows(q, k, v, routing.phases))[0, 0]
    left_out = torch.zeros_like(found, dtype=torch.bool)
    if bad == 1e20:
        left_out[1, 2] = True
    else:
        left_out[1] = left_out[:, 2] = True
        assert (found - expected).abs().max() <= 3
    assert torch.equal(found < 0, left_out) and torch.equal(expected < 0, left_out)


def test_the_reference_reads_what_it_wrote():
    q, k, v = (random(1, 2, 1000, 32, seed=seed) for seed in range(3))
    routing = Routing.of(random_phases(1, 1, 8, 8), 0.1, 0.1, int(Phase.MEAN), by_rows=True)
    memory = memory_of(routing, 1, 2)
    written = route_call(q, k, v, routing, memory=memory)
    memory.is_read = True
    others = route_call(-q, k, v, routing), route_call(-q, k, v, routing, memory=memory)
    assert torch.equal(written.means, others[1].means) and torch.equal(written.bounds, others[1].bounds)
    assert not torch.equal(written.means, others[0].means)


@pytest.mark.parametrize("how", HOW[:2], ids=str)
def test_entries_of_a_batch_choose_as_they_would_alone(how):
    """So guidance may have both its calls in one batch."""
    q, k, v = (random(2, 2, 1000, 32, seed=seed) for seed in range(3))
    routing = Routing.of(random_phases(1, 2, 8, 8), 0.2, **how, by_rows=True)
    together, alone = memory_of(routing, 2, 2), [memory_of(routing, 1, 2) for _ in range(2)]
    route_call(q, k, v, routing, memory=together)
    for entry, memory in enumerate(alone):
        route_call(*(x[entry, None] for x in (q, k, v)), routing, memory=memory)
    for batched, *separate in zip(together.tensors, *(memory.tensors for memory in alone), strict=True):
        assert torch.equal(batched, torch.cat(separate)) and batched.any()


def test_a_plan_knows_how_pairs_are_chosen():
    layout = Call(300, 300, 64).layout
    by = {words: plan.make(parse(f"importance(budget=0.5{words})"), layout).routing.by_rows
          for words in ("", ", by=pools", ", by=rows", ", by=memory", ", beyond=mean, by=memory")}  # fmt: skip
    assert list(by.values()) == [True, False, True, True, True]
    assert parse("importance(budget=0.5, by=memory) | diagonal(window=128)").remembers
    assert not parse("importance(budget=0.5, by=rows) | diagonal(window=128)").remembers
