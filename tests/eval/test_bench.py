"""The benchmark's parts that need no GPU: shapes, bounds, entries, errors, comparisons, turns, resuming, chart."""

import json
import math
import time
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.eval.bench import attention as bench
from dma_diffusers.eval.bench import measure as measuring
from dma_diffusers.eval.bench import timing
from dma_diffusers.eval.bench.bound import Gpu, Products, bound_tflops, letter
from dma_diffusers.eval.bench.entries import (
    FULL,
    LOW_BIT,
    OURS,
    Config,
    Entry,
    Prepared,
    default_configs,
    products,
)
from dma_diffusers.eval.bench.inputs import Sample
from dma_diffusers.eval.bench.peers import PEERS
from dma_diffusers.eval.bench.plot import check_plot, plot
from dma_diffusers.eval.bench.shapes import NAMED, Shape, parse
from dma_diffusers.eval.bench.summary import HEADER, cells, compared, markdown
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.lowerings import FAITHFUL
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class, build_map

# The clock at which NVIDIA's data sheet gives 989 dense bf16 TFLOP/s; the card's highest is 1.98 GHz.
H200 = Gpu("H200", "sm_90", 132, 1.83e9, 50 * 2**20)
BF16, FP8 = Products(1.0, "H", "H"), Products(1.0, "Q", "Q")


def test_models_shapes():
    assert [shape.size for shape in parse(["wan-480p"], 2)] == [(2, 12, 32760, 128), (2, 40, 32760, 128)]
    assert parse(["cogvideox"])[0].label == "cogvideox 1×48×17776×64"
    assert {shape.model for shape in parse(list(NAMED))} == set(NAMED)
    assert parse(["flux-1k"])[0].flop == 4 * 24 * 4608**2 * 128


def test_free_shapes_keep_their_batch_and_come_once():
    assert parse(["2x24x4608x128", "2x24x4608x128"], 1) == [Shape("", 2, 24, 4608, 128)]
    assert parse(["2x24x4608x128"])[0].label == "2×24×4608×128"


@pytest.mark.parametrize(("text", "words"), [
    ("flux", f"choose from {', '.join(NAMED)}, or BxHxNxD"),
    ("24x4608x128", "unknown shape"),
    ("1x24x-4608x128", "unknown shape"),
    ("3x24x4608x128", "batch must be 1 or 2"),
    ("1x24x4608x264", "head_dim must be 1 to 256"),
    ("1x24x4608x0", "head_dim must be 1 to 256"),
    ("1x1x128x64", "8192 elements are too few"),
])  # fmt: skip
def test_bad_shapes(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        parse([text])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("head_dim", "part", "expected"), [
    (128, BF16, 989), (64, BF16, 989), (128, FP8, 1979), (64, FP8, 989),
    (128, Products(1.0, "I", "Q"), 1979),
    (128, Products(1.0, "I", "H"), 4 / 3 * 989),  # one product at twice the rate
])  # fmt: skip
def test_bounds_of_an_h200(head_dim, part, expected):
    shape = Shape("", 1, 24, 4608, head_dim)
    assert bound_tflops(shape, [part], H200) == pytest.approx(expected, rel=1e-3)
    fastest = H200._replace(hz=1.98e9)
    assert bound_tflops(shape, [part], fastest) == pytest.approx(expected * 1.98 / 1.83, rel=1e-3)


def test_the_bound_of_two_classes_adds_their_times():
    shape = Shape("", 1, 24, 4608, 128)
    parts = [BF16._replace(share=0.25), Products(0.75, "I", "Q")]
    assert bound_tflops(shape, parts, H200) == pytest.approx(1 / (0.25 / 989.3 + 0.75 / 1978.6), rel=1e-3)


def test_no_rate_no_bound():
    shape = Shape("", 1, 24, 4608, 128)
    assert bound_tflops(shape, [BF16], H200._replace(architecture="sm_80")) is None
    assert bound_tflops(shape, [Products(1.0, "I", "Q")], H200._replace(architecture="sm_103")) is None
    assert bound_tflops(Shape("", 1, 1, 8192, 64), [FP8], H200._replace(architecture="sm_100")) > 900


def test_letters_follow_the_storage():
    assert [letter(name) for name in ("bf16", "int8", "fp8", "mxfp8", "mxfp4", "nvfp4")] == list("HIQQOO")
    assert [letter(name, FAITHFUL) for name in ("int4", "mxint8", "nvint4", "mxfp4")] == list("IHHQ")


