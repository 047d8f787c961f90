"""Predictions beside what an H200 measured: every committed time of the bf16 and int8 kernels, within 15 %."""

import gzip
import json
import re
from pathlib import Path

import pytest

from dma_diffusers.eval.bench.entries import FULL, OURS
from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.eval.simulator.predict import MACHINES, WITHIN, Call, default_formats, predict
from dma_diffusers.kernels.tiling.boxes import fitting
from dma_diffusers.kernels.tiling.neighborhood import neighborhood

RESULTS = Path(__file__).parents[3] / "eval" / "results"
BENCHES = ("h200_bench.json.gz", "h200_bench_batch2.json.gz", "h200_bench_outliers.json.gz")
FLUX = ((256, 256), (80, 80), (16, 16))
HUNYUAN = ((30, 48, 80), (18, 24, 24), (16, 8, 8))


def beside_measured():
    """Predicted and measured milliseconds of every dense call, by what was timed."""
    for file in BENCHES:
        bench = json.loads(gzip.decompress((RESULTS / file).read_bytes()))
        for label, shape in bench["shapes"].items():
            batch, heads, tokens, head_dim = shape["size"]
            call = Call("h200", batch * heads, tokens, head_dim, "bf16", "int8")
            full = [entry["whole"]["ms"] for entry in shape["entries"] if entry["kind"] == FULL]
            yield f"{label}, full precision, {file}", 1e3 * call.full_precision(), min(full)
            for entry in shape["entries"]:
                if entry["kind"] != OURS:
                    continue
                pairs = (-(-tokens // 128)) ** 2
                high = pairs * sum(part["share"] for part in entry["products"] if part["qk"] == "H")
                for part, seconds in (("whole", call.whole), ("kernel", call.kernel)):
                    predicted = 1e3 * seconds(high, pairs - high)
                    yield f"{label}, {entry['name']}, {part}, {file}", predicted, entry[part]["ms"]


def test_every_dense_time_that_an_h200_measured():
    errors = {name: predicted / measured - 1 for name, predicted, measured in beside_measured()}
    assert len(errors) > 80
    worst = max(errors, key=lambda name: abs(errors[name]))
    assert abs(errors[worst]) <= WITHIN, f"{worst}: {errors[worst]:+.1%}"


@pytest.mark.parametrize(("name", "case"), [("FLUX", FLUX), ("HunyuanVideo", HUNYUAN)])
def test_every_neighborhood_that_an_h200_measured(name, case):
    axes = neighborhood(*case)[0]
    count = Count(axes, fitting(axes), fitting(axes))
    found = predict(count, "h200", 24, 128, "bf16", "int8")
    call = Call("h200", 24, 128 * count.grid_tiles[0], 128, "bf16", "int8")
    text = (RESULTS / "h200_neighborhood.txt").read_text()
    measured = re.findall(rf"^{name}.* whole ([\d.]+) ms .* kernel alone ([\d.]+)", text, re.MULTILINE)
    assert measured
    for whole, kernel in measured:
        assert found.ms == pytest.approx(float(whole), rel=WITHIN)
        assert 1e3 * call.kernel(0, count.visits) == pytest.approx(float(kernel), rel=WITHIN)


def test_every_neighborhood_of_a_bench():
    measured = json.loads(gzip.decompress((RESULTS / "h200_neighborhood.json.gz").read_bytes()))
    for label, shape in measured["shapes"].items():
        _, heads, _, head_dim = shape["size"]
        axes = neighborhood(shape["grid"], shape["window"], shape["stride"])[0]
        count = Count(axes, fitting(axes), fitting(axes), shape["text"])
        found = predict(count, "h200", heads, head_dim, "bf16", "int8")
        *full, dense, _, ours = shape["entries"]
        fastest = min(entry["whole"]["ms"] for entry in full if "whole" in entry)
        for predicted, measured in (
            (found.full_precision_ms, fastest),
            (found.dense_low_ms, dense["whole"]["ms"]),
            (found.ms, ours["whole"]["ms"]),
        ):
            assert predicted == pytest.approx(measured, rel=WITHIN), label


def test_flash_attention_4_on_a_b200():
    """Published: 1,613 TFLOP/s at best."""
    call = Call("b200", 32, 2**15, 128, *default_formats("b200"))
    tflops = 4 * 32 * 2**30 * 128 / call.full_precision() / 1e12
    assert tflops == pytest.approx(1613, rel=0.03)


def test_only_what_was_measured_is_called_so():
    for gpu in MACHINES:
        label = Call(gpu, 1, 1024, 128, *default_formats(gpu)).label
        assert ("not measured on any" in label) == (gpu != "h200") and gpu.upper() in label
    assert Call("h200", 1, 1024, 128, "bf16", "fp8").label.endswith("not measured on any H200 with bf16|fp8")


def test_what_a_neighborhood_costs():
    axes = neighborhood(*FLUX)[0]
    fits, cut = Count(axes, (8, 16), (8, 16)), Count(neighborhood((256, 256), (80, 80))[0], (8, 16), (8, 16))
    plain = predict(fits, "h200", 24, 128, "bf16", "int8")
    assert plain.speedup == pytest.approx(plain.full_precision_ms / plain.ms)
    assert plain.speedup_dense_low == pytest.approx(plain.full_precision_ms / plain.dense_low_ms)
    assert plain.full_precision_ms > plain.dense_low_ms > plain.ms
    with_text = predict(Count(axes, (8, 16), (8, 16), 512), "h200", 24, 128, "bf16", "int8")
    assert with_text.ms > plain.ms
    twice = predict(fits, "h200", 48, 128, "bf16", "int8")
    assert twice.ms == pytest.approx(2 * plain.ms, rel=0.03)
    assert predict(cut, "h200", 24, 128, "bf16", "int8").ms > plain.ms


def test_the_range_of_values_is_read_once():
    """Two classes write V in their own formats, in units that both have."""
    calls = [Call("h200", 24, 16384, 128, "bf16/fp16", low) for low in ("int8/fp16", "int8/fp8")]
    one, both = (call.whole(1, 1) - call.kernel(1, 1) for call in calls)
    written = 24 * 16384 * 128 / calls[0].machine.bytes_per_second  # the e4m3 numbers
    assert both - one == pytest.approx(written)


@pytest.mark.parametrize(("gpu", "formats", "words"), [
    ("b100", ("bf16", "int8"), "unknown GPU 'b100': choose from h100, h200, b200, b300"),
    ("b200", ("bf16", "nope"), "nope"),
])  # fmt: skip
def test_what_cannot_be_predicted(gpu, formats, words):
    with pytest.raises(ValueError, match=words):
        Call(gpu, 24, 4096, 128, *formats)


def test_times_are_of_the_kernels_tiles():
    with pytest.raises(ValueError, match="the kernel's tiles, of 128 tokens, got 16×16"):
        predict(Count(neighborhood(*FLUX)[0], (16, 16), (16, 8)), "h200", 24, 128, "bf16", "int8")
