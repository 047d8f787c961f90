"""Layouts whose text stands in several parts, or among the keys alone: their maps against lists of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels import operator
from dma_diffusers.kernels.plan import make
from dma_diffusers.kernels.tiling.layout import TILE, Layout, tiles
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class, Phase
from dma_diffusers.kernels.tiling.tile_order import TileOrder
from tests.kernels.calls import Call, relative_l2


@st.composite
def layouts(draw) -> Layout:
    """Layouts of up to 4 parts with text; queries are all tokens, or those other than text."""
    parts, length = draw(st.integers(1, 4)), draw(st.integers(2, 420))
    start = draw(st.integers(0, length - 2))
    stop = draw(st.integers(start + 1, length - (start == 0)))
    k_length = parts * length
    q_length = k_length - draw(st.booleans()) * parts * (stop - start)
    return Layout(q_length, k_length, (start, stop), parts=parts)


def tokens(layout: Layout) -> tuple[list[int], list[int]]:
    """The text among the keys, and the key at whose place each query stands."""
    length = layout.k_length // layout.parts
    text = [part * length + token for part in range(layout.parts) for token in range(*layout.text)]
    everything = range(layout.k_length)
    if layout.q_length == layout.k_length:
        return text, list(everything)
    return text, sorted(set(everything) - set(text))


@settings(max_examples=200, deadline=None)
@given(layouts(), st.sampled_from([0, 128, 384, 640]), st.sampled_from([0, 128]))
def test_a_band_follows_the_places_of_the_queries(layout, window, sink):
    text, places = tokens(layout)
    reach = (window - 128) // 256
    expected = torch.full((tiles(layout.q_length), tiles(layout.k_length)), int(Class.LOW))
    for q_tile, k_tile in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        queries = places[q_tile * TILE : (q_tile + 1) * TILE]
        keys = range(k_tile * TILE, min((k_tile + 1) * TILE, layout.k_length))
        has_text = not set(text).isdisjoint(queries) or not set(text).isdisjoint(keys)
        in_band = window > 0 and any(abs(query // TILE - k_tile) <= reach for query in queries)
        if has_text or in_band or k_tile * TILE < sink:
            expected[q_tile, k_tile] = int(Class.HIGH)
    assert torch.equal(Diagonal(window, sink).classes(layout)[0, 0], expected)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_a_mask_of_text_looks_at_the_tiles_of_each_part(layout):
    text, _ = tokens(layout)
    planned = make(Dense(Class.LOW), layout, masks_text=True).precision_map
    first, last = planned.bounds[0, 0, 0, Phase.LOW], planned.bounds[0, 0, 0, Phase.MASKED]
    cut = {tiles(layout.k_length) - 1} if layout.k_length % TILE else set()
    masked = set(planned.indices[0, 0, 0, first:last].tolist())
    assert masked == {token // TILE for token in text} | cut and not planned.has_high


def test_the_text_of_all_parts_has_tiles_of_its_own():
    layout = Layout(700, 700, (150, 220), (14, 40), parts=2)
    text, _ = tokens(layout)
    order = TileOrder(layout, Neighborhood((8, 8)).box(layout.grid))
    assert order.text_tiles == 2 and order.token_order[:140].tolist() == text
    on_grid = order.coordinates[0] >= 0
    place = order.coordinates[0, on_grid] * 40 + order.coordinates[1, on_grid]
    others = torch.tensor(sorted(set(range(700)) - set(text)))
    assert torch.equal(order.token_order[on_grid].long(), others[place.long()])


@pytest.mark.parametrize("policy", [Diagonal(), Neighborhood((8, 8), high=(3, 3))], ids=str)
def test_parts_are_one_sequence_in_another_order(policy):
    """Text and grid of two parts give what they give in one, at the same tiles, or tokens, of HIGH precision."""
    grid = (16, 32) if policy.on_grid else ()
    q, k, v, _ = Call(768, 768, 64, heads=2).tensors()
    order = torch.cat(
        (torch.arange(128), 384 + torch.arange(128), 128 + torch.arange(256), torch.arange(512, 768))
    )
    options = {"high": "bf16", "low": "int8", "lowering": "reference", "grid": grid}
    policy = policy if policy.on_grid else Diagonal(0, 0)

    def attend(*tensors, **text):
        return operator.attention(*tensors, policy=policy, **options, **text).out

    together = attend(*(x[:, :, order] for x in (q, k, v)), text_stop=256)
    in_parts = attend(q, k, v, text_stop=128, parts=2)[:, :, order]
    in_one = attend(q, k, v, text_stop=256)[:, :, order]
    assert relative_l2(in_parts, together) < 1e-3 < relative_l2(in_one, together) / 3


def test_causal_queries_stand_at_the_first_keys():
    """A causal mask compares numbers of queries and keys, whatever is text."""
    layout = Layout(560, 600, (0, 40))
    high = torch.eye(5, dtype=torch.bool)
    high[0] = high[:, 0] = True
    assert torch.equal(Diagonal(128, 0).classes(layout, is_causal=True)[0, 0] == Class.HIGH, high)


@pytest.mark.parametrize(("arguments", "words"), [
    ((100, 100, (0, 10), (), 3), "100 keys are not 3 equal parts"),
    ((100, 100, (0, 10), (), 0), "100 keys are not 0 equal parts"),
    ((100, 100, (0, 60), (), 2), "text range (0, 60) does not lie within the 50 keys of each of the 2 parts"),
    ((100, 100, (0, 101)), "text range (0, 101) does not lie within the 100 keys"),
    ((70, 100, (0, 10), (), 2), "2 parts need as many queries as keys, or as keys other than text: got 70 queries"),
    ((80, 100, (0, 20), (8, 10)), "got 80 and 100: a policy on the grid needs the text among the queries too"),
    ((100, 100, (0, 20), (8, 10), 2), "of the call's 100, 40 of them text, 60 are left for it"),
])  # fmt: skip
def test_contradictions_are_one_line(arguments, words):
    with pytest.raises(ValueError) as raised:
        Layout(*arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)