@pytest.mark.parametrize("tokens", [4608, 4600])
def test_products_of_a_map_are_its_tiles(tokens):
    layout = Layout(tokens, tokens)
    tiles = math.ceil(tokens / 128)
    diagonal = build_map(Diagonal(128, 128).classes(layout), layout)
    cut = tokens % 128 > 0
    high = (tiles + tiles - 1 + (tiles - 1) * cut) / tiles**2  # diagonal, first column, last column
    assert products(diagonal, "bf16", "int8", "native") == [
        (pytest.approx(high), "H", "H"),
        (pytest.approx(1 - high), "I", "Q"),
    ]
    low = build_map(Diagonal(0, 0).classes(layout), layout)
    assert products(low, "bf16", "int8", "native") == [(1.0, "I", "Q")]


def test_products_of_means_are_those_of_their_tiles():
    """70 KV tiles have 3 tiles of means, which 69 of 70 Q tiles walk."""
    layout = Layout(8960, 8960)
    classes = torch.full((1, 1, 70, 70), int(Class.MEAN))
    classes[..., 0, :] = Class.LOW
    for low, of_means in (("int8", "IQ"), ("mxfp4", "HH")):
        parts = products(build_map(classes, layout), "bf16", low, "faithful" if low == "mxfp4" else "native")
        assert parts[0].share == pytest.approx(1 / 70)
        assert parts[1:] == [(pytest.approx(69 * 3 / 70**2), *of_means)]


def test_a_precision_may_name_the_format_of_its_values():
    layout = Layout(4608, 4608)
    parts = products(build_map(Diagonal().classes(layout), layout), "int8/bf16", "int8/fp8", "native")
    assert [(part.qk, part.pv) for part in parts] == [("I", "H"), ("I", "Q")]


def test_faithful_formats_are_multiplied_as_stored():
    layout = Layout(4608, 4608)
    parts = products(build_map(Diagonal().classes(layout), layout), "mxfp8", "mxfp4", "faithful")
    assert [(part.qk, part.pv) for part in parts] == [("H", "H"), ("Q", "Q")]


@pytest.mark.parametrize(("text", "config", "name"), [
    ("high=bf16,low=int8,window=0,sink=0", Config("bf16", "int8", 0, 0), "LOW int8"),
    ("high=bf16, low=fp8", Config("bf16", "fp8"), "bf16|fp8, window 128, sink 128"),
    ("mapped=false,lowering=faithful", Config(mapped=False, lowering="faithful"), "HIGH mxfp8, faithful"),
    ("text_stop=512,window=0,sink=0", Config(window=0, sink=0, text_stop=512),
     "mxfp8|mxfp4, window 0, sink 0, text 0 to 512"),
])  # fmt: skip
def test_configs_are_the_operators_keywords(text, config, name):
    assert Config.parse(text) == config
    assert config.name == name


@pytest.mark.parametrize(("text", "words"), [
    ("", "give each of high, low, window"),
    ("hihg=bf16", "give each of high, low, window"),
    ("high=bf16,high=fp8", "once at most"),
    ("window=wide", "whole number of tokens, got 'wide'"),
    ("sink=-1", "whole number of tokens"),
    ("mapped=no", "true or false"),
    ("low=fp3", "fp3"),
])  # fmt: skip
def test_bad_configs(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        Config.parse(text)
    assert "\n" not in str(raised.value)


def test_default_configs_are_what_the_gpu_multiplies():
    assert [config.name for config in default_configs("sm_90", SHAPE)] == DEFAULT_NAMES
    assert {config.low for config in default_configs("sm_100", SHAPE)} == {"mxfp4"}


def test_default_configs_are_dense_mapped_gathered_and_routed():
    for shape in parse(list(NAMED)):
        configs = default_configs("sm_90", shape)
        layouts = [Layout(shape.tokens, shape.tokens, config.text, config.grid) for config in configs]
        planned = [
            plan.make(config.map_policy, layout) for config, layout in zip(configs, layouts, strict=True)
        ]
        assert [x.precision_map.has_high for x in planned] == [False, True, True, True]
        assert [x.token_order is not None for x in planned] == [False, False, True, False]
        assert [x.routing is not None for x in planned] == [False, False, False, True]
    free = default_configs("sm_90", Shape("", 1, 24, 4608, 128))
    assert [config.name for config in free] == [*DEFAULT_NAMES[:2], DEFAULT_NAMES[3]]


@pytest.mark.parametrize("kind", ["normal", "large"])
def test_errors_against_brute_force(kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 100, 16, generator=generator).bfloat16() for _ in range(3))
    if kind == "large":
        q = q * 30
    exact = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    sample = Sample(q, k, v)
    assert sample.relative_l2(exact) < 1e-12
    assert sample.relative_l2(1.25 * exact) == pytest.approx(0.25)
    assert sample.relative_l2(exact.flip(2)) > 0.5
    assert sample.relative_l2(exact.roll(1, dims=1)) > 0.5


