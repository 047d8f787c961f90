"""`bench pipeline`: steps of tiny models timed where there is no GPU, ways and modes, and the command."""

import gc
import json
import weakref
from contextlib import nullcontext
from functools import partial, partialmethod
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch import nn
from torch.autograd import DeviceType

from dma_diffusers.eval.bench import backends, pipeline, step_time, timing, ways
from dma_diffusers.eval.bench.backends import Backend
from dma_diffusers.eval.bench.breakdown import PARTS, compared
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.models import MODELS
from dma_diffusers.eval.bench.peers import Peer
from dma_diffusers.eval.bench.pipeline import Settings, bench_pipeline
from dma_diffusers.eval.bench.pipeline_table import HEADER, cells, plot
from dma_diffusers.eval.bench.step_time import COMPILED, EAGER, GRAPH, counts, forward
from dma_diffusers.eval.bench.ways import OURS, PEER, PLAIN, STOCK, TORCHAO, Way, parse
from dma_diffusers.linears.exclusions import choose
from tests.command_line import run
from tests.eval.test_bench import H200
from tests.eval.test_bench_models import TINY, plain

CPU = torch.device("cpu")
NAMES = [
    "stock", "stock, torchao fp8", "LOW int8", "linears=fp8", "linears=fp8-calibrated", "LOW int8,linears=fp8",
    "LOW int8,linears=fp8-calibrated",
]  # fmt: skip


class Profile(nullcontext):
    """A profiler that saw these events; PyTorch's sees none without a GPU, and says so."""

    def __init__(self, events, activities):
        super().__init__(self)
        self.events = lambda: events


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that isn't there, a compiler that runs graphs as they are, and steps that are captured by being kept."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name, value in (
        ("memory_allocated", 2**30),
        ("max_memory_allocated", 3 * 2**30),
        ("memory_reserved", 2**30),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**30, 140 * 2**30))
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(pipeline, "require_gpu", lambda: None)
    monkeypatch.setattr(pipeline, "current_gpu", lambda: H200)
    backend = Backend(Peer("SDPA", FULL, "H", "H", ("torch",), "torch", plain))
    monkeypatch.setattr(pipeline, "fastest_backend", lambda *_: ({"SDPA": {"ms": 1.0}}, backend))
    monkeypatch.setattr(backends, "PEERS", (backend.peer,))
    monkeypatch.setattr(step_time, "profile", partial(Profile, []))
    monkeypatch.setattr(step_time, "Captured", lambda step: step)
    for kind in (FluxTransformer2DModel, WanTransformer3DModel):
        monkeypatch.setattr(
            kind, "compile_repeated_blocks", partialmethod(kind.compile_repeated_blocks, backend="eager")
        )
    yield
    torch.compiler.reset()


def measure(name="flux-dev-1k", **settings):
    return pipeline.measure(name, TINY[name], Settings(seconds=0, **settings), H200, CPU)


def test_every_way_is_measured(gpu):
    result = measure(modes=(EAGER,))
    found = {entry["name"]: entry for entry in result["entries"]}
    assert list(found) == NAMES and result["stock"] == "SDPA"
    error = {name: found[name]["relative_l2"] for name in NAMES if name != TORCHAO}
    assert error["stock"] == 0 < error["LOW int8"] < 0.05
    assert error["LOW int8"] < error["linears=fp8"] < 0.2 and error["linears=fp8-calibrated"] < 0.2
    assert error["linears=fp8"] != error["linears=fp8-calibrated"]
    stock = found["stock"]
    assert stock["over_stock"] == 1 and stock["busy_ms"] is None is stock["host_ms"]
    assert (stock["weights_bytes"], stock["peak_bytes"]) == (0, 2 * 2**30)
    assert stock["receipt"] == ["stock attention: nothing is applied"]
    receipt = "".join(found["LOW int8,linears=fp8"]["receipt"])
    assert "dense(everywhere=low)" in receipt and "fp8" in receipt
    assert {result[best]["name"] for best in ("best_stock", "best_ours")} <= set(NAMES)


