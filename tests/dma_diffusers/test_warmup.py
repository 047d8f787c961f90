"""Warming up: what is compiled beforehand is what a drawing asks for, whatever the family."""

import pytest
import torch

pytest.importorskip("triton")

import triton

import dma_diffusers
from dma_diffusers import apply, warmup
from dma_diffusers.kernels import lowerings
from dma_diffusers.kernels.ahead_of_time.compile import specialisation
from dma_diffusers.kernels.attention import encoding
from dma_diffusers.kernels.device.compiled import compiled_kernels
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.warming import KindOfCall
from tests import tiny_pipelines
from tests.tiny_pipelines import CALLS, draw

HOPPER = {"high": "bf16", "low": "int8", "min_length": 0}


@pytest.fixture
def variants(monkeypatch):
    """The kernels that calls on a GPU would have compiled, as Triton tells one from another; nothing is launched."""
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter compiles nothing")
    asked = set()

    def note(launcher, kernel, grid, *arguments, **options):
        built = {name: value for name, value in options.items() if name not in kernel.arg_names}
        asked.add((kernel.__name__, repr(specialisation(kernel, arguments, options)), repr(built)))

    def empty(launcher, shape, dtype, device):
        return torch.zeros(
            shape, dtype=dtype, device=device
        )  # the models go on with what nothing has written

    monkeypatch.setattr(Launcher, "__call__", note)
    monkeypatch.setattr(Launcher, "empty", empty)
    for module in (lowerings, encoding):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    return asked


def size_of(pipe) -> tuple[int, ...]:
    call = CALLS[type(pipe)]
    return tuple(call[name] for name in ("width", "height", "num_frames") if name in call)


BATCHES = {"cogvideox": 2, "sd3": 2, "z_image": 2}  # these guide in one call
NAMES = ("cogvideox", "cosmos", "flux", "hunyuan", "hunyuan15", "mochi", "sd3", "wan22", "z_image")


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_compiles_nothing_after_it(name, variants):
    pipe = getattr(tiny_pipelines, name)(head_dim=64)
    apply(pipe, **HOPPER)
    warmed = warmup(pipe, [size_of(pipe)], batch=BATCHES.get(name, 1), progress=False)
    known = set(variants)
    assert warmed and known
    variants.clear()
    draw(pipe)
    assert variants and variants <= known


ON_GRID = {"policy": "neighborhood(window=9x7, high=3x3)"}
STEPS = {"dense_above_sigma": 0.9, "dense_layers": (0,)}
OWN = {
    "modules": {
        "transformer_blocks.0.attn": {"window": 384},
        "single_transformer_blocks.0.attn": {"low": "fp8"},
    }
}


# In dense steps, too, q and k are normed and turned while they are encoded.
@pytest.mark.parametrize(("fields", "most"), [({}, 3), (STEPS, 5), (OWN, 5), (ON_GRID | STEPS, 6)])
def test_kernels_of_flux(fields, most, variants):
    pipe = tiny_pipelines.flux(head_dim=64)
    apply(pipe, **HOPPER | fields)
    warmup(pipe, ["40x48"], text=19)
    known = set(variants)
    assert 3 <= len(known) <= most
    variants.clear()
    draw(pipe)
    draw(pipe, height=64, width=56)  # of another size, of as few kinds
    assert variants <= known


def test_every_kind_of_call_is_made_once():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, dense_above_sigma=0.9)
    sizes = [(40, 48), "56x64", 480]
    shapes = [(call.call.shape, dict(call.call.options)["policy"]) for call in warmup(pipe, sizes, text=19)]
    policies = ["dense(everywhere=high)", "diagonal(window=128, sink=128)"]
    lengths = [20 * 24 + 19, 28 * 32 + 19]  # 480 tokens are those of 40×48
    assert shapes == [((1, 2, length, 16), policy) for length in lengths for policy in policies]
    said = str(warmup(pipe, sizes, text=19)[1])
    assert said.startswith("1×2×499×16, mxfp8|mxfp4, diagonal(window=128, sink=128): no new kernel, ")


