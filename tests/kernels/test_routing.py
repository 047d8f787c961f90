"""Routing: importance is compared with probabilities, upgraded pairs with brute force, kernels with the reference."""

import math
from dataclasses import replace

import pytest
import torch

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import (
    LEVELS,
    SUBTILES,
    Pools,
    Routing,
    importance,
    levels,
    log_mean_exp,
    pooled,
    route,
    routed,
    sample,
)
from dma_diffusers.kernels.routing.reference import pools as pools_of
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, Layout
from dma_diffusers.kernels.tiling.policies import Importance, parse
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


@pytest.mark.parametrize("parts", [1, SUBTILES])
def test_a_pool_is_mean_and_variance_of_counted_tokens(parts):
    x, counted = random(2, 3, 300, 8), random(2, 300) > 0
    counted[1, 128:256] = False
    found = pooled(torch.where(counted[:, None, :, None], x, math.inf), counted, parts)
    for batch, tile, part in ((0, 0, parts - 1), (0, 2, 0), (1, 0, 0)):
        rows = tile * TILE + sample()[part * 32 // parts : (part + 1) * 32 // parts]
        rows = rows[rows < 300]
        tokens = x[batch, :, rows][:, counted[batch, rows]]
        torch.testing.assert_close(found[batch, :, tile * parts + part, 0], tokens.mean(1))
        torch.testing.assert_close(found[batch, :, tile * parts + part, 1], tokens.var(1, unbiased=False))
    assert found[1, :, parts : 2 * parts].isnan().all()
    every = torch.ones(1, 300, dtype=torch.bool)
    torch.testing.assert_close(pooled(x, None, parts), pooled(x, every, parts), equal_nan=True)


def test_a_sample_has_one_of_every_four_tokens_and_every_column_of_a_box_as_often():
    assert sample().div(4, rounding_mode="floor").tolist() == list(range(32))
    for columns in (4, 8, 16):
        assert (sample() % columns).bincount().tolist() == [32 // columns] * columns


@pytest.mark.parametrize(
    ("deviation", "tolerance"), [(0.5, 0.05), (1.0, 0.1), (2.0, 0.3), (8.0, 4.0), (20.0, 11.0)]
)
def test_mean_exponentials_of_a_sub_tile_of_gaussians(deviation, tolerance):
    """Without the bound on the deviation, wide tiles would count for thousands of times as much."""
    drawn = torch.logsumexp(deviation * random(4000, SUBTILE) * math.log(2), dim=-1) / math.log(2)
    predicted = log_mean_exp(torch.tensor(deviation)).item()
    assert predicted == pytest.approx(drawn.mean().item() - math.log2(SUBTILE), abs=tolerance)


@pytest.mark.parametrize("by_mass", [False, True])
def test_importance_is_the_mass_or_the_root_mean_square_probability_times_the_spread_of_values(by_mass):
    """The keys of a sub-tile are Gaussian, and the queries of a tile are all alike."""
    queries, centres = 0.3 * random(1, 2, 6, 1, 64, seed=1), random(1, 2, 24, 1, 64, seed=2)
    deviations = torch.arange(1, 25)[:, None, None] / 48
    q = queries.expand(-1, -1, -1, TILE, -1).flatten(2, 3)
    k = (centres + deviations * random(1, 2, 24, SUBTILE, 64, seed=4)).flatten(2, 3)
    spreads = torch.arange(1, 7)[torch.randperm(6, generator=torch.Generator().manual_seed(0))]
    v = random(1, 2, 6 * TILE, 64, seed=5) * spreads.repeat_interleave(TILE)[:, None]
    probabilities = torch.softmax(q @ k.mT * math.log(2), dim=-1)
    probabilities = probabilities.unflatten(-1, (6, TILE)).unflatten(-3, (6, TILE))
    mass, square = (x.sum(-1).mean(-2) for x in (probabilities, probabilities.square()))
    expected = (
        mass.log2() if by_mass else (SUBTILE * square).log2() / 2 + (spreads * 8).log2()
    )  # √64 channels
    found = importance(pools_of(q, k, v), torch.zeros(1, 1, 6, 6), by_mass)
    assert (found - expected).square().mean().sqrt() < 0.3 < 1 < expected.std()


def test_sub_tiles_that_are_not_seen_or_not_finite_count_for_nothing():
    q, k, v = (random(1, 1, 512, 16, seed=seed) for seed in range(3))
    phases = torch.full((1, 1, 4, 4), int(Phase.LOW))
    seen = torch.ones(1, 512, dtype=torch.bool)
    seen[:, 160:192] = seen[:, 384:] = False
    hidden = importance(pools_of(q, k, v, seen=seen), phases)
    spoilt = k.clone()
    spoilt[:, :, 160:192] = spoilt[:, :, 384:] = math.nan
    not_finite = importance(pools_of(q, spoilt, v), phases)
    assert hidden[..., 3].isnan().all() and not_finite[..., 3].isnan().all()
    torch.testing.assert_close(hidden[..., [0, 2]], not_finite[..., [0, 2]])
    assert hidden[..., :3].isfinite().all()
    shorter = importance(pools_of(q[:, :, :128], k[:, :, :128], v[:, :, :128]), phases[..., :1, :1], True)
    torch.testing.assert_close(shorter, torch.zeros(1, 1, 1, 1), atol=1e-6, rtol=0)


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


def brute_force(phases, levels, routing):
    """The phases after each Q tile's LOW pairs, sorted by level and then by place, had their shares; in loops."""
    after = phases.expand(levels.shape).clone().int()
    for batch, head, q_tile in torch.cartesian_prod(*map(torch.arange, levels.shape[:3])).tolist():
        own = phases[0, min(head, phases.shape[1] - 1), q_tile].tolist()
        level = levels[batch, head, q_tile].tolist()
        ranked = sorted((-level[tile], tile) for tile, phase in enumerate(own) if phase == Phase.LOW)
        high, kept = routing.shares[0, min(head, phases.shape[1] - 1), q_tile].tolist()
        for place, (_, tile) in enumerate(ranked):
            phase = Phase.HIGH if place < high else Phase.LOW if place < kept else routing.rest
            after[batch, head, q_tile, tile] = int(phase)
    return after


@pytest.mark.parametrize("rest", [int(Phase.MEAN), UNVISITED])
@pytest.mark.parametrize("top", [1, 8, LEVELS])
@pytest.mark.parametrize(("budget", "low"), [(0.3, 0.0), (0.1, 0.2), (0.0, 0.4), (0.01, 0.01), (1.0, 0.0)])
def test_each_q_tile_takes_its_most_important_pairs_more_precisely(budget, low, top, rest):
    phases, found = random_phases(1, 3, 5, 9), random_levels(2, 3, 5, 9, top=top)
    routing = Routing.of(phases, budget, low, rest)
    after = routed(found, routing)
    assert torch.equal(after, brute_force(phases, found, routing))
    is_low = (phases == Phase.LOW).expand(after.shape)
    taken = (is_low & (after < Phase.MEAN)).sum(-1)
    visited = (phases != UNVISITED).sum(-1)
    wanted = ((budget + low) * visited.double() + 0.5).int().clamp(min=1)
    assert torch.equal(taken, torch.minimum(wanted.expand(taken.shape), is_low.sum(-1)))
    assert (routing.shares[..., 0] <= routing.shares[..., 1]).all()


def test_shares_are_of_each_q_tiles_visited_pairs():
    """Causal, 6 tiles: a share of .25 of 1 … 6 pairs, rounded, of which one is the diagonal's, and at least one."""
    planned = plan.make(
        parse("importance(budget=0.25, low=0.25, beyond=mean)"), Call(768, 768, 64).layout, True
    )
    assert planned.routing.shares[0, 0].tolist() == [[0, 1], [1, 1], [1, 2], [1, 2], [1, 3], [2, 3]]
    without_low = plan.make(parse("importance(budget=0.25, beyond=skip)"), Call(768, 768, 64).layout, True)
    assert without_low.routing.shares[0, 0].tolist() == [[1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [2, 2]]


@pytest.mark.parametrize(("words", "has_low", "has_mean"), [
    ("importance(budget=0.1)", True, False), ("importance(budget=0.1, beyond=skip)", False, False),
    ("importance(budget=0.1, low=0.2, beyond=skip)", True, False),
    ("importance(budget=0.1, beyond=mean)", False, True),
    ("importance(budget=0, low=0.2, beyond=mean)", True, True),
])  # fmt: skip
def test_a_plan_knows_the_classes_that_routing_may_give(words, has_low, has_mean):
    planned = plan.make(parse(words), Call(1000, 1000, 64, text=(0, 100)).layout)
    static = planned.precision_map
    assert (static.has_high, static.has_low, static.has_mean) == (True, has_low, has_mean)
    pools = pools_of(*(random(1, 2, 1000, 64, seed=seed) for seed in range(3)))
    found = route(pools, planned.routing)
    assert (found.has_high, found.has_low, found.has_mean) == (True, has_low, has_mean)


def test_beyond_is_for_pairs_that_are_low_by_their_position():
    """In a neighbourhood with a HIGH window, far pairs stay left out, near ones stay HIGH, content has the others."""
    layout = Layout(1024, 1024, grid=(8, 8, 16))
    near = parse("neighborhood(window=6x8x16, high=2x8x8)")
    before = plan.make(near, layout)
    united = plan.make(near | parse("importance(budget=0.1, low=0.3, beyond=mean)"), layout)
    assert torch.equal(united.token_order, before.token_order)
    phases = united.routing.phases.int()
    found = routed(random_levels(1, 2, *phases.shape[2:]), united.routing)
    same = (phases != Phase.LOW).expand(found.shape)
    assert torch.equal(found[same], phases.expand(found.shape)[same]) and 0 < same.sum() < same.numel()
    assert (found[~same] == Phase.MEAN).any() and (found[~same] == Phase.HIGH).any()


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
    expected = pools_of(q, k, v, taken, of_keys)
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
    for found, wanted in zip(
        pooled_by_kernel(Source(x, x, x), None), pools_of(*[x.float()] * 3), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=3e-3, atol=0, equal_nan=True)


def test_more_pairs_than_can_be_counted_are_refused():
    pytest.importorskip("triton")
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    tiles = 2**14
    shapes = (tiles, 2, 64), (SUBTILES * tiles, 2, 64), (tiles,)
    pools = Pools(*(torch.empty(1, 8, *shape, device="meta") for shape in shapes))
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


def random_pools(heads, kv_heads, q_tiles, k_tiles, dim, device) -> Pools:
    q, k = random(2, heads, q_tiles, 2, dim), random(2, kv_heads, SUBTILES * k_tiles, 2, dim, seed=1)
    pools = Pools(0.3 * q, 0.3 * k, random(2, kv_heads, k_tiles, seed=2).abs())
    for of_tiles in pools[:2]:
        of_tiles[..., 1, :].abs_()
    pools.k[:, :, -2:] = math.nan  # sub-tiles past the keys
    return Pools(*(x.to(device) for x in pools))


HOW = [{}, {"rest": int(Phase.MEAN), "low": 0.2}, {"rest": UNVISITED, "low": 0.05}, {"rest": int(Phase.MEAN)}]


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("how", HOW[:3], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "q_length", "k_length", "own", "dim", "budget"), [
    (1, 1, 100, 100, 1, 64, 1.0), (4, 2, 500, 700, 1, 64, 0.2), (2, 2, 900, 600, 2, 64, 0.01),
    (2, 1, 650, 650, 1, 128, 0.7), (2, 2, 300, 300, 2, 256, 1.0), (1, 1, 300, 300 * TILE, 1, 64, 0.05),
])  # fmt: skip
def test_routes_as_the_reference(
    heads, kv_heads, q_length, k_length, own, dim, budget, how, is_shared, kernel_device
):
    """Levels agree within the rounding of the products; the same levels give the same block lists and means."""
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    q_tiles, k_tiles = -(-q_length // TILE), -(-k_length // TILE)
    pools = random_pools(heads, kv_heads, q_tiles, k_tiles, dim, kernel_device)
    phases = random_phases(1, own, q_tiles, k_tiles)
    phases[..., 0, 0] = Phase.LOW
    routing = Routing.of(phases, budget, **how).to(kernel_device)
    recorded = Recorded(is_guarded=True)
    found = route_by_kernel(pools, routing, is_shared, launcher=Launcher(recorded))
    by_kernel = recorded.given["score"]["levels"].int()
    is_low = (routing.phases == Phase.LOW).expand(by_kernel.shape)
    assert (by_kernel[~is_low] == -1).all()
    off = (by_kernel - levels(importance(pools, routing.phases, routing.by_mass)))[is_low].abs()
    assert off.max() <= (1 if kernel_device.type == "cpu" else 16)
    expected = map_of(routed(by_kernel, routing).cpu(), has_high=True)
    assert_same_lists(found, (expected.shared if is_shared else expected).to(kernel_device))
    assert (found.indices >= -1).all()
    assert (found.means is None) == (routing.rest != Phase.MEAN)
    if found.means is not None:
        no_means = torch.zeros_like(found.means)
        assert torch.equal(
            found.means, no_means if expected.means is None else expected.means.to(kernel_device)
        )


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rest", [int(Phase.MEAN), UNVISITED])
@pytest.mark.parametrize("is_shared", [False, True])
def test_of_equal_pairs_the_first_are_taken(rest, is_shared, kernel_device):
    """Keys that are all alike leave each Q tile its shares, so that no row sees nothing."""
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    phases = random_phases(1, 1, 5, 300)
    routing = Routing.of(phases, 0.1, 0.15, rest)
    pools = pools_of(
        random(1, 1, 640, 64), torch.zeros(1, 1, 300 * TILE, 64), torch.ones(1, 1, 300 * TILE, 64)
    )
    expected = map_of(brute_force(phases, torch.zeros(1, 1, 5, 300), routing), has_high=True)
    found = route_by_kernel(
        Pools(*(x.to(kernel_device) for x in pools)), routing.to(kernel_device), is_shared
    )
    assert_same_lists(found, (expected.shared if is_shared else expected).to(kernel_device))
    assert expected.means is None or torch.equal(found.means, expected.means.to(kernel_device))


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("how", HOW[:2], ids=str)
def test_pairs_that_are_not_finite_are_not_upgraded_and_spoil_no_other_row(how, which, bad, kernel_device):
    from dma_diffusers.kernels.device.launch import Launcher
    from dma_diffusers.kernels.routing.launch import route as route_by_kernel

    pools = pools_of(random(1, 2, 512, 64) / 8, random(1, 2, 512, 64, seed=1), random(1, 2, 512, 64, seed=2))
    pools = Pools(*(x.clone() for x in pools))
    pools[which][0, 0, slice(4, 8) if which == 1 else 1] = bad
    pools = Pools(*(x.to(kernel_device) for x in pools))
    routing = Routing.of(torch.ones(1, 1, 4, 4, dtype=torch.int), 0.5, **how).to(kernel_device)
    recorded = Recorded(is_guarded=True)
    found = route_by_kernel(pools, routing, launcher=Launcher(recorded))
    assert (found.bounds[..., 2] == (4 if routing.shares is None else 3)).all()
    assert (found.bounds[0, 1, :, 0] > 0).any()
    if math.isnan(bad):
        row, column = ((1, slice(None)), (slice(None), 1), (slice(None), 1))[which]
        assert (recorded.given["score"]["levels"][0, 0, row, column] == -1).all()
        assert (recorded.given["score"]["levels"] >= 0).sum() == 28


def routed_call(device, budget=0.2, how=None, **changes):
    """A call, the map of its policy alone, and its routing."""
    call = Call(400, 400, 64, heads=4, text=(0, 128), **changes)
    how = how or {}
    classes = Importance(budget).classes(call.layout)
    phases = visiting_phases(classes, call.layout, token_order=call.token_order)
    routing = Routing.of(phases, budget, **how)
    if routing.rest is not None:
        phases = torch.where(phases == Phase.LOW, routing.rest, phases)
    static = replace(map_of(phases, has_high=True), has_low=not how or "low" in how)
    return call, static.to(device), routing.to(device)


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"high": "bf16", "low": "int8"}, {"masks_keys": True, "has_token_order": True},
])  # fmt: skip
def test_attention_visits_what_was_routed(changes, how, kernel_device):
    """The same block lists as a static map give the same bits; the reference upgrades the same pairs and agrees."""
    from dma_diffusers.kernels.operator import choose

    call, static, routing = routed_call(kernel_device, how=how, **changes)
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
    assert (counts > 0).all()
    assert routing.shares is not None or (counts <= routing.allowed(4)).all()
    same_map = replace(map_of(upgraded.cpu(), has_high=True), has_low=static.has_low).to(kernel_device)
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
