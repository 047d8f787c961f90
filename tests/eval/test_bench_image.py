"""`bench image`: FLUX of true size, steps of a tiny one timed where there is no GPU, FP8 linears, and the command."""

import json
from contextlib import nullcontext
from functools import partial, partialmethod
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.autograd import DeviceType

from dma_diffusers.eval.bench import image, timing
from dma_diffusers.eval.bench.fp8_linears import Fp8Linear, use_fp8_linears
from dma_diffusers.eval.bench.image import COMPILED, EAGER, bench_image, cells, compared
from dma_diffusers.eval.bench.image_models import IMAGES, Image
from tests.command_line import run
from tests.eval.test_bench import H200
from tests.tiny_pipelines import rope_axes

CPU = torch.device("cpu")
TINY = Image(
    40, (16, 24),
    {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "in_channels": 16, "guidance_embeds": True,
        "axes_dims_rope": rope_axes(16),
    },
)  # fmt: skip
NAMES = [
    "stock, PyTorch's choice",
    "stock, cuDNN",
    "LOW int8",
    "bf16|int8, window 128, sink 128",
    "published neighbourhood, LOW int8",
]


class Profile(nullcontext):
    """A profiler that saw these events; PyTorch's sees none without a GPU, and says so."""

    def __init__(self, events, activities):
        super().__init__(self)
        self.events = lambda: events


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that isn't there, and a compiler that runs graphs as they are."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(timing, "require_gpu", lambda: None)
    monkeypatch.setattr(image, "require_gpu", lambda: None)
    monkeypatch.setattr(image, "current_gpu", lambda: H200)
    monkeypatch.setattr(image, "profile", partial(Profile, []))
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks",
        partialmethod(FluxTransformer2DModel.compile_repeated_blocks, backend="eager"),
    )  # fmt: skip
    yield
    torch.compiler.reset()


def measure(configs=None, linears="bf16"):
    return image.measure("flux-1k", TINY, configs, linears, 1, 0, "sm_90", CPU)