def entry(name, kind, ms, error=0.01, **parts):
    times = {
        part: {"ms": value, "ms_quartiles": [value, value], "host_us": 50.0} for part, value in parts.items()
    }
    whole = {"ms": ms, "ms_quartiles": [ms, ms], "host_us": 100.0}
    return {
        "name": name, "kind": kind, "relative_l2": error, "peak_bytes": 2**21, "bound_tflops": 1000.0,
        "products": [], "whole": whole, **times,
    }  # fmt: skip


SHAPE = Shape("flux-1k", 1, 24, 4608, 128)
DEFAULT_NAMES = [
    "LOW int8",
    "bf16|int8, window 128, sink 128",
    "bf16|int8, diagonal(window=128, sink=128, near=grid), text 0 to 512",
    "bf16|int8, importance(budget=0.05, by=pools)",
]
ENTRIES = [
    entry("slow full", FULL, 0.5, error=0.002),
    entry("cuDNN", FULL, 0.4, error=0.002),
    entry("fast and wrong", LOW_BIT, 0.1, error=0.3),
    entry("fast and NaN", LOW_BIT, 0.1, error=None),
    {"name": "Sage", "kind": LOW_BIT, "absent": "No module named 'sageattention'"},
    entry("Sage 2", LOW_BIT, 0.3),
    entry("LOW int8", OURS, 0.25, kernel=0.2, quantise=0.03),
]


@pytest.fixture
def measured():
    return {SHAPE.label: {"size": list(SHAPE.size), "copies": 5, "entries": compared(SHAPE, ENTRIES)}}


def test_ratios_are_to_the_best_peer_that_is_right(measured):
    found = {e["name"]: e for e in measured[SHAPE.label]["entries"]}
    ours = found["LOW int8"]
    assert (ours["whole"]["over_full"], ours["whole"]["over_low"]) == pytest.approx((0.4 / 0.25, 0.3 / 0.25))
    assert (ours["kernel"]["over_full"], ours["kernel"]["over_low"]) == pytest.approx((2.0, 1.5))
    assert ours["whole"]["tflops"] == pytest.approx(4 * 24 * 4608**2 * 128 / 0.25e-3 / 1e12)
    assert ours["whole"]["share_of_bound"] == pytest.approx(ours["whole"]["tflops"] / 1000)
    assert ours["less_kernel_ms"] == pytest.approx(0.05)
    assert [name for name, e in found.items() if e.get("wrong")] == ["fast and wrong", "fast and NaN"]
    assert found["cuDNN"]["whole"]["over_full"] == 1
    assert found["Sage"] == ENTRIES[4]


def test_without_peers_or_bound_there_are_no_ratios():
    (alone,) = compared(SHAPE, [ENTRIES[-1] | {"bound_tflops": None}])
    assert [alone["whole"][name] for name in ("over_full", "over_low", "share_of_bound")] == [None] * 3
    assert cells([alone])[0][3:6] == [""] * 3


def test_the_table_says_all(measured):
    lines = cells(measured[SHAPE.label]["entries"])
    assert {len(line) for line in lines} == {len(HEADER)}
    titles = [line[0] for line in lines]
    assert titles[2:5] == [
        "fast and wrong (WRONG)",
        "fast and NaN (WRONG)",
        "Sage: No module named 'sageattention'",
    ]
    assert lines[6] == ["LOW int8", "0.250", "1044", "1.60", "1.20", "104", "0.0100", "2", "100", "", ""]
    assert lines[7][:6] == ["– without quantisation", "0.200", "1305", "2.00", "1.50", "130"]
    assert [line[1] for line in lines[8:]] == ["0.030", "0.050"]
    text = markdown(measured)
    assert text.startswith("**flux-1k 1×24×4608×128**\n\n| Attention | ms |")
    assert len(text.splitlines()) == 2 + 2 + len(lines)
    assert r"bf16\|int8" in markdown({"a": {"entries": compared(SHAPE, [entry("bf16|int8", OURS, 1.0)])}})


