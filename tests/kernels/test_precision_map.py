"""Precision maps and their policies against brute force."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import (
    LOOPS,
    UNVISITED,
    Class,
    Phase,
    PrecisionMap,
    build_map,
    visiting_phases,
)
from tests.kernels.calls import Call
from tests.kernels.oracle import is_high

HIGH, LOW, MEAN, SKIP = Class


def block_list(precision_map, q_tile, batch=0, head=0):
    """The KV tiles of each phase of one Q tile."""
    bounds = [0, *precision_map.bounds[batch, head, q_tile].tolist()]
    indices = precision_map.indices[batch, head, q_tile].tolist()
    return [indices[bounds[p] : bounds[p + 1]] for p in LOOPS]


def mean_tiles(precision_map, q_tile, batch=0, head=0):
    """The KV tiles that one Q tile takes through their means."""
    if not precision_map.has_mean:
        return []
    words = [word % 2**32 for word in precision_map.means[batch, head, q_tile].tolist()]
    return [32 * place + bit for place, word in enumerate(words) for bit in range(32) if word >> bit & 1]


def test_phases_hold_sorted_tiles_of_their_class():
    classes = torch.tensor([[LOW, HIGH, SKIP, LOW], [SKIP, SKIP, SKIP, SKIP], [HIGH, HIGH, LOW, HIGH]])
    precision_map = build_map(classes[None, None], Layout(384, 512))
    assert block_list(precision_map, 0) == [[1], [0, 3], []]
    assert block_list(precision_map, 1) == [[], [], []]
    assert block_list(precision_map, 2) == [[0, 1, 3], [2], []]
    assert precision_map.indices.dtype == precision_map.bounds.dtype == torch.int32


def test_end_of_the_keys_is_masked():
    precision_map = build_map(Dense(LOW).classes(Layout(256, 300)), Layout(256, 300))
    assert block_list(precision_map, 0) == block_list(precision_map, 1) == [[], [0, 1], [2]]


def test_empty_slots_are_masked():
    """MASKED tiles are those with a slot in which no token stands, and no others."""
    token_order = torch.arange(500)
    token_order[[130, 499]] = -1
    precision_map = build_map(Dense(LOW).classes(Layout(500, 500)), Layout(500, 500), token_order=token_order)
    assert block_list(precision_map, 0) == block_list(precision_map, 3) == [[], [0, 2], [1, 3]]
    whole = build_map(Dense(LOW).classes(Layout(512, 512)), Layout(512, 512), token_order=torch.arange(512))
    assert block_list(whole, 0) == [[], [0, 1, 2, 3], []]


def test_skipped_end_stays_skipped():
    precision_map = build_map(torch.tensor([[[[HIGH, SKIP]]]]), Layout(128, 200))
    assert block_list(precision_map, 0) == [[0], [], []]


def test_batches_and_heads_have_lists_of_their_own():
    classes = torch.stack([torch.full((2, 2), LOW), torch.full((2, 2), HIGH)])[None]
    precision_map = build_map(classes, Layout(256, 256))
    assert block_list(precision_map, 1, head=0) == [[], [0, 1], []]
    assert block_list(precision_map, 1, head=1) == [[0, 1], [], []]


@settings(max_examples=60, deadline=None)
@given(
    q_length=st.integers(1, 600), k_length=st.integers(1, 5000), is_causal=st.booleans(), heads=st.integers(1, 2),
    seed=st.integers(0, 2**31), empties=st.integers(0, 3), cuts=st.booleans(),
)  # fmt: skip
def test_classes_become_lists_and_bits(q_length, k_length, is_causal, heads, seed, empties, cuts):
    """Every pair of tiles stands in one list, in the bits of the means, or nowhere."""
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(q_length, k_length)
    q_tiles, k_tiles = tiles(q_length), tiles(k_length)
    classes = torch.randint(0, len(Class), (1, heads, q_tiles, k_tiles), generator=generator)
    token_order = torch.arange(k_length) if empties else None
    for empty in torch.randint(0, k_length, (empties,), generator=generator).tolist():
        token_order[empty] = -1
    cut = torch.rand(q_tiles, k_tiles, generator=generator) < 0.2 if cuts else None
    precision_map = build_map(classes, layout, is_causal, token_order, cut)
    is_visited_high = False
    for head, q_tile, k_tile in product(range(heads), range(q_tiles), range(k_tiles)):
        kind = Class(classes[0, head, q_tile, k_tile].item())
        is_diagonal = is_causal and k_tile == q_tile
        if is_causal and k_tile > q_tile:
            kind = SKIP
        elif is_diagonal and kind is MEAN:
            kind = LOW
        end = min(128 * (k_tile + 1), k_length)
        is_cut = end < 128 * (k_tile + 1) or is_diagonal or (cuts and cut[q_tile, k_tile].item())
        if token_order is not None:
            is_cut |= (token_order[128 * k_tile : end] < 0).any().item()
        loop = Phase.MASKED if is_cut else Phase(int(kind))
        expected = {SKIP: UNVISITED, MEAN: Phase.MEAN}.get(kind, loop)
        is_visited_high |= kind is HIGH
        lists = [*block_list(precision_map, q_tile, head=head), mean_tiles(precision_map, q_tile, head=head)]
        assert [phase for phase, found in enumerate(lists) if k_tile in found] == [expected][
            : expected < UNVISITED
        ]
        assert all(found == sorted(set(found)) for found in lists)
    assert precision_map.has_high == is_visited_high
    phases = visiting_phases(classes, layout, is_causal, token_order, cut)
    assert precision_map.has_mean == bool((phases == Phase.MEAN).any())
    if precision_map.has_mean:
        assert precision_map.means.dtype == torch.int32 and precision_map.means.shape[-1] == -(-k_tiles // 32)
        assert precision_map.shared.means is precision_map.means
        assert torch.equal(precision_map.to(torch.device("cpu")).means, precision_map.means)


def test_a_map_of_all_means_has_empty_lists():
    layout = Layout(300, 33 * 128)
    precision_map = build_map(Dense(MEAN).classes(layout), layout)
    assert precision_map.means.tolist() == [[[[-1, 1]] * 3]]
    assert not precision_map.bounds.any() and not precision_map.has_high and not precision_map.has_low
    assert not build_map(Dense(LOW).classes(layout), layout).has_mean


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"classes must be .* got \[1, 1, 1, 2\]"):
        build_map(torch.zeros(1, 1, 1, 2, dtype=torch.int), Layout(256, 256))


@pytest.mark.parametrize(
    ("window", "is_causal", "expected"),
    [(0, False, []), (128, False, [3]), (384, False, [2, 3, 4]), (640, False, [1, 2, 3, 4, 5]),
     (129, False, [2, 3, 4]), (128, True, [3]), (256, True, [2, 3]), (384, True, [1, 2, 3])],
)  # fmt: skip
def test_widths_of_the_band(window, is_causal, expected):
    layout = Layout(1024, 1024)
    classes = Diagonal(window, sink=0).classes(layout, is_causal)
    visible = range(4 if is_causal else 8)
    assert [j for j in visible if classes[0, 0, 3, j] == HIGH] == expected


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_width_for_each_head(is_causal):
    layout, windows = Layout(700, 700, (0, 30)), (384, 0, 100_000)
    classes = Diagonal(windows, sink=0).classes(layout, is_causal)
    assert classes.shape == (1, 3, 6, 6)
    for head, window in enumerate(windows):
        assert torch.equal(classes[:, head], Diagonal(window, sink=0).classes(layout, is_causal)[:, 0])


@settings(max_examples=60, deadline=None)
@given(
    q_length=st.integers(1, 700), k_length=st.integers(1, 700), window=st.integers(0, 700),
    sink=st.integers(0, 400), is_causal=st.booleans(), data=st.data(),
)  # fmt: skip
def test_map_equals_brute_force(q_length, k_length, window, sink, is_causal, data):
    start = data.draw(st.integers(0, k_length))
    stop = data.draw(st.integers(start, k_length))
    call = Call(q_length, k_length, 64, window=window, sink=sink, text=(start, stop), is_causal=is_causal)
    precision_map, expected = call.map(), is_high(call)
    for q_tile in range(-(-q_length // 128)):
        high, low, masked = block_list(precision_map, q_tile)
        last_query = min(q_tile * 128 + 127, q_length - 1)
        visited = [j for j in range(-(-k_length // 128)) if not is_causal or j * 128 <= q_tile * 128 + 127]
        assert sorted(high + low + masked) == visited
        for j in visited:
            cut = (j + 1) * 128 > k_length or (is_causal and j == q_tile)
            assert (j in masked) == cut
            is_high_tile = (j in high) or (j in masked and precision_map.has_high)
            assert is_high_tile == expected[last_query, j * 128]


def test_negative_width_is_refused():
    with pytest.raises(ValueError, match="window must be a whole number of tokens, 0 or more, got -1"):
        Diagonal(window=-1)
    with pytest.raises(ValueError, match="window must be a whole number of tokens, 0 or more, got -2"):
        Diagonal(window=(128, -2))
    with pytest.raises(ValueError, match="sink must be a whole number of tokens, 0 or more, got -128"):
        Diagonal(sink=-128)


def random_map(seed: int, batch: int, heads: int, q_length: int, k_length: int, is_causal: bool):
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(q_length, k_length)
    shape = (batch, heads, tiles(q_length), tiles(k_length))
    return build_map(torch.randint(0, len(Class), shape, generator=generator), layout, is_causal)


@pytest.mark.parametrize("seed", range(20))
def test_a_shared_list_visits_for_each_block_what_its_q_tile_visits(seed):
    q_length, k_length = 64 * (1 + seed * 7 % 23), 1 + seed * 97 % 1500
    precision_map = random_map(seed, 1 + seed % 2, 1 + seed % 3, q_length, k_length, seed % 4 == 0)
    shared = precision_map.shared
    assert shared.indices.shape[-2] == -(-tiles(q_length) * 2 // 3)
    for batch, head in product(*map(range, precision_map.bounds.shape[:2])):
        for block in range(2 * tiles(q_length)):
            entries = block_list(shared, block // 3, batch, head)
            for phase, own_tiles in enumerate(block_list(precision_map, block // 2, batch, head)):
                visited = [entry & 0xFFFFFF for entry in entries[phase] if entry >> (24 + block % 3) & 1]
                assert visited == own_tiles


def test_a_shared_list_holds_a_tile_once_a_phase_and_only_if_it_is_visited():
    shared = random_map(3, 1, 2, 640, 900, False).shared
    for _, head, program in product(*map(range, shared.bounds.shape[:3])):
        for entries in block_list(shared, program, head=head):
            assert all(0 < entry >> 24 < 8 for entry in entries)
            found = [entry & 0xFFFFFF for entry in entries]
            assert found == sorted(set(found))


def test_heads_with_other_windows_have_their_own_shared_lists():
    layout = Layout(600, 600)
    shared = build_map(Diagonal((384, 0, 384, 128)).classes(layout), layout).shared
    assert shared.indices.is_contiguous() and shared.bounds.shape == (1, 4, 4, 3)
    for head, window in enumerate((384, 0, 384, 128)):
        alone = build_map(Diagonal(window).classes(layout), layout).shared
        for program in range(4):
            assert block_list(shared, program, head=head) == block_list(alone, program)


def test_transposed_lists_name_the_same_pairs():
    torch.manual_seed(0)
    classes = torch.randint(0, 4, (2, 3, 4, 5))
    precision_map = build_map(classes, Layout(500, 600))
    undefined = torch.arange(precision_map.indices.shape[-1]) >= precision_map.bounds[..., -1:]
    precision_map = replace(precision_map, indices=precision_map.indices.masked_fill(undefined, -1))
    transposed = precision_map.transposed(5)

    def pairs(lists: PrecisionMap) -> set[tuple[int, ...]]:
        """Batch entry, head, list, tile and phase of every entry."""
        return {
            (*place, int(lists.indices[place][entry]), phase)
            for place in product(*map(range, lists.bounds.shape[:-1]))
            for entry in range(int(lists.bounds[place][-1]))
            for phase in [int((entry >= lists.bounds[place]).sum())]
        }

    expected = {(b, h, k, q, phase) for b, h, q, k, phase in pairs(precision_map)}
    assert pairs(transposed) == expected and len(expected) > 40
    ascending = transposed.indices[0, 0, 0, : int(transposed.bounds[0, 0, 0, 0])]
    assert torch.equal(ascending, ascending.sort().values)