@pytest.mark.parametrize(("name", "tokens"), [("flux-1k", 4608), ("flux-2k", 16_896), ("flux-4k", 66_048)])
def test_flux_is_of_true_size(name, tokens):
    chosen = IMAGES[name]
    model = chosen.build(torch.device("meta"), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
    assert chosen.text + chosen.grid[0] * chosen.grid[1] == tokens
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (19, 38)
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (24, 128)


def test_every_attention_is_measured_eager_and_compiled(gpu):
    entries = measure()["entries"]
    assert [(entry["name"], entry["mode"]) for entry in entries] == [
        (name, mode) for mode in (EAGER, COMPILED) for name in NAMES
    ]
    found = {(entry["name"], entry["mode"]): entry for entry in entries if "absent" not in entry}
    for mode in (EAGER, COMPILED):
        errors = [found[name, mode]["relative_l2"] for name in (NAMES[0], *NAMES[2:])]
        assert errors[0] < 1e-6 < errors[2] <= errors[1] < 0.05 and errors[3] > errors[1]
        assert found[NAMES[0], mode]["over_stock"] == 1
        assert found[NAMES[2], mode]["busy_ms"] is None is found[NAMES[2], mode]["host_bound"]
    assert "2 calls intercepted" not in "".join(found[NAMES[0], EAGER]["receipt"])
    assert "LOW int8" not in "".join(found[NAMES[0], COMPILED]["receipt"])


def test_compiled_steps_run_compiled_blocks_and_eager_ones_do_not(gpu, monkeypatch):
    seen = []

    def timed(step, steps):
        model = step.args[0]
        seen.append({block._compiled_call_impl is not None for block in model.transformer_blocks})
        return {"step_ms": 1.0, "busy_ms": 0.75}

    monkeypatch.setattr(image, "_timed", timed)
    entries = measure(configs={})["entries"]
    timed_modes = [entry["mode"] for entry in entries if "absent" not in entry]
    assert seen == [{mode == COMPILED} for mode in timed_modes] and set(timed_modes) == {EAGER, COMPILED}
    assert entries[0]["host_bound"] == 0.25


def test_a_step_has_its_time_and_its_kernels(gpu, monkeypatch):
    def event(name, us, device_type=DeviceType.CUDA, is_user_annotation=False):
        time_range = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(
            name=name, time_range=time_range, device_type=device_type, is_user_annotation=is_user_annotation
        )

    events = [
        event("attend", 2000), event("gemm", 1500), event("gemm", 1500),
        event("cudaLaunchKernel", 9000, DeviceType.CPU), event("a region", 7000, is_user_annotation=True),
    ]  # fmt: skip
    monkeypatch.setattr(image, "profile", partial(Profile, events))
    steps = []
    found = image._timed(lambda: steps.append(1), 4)
    assert len(steps) == 3 * 4 + 1 and len(found["rounds_ms"]) == 3 and found["busy_ms"] == 5
    assert found["kernels"] == [
        {"name": "gemm", "ms": 3.0, "calls": 2},
        {"name": "attend", "ms": 2.0, "calls": 1},
    ]


def entry(name, mode, step_ms, busy_ms, **others):
    return {
        "name": name, "mode": mode, "is_stock": name.startswith("stock"), "step_ms": step_ms, "busy_ms": busy_ms,
        "peak_bytes": 3 * 2**30, "relative_l2": 0.0123, **others,
    }  # fmt: skip


ENTRIES = [
    entry("stock", EAGER, 172.0, 170.0), entry("stock, cuDNN", EAGER, 160.0, 160.5), entry("ours", EAGER, 200.0, 150.0),
    {"name": "stock", "mode": COMPILED, "absent": "No available kernel."},
    entry("ours", COMPILED, 140.0, None, relative_l2=None),
]  # fmt: skip


def test_the_table():
    found = compared(ENTRIES)
    assert cells(found) == [
        ["stock", "eager", "172.0", "0.930", "170.0", "1.2", "3.0", "0.0123"],
        ["stock, cuDNN", "eager", "160.0", "1.000", "160.5", "0.0", "3.0", "0.0123"],
        ["ours", "eager", "200.0", "0.800", "150.0", "25.0", "3.0", "0.0123"],
        ["stock: No available kernel.", "compiled", "", "", "", "", "", ""],
        ["ours", "compiled", "140.0", "", "", "", "3.0", "NaN"],
    ]


def test_fp8_linears_are_those_that_see_every_token():
    model = IMAGES["flux-1k"].build(torch.device("meta"), 0)
    assert use_fp8_linears(model) == 418
    left = {name.split(".", 2)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name in left if "." in name and "norm" in name} >= {
        "norm1.linear",
        "norm1_context.linear",
    }


@pytest.mark.parametrize("size", [(7, 32), (2, 9, 32)])
def test_an_fp8_linear_is_close_to_its_linear(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*size, generator=generator).bfloat16()
    x[..., 0, :] *= 1000  # each row has its own scale
    linear = nn.Linear(32, 48).bfloat16().requires_grad_(False)
    found, exact = Fp8Linear(linear)(x), linear(x)
    assert found.shape == exact.shape and found.dtype == exact.dtype
    error = (found - exact).float().norm(dim=-1) / exact.float().norm(dim=-1)
    assert 1e-3 < error.max() < 0.08


def test_a_model_with_fp8_linears_is_close_to_itself():
    model, inputs = TINY.build(CPU, 0), TINY.inputs(TINY.build(CPU, 0), 0)
    exact = image._forward(model, inputs)
    assert use_fp8_linears(model) == 12 + 5
    assert 1e-4 < image.relative_l2(image._forward(model, inputs), exact) < 0.1


def test_fp8_linears_compile_and_their_number_is_recorded(gpu):
    found = measure(configs={}, linears="fp8")
    assert found["fp8_linears"] == 17
    assert {entry["mode"] for entry in found["entries"] if "absent" not in entry} == {EAGER, COMPILED}


@pytest.fixture
def stored(monkeypatch, gpu):
    monkeypatch.setattr(image, "measure", lambda *_: {"entries": compared(ENTRIES)})


def test_results_of_both_linears_share_a_file(stored, tmp_path):
    output = tmp_path / "result.json"
    bench_image({"flux-1k": TINY}, output=output)
    result = bench_image({"flux-1k": TINY}, linears="fp8", output=output)
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert list(result["shapes"]) == ["flux-1k, bf16 linears", "flux-1k, fp8 linears"]
    with pytest.raises(ValueError, match="measured with different steps"):
        bench_image({"flux-1k": TINY}, steps=9, output=output)


def test_the_command(monkeypatch, capsys, stored):
    code, output, _ = run(monkeypatch, capsys, "bench", "image")
    assert code == 0
    assert "flux-1k, bf16 linears, H200" in output and "quality is unknown" in output
    arguments = (
        "bench",
        "image",
        "--model",
        "flux-2k",
        "--config",
        "preset=hopper",
        "--linears",
        "fp8",
        "--json",
    )
    code, output, error = run(monkeypatch, capsys, *arguments)
    assert (code, error) == (0, "") and list(json.loads(output)["shapes"]) == ["flux-2k, fp8 linears"]
    assert list(json.loads(output)["settings"]["configs"]) == ["preset=hopper"]


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model", "flux"), "unknown model 'flux': choose from flux-1k, flux-2k, flux-4k"),
    (("--linears", "fp4"), "unknown linears 'fp4': choose from bf16, fp8"),
    (("--config", "low=fp3"), "fp3"),
    (("-o", "/no/such/folder/out.json"), "no folder"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, stored, arguments, words):
    code, output, error = run(monkeypatch, capsys, "bench", "image", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error
