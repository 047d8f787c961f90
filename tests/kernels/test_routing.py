"""Routing: importance is compared with probabilities, upgraded pairs with brute force, kernels with the reference."""

import math
from dataclasses import replace

import pytest
import torch

from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import (
    LEVELS,
    SAMPLE_STRIDE,
    Pools,
    Routing,
    importance,
    levels,
    log_mean_exp,
    pooled,
    route,
    routed,
)
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.policies import Importance
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase, build_map, map_of, visiting_phases
from tests.kernels.calls import Call, by_reference, launched, relative_l2
from tests.kernels.guarded import guarded


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_phases(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random phases, in most places LOW."""
    drawn = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(seed))
    is_low = (drawn > UNVISITED) | (drawn == Phase.MEAN)
    return torch.where(is_low, int(Phase.LOW), drawn)


def random_levels(*shape: int, seed: int = 0, top: int = LEVELS) -> torch.Tensor:
    drawn = torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return torch.where(random(*shape, seed=seed) > 2, -1, drawn)


def pools_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pools:
    return Pools(pooled(q), pooled(k), pooled(v)[..., 1, :].sum(-1))


def test_a_pool_is_mean_and_variance_of_counted_tokens():
    x, counted = random(2, 3, 300, 8), random(2, 300) > 0
    counted[1, 128:256] = False
    found = pooled(torch.where(counted[:, None, :, None], x, math.inf), counted)
    for batch, tile in ((0, 0), (0, 2), (1, 0)):
        rows = slice(tile * TILE, (tile + 1) * TILE, SAMPLE_STRIDE)
        tokens = x[batch, :, rows][:, counted[batch, rows]]
        torch.testing.assert_close(found[batch, :, tile, 0], tokens.mean(1))
        torch.testing.assert_close(found[batch, :, tile, 1], tokens.var(1, unbiased=False))
    assert found[1, :, 1].isnan().all()
    torch.testing.assert_close(pooled(x), pooled(x, torch.ones(1, 300, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("deviation", "tolerance"), [(0.5, 0.05), (1.0, 0.1), (2.0, 0.3), (8.0, 4.0), (20.0, 11.0)]
)
def test_mean_exponentials_of_a_tile_of_gaussians(deviation, tolerance):
    """Without the bound on the deviation, wide tiles would count for thousands of times as much."""
    sample = torch.logsumexp(deviation * random(4000, TILE) * math.log(2), dim=-1) / math.log(2) - math.log2(
        TILE
    )
    predicted = log_mean_exp(torch.tensor(deviation)).item()
    assert predicted == pytest.approx(sample.mean().item(), abs=tolerance)


def test_importance_is_the_root_mean_square_probability_times_the_spread_of_values():
    """The keys of a tile are Gaussian, and its queries are all alike."""
    queries, centres = 0.3 * random(1, 2, 6, 1, 64, seed=1), random(1, 2, 6, 1, 64, seed=2)
    deviations = torch.arange(1, 7)[:, None, None] / 12
    q = queries.expand(-1, -1, -1, TILE, -1).flatten(2, 3)
    k = (centres + deviations * random(1, 2, 6, TILE, 64, seed=4)).flatten(2, 3)
    spreads = torch.arange(1, 7)[torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    v = random(1, 2, 6 * TILE, 64, seed=5) * spreads.repeat_interleave(TILE)[:, None]
    probabilities = torch.softmax(q @ k.mT * math.log(2), dim=-1)
    probabilities = probabilities.unflatten(-1, (6, TILE)).unflatten(-3, (6, TILE))
    expected = (TILE * probabilities.square().mean((-3, -1)).sqrt() * spreads * 8).log2()  # √64 channels
    found = importance(pools_of(q, k, v), torch.zeros(1, 1, 6, 6))
    assert (found - expected).square().mean().sqrt() < 0.3 < 2 < expected.std()


def test_heads_of_q_share_heads_of_k():
    q, k, v = random(2, 4, 300, 16), random(2, 2, 400, 16, seed=1), random(2, 2, 400, 16, seed=2)
    phases = random_phases(1, 4, 3, 4)
    shared = importance(pools_of(q, k, v), phases)
    own = importance(pools_of(q, *(x.repeat_interleave(2, dim=1) for x in (k, v))), phases)
    torch.testing.assert_close(shared, own)


def test_probabilities_are_shares_of_what_is_visited():
    q, k, v = random(1, 1, 128, 16), random(1, 1, 512, 16, seed=1), random(1, 1, 512, 16, seed=2)
    phases = torch.tensor([Phase.HIGH, Phase.LOW, UNVISITED, UNVISITED]).view(1, 1, 1, 4)
    some = importance(pools_of(q, k, v), phases)[..., :2]
    alone = importance(pools_of(q, k[:, :, :256], v[:, :, :256]), phases[..., :2])
    torch.testing.assert_close(some, alone)


def test_levels_are_ordered_as_importance():
    values = torch.tensor(
        [math.nan, -math.inf, -45.0, -44.0, -43.9, -1.0, 0.0, 0.015, 0.016, 19.0, 19.99, math.inf]
    )
    found = levels(values).tolist()
    assert (
        found[0] == -1 and found[1:4] == [0, 0, 0] and found[6] == found[7] and found[-2:] == [LEVELS - 1] * 2
    )
    assert all(a < b for a, b in zip(found[3:6] + found[7:9], found[4:7] + found[8:10], strict=True))


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("top", [8, LEVELS])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_most_important_low_pairs_of_a_batch_entry_become_high(heads, top, budget):
    phases, found = random_phases(1, heads, 5, 9), random_levels(2, 3, 5, 9, top=top)
    routing = Routing.of(phases, budget)
    after = routed(found, routing)
    before = phases.expand(2, 3, -1, -1)
    for entry in range(2):
        allowed = int(budget * (before[entry] != UNVISITED).sum())
        upgraded = (before[entry] == Phase.LOW) & (after[entry] == Phase.HIGH)
        left = (before[entry] == Phase.LOW) & ~upgraded
        assert torch.equal(before[entry][~upgraded], after[entry][~upgraded].long())
        ranked = [level for level in found[entry][before[entry] == Phase.LOW].tolist() if level >= 0]
        fitting = [least for least in {*ranked, LEVELS} if sum(level >= least for level in ranked) <= allowed]
        assert (found[entry][upgraded] >= min(fitting)).all() and (found[entry][left] < min(fitting)).all()


def test_a_call_routes_by_policy_and_content():
    """Text is HIGH beside the budget, the end of the keys is MASKED, and each Q tile finds the keys like it."""
    layout = Call(1000, 1000, 64, text=(0, 100)).layout
    classes = Importance(0.1).classes(layout)
    centres = 8 * random(1, 1, 8, 1, 64)
    q = (centres + 0.1 * random(1, 1, 8, TILE, 64)).flatten(2, 3)[:, :, :1000]
    k = (centres.flip(2) + 0.1 * random(1, 1, 8, TILE, 64, seed=1)).flatten(2, 3)[:, :, :1000]
    found = route(pools_of(q / 64, k, q), Routing.of(visiting_phases(classes, layout), 0.1))
    static = build_map(classes, layout)
    for tile in range(1, 8):
        end = found.bounds[0, 0, tile].tolist()
        high = found.indices[0, 0, tile, : end[0]].tolist()
        assert high == ([0, 7 - tile] if tile < 7 else [0]) and end[2] == static.bounds[0, 0, tile, 2] == 8
        assert found.indices[0, 0, tile, end[1]].item() == 7


# The kernels


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("length", "head_dim", "masks_keys", "has_token_order"), [
    (1, 64, False, False), (300, 72, True, True), (256, 128, False, False), (300, 64, True, False),
    (300, 64, False, True),
])  # fmt: skip
def test_pools_as_the_reference(length, head_dim, masks_keys, has_token_order, kernel_device):
    from dma_diffusers.kernels.quantiser.launch import Source
    from dma_diffusers.kernels.quantiser.operands import padded_dim
    from dma_diffusers.kernels.routing.launch import pooled as pooled_by_kernel

    call = Call(
        length, length, head_dim, batch=2, heads=4, has_rope=head_dim == 72, masks_keys=masks_keys,
        has_token_order=has_token_order, empty_slots=200 * has_token_order,
    )  # fmt: skip
    q, k, v, mask = call.tensors(kernel_device)
    ropes, mean = call.ropes(kernel_device), random(2, 2, 1, head_dim).to(kernel_device)
    slots = call.layout.k_length
    taken = (
        torch.ones(1, slots, dtype=torch.bool) if call.token_order is None else (call.token_order >= 0)[None]
    )
    seen = taken.to(kernel_device).expand(2, -1)
    if mask is not None:
        mask[1, :] = False  # so that no query sees any token of a tile
        seen = seen & call.in_slots(mask[..., None].expand(-1, -1, 1))[..., 0]
    whole = torch.nn.functional.pad(seen.to(torch.uint8), (0, -slots % TILE)).contiguous()
    padded_mean = (
        torch.nn.functional.pad(mean, (0, padded_dim(head_dim) - head_dim)).flatten(0, 2).contiguous()
    )
    source = Source(
        q, k, v, 0.3, **ropes, key_mask=None if mask is None else whole,
        token_order=call.token_order_on(kernel_device),
    )  # fmt: skip
    found = pooled_by_kernel(source, padded_mean)
    q, k = quantiser.rotate(q, ropes["q_rope"]) * 0.3, quantiser.rotate(k, ropes["k_rope"]) - mean
    q, k, v, taken = call.in_slots(q), call.in_slots(k), call.in_slots(v), taken.to(kernel_device)
    of_keys = taken if mask is None else seen
    expected = Pools(pooled(q, taken), pooled(k, of_keys), pooled(v, of_keys)[..., 1, :].sum(-1))
    for x, wanted in zip(found, expected, strict=True):
        assert x.isnan().any() == (wanted.isnan().any())
        own, rest = (x, x[:0]) if x.ndim == 3 else (x[..., :head_dim], x[..., head_dim:])
        torch.testing.assert_close(own, wanted, equal_nan=True, atol=1e-4, rtol=1e-4)
        assert (rest.nan_to_num() == 0).all()


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
def test_pools_far_from_zero(kernel_device):
    from dma_diffusers.kernels.quantiser.launch import Source
    from dma_diffusers.kernels.routing.launch import pooled as pooled_by_kernel

    x = (30 + random(1, 2, 300, 64)).bfloat16().to(kernel_device)
    found, wanted = pooled_by_kernel(Source(x, x, x), None), pooled(x.float())
    for pools in (found.q, found.k):
        torch.testing.assert_close(pools, wanted, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.v, wanted[..., 1, :].sum(-1), rtol=2e-3, atol=0)


def test_more_pairs_than_can_be_counted_are_refused():
    pytest.importorskip("triton")
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    tiles = 2**14
    pools = Pools(*(torch.empty(1, 8, tiles, *rest, device="meta") for rest in ((2, 64), (2, 64), ())))
    routing = Routing(torch.empty(1, 1, tiles, tiles, device="meta"), visited=1, budget=0.1)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 pairs .* not 2147483648"):
        route_by_kernel(pools, routing)


class Recorded:
    """Runs kernels, within guarded memory if asked to, and keeps the arguments of each one's last launch."""

    def __init__(self, is_guarded: bool = False):
        self.is_guarded, self.given = is_guarded, {}

    def __call__(self, kernel, grid, *arguments, **options):
        from dma_diffusers.kernels.device.launch import run

        (guarded if self.is_guarded else run)(kernel, grid, *arguments, **options)
        self.given[kernel.fn.__name__] = dict(zip(kernel.arg_names, arguments, strict=False))


def assert_same_lists(found, expected) -> None:
    """Compare block lists up to the end of each."""
    bounds = expected.bounds
    assert torch.equal(found.bounds, bounds.expand(found.bounds.shape))
    length = min(found.indices.shape[-1], expected.indices.shape[-1])
    listed = torch.arange(length, device=bounds.device) < bounds[..., 2:]
    assert (bounds[..., 2] <= length).all()
    assert torch.equal(*(torch.where(listed, x.indices[..., :length], 0) for x in (found, expected)))


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "q_length", "k_length", "own", "dim", "budget"), [
    (1, 1, 100, 100, 1, 64, 1.0), (4, 2, 500, 700, 1, 64, 0.2), (2, 2, 900, 600, 2, 64, 0.01),
    (2, 1, 650, 650, 1, 128, 0.7), (2, 2, 300, 300, 2, 256, 1.0), (1, 1, 300, 300 * TILE, 1, 64, 0.05),
])  # fmt: skip
def test_routes_as_the_reference(
    heads, kv_heads, q_length, k_length, own, dim, budget, is_shared, kernel_device
):
    """Levels agree within the rounding of the products; the same levels give the same block lists."""
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    q_tiles, k_tiles = -(-q_length // TILE), -(-k_length // TILE)
    pools = Pools(
        0.3 * random(2, heads, q_tiles, 2, dim), 0.3 * random(2, kv_heads, k_tiles, 2, dim, seed=1),
        random(2, kv_heads, k_tiles, seed=2).abs(),
    )  # fmt: skip
    for pools_of_x in pools[:2]:
        pools_of_x[..., 1, :].abs_()
    pools = Pools(*(x.to(kernel_device) for x in pools))
    routing = Routing.of(random_phases(1, own, q_tiles, k_tiles), budget).to(kernel_device)
    recorded = Recorded(is_guarded=True)
    found = route_by_kernel(pools, routing, is_shared, launcher=Launcher(recorded))
    by_kernel = recorded.given["score"]["levels"].int()
    is_low = (routing.phases == Phase.LOW).expand(by_kernel.shape)
    assert (by_kernel[~is_low] == -1).all()
    off = (by_kernel - levels(importance(pools, routing.phases)))[is_low].abs()
    assert off.max() <= (1 if kernel_device.type == "cpu" else 16)
    expected = map_of(routed(by_kernel, routing).cpu(), has_high=True)
    assert_same_lists(found, (expected.shared if is_shared else expected).to(kernel_device))
    assert (found.indices >= -1).all()


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_pairs_that_are_not_finite_are_not_upgraded_and_spoil_no_other_row(which, bad, kernel_device):
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    pools = pools_of(random(1, 2, 512, 64) / 8, random(1, 2, 512, 64, seed=1), random(1, 2, 512, 64, seed=2))
    pools = Pools(*(x.clone() for x in pools))
    pools[which][0, 0, 1] = bad
    pools = Pools(*(x.to(kernel_device) for x in pools))
    routing = Routing.of(torch.ones(1, 1, 4, 4, dtype=torch.int), 0.5).to(kernel_device)
    recorded = Recorded(is_guarded=True)
    found = route_by_kernel(pools, routing, launcher=Launcher(recorded))
    assert (found.bounds[..., 2] == 4).all()
    assert (found.bounds[0, 1, :, 0] > 0).any()
    if math.isnan(bad):
        row, column = ((1, slice(None)), (slice(None), 1), (slice(None), 1))[which]
        assert (recorded.given["score"]["levels"][0, 0, row, column] == -1).all()
        assert (recorded.given["score"]["levels"] >= 0).sum() == 28


def routed_call(device, budget=0.2, **changes):
    """A call, the map of its policy alone, and its routing."""
    call = Call(400, 400, 64, heads=4, text=(0, 128), **changes)
    classes = Importance(budget).classes(call.layout)
    phases = visiting_phases(classes, call.layout, token_order=call.token_order)
    static = build_map(classes, call.layout, token_order=call.token_order)
    return call, replace(static, has_high=True).to(device), Routing.of(phases, budget).to(device)


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("changes", [
    {}, {"high": "bf16", "low": "int8"}, {"masks_keys": True, "has_token_order": True},
])  # fmt: skip
def test_attention_visits_what_was_routed(changes, kernel_device):
    """The same block lists as a static map give the same bits; the reference upgrades the same pairs and agrees."""
    from dma_diffusers.kernels.operator import choose

    call, static, routing = routed_call(kernel_device, **changes)
    is_gpu = kernel_device.type == "cuda"
    lowering = choose(kernel_device, 64, call.high, call.low).lowering if is_gpu else "native"
    q, k, v, mask = call.tensors(kernel_device)
    given = {
        "key_mask": mask, "scale": 64**-0.5, "is_causal": False, "token_order": call.token_order_on(kernel_device),
        "fine_mask": call.fine_mask_on(kernel_device),
    }  # fmt: skip
    recorded = Recorded()
    out, lse, _ = launched(
        q, k, v, static, call.high, call.low, **given, lowering=lowering, routing=routing, run=recorded
    )
    upgraded = routed(recorded.given["score"]["levels"].int(), routing)
    counts = ((upgraded == Phase.HIGH) & (routing.phases == Phase.LOW)).sum((1, 2, 3))
    assert (counts > 0).all() and (counts <= routing.allowed(4)).all()
    same_map = map_of(upgraded.cpu(), has_high=True).to(kernel_device)
    as_given = launched(q, k, v, same_map, call.high, call.low, **given, lowering=lowering)
    assert torch.equal(out, as_given[0]) and torch.equal(lse, as_given[1])
    if not is_gpu:
        expected, _ = by_reference(q, k, v, static, call.high, call.low, **given, routing=routing)
        assert relative_l2(out, expected) < 1e-3


@pytest.mark.kernel
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_captures_the_routing(kernel_device):
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    pools = Pools(
        *(x.to(kernel_device) for x in pools_of(*(random(1, 2, 900, 64, seed=seed) for seed in range(3))))
    )
    routing = Routing.of(random_phases(1, 1, 8, 8), 0.2).to(kernel_device)
    expected = route_by_kernel(pools, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = route_by_kernel(pools, routing)
    graph.replay()
    assert_same_lists(found, expected)
