"""Attention over several processes (gloo on the CPU) by Diffusers' context parallelism is attention in one."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from dma_diffusers.families import FAMILIES
from dma_diffusers.parallel import Spread, splits_text
from tests.dma_diffusers.parallel_cases import CASES, GRIDS, MODELS, results

RING, ULYSSES, BOTH = (2, 1), (1, 2), (2, 2)
DEGREES = {"ring": RING, "Ulysses": ULYSSES, "both": BOTH}
BY_BOTH = (
    "keys_have_means_of_their_own", "masks_are_each_chunk_s_own", "heads_and_chunks_have_their_policies",
    "stock: flux", "stock: flux2", "stock: qwen", "stock: wan",
)  # fmt: skip
REFUSED = (
    "needs the whole grid, of which a ring shows one chunk at a time: "
    "use Ulysses, ContextParallelConfig(ulysses_degree=2)"
)


def found(degrees: tuple[int, int], name: str) -> list[dict]:
    """Gives what a case returned, for each process."""
    all_results = results(degrees, BY_BOTH) if degrees == BOTH else results(degrees)
    return [each[name] for each in all_results]


@pytest.mark.parametrize("degrees", DEGREES.values(), ids=DEGREES)
def test_the_log_sum_exp_is_corrected_for_each_chunk_s_mean_of_keys(degrees):
    for each in found(degrees, "keys_have_means_of_their_own"):
        assert each["several"] < 1.1 * each["alone"] < 0.05
        assert degrees == ULYSSES or each["uncorrected"] > 0.3


@pytest.mark.parametrize("degrees", DEGREES.values(), ids=DEGREES)
def test_masks_are_each_chunk_s_own(degrees):
    assert all(each["error"] < 1e-6 for each in found(degrees, "masks_are_each_chunk_s_own"))


def test_heads_have_their_windows_and_chunks_their_bands_and_sinks():
    """Ulysses gives each process half of the heads; a ring's first chunk alone has the sink, the own one the band."""
    shared = " | importance(budget=0.25)"
    mine, others = "diagonal(window=0/128/384/640, sink={})", "diagonal(window=0, sink={})"
    name = "heads_and_chunks_have_their_policies"
    assert [each["policies"] for each in found(RING, name)] == [
        [mine.format(256) + shared, others.format(0) + shared],
        [mine.format(0) + shared, others.format(256) + shared],
    ]
    assert [each["policies"] for each in found(ULYSSES, name)] == [
        [f"diagonal(window={windows}, sink=256)" + shared] for windows in ("0/128", "384/640")
    ]
    assert [each["policies"] for each in found(BOTH, name)] == [
        [f"diagonal(window={windows}, sink={sink})" + shared, others.format(256 - sink) + shared]
        for sink in (256, 0)
        for windows in ("0/128", "384/640")
    ]
    for degrees in DEGREES.values():
        for each in found(degrees, name):
            assert each["texts"] == [(0, 8, degrees[1])] * degrees[0]


@pytest.mark.parametrize(("degrees", "name"), [
    *((degrees, name) for degrees in (RING, ULYSSES) for name in MODELS if (degrees, name) != (RING, "ltx")),
    *((BOTH, name) for name in ("flux", "flux2", "qwen", "wan")),
], ids=str)  # fmt: skip
def test_a_model_with_exact_attention_is_stock(degrees, name):
    """Its text is where it is said to be. Applied before parallelism is enabled, and after it."""
    kinds = [
        f"{kind} over 2 GPUs"
        for kind, degree in zip(("Ulysses", "ring"), degrees[::-1], strict=True)
        if degree > 1
    ]
    for each in found(degrees, f"stock: {name}"):
        assert each["error"] < 1e-6
        assert each["text"] and each["texts_agree"] and each["has_text"] == (name not in ("wan", "ltx"))
        assert each["calls"] == degrees[0] * each["expected"] and each["intercepted"] == 2 * each["expected"]
        assert f"note: context parallelism: {' and '.join(kinds)}\n" in each["receipt"] + "\n"


@pytest.mark.parametrize("name", GRIDS)
def test_on_a_grid_every_tile_is_that_of_one_process(name):
    """With low bits, which differ between tiles: one token in another tile would show."""
    for each in found(ULYSSES, f"boxes: {name}"):
        assert each["several"] < 0.01 * each["low"] and each["low"] > 1e-5


def test_a_ring_has_no_grid():
    for each in found(RING, "grids_are_refused"):
        assert len(each["said"]) == 2 and all(REFUSED in said for said in each["said"])
    for name in GRIDS:
        assert all(REFUSED in each["error"] for each in found(RING, f"boxes: {name}"))


def test_restored_models_are_stock():
    for each in found(ULYSSES, "restored_models_are_stock"):
        assert max(each["errors"]) < 1e-6


def test_calls_fall_back_to_stock_over_the_same_processes():
    for each in found(ULYSSES, "fallbacks_are_stock"):
        assert max(each["errors"]) < 1e-6 and each["fallbacks"] == {"fewer than 10000 keys": 2}
    for each in found(RING, "fallbacks_are_stock"):
        assert each["said"] == (
            "fewer than 10000 keys: this call falls back to stock attention, which has no ring in PyTorch's own "
            "backend: use Ulysses (ulysses_degree) in its place, or another backend (set_attention_backend)"
        )


@pytest.mark.parametrize("degrees", [RING, ULYSSES], ids=["ring", "Ulysses"])
def test_a_call_is_as_long_as_all_its_parts(degrees):
    assert all(each["intercepted"] == [1, 1, 1] for each in found(degrees, "lengths_are_all_processes"))