def test_a_way_is_measured_in_its_modes(gpu):
    both = "LOW int8,linears=fp8"
    found = measure(only=("stock", both))["entries"]
    modes = [("stock", mode) for mode in (EAGER, COMPILED, GRAPH)] + [(both, COMPILED), (both, GRAPH)]
    assert [(entry["name"], entry["mode"]) for entry in found] == modes
    assert all(entry["interleaved"] for entry in found if entry["mode"] == GRAPH)
    assert 1e-3 < found[-1]["relative_l2"] < 0.2
    assert found[-1]["relative_l2"] == pytest.approx(found[-2]["relative_l2"])


def test_a_peer_runs_stock_attention_and_ours_runs_our_own(gpu, monkeypatch):
    calls = []

    def attend(_, *qkv):
        calls.append(qkv[0].shape)
        return plain(None, *qkv)

    peer = Peer("mine", FULL, "H", "H", ("torch",), "torch", attend)
    monkeypatch.setattr(backends, "PEERS", (peer,))
    monkeypatch.setattr(pipeline, "fastest_backend", lambda *_: ({}, Backend(peer)))
    per_way = {}
    for only in ("stock", "linears=fp8", "LOW int8"):
        calls.clear()
        measure(only=(only,), modes=(EAGER,))
        per_way[only] = len(calls)
    assert per_way["stock"] == per_way["linears=fp8"] > 0 == per_way["LOW int8"]


def test_compiled_steps_run_compiled_blocks_and_eager_ones_do_not(gpu, monkeypatch):
    seen = []

    def prepared(model, inputs, mode):
        step = prepare(model, inputs, mode)
        seen.append((mode, {block._compiled_call_impl is not None for block in model.transformer_blocks}))
        return step

    prepare = step_time.prepare
    monkeypatch.setattr(step_time, "prepare", prepared)
    measure(only=("stock",))
    assert seen == [(mode, {mode != EAGER}) for mode in (EAGER, COMPILED, GRAPH)]


def test_clips_are_not_captured_unless_that_is_asked_for(gpu):
    found = [entry["mode"] for entry in measure("wan-14b-720p", only=("stock",))["entries"]]
    assert found == [EAGER, COMPILED]
    result = measure("wan-14b-720p", only=("*neighbourhood, LOW int8",), modes=(GRAPH,))
    assert [(entry["name"], entry["mode"]) for entry in result["entries"]] == [
        ("neighbourhood, LOW int8", GRAPH)
    ]
    assert "interleaved" not in result["entries"][0] and result["best_over_stock"] is None


def test_graphs_that_fit_beside_each_other_are_interleaved(gpu, monkeypatch):
    rooms = iter([100, 100, 2, 100])  # GiB; a way needs 2.4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(rooms) * 2**30, 140 * 2**30))
    monkeypatch.setattr(step_time, "prepare", lambda model, inputs, mode: partial(forward, model, inputs))
    result = measure(only=("stock", "LOW int8", "*linears=fp8"), modes=(GRAPH,))
    found = {entry["name"]: entry.get("interleaved", False) for entry in result["entries"]}
    assert found == {"stock": True, "LOW int8": True, "linears=fp8": False, "LOW int8,linears=fp8": True}


def test_a_graph_holds_the_model_whose_memory_it_reads(monkeypatch):
    """Without its model, a graph would read memory that others have by then."""

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    model = nn.Linear(2, 2)
    alive = weakref.ref(model)
    step = step_time.Captured(partial(model, torch.ones(2)))
    del model
    gc.collect()
    assert alive() is not None and torch.equal(step(), alive()(torch.ones(2))) and Graph.replays == 1