def test_the_table_says_how_fast_calls_are_one_after_another_and_as_a_graph():
    both, eager_only = entry("both", OURS, 0.25), entry("eager only", FULL, 0.4)
    both["whole"] |= {"eager_ms": 0.5, "graph_ms": 0.26}
    eager_only["whole"] |= {"eager_ms": 0.41, "graph_ms": None, "graph_absent": "it waits for the device"}
    found = compared(SHAPE, [both, eager_only])
    assert (HEADER[-2], HEADER[-1]) == ("eager TFLOP/s", "graph TFLOP/s")
    assert [line[-2:] for line in cells(found)] == [["522", "1004"], ["636", ""]]
    assert found[0]["whole"]["eager_tflops"] == pytest.approx(found[0]["whole"]["tflops"] / 2)
    assert "graph_tflops" not in found[1]["whole"]


def test_the_chart_has_a_bar_for_each_right_entry(measured):
    root = ElementTree.fromstring(plot(measured))
    bars = [node for node in root.findall(".//{*}rect") if node.find("{*}title") is not None]
    assert [bar.find("{*}title").text for bar in bars] == [
        "slow full: 522",
        "cuDNN: 652",
        "Sage 2: 870",
        "LOW int8: 1044",
    ]
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[3] / heights[0] == pytest.approx(2, rel=0.01)
    assert len({bar.get("fill") for bar in bars}) == 4
    lines = [node for node in root.findall(".//{*}path") if node.get("class") == "bound"]
    assert len(lines) == 4 and len({node.get("d").split()[1].split("h")[0] for node in lines}) == 1
    texts = [node.text for node in root.findall(".//{*}text")]
    assert {"flux-1k", "1×24×4608×128", "LOW int8"} <= set(texts)
    assert not {"Sage", "fast and wrong"} & set(texts)


def test_plots_are_svg(tmp_path):
    check_plot(tmp_path / "plot.svg")
    with pytest.raises(ValueError, match=r"ends in \.svg, not plot\.png"):
        check_plot(tmp_path / "plot.png")


