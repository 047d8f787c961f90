"""Maps and policies against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.layout import Layout
from dma_diffusers.kernels.maps import Class, Phase, build_map
from dma_diffusers.kernels.policies import Dense, Diagonal
from tests.kernels.calls import Call, is_high

HIGH, LOW, SKIP = Class.HIGH, Class.LOW, Class.SKIP


def walk(precision_map, q_tile, batch=0, head=0):
    """The KV tiles of each phase of one Q tile."""
    bounds = [0, *precision_map.bounds[batch, head, q_tile].tolist()]
    indices = precision_map.indices[batch, head, q_tile].tolist()
    return [indices[bounds[p] : bounds[p + 1]] for p in Phase]


def test_phases_hold_sorted_tiles_of_their_class():
    classes = torch.tensor([[LOW, HIGH, SKIP, LOW], [SKIP, SKIP, SKIP, SKIP], [HIGH, HIGH, LOW, HIGH]])
    precision_map = build_map(classes[None, None], Layout(384, 512))
    assert walk(precision_map, 0) == [[1], [0, 3], []]
    assert walk(precision_map, 1) == [[], [], []]
    assert walk(precision_map, 2) == [[0, 1, 3], [2], []]
    assert precision_map.indices.dtype == precision_map.bounds.dtype == torch.int32


def test_end_of_the_keys_is_masked():
    precision_map = build_map(Dense(LOW).classes(Layout(256, 300)), Layout(256, 300))
    assert walk(precision_map, 0) == walk(precision_map, 1) == [[], [0, 1], [2]]


def test_skipped_end_stays_skipped():
    precision_map = build_map(torch.tensor([[[[HIGH, SKIP]]]]), Layout(128, 200))
    assert walk(precision_map, 0) == [[0], [], []]


def test_batches_and_heads_have_lists_of_their_own():
    classes = torch.stack([torch.full((2, 2), LOW), torch.full((2, 2), HIGH)])[None]
    precision_map = build_map(classes, Layout(256, 256))
    assert walk(precision_map, 1, head=0) == [[], [0, 1], []]
    assert walk(precision_map, 1, head=1) == [[0, 1], [], []]


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
        high, low, masked = walk(precision_map, q_tile)
        last_query = min(q_tile * 128 + 127, q_length - 1)
        visited = [j for j in range(-(-k_length // 128)) if not is_causal or j * 128 <= q_tile * 128 + 127]
        assert sorted(high + low + masked) == visited
        for j in visited:
            cut = (j + 1) * 128 > k_length or (is_causal and j == q_tile)
            assert (j in masked) == cut
            assert (j in low) == (not expected[last_query, j * 128])


def test_negative_width_is_refused():
    with pytest.raises(ValueError, match="window must be 0 tokens or more, got -1"):
        Diagonal(window=-1)
    with pytest.raises(ValueError, match="sink must be 0 tokens or more, got -128"):
        Diagonal(sink=-128)
