"""DMA beside tools that change, pack, cast or move weights: adapters, quantised linears, offload, placement."""

import pytest
import torch
import torch.nn.functional as F

from tests import tiny_pipelines
from tests.dma_diffusers.combining import combine, nothing
from tests.tiny_pipelines import draw

CALLS = {"flux": 6, "sd3": 6, "wan": 8, "hunyuan": 4}  # of the operator, in a drawing of two steps


def add_lora(pipe) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        peft.LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False), "one"
    )


LORA = [
    nothing,
    add_lora,
    lambda pipe: pipe.transformer.set_adapters("one", weights=0.3),
    lambda pipe: pipe.transformer.disable_adapters(),
    lambda pipe: pipe.transformer.enable_adapters(),
    lambda pipe: pipe.transformer.fuse_lora(lora_scale=0.5),
    lambda pipe: pipe.transformer.unfuse_lora(),
    lambda pipe: pipe.transformer.unload_lora(),
    add_lora,
]


@pytest.mark.parametrize(
    ("name", "applied_after"), [("flux", 0), ("sd3", 0), ("wan", 0), ("hunyuan", 0), ("flux", 2), ("wan", 2)]
)
def test_lora_is_added_scaled_switched_fused_and_unloaded(name, applied_after):
    steps = [(step, CALLS[name]) for step in LORA]
    combine(getattr(tiny_pipelines, name), steps, applied_after=applied_after)


@pytest.mark.parametrize(
    ("name", "argument"),
    {"flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs", "wan": "attention_kwargs"}.items(),
)
def test_the_scale_of_lora_reaches_the_model(name, argument):
    def run(pipe):
        return draw(pipe, **{argument: {"scale": 0.25}})

    combine(getattr(tiny_pipelines, name), [(add_lora, CALLS[name])], run)
    pipe = getattr(tiny_pipelines, name)()
    add_lora(pipe)
    assert not torch.equal(run(pipe), draw(pipe))


class PackedLinear(torch.nn.Linear):
    """A linear whose weight is bytes and a scale for each row, as that of a GGUF file; it dequantises in each call."""

    def __init__(self, linear: torch.nn.Linear):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(
            packed.view(torch.uint8).repeat_interleave(2, 1), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight[:, ::2].view(torch.int8) * self.scale, self.bias)


def pack(pipe) -> None:
    for module in list(pipe.transformer.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear and name.startswith(("to_", "add_", "proj")):
                setattr(module, name, PackedLinear(child))


def int8_weights(pipe) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())


def int8_weights_and_activations(pipe) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(pipe.transformer, torchao.Int8DynamicActivationInt8WeightConfig())


QUANTISED = {"packed": pack, "torchao, weights": int8_weights, "torchao, both": int8_weights_and_activations}


@pytest.mark.parametrize(("name", "applied_after"), [("flux", 0), ("wan", 1)])
@pytest.mark.parametrize("tool", QUANTISED)
def test_linears_are_quantised(tool, name, applied_after):
    steps = [(QUANTISED[tool], CALLS[name]), (nothing, CALLS[name])]
    combine(getattr(tiny_pipelines, name), steps, applied_after=applied_after)


CPU = torch.device("cpu")


def offload_leaves(pipe, folder) -> None:
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def offload_blocks(pipe, folder) -> None:
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_by_accelerate(pipe, folder) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, CPU)


def offload_with_hook(pipe, folder) -> None:
    pytest.importorskip("accelerate").cpu_offload_with_hook(pipe.transformer, CPU)


def offload_components(pipe, folder) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def dispatch(pipe, folder) -> None:
    accelerate, model = pytest.importorskip("accelerate"), pipe.transformer
    parts = [*dict(model.named_children()), *dict(model.named_parameters(recurse=False))]
    places = dict.fromkeys(parts, "cpu") | {"proj_out": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def cast_to_fp8(pipe, folder) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)


PLACEMENTS = [
    offload_leaves, offload_blocks, offload_by_accelerate, offload_with_hook, offload_components, dispatch,
    cast_to_fp8,
]  # fmt: skip


@pytest.mark.parametrize(("name", "applied_after"), [("flux", 0), ("wan", 1)])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_weights_are_moved_or_cast(place, name, applied_after, tmp_path):
    steps = [(lambda pipe: place(pipe, tmp_path), CALLS[name]), (nothing, CALLS[name])]
    combine(getattr(tiny_pipelines, name), steps, applied_after=applied_after)


def test_a_model_is_loaded_with_a_device_map(tmp_path):
    def load(pipe) -> None:
        pipe.transformer.save_pretrained(tmp_path)
        pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, device_map={"": "cpu"})

    combine(tiny_pipelines.flux, [(load, 6), (nothing, 6)], applied_after=1)


@pytest.mark.parametrize("tool", [add_lora, *QUANTISED.values(), lambda pipe: cast_to_fp8(pipe, None)])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_these_tools_change_pictures(tool, name):
    pipe = getattr(tiny_pipelines, name)()
    plain = draw(pipe)
    tool(pipe)
    assert not torch.equal(draw(pipe), plain)