class Event:
    """An event of a GPU that is done with everything at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


class Graph:
    """A CUDA graph that takes a millisecond whenever it is replayed."""

    def replay(self):
        time.sleep(1e-3)


@pytest.fixture
def pretends(monkeypatch):
    """`torch.cuda` on the CPU; what the GPU was told to wait for."""
    waits = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    generator = torch.Generator().manual_seed(0)
    copies = [tuple(torch.randn(3, 1, 2, 64, 16, generator=generator).bfloat16()) for _ in range(3)]
    monkeypatch.setattr(measuring, "draw", lambda *_: copies)
    return waits


def test_entries_are_checked_and_timed_in_turns(pretends):
    order = []

    def prepared(name, milliseconds, error, copies):
        def whole(number):
            order.append((name, number))
            time.sleep(1e-3 * milliseconds)
            q, k, v = copies[number % len(copies)]
            return F.scaled_dot_product_attention(q.double(), k.double(), v.double()) * (1 + error)

        return Prepared([BF16], whole, kernel=lambda number: time.sleep(1e-3 * milliseconds / 2))

    def refuse(copies):
        raise RuntimeError("\n no kernel for this\nmachine")

    entries = [
        Entry("exact", FULL, partial(prepared, "exact", 20, 0.0)),
        Entry("wrong", LOW_BIT, partial(prepared, "wrong", 0, 0.25)),
        Entry("refuses", LOW_BIT, refuse),
        Entry("fast", OURS, partial(prepared, "fast", 2, 0.1)),
    ]
    shape, steps = Shape("", 1, 2, 64, 16), []
    result = measuring.measure(shape, entries, H200, "normal", 0, 0.04, lambda *step: steps.append(step))
    exact, wrong, refuses, fast = result["entries"]
    assert refuses == {"name": "refuses", "kind": LOW_BIT, "absent": "no kernel for this"}
    assert [e["relative_l2"] for e in (exact, wrong, fast)] == pytest.approx([0, 0.25, 0.1], abs=1e-9)
    assert [e["wrong"] for e in (exact, wrong, fast)] == [False, True, False]
    assert [e["peak_bytes"] for e in (exact, wrong, fast)] == [250] * 3
    assert exact["whole"]["ms"] >= 20 and exact["kernel"]["ms"] >= 10 and exact["whole"]["host_us"] >= 20_000
    assert fast["whole"]["over_full"] == pytest.approx(exact["whole"]["ms"] / fast["whole"]["ms"])
    assert fast["whole"]["over_low"] is None
    assert json.loads(json.dumps(result, allow_nan=False))["copies"] == 3
    assert steps[-1] == (shape.label, 5, 5)

    turns = [(name, [number for _, number in group]) for name, group in groupby(order, lambda call: call[0])]
    # Each is checked twice; then come an estimate and the host's time; then three turns; then eager calls and graphs.
    assert [name for name, _ in turns] == ["exact", "wrong", "fast"] * (1 + 1 + 3 + 1)
    assert turns[0][1] == [0, 0]
    assert turns[3][1] == [0, 1] + [0] * 5
    # Three untimed calls precede the timed one, which takes the next copy in each turn.
    assert [turns[index][1] for index in (6, 9, 12)] == [[0, 1, 2, 0], [0, 1, 2, 1], [0, 1, 2, 2]]
    # A call is captured on each copy, estimated by three calls after one, and runs three times in three rounds.
    assert turns[15][1] == [0, 1, 2] + [0, 1, 2, 3] + [0, 1, 2, 3] * 3
    assert len(turns[7][1]) > len(turns[6][1])
    assert all(wait > 0 for wait in pretends) and len(pretends) == 6 * (1 + 5 + 3)
    assert exact["whole"]["eager_ms"] >= 20 and 1 <= fast["whole"]["graph_ms"] < fast["whole"]["eager_ms"]
    assert "eager_ms" not in exact["kernel"]


def test_a_call_that_cannot_be_captured_has_the_reason(pretends, monkeypatch):
    def refuse(number):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(timing, "_captured", lambda call, copies: refuse(0))
    found = timing.eager_and_graph(lambda number: time.sleep(1e-3), 3, 0.01)
    assert found["graph_absent"] == "operation not permitted when stream is capturing"
    assert found["graph_ms"] is None and 1 <= found["eager_ms"] < 10


def test_a_slow_host_is_told_by_host_us_and_by_eager_calls(pretends):
    """The pretended GPU waits for the host, as a real one does where nothing makes it run behind."""
    slow, fast = (partial(lambda took, number: time.sleep(took), took) for took in (4e-3, 1e-3))
    found = timing.take_turns({"slow": slow, "fast": fast}, 0.03)
    assert 4000 <= found["slow"]["host_us"] < 8000 and 1000 <= found["fast"]["host_us"] < 3000
    assert timing.host_seconds(slow, 2) >= 4e-3
    assert timing.eager_and_graph(slow, 1, 0.03)["eager_ms"] >= 4


@pytest.fixture
def has_gpu(monkeypatch):
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    monkeypatch.setattr(bench, "current_gpu", lambda: H200)


def run(output, shapes, done, interrupt_at=None, **options):
    def measure(shape, entries, gpu, kind, seed, seconds, on_step):
        if len(done) == interrupt_at:
            raise KeyboardInterrupt
        done.append(shape.label)
        return {"size": list(shape.size), "copies": 1, "entries": [{"name": e.name} for e in entries]}

    return bench.bench_attention(parse(shapes), output=output, measure=measure, **options)


def test_an_interrupted_run_is_resumed(has_gpu, tmp_path):
    output, done = tmp_path / "result.json", []
    with pytest.raises(KeyboardInterrupt):
        run(output, ["flux-1k", "cogvideox"], done, interrupt_at=1)
    assert list(json.loads(output.read_text())["shapes"]) == ["flux-1k 1×24×4608×128"]
    result = run(output, ["flux-1k", "cogvideox", "flux-2k"], done, command="again")
    assert done == ["flux-1k 1×24×4608×128", "cogvideox 1×48×17776×64", "flux-2k 1×24×16896×128"]
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == done
    names = [row["name"] for row in result["shapes"][done[0]]["entries"]]
    assert names == [*(peer.name for peer in PEERS), *DEFAULT_NAMES]


@pytest.mark.parametrize("change", [{"seed": 1}, {"inputs": "outliers"}, {"configs": [Config()]}])
def test_a_result_with_other_settings_is_not_overwritten(has_gpu, tmp_path, change):
    output = tmp_path / "result.json"
    run(output, ["flux-1k"], [])
    before = output.read_bytes()
    with pytest.raises(ValueError, match=f"different {', '.join(change)}: choose another file"):
        run(output, ["flux-1k", "flux-2k"], [], **change)
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3, "shapes": {}}'])
def test_another_file_is_not_overwritten(has_gpu, tmp_path, content):
    output = tmp_path / "notes.json"
    output.write_text(content)
    with pytest.raises(ValueError, match="no result of a benchmark"):
        run(output, ["flux-1k"], [])
    assert output.read_text() == content


@pytest.mark.parametrize(("options", "words"), [
    ({"inputs": "zeros"}, "unknown inputs 'zeros': choose from normal, outliers"),
    ({"configs": [Config(), Config()]}, "two configs are the same"),
])  # fmt: skip
def test_bad_options(has_gpu, options, words):
    with pytest.raises(ValueError, match=words):
        run(None, ["flux-1k"], [], **options)
