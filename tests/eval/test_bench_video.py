"""`bench video`: models of true size, steps of tiny ones timed by a clock that isn't there, and the command."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers import apply, report
from dma_diffusers.eval.bench import steps, timing, video
from dma_diffusers.eval.bench.bound import bound_tflops
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.peers import Peer
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.steps import Clock
from dma_diffusers.eval.bench.video import DENSE, LOW, SPARSE, STOCK, bench_video, cells, compared
from dma_diffusers.eval.bench.video_models import VIDEOS, shortened
from dma_diffusers.eval.cost import pairs
from dma_diffusers.kernels.lowerings import Choice
from dma_diffusers.kernels.tiling.layout import tiles
from dma_diffusers.kernels.tiling.policies import Neighborhood
from tests.command_line import run
from tests.eval.test_bench import H200
from tests.tiny_pipelines import rope_axes

CPU = torch.device("cpu")
NEAR = Neighborhood((2, 8, 8), (2, 8, 8))
SDPA = Peer("SDPA", FULL, "H", "H", ("torch",), "torch", lambda _, *qkv: F.scaled_dot_product_attention(*qkv))
TINY = {
    "wan-14b-720p": replace(
        VIDEOS["wan-14b-720p"], latents=(4, 16, 32), text=7, neighborhood=NEAR,
        config={"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "ffn_dim": 32, "num_layers": 2},
    ),
    "hunyuan-720p": replace(
        VIDEOS["hunyuan-720p"], latents=(4, 16, 32), text=40, neighborhood=NEAR,
        config={
            "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32,
            "rope_axes_dim": rope_axes(16),
        },
    ),
}  # fmt: skip
NAMES = tuple(TINY)
CALLS = {"wan-14b-720p": 2, "hunyuan-720p": 4}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that isn't there, on which every event comes one second after the last."""

    class Event:
        now = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1
            self.at = Event.now

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(video, "require_gpu", lambda: None)
    monkeypatch.setattr(video, "current_gpu", lambda: H200)


@pytest.fixture
def measured(monkeypatch, gpu):
    monkeypatch.setattr(video, "fastest_backend", lambda *_: ({"SDPA": {"ms": 1.0}}, SDPA))
    return lambda name: video.measure(name, TINY[name], CPU, H200, 2, 0)