def test_what_fails_is_absent_with_the_reason(gpu, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(step_time, "Captured", fails)
    monkeypatch.setattr(ways, "quantize_linears", fails)
    entries = measure(only=("stock", "linears=fp8"), modes=(COMPILED, GRAPH))["entries"]
    assert [entry.get("absent") for entry in entries] == [None, *["no such kernel"] * 3]


def test_torchao_quantises_the_same_layers(gpu):
    pytest.importorskip("torchao")
    model = TINY["flux-dev-1k"].build(CPU, 0)
    names = set(choose(model).layers)
    (way,) = ways.ways([], [TORCHAO])
    try:
        way.put_on(model, {})
    except Exception as error:  # it may ask for a GPU that multiplies e4m3
        pytest.skip(str(error))
    kinds = {name: type(m.weight).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Float8Tensor"} == names
    assert not torch._inductor.config.coordinate_descent_tuning  # would hold for every other way


def test_a_step_has_its_time_its_kernels_and_their_parts(gpu, monkeypatch):
    def event(name, us, device_type=DeviceType.CUDA, is_user_annotation=False):
        time_range = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, time_range=time_range, device_type=device_type, is_user_annotation=is_user_annotation
        )

    events = [
        event("attend_hopper", 2000), event("nvjet_sm90", 1500), event("nvjet_sm90", 1500),
        event("cudaLaunchKernel", 9000, DeviceType.CPU), event("a region", 7000, is_user_annotation=True),
    ]  # fmt: skip
    monkeypatch.setattr(step_time, "profile", partial(Profile, events))
    monkeypatch.setattr(step_time, "wall_ms", lambda step, count: 100.0 / count)
    found, out = step_time.timed(lambda: "out", 2)
    assert (found["step_ms"], found["rounds_ms"], found["busy_ms"], out) == (
        100 / 6,
        [100 / 6] * 3,
        5.0,
        "out",
    )
    assert found["parts_ms"] == dict.fromkeys(PARTS, 0.0) | {"attention": 2.0, "linears": 3.0}
    assert found["kernels"] == [
        {"name": "nvjet_sm90", "ms": 3.0, "calls": 2},
        {"name": "attend_hopper", "ms": 2.0, "calls": 1},
    ]


@pytest.mark.parametrize(("ms", "expected"), [
    (9000.0, (1, 1)), (900.0, (1, 2)), (100.0, (6, 3)), (1.0, (10, 3)),
])  # fmt: skip
def test_steps_fit_the_time_and_there_is_one_at_least(ms, expected):
    assert counts(ms, 2) == expected


def entry(name, mode, step_ms, busy_ms, parts=(), kind=OURS, **others):
    return {
        "name": name, "kind": kind, "mode": mode, "step_ms": step_ms, "busy_ms": busy_ms,
        "parts_ms": dict(zip(PARTS, parts, strict=False)), "weights_bytes": 2**30, "peak_bytes": 3 * 2**30,
        "relative_l2": 0.0123, **others,
    }  # fmt: skip


WAYS = [
    Way(PLAIN, STOCK), Way(TORCHAO, PEER, quantises=True), Way("A", OURS, attends=True),
    Way("linears=fp8", OURS, quantises=True),
    Way("A,linears=fp8", OURS, attends=True, quantises=True, parts=("A", "linears=fp8")),
]  # fmt: skip
ENTRIES = [
    entry("stock", EAGER, 150.0, None, kind=STOCK),
    entry("stock", GRAPH, 130.0, 128.0, (30.0, 0.0, 80.0, 0.0, 16.0, 2.0), STOCK),
    {"name": TORCHAO, "kind": PEER, "mode": GRAPH, "absent": "No module named 'torchao'"},
    entry("A", GRAPH, 125.0, 123.0, (20.0, 5.0, 80.0, 0.0, 16.0, 2.0)),
    entry("linears=fp8", GRAPH, 100.0, 95.0, (30.0, 0.0, 45.0, 14.0, 7.0, 2.0)),
    entry("A,linears=fp8", GRAPH, 100.0, 101.0, (20.0, 5.0, 45.0, 15.0, 14.0, 2.0), relative_l2=None),
]  # fmt: skip


def test_the_table():
    found = compared(ENTRIES, WAYS)
    assert [line[:4] + line[10:] for line in cells(found)] == [
        ["stock", "eager", "150.0", "1.000", "", "", "", "1.0", "3.0", "0.0123"],
        ["stock", "graph", "130.0", "1.000", "2.0", "", "", "1.0", "3.0", "0.0123"],
        [f"{TORCHAO}: No module named 'torchao'", "graph", *[""] * 8],
        ["A", "graph", "125.0", "1.040", "2.0", "", "", "1.0", "3.0", "0.0123"],
        ["linears=fp8", "graph", "100.0", "1.300", "5.0", "10.0", "", "1.0", "3.0", "0.0123"],  # 5 of 50 ms
        [
            "A,linears=fp8",
            "graph",
            "100.0",
            "1.300",
            "0.0",
            "22.4",
            "95.0",
            "1.0",
            "3.0",
            "NaN",
        ],  # 13 of 58 ms
    ]
    assert cells(found)[3][4:10] == ["20.0", "5.0", "80.0", "0.0", "16.0", "2.0"]
    assert cells(found)[0][4:10] == [""] * 6
    assert all(len(line) == len(HEADER) for line in cells(found))


def test_the_step_that_amdahl_promises():
    """Attention saves 5 of stock's 130 ms, linears and what stands between them 30."""
    *_, both = compared(ENTRIES, WAYS)
    assert (both["amdahl_ms"], both["of_amdahl"]) == (95.0, 0.95)
    fused = [each | {"parts_ms": each["parts_ms"] | {"norms and pointwise": 12.0}} for each in ENTRIES[3:4]]
    *_, both = compared(
        [*ENTRIES[:3], *fused, *ENTRIES[4:]], WAYS
    )  # attention's quantiser does the norms as well
    assert both["amdahl_ms"] == 91.0
    without = compared([each for each in ENTRIES if each["name"] != "A"], WAYS)
    assert without[-1]["amdahl_ms"] is None is without[-1]["of_amdahl"]


def test_the_chart():
    svg = plot({"flux": {"entries": compared(ENTRIES, WAYS)}}).decode()
    root = ElementTree.fromstring(svg)
    parts = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if rect.get("class") == "part"]
    assert (
        len(parts) == 1 + 5 + 6 + 6 + 6
    )  # one for stock's eager step, which has no parts; no host in the last
    of_first = [rect for rect in parts if rect.get("y") == parts[0].get("y")]
    assert [float(rect.get("width")) for rect in of_first] == [560.0]
    assert "No module" not in svg and "A,linears=fp8, graph" in svg


