"""Laws of the shares that each Q tile has of its pairs; hypothesis searches for counterexamples."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.routing.reference import LEVELS, SUBTILES, Pools, Routing, routed
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase, map_of


@st.composite
def routings(draw) -> tuple[torch.Tensor, Routing]:
    """Levels, int32 `[B, H, q_tiles, k_tiles]`, many of them equal, and a routing with shares."""
    batch, heads, q_tiles = (draw(st.integers(1, most)) for most in (2, 3, 4))
    k_tiles = draw(st.sampled_from([1, 2, 31, 32, 33, 70, 255, 256, 257, 300]))
    own = draw(st.sampled_from([1, heads]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    phases = torch.randint(0, UNVISITED + 1, (1, own, q_tiles, k_tiles), generator=generator)
    is_low = torch.rand(phases.shape, generator=generator) < draw(st.sampled_from([0.1, 0.9, 1.0]))
    phases = torch.where(is_low, int(Phase.LOW), phases)
    top = draw(st.sampled_from([1, 2, 50, LEVELS]))
    levels = torch.randint(-1, top, (batch, heads, q_tiles, k_tiles), generator=generator, dtype=torch.int32)
    levels = torch.where(phases == Phase.LOW, levels, -1)
    budget = draw(st.floats(0, 1))
    low = draw(st.just(0.0) | st.floats(0, 1 - budget))
    rest = draw(st.sampled_from([int(Phase.MEAN), UNVISITED]))
    return levels, Routing.of(phases, budget, low, rest)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(routings())
def test_taken_pairs_are_as_many_as_the_shares_and_none_that_is_left_is_more_important(drawn):
    levels, routing = drawn
    phases, after = routing.phases.expand(levels.shape), routed(levels, routing)
    offered = phases == Phase.LOW
    assert torch.equal(after[~offered], phases[~offered].int())
    of_class = [offered & (after == kind) for kind in (Phase.HIGH, Phase.LOW, routing.rest)]
    assert torch.equal(sum(kind.int() for kind in of_class), offered.int())
    high, kept = routing.shares.expand(*levels.shape[:2], -1, -1).unbind(-1)
    count = offered.sum(-1)
    assert torch.equal(of_class[0].sum(-1), torch.minimum(high, count))
    assert torch.equal(of_class[0].sum(-1) + of_class[1].sum(-1), torch.minimum(kept, count))
    place = torch.arange(levels.shape[-1])
    key = levels.double() * levels.shape[-1] - place  # equal levels differ by their places
    for better, worse in ((0, 1), (0, 2), (1, 2)):
        least = torch.where(of_class[better], key, torch.inf).amin(-1)
        most = torch.where(of_class[worse], key, -torch.inf).amax(-1)
        assert (least > most).all()


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(routings(), st.booleans())
def test_kernels_take_the_pairs_that_the_reference_takes(kernel_device, drawn, is_shared):
    from dma_diffusers.kernels.device.launch import Launcher, run
    from dma_diffusers.kernels.routing.launch import route

    def run_with_levels(kernel, grid, *arguments, **options):
        if kernel.fn.__name__ == "score":
            arguments[kernel.arg_names.index("levels")].copy_(levels)
        else:
            run(kernel, grid, *arguments, **options)

    levels, routing = drawn
    batch, heads, q_tiles, k_tiles = levels.shape
    pools = Pools(
        torch.empty(batch, heads, q_tiles, 2, 64, device=kernel_device),
        torch.empty(batch, 1, SUBTILES * k_tiles, 2, 64, device=kernel_device),
        torch.empty(batch, 1, k_tiles, device=kernel_device),
    )  # fmt: skip
    found = route(pools, routing.to(kernel_device), is_shared, Launcher(run_with_levels))
    whole = map_of(routed(levels, routing), has_high=True)
    expected = whole.shared if is_shared else whole
    assert torch.equal(found.bounds.cpu(), expected.bounds)
    length = min(found.indices.shape[-1], expected.indices.shape[-1])
    listed = torch.arange(length) < expected.bounds[..., 2:]
    lists = (torch.where(listed, x.indices[..., :length].cpu(), 0) for x in (found, expected))
    assert torch.equal(*lists)
    if routing.rest == Phase.MEAN:
        no_means = torch.zeros_like(found.means.cpu())
        assert torch.equal(found.means.cpu(), no_means if whole.means is None else whole.means)
    else:
        assert found.means is None
