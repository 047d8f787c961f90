"""`bench neighborhood`: what it asks of each entry, its comparisons, its table and its command."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.eval.bench import flex, neighborhood, timing
from dma_diffusers.eval.bench.bound import Products, bound_tflops
from dma_diffusers.eval.bench.entries import FULL, OURS, SPARSE, Config
from dma_diffusers.eval.bench.inputs import Sample
from dma_diffusers.eval.bench.neighborhood import NAMED, Case, bench_neighborhood, cells, compared
from dma_diffusers.eval.bench.summary import markdown
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.tiling.neighborhood import mask
from dma_diffusers.kernels.tiling.policies import Neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class
from tests.command_line import run
from tests.eval.test_bench import H200, SHAPE, entry
from tests.eval.test_bench import compared as compared_full

CUT = Case("", (24, 40), (9, 13), (2, 4), 70, 2, 16)
FITTING = Case("", (16, 16), (8, 8), (8, 8), 0, 2, 16)
VIDEO = Case("", (6, 10, 12), (3, 5, 6), (1, 2, 3), 130, 2, 16)


def seen_of(case):
    """Says which keys each query sees, from the reference mask of the grid: text sees all and is seen by all."""
    on_grid = mask(case.policy.axes(case.grid))
    return F.pad(F.pad(on_grid, (case.text, 0), value=True), (0, 0, case.text, 0), value=True)


def test_named_cases_are_those_of_the_paper():
    assert [Case(name, *sides).simulated for name, sides in NAMED.items()] == pytest.approx(
        [10.24, 11.11], abs=0.01
    )
    flux = Case("flux-4k", *NAMED["flux-4k"], 512)
    assert flux.shape.size == (1, 24, 256 * 256 + 512, 128)
    assert flux.label == "flux-4k 256×256, window 80×80, stride 16×16, 512 text tokens, 24 heads × 128"
    assert flux.simulated < 10.24


@pytest.mark.parametrize("case", [CUT, FITTING, VIDEO], ids=["cut", "fitting", "video"])
def test_what_our_neighbourhood_is_asked_to_see(case):
    *dense, flexible, ours = case.entries()
    assert {e.kind for e in dense} == {FULL, OURS} and all(e.seen is None for e in dense)
    assert (flexible.kind, ours.kind) == (SPARSE, OURS) and flexible.seen is ours.seen
    queries = torch.randperm(case.shape.tokens)[:200]
    assert torch.equal(ours.seen(queries), seen_of(case)[queries])


def test_text_may_stand_anywhere():
    config = Config.parse("policy=neighborhood(window=3x4, stride=1x2),grid=8x8,text_start=10,text_stop=15")
    assert config.name == "mxfp8|mxfp4, neighborhood(window=3x4, stride=1x2), text 10 to 15"
    text = torch.zeros(69, dtype=torch.bool)
    text[10:15] = True
    expected = text[:, None] | text
    expected[(~text[:, None] & ~text)] = mask(config.map_policy.axes((8, 8))).flatten()
    assert torch.equal(config.entry.seen(torch.arange(69)), expected)


def test_errors_of_a_neighbourhood():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, CUT.shape.tokens, 16, generator=generator).double()
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_of(CUT))
    sample = Sample(q, k, v, 0, CUT.entries()[-1].seen)
    assert sample.relative_l2(exact) < 1e-12
    assert sample.relative_l2(F.scaled_dot_product_attention(q, k, v)) > 0.5


@pytest.mark.parametrize("case", [CUT, FITTING, VIDEO], ids=["cut", "fitting", "video"])
def test_flex_attention_sees_the_same(case, monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    generator = torch.Generator().manual_seed(0)
    copies = [tuple(torch.randn(3, 1, 2, case.shape.tokens, 16, generator=generator)) for _ in range(2)]
    planned = plan.make(case.policy, case.layout)
    prepared = flex.prepare(planned, copies)
    for number, copy in enumerate(copies):
        expected = F.scaled_dot_product_attention(*copy, attn_mask=seen_of(case))
        assert torch.allclose(prepared.whole(number), expected, atol=1e-5)
        of_place = prepared.kernel(number)[:, :, planned.token_order >= 0]
        assert torch.allclose(
            of_place, expected[:, :, planned.token_order[planned.token_order >= 0]], atol=1e-5
        )
        assert torch.equal(prepared.quantise(number), copy[0])
    visited = planned.precision_map.bounds[..., -1].sum().item()
    assert prepared.products == [
        (pytest.approx(visited / planned.precision_map.bounds.shape[2] ** 2), "H", "H")
    ]


def test_flex_attention_has_a_mask_of_keys_only_where_tiles_are_cut():
    for case, is_cut in ((CUT, True), (FITTING, True), (Case("flux-4k", *NAMED["flux-4k"]), False)):
        mask = flex.block_mask(plan.make(case.policy, case.layout))
        assert bool(mask.kv_num_blocks.any()) == is_cut == (mask.mask_mod.__name__ == "sees")
        assert all(x.is_contiguous() for x in (mask.kv_num_blocks, mask.full_kv_num_blocks, mask.kv_indices))


def test_flex_attention_takes_no_means():
    policy = Neighborhood(FITTING.window, FITTING.stride, beyond=Class.MEAN)
    with pytest.raises(ValueError, match="FlexAttention takes no tiles by their means"):
        flex.block_mask(plan.make(policy, FITTING.layout))


def test_what_is_skipped_is_not_in_the_bound():
    shape = Case("flux-4k", *NAMED["flux-4k"]).shape
    dense, tenth = ([Products(share, "Q", "Q")] for share in (1.0, 0.1))
    assert bound_tflops(shape, tenth, H200) == pytest.approx(10 * bound_tflops(shape, dense, H200))


ENTRIES = [
    entry("cuDNN SDPA bf16", FULL, 80.0, error=0.002),
    entry("FlashAttention-4 bf16", FULL, 70.0, error=0.002),
    entry("LOW int8", OURS, 50.0, kernel=49.0, quantise=1.0),
    entry("FlexAttention bf16", SPARSE, 12.0, kernel=10.0, quantise=2.0),
    entry("ours", OURS, 5.0, kernel=4.0, quantise=1.0),
]


@pytest.fixture
def measured():
    return compared(compared_full(SHAPE, ENTRIES), 10.0)


def test_speeds_are_in_units_of_dense_attention_and_flex_attentions_kernel(measured):
    cudnn, _, dense, flexible, ours = (e["whole"] for e in measured)
    assert (ours["over_cudnn"], ours["over_dense"], ours["over_flex"]) == (16, 10, 2)
    assert (ours["of_simulated"], ours["of_simulated_over_dense"]) == (1.6, 1.0)
    assert measured[-1]["kernel"]["over_cudnn"] == 20 and measured[-1]["kernel"]["of_simulated"] == 2
    assert (cudnn["over_cudnn"], dense["over_cudnn"]) == (1, 1.6)
    assert flexible["over_flex"] == pytest.approx(10 / 12) and measured[3]["kernel"]["over_flex"] == 1
    assert flexible["of_simulated"] == pytest.approx(80 / 12 / 10)
    assert not {"of_simulated"} & (cudnn.keys() | dense.keys())


def test_without_flex_attention_there_is_nothing_beside_it():
    absent = {"name": "FlexAttention bf16", "kind": SPARSE, "absent": "no compiler"}
    *_, ours = compared(compared_full(SHAPE, [*ENTRIES[:3], absent, ENTRIES[4]]), 10.0)
    assert ours["whole"]["over_flex"] is None and ours["whole"]["over_cudnn"] == 16


def test_the_table(measured):
    lines = cells(measured)
    assert lines[-3] == ["ours", "5.000", "16.00", "10.00", "2.00", "160", "100", "5", "0.0100", "2", "100"]
    assert [line[0] for line in lines[-6:]] == [
        "FlexAttention bf16", "– tokens permuted before", "– the permutation",
        "ours", "– without quantisation", "– its quantiser's kernels",
    ]  # fmt: skip
    text = markdown({CUT.label: {"entries": measured}}, neighborhood.HEADER, cells)
    assert text.startswith(f"**{CUT.label}**\n\n| Attention | ms | × cuDNN |")
    assert {line.count("|") for line in text.splitlines()[2:]} == {len(neighborhood.HEADER) + 1}


@pytest.fixture
def stored(monkeypatch, measured):
    """A GPU that isn't there, on which everything has been measured."""
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(neighborhood, "require_gpu", lambda: None)
    monkeypatch.setattr(neighborhood, "current_gpu", lambda: H200)
    found = {"size": [], "copies": 1, "entries": compared_full(SHAPE, ENTRIES)}
    monkeypatch.setattr(neighborhood, "measure", lambda *_: found)