def test_configurations_name_attention_and_linears():
    texts = ["low=int8,high=bf16,linears=fp8", "preset=exact", "linears=fp8"]
    found = parse(texts)
    assert [(asked.name, asked.linears) for asked in found] == [
        ("low=int8,high=bf16", "fp8"), ("preset=exact", ""), ("", "fp8"),
    ]  # fmt: skip
    assert found[0].attention.low == "int8" and found[2].attention is None
    names = [way.name for way in ways.ways(found)]
    assert names == [PLAIN, TORCHAO, *("low=int8,high=bf16", "preset=exact", "linears=fp8", texts[0])]
    assert [way.name for way in ways.ways(found, ["stock", "*linears=fp8"])] == [
        PLAIN,
        "linears=fp8",
        texts[0],
    ]


@pytest.mark.parametrize(("name", "near"), [
    ("flux-dev-1k", []), ("flux-dev-4k", ["published neighbourhood, LOW int8"]), ("qwen-image-1k", []),
    ("wan-14b-720p", ["neighbourhood, LOW int8"]),
])  # fmt: skip
def test_a_neighbourhood_is_measured_where_there_are_tokens_enough(name, near):
    model = MODELS[name].build(torch.device("meta"), 0)
    found = ways.default_configs(MODELS[name], model, "sm_90")
    assert [(asked.name, asked.linears) for asked in found] == [
        ("LOW int8", "fp8"), ("LOW int8", "fp8-calibrated"), *((each, "fp8") for each in near),
    ]  # fmt: skip
    assert ways.default_configs(MODELS[name], model, "sm_100")[0].name == "LOW mxfp4"
    assert all(asked.attention.dense_above_sigma == 1 for asked in found)