def test_parts_may_differ_in_length_without_text():
    name = "parts_of_different_lengths"
    for degrees, option in ((RING, "ring_anything"), (ULYSSES, "ulysses_anything")):
        reason = f"text or a mask under {option}: parts may be of different lengths"
        for each in found(degrees, name):
            assert each["error"] < 1e-6 and each["reasons"] == ["", reason]
    windows = [each["policies"] for each in found(ULYSSES, name)]
    assert windows == [["diagonal(window=0/0, sink=0)"], ["diagonal(window=128/128, sink=0)"]]


def test_refusals_say_what_to_do():
    heads = "Ulysses shares heads out: 2 GPUs must divide them, got 3 heads; choose another ulysses_degree"
    assert all(heads in each["said"] for each in found(ULYSSES, "heads_must_be_divided"))
    assert all(each["said"] == "" for each in found(RING, "heads_must_be_divided"))
    for degrees in (RING, ULYSSES):
        for each in found(degrees, "masks_of_all_tokens_are_refused"):
            assert (
                "a mask over 324 keys where each of 2 GPUs has 162: split it in the cp_plan" in each["said"]
            )
        for each in found(degrees, "backends_without_parallelism_are_refused"):
            assert "stock attention's backend 'flex' has no context parallelism" in each["said"]


def test_compiled_models_are_eager_ones():
    """Ulysses in one graph; a ring breaks it at each attention call."""
    for name in ("compiled", "compiled in pieces"):
        assert all(each["compiled"] < 1e-6 < 1e-5 < each["low"] for each in found(ULYSSES, name))
    assert all(each["compiled"] < 1e-6 < 1e-5 < each["low"] for each in found(RING, "compiled in pieces"))
    assert all(
        "ring attention is not compiled: use Ulysses" in each["error"] for each in found(RING, "compiled")
    )


@pytest.mark.parametrize("degrees", [RING, ULYSSES], ids=["ring", "Ulysses"])
def test_processes_make_a_bad_step_again_together(degrees):
    """Only those modules turn whose own heads or chunks are bad. Over a ring there is no stock attention."""
    first, second = found(degrees, "guarded")
    high, stock = "every tile is HIGH from now on", "stock attention from now on"
    none = "its output was not finite; over a ring there is no stock attention to turn to"
    assert first["asked"]["finite"] and second["asked"]["finite"]
    assert first["asked"]["calls"] == second["asked"]["calls"] == 6  # of three modules
    assert (first["asked"]["turned"], second["asked"]["turned"]) == ([high], [])
    assert first["high"]["finite"] == second["high"]["finite"] == (degrees == ULYSSES)
    assert [words.split(" its ")[-1] for words in first["high"]["turned"]] == (
        [high, stock] if degrees == ULYSSES else [high, none.removeprefix("its ")]
    )
    assert second["high"]["turned"] == []


def test_no_case_failed():
    refused = {RING: ("boxes", "compiled", "memories", "restored", "stock: ltx"), ULYSSES: (), BOTH: ()}
    for degrees, names in refused.items():
        for name in BY_BOTH if degrees == BOTH else CASES:
            is_refused = name.startswith(names) and name != "compiled in pieces" if names else False
            assert is_refused or not isinstance(found(degrees, name)[0].get("error", 0), str), name


def test_text_that_is_split_with_the_other_tokens_is_where_it_was():
    """MiniMax-H3 splits one packed sequence: Ulysses puts it together again, a ring's chunks differ."""
    assert not splits_text(torch.nn.Module.__new__(diffusers.MiniMaxH3Transformer3DModel))
    assert splits_text(torch.nn.Module.__new__(diffusers.FluxTransformer2DModel))
    assert splits_text(torch.nn.Module.__new__(diffusers.ChromaTransformer2DModel))
    q = torch.empty(1, 4, 100, 32)
    for ring, ulysses in ((1, 4), (4, 1)):
        context = SimpleNamespace(
            ring_degree=ring, ulysses_degree=ulysses, ulysses_anything=False, ring_anything=False,
            _ulysses_local_rank=0, _ring_local_rank=0,
        )  # fmt: skip
        spread = Spread(context, None, splits_text=False)
        text = spread.text_range(FAMILIES["FluxTransformer2DModel"], 100, 100, 100, 0, 120, None)
        assert text == (0, 120)
        is_refused = "a ring of whose chunks only the first or the last have text" in spread.why_stock(
            q, q, None, text
        )
        assert is_refused == (ring > 1)
        arguments = spread.arguments({"policy": "diagonal(window=128)", "text_start": 0, "text_stop": 120}, 1)
        assert arguments["parts"] == 1


def test_memories_are_those_of_one_process():
    for each in found(ULYSSES, "memories_are_those_of_one_process"):
        assert each["several"] < 1e-6
        of_both = "importance was found in 2 calls, and remembered in 4"
        assert all(of_both in notes for notes in each["notes"])


def test_a_ring_s_chunks_have_memories_of_their_own():
    for each in found(RING, "chunks_have_memories_of_their_own"):
        assert each["first step"] == 0
        assert all(of_call == [False, True, True] for of_call in each["read"])
        assert all(len(set(of_call)) == 1 for of_call in each["memories"])
        assert len({memory for memory, *_ in each["memories"]}) == len(each["memories"])
        of_both = "importance was found in 2 calls, and remembered in 4"
        assert 2 * sum(of_both in notes for notes in each["notes"]) == len(each["memories"])
