"""Routing in torch: importance is compared with probabilities, and the pairs that it takes with brute force."""

import math

import pytest
import torch

from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.routing.reference import (
    LEVELS,
    SUBTILES,
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
from dma_diffusers.kernels.tiling.precision_map import (
    UNVISITED,
    Phase,
    build_map,
    visiting_phases,
)
from tests.kernels.calls import Call, relative_l2
from tests.kernels.routings import brute_force, random, random_levels, random_phases


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


@pytest.mark.parametrize("pair", [("int8/bf16", "int4/bf16"), ("mxint8/bf16", "mxint4/bf16")])
def test_importance_gives_pairs_eight_bits_or_four(pair):
    """The two widths of low-bit FlashAttention, per tile: the more pairs have 8 bits, the smaller the error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 640, 64, generator=generator) for _ in range(3))
    q[:, :, :128], k[:, :, 256:384] = 3 * q[:, :, :128], 3 * k[:, :, 256:384]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(policy):
        found = operator.attention(
            q, k, v, high=pair[0], low=pair[1], policy=policy, lowering="reference"
        ).out
        return relative_l2(found, wanted)

    errors = [
        error("dense(everywhere=low)"), error("importance(budget=0.1)"), error("importance(budget=0.5)"),
        error("dense(everywhere=high)"),
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[0] > 3 * errors[3] > 0
    assert errors[1] < 0.8 * errors[0]