def test_text_is_as_long_as_the_pipeline_has_it_at_most():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0)
    (call,) = (made.call for made in warmup(pipe, ["40x48"]))
    assert call.shape == (1, 2, 480 + 512, 16) and dict(call.options)["text_stop"] == 512


def test_modules_with_stock_attention_need_nothing():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=1000)
    assert warmup(pipe, ["40x48"], text=19) == []
    apply(pipe, lowering="stock")
    assert warmup(pipe, ["40x48"]) == []


def test_a_transformer_alone_is_given_its_tokens():
    model = tiny_pipelines.wan().transformer
    apply(model, min_length=0)
    (made,) = warmup(model, [297])
    options = dict(made.call.options)
    assert made.call == KindOfCall(
        (1, 2, 297, 16), torch.float32, torch.device("cpu"), False, made.call.options
    )
    assert (options["text_start"], options["text_stop"]) == (0, 0)
    with pytest.raises(
        ValueError, match="WanTransformer3DModel does not tell how many pixels make a latent: give the"
    ):
        warmup(model, ["176x144x9"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["40"], r"a size is \(width, height\) or .*, or a number of tokens, each more than 0, got '40'"),
        ([(40, 0)], r"a size is .* got \(40, 0\)"),
        ([-3], "a size is .* got -3"),
        ([(40, 48, 9)], "FluxPipeline draws pictures: give width and height, not 40x48x9"),
    ],
)
def test_wrong_sizes(sizes, message):
    pipe = tiny_pipelines.flux()
    apply(pipe)
    with pytest.raises(ValueError, match=message):
        warmup(pipe, sizes)


def test_what_cannot_be_told_is_asked_for():
    pipe = tiny_pipelines.flux()
    with pytest.raises(ValueError, match=r"nothing to warm up: call dma_diffusers\.apply first"):
        warmup(pipe, ["40x48"])
    apply(pipe, policy="neighborhood(window=9x7)")
    with pytest.raises(ValueError, match="needs a grid: give sizes in pixels, not a number of tokens"):
        warmup(pipe, [480], text=19)
    model = pipe.transformer
    apply(model)
    with pytest.raises(
        ValueError, match="FluxTransformer2DModel does not tell how many text tokens it has: say so"
    ):
        warmup(model, [480])


def test_it_is_the_package_s():
    assert dma_diffusers.warmup is warmup and "warmup" in dir(dma_diffusers)


@pytest.mark.kernel
def test_in_the_interpreter_it_runs_the_kernels(monkeypatch):
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    ran = []
    genuine = Launcher.__call__

    def note(launcher, kernel, *arguments, **options):
        ran.append(kernel.__name__)
        genuine(launcher, kernel, *arguments, **options)

    monkeypatch.setattr(Launcher, "__call__", note)
    for module in (lowerings, encoding):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_89")
    pipe = tiny_pipelines.flux()
    apply(pipe, **HOPPER)
    (made,) = warmup(pipe, [290], text=19)  # three tiles, two of them LOW
    assert ran == ["statistics", "encode", "attend"]
    assert made.kernels == ()  # nothing was compiled


@pytest.mark.kernel
def test_on_a_gpu_a_drawing_compiles_nothing_after_it():
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pipe = tiny_pipelines.flux(head_dim=128).to("cuda", torch.bfloat16)
    apply(pipe, **HOPPER, dense_above_sigma=0.9)
    warmed = warmup(pipe, ["40x48"], text=19)
    # Statistics once; quantiser (which applies the norms) and attention for mapped steps, and again for dense ones.
    assert sum(len(made.kernels) for made in warmed) <= 5
    with compiled_kernels() as compiled:
        draw(pipe)
        draw(pipe, height=64, width=56)
    assert compiled == []
