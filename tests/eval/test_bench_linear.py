"""`bench linear`: shapes, entries that run where there is no GPU, bounds, the table and the command."""

import contextlib
import json

import pytest
import torch

from dma_diffusers.eval.bench import linear, linear_entries, timing
from dma_diffusers.eval.bench.entries import FULL, LOW_BIT, OURS
from dma_diffusers.eval.bench.linear import HEADER, bench_linear, cells, compared, measure
from dma_diffusers.eval.bench.linear_entries import FIXED, METHODS, Prepared, bound_tflops, draw
from dma_diffusers.eval.bench.linear_shapes import LinearShape, parse
from tests.command_line import run
from tests.eval.test_bench import H200

CPU = torch.device("cpu")
SHAPE = LinearShape("", 256, 512, 384)


BY_ROW = ("torch._scaled_mm, rows", "fp8")


def scales_rows() -> bool:
    """Tell if torch._scaled_mm takes a scale for each row on the CPU; that of PyTorch 2.11 does not."""
    x, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that isn't there, where functions run as they are and every call takes a millisecond."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(linear, "require_gpu", lambda: None)
    monkeypatch.setattr(linear, "current_gpu", lambda: H200)
    monkeypatch.setattr(linear_entries, "compiled", lambda function: function)
    monkeypatch.setattr(timing, "take_turns", lambda calls, seconds: {key: {"ms": 1.0} for key in calls})


def test_shapes_of_models_and_free_ones():
    assert [shape[1:] for shape in parse(["flux-dev"])] == [
        (4608, 3072, 9216), (4608, 3072, 12_288), (4608, 12_288, 3072), (4608, 3072, 21_504), (4608, 15_360, 3072),
    ]  # fmt: skip
    (shape,) = parse(["256x512x384", "256x512x384"])
    assert shape == SHAPE and shape.label == "256×512×384" and shape.flop == 2 * 256 * 512 * 384
    assert parse(["wan-14b"])[0].label == "wan-14b 75600×5120×5120"


@pytest.mark.parametrize(("text", "words"), [
    ("flux", "unknown shape 'flux': choose from flux-dev, qwen-image"), ("512x512", "rows x inputs x outputs"),
    ("16x512x512", "128 or more"), ("256x520x512", "multiples of 32"),
])  # fmt: skip
def test_shapes_that_cannot_be_timed(text, words):
    with pytest.raises(ValueError, match=words):
        parse([text])


def test_what_is_drawn_does_not_fit_the_cache():
    copies = draw(SHAPE, 0, 2**17, CPU)
    assert sum((each.x.numel() + each.weight.numel()) / 2 for each in copies) >= 2 * 2**17
    assert not torch.equal(copies[0].x, copies[1].x)
    assert torch.equal(copies[1].weight, draw(SHAPE, 0, 2**17, CPU)[1].weight)
    assert len(draw(SHAPE, 0, 1, CPU)) == 1


def test_every_entry_computes_the_layer(gpu):
    """8-bit MX formats need Triton's kernels, and nvfp4 a GPU that has it: these are absent here."""
    measured = measure(SHAPE, METHODS, H200._replace(l2_bytes=2**17), CPU, 0, 0.1)
    found = {entry["name"]: entry for entry in measured["entries"]}
    assert list(found)[:5] == [
        "bf16", "torch._scaled_mm, rows", "torch._scaled_mm, tensors", "torchao fp8", "torchao int8",
    ]  # fmt: skip
    assert list(found)[5:] == list(METHODS) and measured["copies"] > 1
    error = {name: entry["relative_l2"] for name, entry in found.items() if "absent" not in entry}
    assert 1e-4 < error["bf16"] < 0.005 < error["int8"] < 0.02
    for name in ("torch._scaled_mm, rows", "torch._scaled_mm, tensors", "fp8", FIXED):
        if name in BY_ROW and not scales_rows():
            assert "per-tensor scaling" in found[name]["absent"]
        else:
            assert 0.02 < error[name] < 0.06, name
    for name in ("torchao fp8", "torchao int8"):
        assert name not in error or error[name] < 0.06
    assert found["nvfp4"]["absent"].startswith("only the reference runs it here")
    assert {"absent", "name", "kind"} == found["nvfp4"].keys()
    assert (found["int8"]["bits"], found[FIXED]["bits"], found["bf16"]["bits"]) == (
        pytest.approx(8 + 32 / 512), pytest.approx(8, abs=1e-3), 16.0,
    )  # fmt: skip
    assert found["int8"]["quantising_share"] == 0 and "whole" not in found["torch._scaled_mm, rows"]


def test_torchao_changes_no_setting_of_the_compiler(gpu):
    """The settings that it recommends would hold for every other way that the process compiles."""
    pytest.importorskip("torchao")
    from torch._inductor import config

    with config.patch(coordinate_descent_tuning=False, force_fuse_int_mm_with_mul=False):
        for entry in linear_entries.entries([])[3:5]:
            with contextlib.suppress(
                RuntimeError, AssertionError
            ):  # it may ask for a GPU that multiplies e4m3
                entry.prepare(draw(SHAPE, 0, 1, CPU), "sm_90")
        assert not config.coordinate_descent_tuning and not config.force_fuse_int_mm_with_mul