@pytest.mark.parametrize(("name", "parameters", "grid", "text"), [
    ("wan-14b-720p", 14_288_491_584, (21, 45, 80), (0, 0)),
    ("hunyuan-720p", 12_821_012_544, (33, 45, 80), (118_800, 119_056)),
    ("wan-1.3b-480p", 1_418_996_800, (9, 30, 52), (0, 0)),
    ("hunyuan-720p-5-layers", 1_465_152_320, (33, 45, 80), (118_800, 119_056)),
])  # fmt: skip
def test_models_are_of_true_size(name, parameters, grid, text):
    model = VIDEOS[name].build(torch.device("meta"), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    layout = VIDEOS[name].layout(model)
    assert (layout.grid, layout.text, layout.k_length) == (grid, text, math.prod(grid) + text[1] - text[0])


@pytest.mark.parametrize("name", VIDEOS)
def test_nine_tenths_of_the_tiles_are_skipped(name):
    chosen = VIDEOS[name]
    layout = chosen.layout(chosen.build(torch.device("meta"), 0))
    visited = sum(number.mean().item() for number in pairs(chosen.neighborhood, layout))
    assert visited / tiles(layout.k_length) ** 2 <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_those_of_from_pretrained(name, tmp_path):
    model = TINY[name].build(CPU, 0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = {key: (x.dtype, x.device) for key, x in [*loaded.named_parameters(), *loaded.named_buffers()]}
    found = {key: (x.dtype, x.device) for key, x in [*model.named_parameters(), *model.named_buffers()]}
    assert found == expected
    assert {dtype for dtype, _ in found.values()} >= {torch.bfloat16}


def test_the_same_seed_gives_the_same_model():
    one, same, other = (TINY["wan-14b-720p"].build(CPU, seed) for seed in (0, 0, 1))
    weights = [model.blocks[0].ffn.net[0].proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.get_default_dtype() is torch.float32


def test_a_mask_that_hides_nothing_is_left_out(gpu):
    tiny = TINY["hunyuan-720p"]
    model = tiny.build(CPU, 0)
    inputs = tiny.inputs(model, 0)
    tokens = tiny.layout(model).k_length
    with torch.no_grad(), Clock(SDPA, tokens):
        without = model(**inputs, return_dict=False)[0]
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block._forward_pre_hooks.clear()
    with torch.no_grad():
        masked = model(**inputs, return_dict=False)[0]
        assert torch.equal(without, masked)
        with Clock(SDPA, tokens), pytest.raises(RuntimeError, match="was given a mask"):
            model(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_shortened_model_has_a_block_of_each_kind(name):
    model = TINY[name].build(CPU, 0)
    kinds = ("blocks",) if name == "wan-14b-720p" else ("transformer_blocks", "single_transformer_blocks")
    with shortened(model):
        assert [len(getattr(model, kind)) for kind in kinds] == [1] * len(kinds)
    assert [len(getattr(model, kind)) for kind in kinds] == [2] * len(kinds)


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_timed_wherever_it_runs(name, measured):
    found = measured(name)
    entries = {entry["name"]: entry for entry in found["entries"]}
    assert found["attention_calls"] == CALLS[name]
    for entry in (STOCK, LOW, SPARSE, DENSE):
        # Two events for each call, the first and the last of them within the step's.
        assert entries[entry]["attentions_s"] == [CALLS[name]] * 2
        assert entries[entry]["steps_s"] == [2 * CALLS[name] + 1] * 2


@pytest.mark.parametrize("name", NAMES)
def test_what_each_configuration_computes(name, measured):
    entries = {entry["name"]: entry for entry in measured(name)["entries"]}
    errors = {entry: entries[entry]["relative_l2"] for entry in (STOCK, LOW, SPARSE, DENSE)}
    assert errors[STOCK] == 0 < errors[DENSE] < 0.01
    assert errors[DENSE] < errors[LOW] < 0.03 < errors[SPARSE]
    assert (entries[LOW]["high"], entries[LOW]["low"]) == (0, 1)
    assert (entries[DENSE]["high"], entries[DENSE]["low"]) == (1, 0)
    assert 0 < entries[SPARSE]["low"] < 1
    assert (entries[SPARSE]["high"] > 0) == (name == "hunyuan-720p")  # its text
    assert f"{CALLS[name]} calls intercepted" in "".join(entries[SPARSE]["receipt"])
    assert entries[STOCK]["receipt"] == ["stock attention: nothing is applied"]


def test_the_bound_is_that_of_the_products(monkeypatch):
    monkeypatch.setattr(video.operator, "choose", lambda *_: Choice("native", ""))
    wan = VIDEOS["wan-14b-720p"]
    layout = wan.layout(wan.build(torch.device("meta"), 0))
    shape = Shape("", 1, 40, layout.k_length, 128)
    bounds = {}
    for entry, config in video.configurations(wan.neighborhood).items():
        found = video.workload(config, layout, 128, CPU, entry == DENSE)
        bounds[entry] = bound_tflops(shape, found["products"], H200)
    assert bounds[DENSE] == bounds[STOCK] == pytest.approx(bounds[LOW] / 2)
    assert bounds[SPARSE] / bounds[LOW] == pytest.approx(11.81, rel=1e-3)


def test_gated_configurations_take_the_map_in_every_step():
    tiny = TINY["wan-14b-720p"]
    model = tiny.build(CPU, 0)
    for entry, dense in ((LOW, False), (SPARSE, False), (DENSE, True)):
        apply(model, video.configurations(NEAR)[entry])
        with torch.no_grad():
            model(**tiny.inputs(model, 0))
        interceptions = [m.processor.interception for n, m in model.named_modules() if n.endswith("attn1")]
        assert [interception.mapped for interception in interceptions] == [not dense] * 2
    assert report(model).modules[0].intercepted == 1


def test_the_fastest_backend_that_runs_is_stock(monkeypatch, gpu):
    def no_kernel(module, *qkv):
        raise RuntimeError("No available kernel.\nAborting")

    def peer(name, call=SDPA.call):
        return Peer(name, FULL, "H", "H", ("torch",), "torch", call)

    given = torch.zeros(3, 1, 2, 8, 16)
    seen = []
    peers = (peer("slow"), peer("none", no_kernel), peer("fast", lambda _, *qkv: seen.extend(qkv)))
    times = {"slow": {"ms": 2.0}, "fast": {"ms": 1.0}}
    monkeypatch.setattr(steps, "BACKENDS", peers)
    monkeypatch.setattr(steps, "draw", lambda *_: [tuple(given)])
    monkeypatch.setattr(steps, "take_turns", lambda calls, _: {peer: times[peer.name] for peer in calls})
    found, fastest = steps.fastest_backend(Shape("", 1, 2, 8, 16), H200, 0)
    assert found == {"none": {"absent": "No available kernel."}} | times
    assert fastest.name == "fast"
    assert [x.shape for x in seen] == [given.shape[1:]] * 3
    assert all(x.transpose(1, 2).is_contiguous() for x in seen)  # as models lay tokens out
    monkeypatch.setattr(steps, "BACKENDS", peers[1:2])
    with pytest.raises(ValueError, match="no backend of stock attention runs here"):
        steps.fastest_backend(Shape("", 1, 2, 8, 16), H200, 0)


def entry(name, step_s, attention_s, gib=1, high=0.0, low=0.0):
    return {
        "name": name, "policy": None, "step_s": step_s, "attention_s": attention_s, "attention_bound_s": 1.0,
        "peak_bytes": gib * 2**30, "high": high, "low": low, "relative_l2": 0.01,
    }  # fmt: skip


ENTRIES = [
    entry(STOCK, 10.0, 8.0, high=1.0),
    entry(LOW, 7.0, 5.0, low=1.0),
    entry(SPARSE, 3.0, 1.0, 2, 0.01, 0.1),
    entry(DENSE, 11.0, 9.0, 3, high=1.0),
]


def test_a_schedule_is_computed_from_steps():
    *_, low, near, dense, schedule = compared(ENTRIES)
    assert (low["over_stock"], low["attention_over_stock"]) == (pytest.approx(10 / 7), 1.6)
    assert near["over_stock"] == pytest.approx(10 / 3) and dense["over_stock"] == pytest.approx(10 / 11)
    assert schedule["computed"] and schedule["step_s"] == pytest.approx(0.3 * 11 + 0.7 * 3)
    assert schedule["over_stock"] == pytest.approx(10 / 5.4)
    assert schedule["attention_over_stock"] == pytest.approx(8 / (0.3 * 9 + 0.7))
    assert schedule["attention_share"] == pytest.approx(3.4 / 5.4)
    assert schedule["peak_bytes"] == 3 * 2**30
    assert compared(ENTRIES)[0]["attention_share"] == 0.8


def test_the_table():
    lines = cells(compared([*ENTRIES[:1], ENTRIES[1] | {"relative_l2": None}, *ENTRIES[2:]]))
    assert lines[0] == ["stock", "10.000", "1.00", "8.000", "1.00", "80", "12", "100.0", "1.0", "0.0100"]
    assert lines[1][-1] == "NaN"
    assert lines[-1] == [
        "neighbourhood, 30% of steps dense", "5.400", "1.85", "3.400", "2.35", "63", "", "37.7", "3.0", "",
    ]  # fmt: skip


@pytest.fixture
def stored(monkeypatch, gpu):
    found = {"clip": "a clip", "stock": "SDPA", "entries": compared(ENTRIES)}
    monkeypatch.setattr(video, "measure", lambda *_: found)
    monkeypatch.setattr(video.operator, "choose", lambda *_: Choice("native", ""))


def test_a_whole_result(stored, tmp_path):
    output = tmp_path / "result.json"
    result = bench_video(dict(list(TINY.items())[:1]), output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == ["wan-14b-720p"]
    assert "quality is unknown" in result["settings"]["note"]
    assert {"diffusers", "torch", "triton"} < result["settings"]["versions"].keys()
    assert list(bench_video(TINY, output=output)["shapes"]) == list(TINY)  # goes on
    with pytest.raises(ValueError, match="measured with different rounds"):
        bench_video(TINY, rounds=5, output=output)


def test_the_command(monkeypatch, capsys, stored):
    code, output, _ = run(monkeypatch, capsys, "bench", "video")
    assert code == 0
    assert output.count("neighbourhood, 30% of steps dense") == 2 and "quality is unknown" in output
    code, output, error = run(monkeypatch, capsys, "bench", "video", "--model", "hunyuan-720p", "--json")
    assert (code, error) == (0, "") and list(json.loads(output)["shapes"]) == ["hunyuan-720p"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model", "wan"), "unknown model 'wan': choose from wan-14b-720p, hunyuan-720p"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, stored, arguments, words):
    code, output, error = run(monkeypatch, capsys, "bench", "video", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    code, output, error = run(monkeypatch, capsys, "bench", "video")
    assert (code, output, error) == (1, "", "error: this command needs a CUDA GPU, and there is none\n")


def test_without_a_kernel_nothing_is_built(monkeypatch, gpu):
    monkeypatch.setattr(video.operator, "choose", lambda *_: Choice("reference", "sm_70 has none"))
    with pytest.raises(ValueError, match=r"there is no kernel for bf16\|int8: sm_70 has none"):
        bench_video(TINY)
