"""Routing's kernels are compared with the reference, and attention with that of the map that they chose."""

import math
from dataclasses import replace

import pytest
import torch

from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import SUBTILES, Pools, Routing, importance, levels, routed
from dma_diffusers.kernels.routing.reference import pools as pools_of
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.policies import Importance
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase, map_of, visiting_phases
from tests.kernels.calls import Call, by_reference, launched, relative_l2
from tests.kernels.guarded import guarded
from tests.kernels.routings import brute_force, random, random_phases


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
    if rest == Phase.MEAN:
        assert torch.equal(found.means, expected.means.to(kernel_device))


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
    same_map = replace(map_of(upgraded.cpu(), has_high=True), has_low=static.has_low)
    if (
        routing.rest == Phase.MEAN and same_map.means is None
    ):  # no pair is left to be taken so, by the same kernel
        same_map = replace(same_map, means=torch.zeros(1, 1, upgraded.shape[2], 1, dtype=torch.int32))
    same_map = same_map.to(kernel_device)
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