def test_parts_of_ours_make_the_whole(gpu):
    copies = draw(SHAPE, 0, 2**17, CPU)
    for method in (*["fp8"] * scales_rows(), FIXED, "int8"):
        (entry,) = (each for each in linear_entries.entries([method]) if each.name == method)
        prepared = entry.prepare(copies, "sm_90")
        for number in range(len(copies) + 1):
            assert torch.equal(prepared.whole(number), prepared.kernel(number))
        assert not torch.equal(prepared.whole(0), prepared.whole(1))


@pytest.mark.kernel
def test_block_formats_run_in_the_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(linear_entries, "compiled", lambda function: function)
    copies = draw(LinearShape("", 16, 384, 128), 0, 1, CPU)
    exact = copies[0].x.double() @ copies[0].weight.double().T + copies[0].bias.double()
    for method, most, bits in (("mxfp4", 0.25, 4.25), ("micromix", 0.25, None)):
        (entry,) = (each for each in linear_entries.entries([method]) if each.name == method)
        prepared = entry.prepare(copies, "sm_90")
        assert 1e-3 < (prepared.whole(0).double() - exact).norm() / exact.norm() < most
        assert bits is None or prepared.bits == pytest.approx(bits)


@pytest.mark.parametrize(("letters", "tflops"), [
    ({"H": 1.0}, 989.3), ({"Q": 1.0}, 1978.6), ({"H": 0.5, "Q": 0.5}, 1 / (0.5 / 989.3 + 0.5 / 1978.6)),
    ({"O": 1.0}, None),
])  # fmt: skip
def test_the_bound_is_that_of_the_matrix_instructions(letters, tflops):
    prepared = Prepared(None, None, None, 8.0, letters)
    assert bound_tflops(prepared, H200) == (tflops and pytest.approx(tflops, rel=1e-3))


ROWS = [
    {"name": "bf16", "kind": FULL, "bits": 16.0, "bound_tflops": 1000.0, "relative_l2": 0.002, "whole": {"ms": 0.4}},
    {"name": "rows", "kind": LOW_BIT, "bits": 8.0, "bound_tflops": 2000.0, "relative_l2": 0.04, "kernel": {"ms": 0.2}},
    {"name": "torchao fp8", "kind": LOW_BIT, "absent": "No module named 'torchao'"},
    {
        "name": "fp8", "kind": OURS, "bits": 8.01, "bound_tflops": None, "relative_l2": None, "whole": {"ms": 0.25},
        "kernel": {"ms": 0.2}, "quantise": {"ms": 0.06},
    },
]  # fmt: skip


def test_the_table():
    lines = cells(compared(LinearShape("", 1000, 1000, 100_000), ROWS))  # 0.2 TFLOP
    assert lines == [
        ["bf16", "0.400", "500", "1.00", "50", "", "", "", "", "16.00", "0.0020"],
        ["rows", "", "", "", "", "1000", "50", "", "", "8.00", "0.0400"],
        ["torchao fp8: No module named 'torchao'", *[""] * 10],
        ["fp8", "0.250", "800", "1.60", "", "1000", "", "0.060", "20.0", "8.01", "NaN"],
    ]
    assert all(len(line) == len(HEADER) for line in lines)


@pytest.fixture
def stored(monkeypatch, gpu):
    monkeypatch.setattr(linear, "measure", lambda shape, *_: {"entries": compared(shape, ROWS)})


def test_a_result_is_gone_on_with(stored, tmp_path):
    output = tmp_path / "result.json"
    bench_linear([SHAPE], output=output)
    result = bench_linear(parse(["256x512x384", "256x512x512"]), output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == ["256×512×384", "256×512×512"]
    with pytest.raises(ValueError, match="measured with different methods"):
        bench_linear([SHAPE], ["fp8"], output=output)


def test_the_command(monkeypatch, capsys, stored):
    code, output, _ = run(monkeypatch, capsys, "bench", "linear")
    assert (
        code == 0
        and "flux-dev 4608×3072×9216, H200" in output
        and "torch._scaled_mm is the product" in output
    )
    arguments = ("--shape", "256x512x384", "--method", "fp8", "--json")
    code, output, error = run(monkeypatch, capsys, "bench", "linear", *arguments)
    assert (code, error) == (0, "") and list(json.loads(output)["shapes"]) == ["256×512×384"]
    assert json.loads(output)["settings"]["methods"] == ["fp8"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--shape", "flux"), "unknown shape 'flux'"),
    (("--method", "fp5"), "unknown method 'fp5': choose from fp8; fp8, fixed input scale; int8"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, stored, arguments, words):
    code, output, error = run(monkeypatch, capsys, "bench", "linear", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    code, output, error = run(monkeypatch, capsys, "bench", "linear")
    assert (code, output, error) == (1, "", "error: this command needs a CUDA GPU, and there is none\n")