def test_a_whole_result(stored, tmp_path):
    output = tmp_path / "result.json"
    result = bench_neighborhood([CUT, FITTING], output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == [CUT.label, FITTING.label]
    found = result["shapes"][CUT.label]
    assert (found["grid"], found["window"], found["stride"], found["text"]) == ([24, 40], [9, 13], [2, 4], 70)
    assert found["simulated"] == CUT.simulated
    assert result["shapes"][CUT.label]["entries"][-1]["whole"]["over_cudnn"] == 16


def test_the_command(monkeypatch, capsys, stored):
    code, output, _ = run(monkeypatch, capsys, "bench", "neighborhood")
    assert code == 0
    assert re.search(r"flux-4k 256×256.* 512 text tokens.*tiles counted: 8\.96× fewer", output)
    assert output.count("FlexAttention bf16") == 4
    free = (
        "--grid",
        "24x40",
        "--window",
        "9x13",
        "--stride",
        "2x4",
        "--text",
        "70",
        "--heads",
        "2",
        "--head-dim",
        "16",
    )
    code, output, error = run(monkeypatch, capsys, "bench", "neighborhood", *free, "--json")
    assert (code, error) == (0, "") and list(json.loads(output)["shapes"]) == [CUT.label]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--shape", "flux-8k"), "unknown shape 'flux-8k': choose from flux-4k, hunyuan-720p"),
    (("--window", "8x8"), "give --grid with --window"),
    (("--grid", "16x16"), "give --grid with --window"),
    (("--grid", "16x16", "--window", "8x8", "--shape", "flux-4k"), "give --grid with --window"),
    (("--grid", "16x16", "--window", "8x8x8"), "window 8×8×8 is 3-D"),
    (("--grid", "16x16", "--window", "8x8", "--stride", "9x9"), "stride 9 exceeds window 8"),
    (("--grid", "16x", "--window", "8x8"), "--grid '16x'"),
    (("--inputs", "zeros"), "unknown inputs 'zeros'"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, stored, arguments, words):
    code, output, error = run(monkeypatch, capsys, "bench", "neighborhood", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error