def test_what_needs_calibration_is_calibrated_on_the_step(gpu):
    asked = parse(["linears=micromix", "linears=int8"])
    entries = measure(configs=asked, only=("stock", "linears=*"), modes=(EAGER,))["entries"]
    assert [entry["name"] for entry in entries] == ["stock", "linears=micromix", "linears=int8"]
    assert all(0 < entry["relative_l2"] < 0.2 for entry in entries[1:])


@pytest.fixture
def stored(monkeypatch, gpu):
    found = {"stock": "SDPA", "entries": compared(ENTRIES, WAYS), "best_over_stock": 1.3}
    found["best_stock"], found["best_ours"] = (found["entries"][index] for index in (1, 4))
    monkeypatch.setattr(pipeline, "measure", lambda *_: found)


def test_a_result_is_gone_on_with(stored, tmp_path):
    output = tmp_path / "result.json"
    bench_pipeline({"flux-dev-1k": MODELS["flux-dev-1k"]}, Settings(), output)
    result = bench_pipeline(
        {name: MODELS[name] for name in ("flux-dev-1k", "wan-14b-720p")}, Settings(only=("stock",)), output
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == [
        "flux-dev-1k, 1024×1024", "flux-dev-1k, 1024×1024, only stock", "wan-14b-720p, 1280×720, 81 frames, only stock",
    ]  # fmt: skip
    assert {"diffusers", "torch", "triton", "torchao"} < result["settings"]["versions"].keys()
    with pytest.raises(ValueError, match="measured with different seconds"):
        bench_pipeline(MODELS, Settings(seconds=9), output)


def test_the_command(monkeypatch, capsys, stored, tmp_path):
    arguments = ("bench", "pipeline", "--plot", str(tmp_path / "steps.svg"))
    code, output, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "flux-dev-1k, 1024×1024, H200; stock attention: SDPA" in output and "quality is unknown" in output
    assert "the fastest of ours is linears=fp8 (graph), 100.0 ms: 1.300 ×" in output
    assert ElementTree.parse(tmp_path / "steps.svg").getroot().tag.endswith("svg")
    arguments = (
        "--model",
        "flux-dev-2k",
        "--config",
        "preset=hopper,linears=fp8",
        "--mode",
        "graph",
        "--json",
    )
    code, output, error = run(monkeypatch, capsys, "bench", "pipeline", *arguments)
    assert (code, error) == (0, "") and list(json.loads(output)["shapes"]) == ["flux-dev-2k, 2048×2048"]
    (config,) = json.loads(output)["settings"]["configs"]
    assert (config[0], config[2]) == ("preset=hopper", "fp8")


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model", "flux"), "unknown model 'flux': choose from flux-dev-1k, flux-dev-2k"),
    (("--config", "preset=hopper,linears=fp5"), "unknown linears 'fp5'; there are fp8, int8"),
    (("--config", "linears=fp8,linears=fp8"), "give linears once"),
    (("--config", "low=fp3"), "fp3"),
    (("--mode", "fast"), "unknown mode 'fast': choose from eager, compiled, graph"),
    (("--size", "512x512"), "flux-dev-1k has its own size"),
    (("--plot", "steps.png"), "ends in .svg"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, stored, arguments, words):
    code, output, error = run(monkeypatch, capsys, "bench", "pipeline", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error


def test_a_way_that_there_is_not_names_those_that_there_are(gpu):
    with pytest.raises(ValueError, match=r"no way is called 'LOW': choose from stock; .*; LOW int8; "):
        measure(only=("LOW",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    code, output, error = run(monkeypatch, capsys, "bench", "pipeline")
    assert (code, output, error) == (1, "", "error: this command needs a CUDA GPU, and there is none\n")
