"""Models of true size with random weights, a user's own, and the backend that stock attention gets."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from dma_diffusers.eval.bench import backends
from dma_diffusers.eval.bench.backends import Backend, LargestCall, fastest_backend
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.models import MODELS, shortened
from dma_diffusers.eval.bench.own_model import named
from dma_diffusers.eval.bench.peers import Peer
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.step_time import forward
from dma_diffusers.eval.cost import pairs
from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL
from tests.eval.test_bench import H200
from tests.tiny_pipelines import rope_axes

CPU = torch.device("cpu")
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
# Published models, but for their sizes.
TINY = {
    "flux-dev-1k": replace(
        MODELS["flux-dev-1k"], grid=(16, 24), text=40,
        config=HEADS | {
            "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
            "in_channels": 16, "guidance_embeds": True, "axes_dims_rope": rope_axes(16),
        },
    ),
    "qwen-image-1k": replace(
        MODELS["qwen-image-1k"], grid=(16, 24), text=40,
        config=HEADS | {"num_layers": 2, "joint_attention_dim": 32, "in_channels": 16, "axes_dims_rope": rope_axes(16)},
    ),
    "wan-14b-720p": replace(
        MODELS["wan-14b-720p"], grid=(4, 8, 16), text=7,
        config=HEADS | {"text_dim": 32, "ffn_dim": 32, "num_layers": 2},
    ),
    "hunyuan-720p": replace(
        MODELS["hunyuan-720p"], grid=(4, 8, 16), text=40,
        config=HEADS | {
            "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 32,
            "pooled_projection_dim": 32, "rope_axes_dim": rope_axes(16),
        },
    ),
}  # fmt: skip
TOKENS = {"flux-dev-1k": 424, "qwen-image-1k": 424, "wan-14b-720p": 512, "hunyuan-720p": 552}


@pytest.mark.parametrize(("name", "parameters", "tokens"), [
    ("flux-dev-1k", 11_901_408_320, 4608),
    ("flux-dev-2k", 11_901_408_320, 16_896),
    ("flux-dev-4k", 11_901_408_320, 66_048),
    ("qwen-image-1k", 20_430_401_088, 4608),
    ("wan-14b-720p", 14_288_491_584, 75_600 + 512),
    ("hunyuan-720p", 12_821_012_544, 119_056),
    ("wan-1.3b-480p", 1_418_996_800, 14_040 + 512),
    ("hunyuan-720p-5-layers", 1_465_152_320, 119_056),
])  # fmt: skip
def test_models_are_of_true_size(name, parameters, tokens):
    model = MODELS[name].build(torch.device("meta"), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert MODELS[name].text + math.prod(MODELS[name].grid) == tokens


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.neighborhood])
def test_nine_tenths_of_the_tiles_are_skipped(name):
    chosen = MODELS[name]
    video = math.prod(chosen.grid)
    tokens = video + chosen.text * name.startswith("hunyuan")
    layout = Layout(tokens, tokens, (video, tokens) if tokens > video else (0, 0), chosen.grid)
    visited = sum(number.mean().item() for number in pairs(chosen.neighborhood, layout))
    assert visited / tiles(layout.k_length) ** 2 <= 0.1


@pytest.mark.parametrize("name", TINY)
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


@pytest.mark.parametrize("name", TINY)
def test_the_largest_attention_call_sees_every_token(name):
    tiny = TINY[name]
    model = tiny.build(CPU, 0)
    inputs = tiny.inputs(model, 0)
    with LargestCall() as seen:
        with pytest.raises(ValueError, match="no call of scaled_dot_product_attention"):
            _ = seen.shape
        forward(model, inputs)
        assert (seen.shape, seen.dispatched) == (Shape("", 1, 2, TOKENS[name], 16), True)
        q = torch.zeros(1, 3, 2 * TOKENS[name], 16)
        SDPA(query=q, key=q, value=q)
        assert (seen.shape.heads, seen.dispatched) == (3, False)


def test_a_mask_that_hides_nothing_is_left_out(monkeypatch):
    tiny = TINY["hunyuan-720p"]
    model = tiny.build(CPU, 0)
    inputs = tiny.inputs(model, 0)
    stock, masks = F.scaled_dot_product_attention, []

    def seen(query, key, value, attn_mask=None, *args, **kwargs):
        if key.shape[-2] == TOKENS["hunyuan-720p"]:
            masks.append(attn_mask is not None)
        return stock(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    without = forward(model, inputs)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block._forward_pre_hooks.clear()
    assert torch.equal(forward(model, inputs), without)
    assert masks == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", TINY)
def test_a_shortened_model_has_a_block_of_each_kind(name):
    model = TINY[name].build(CPU, 0)
    kinds = {
        "flux-dev-1k": ("transformer_blocks", "single_transformer_blocks"),
        "qwen-image-1k": ("transformer_blocks",),
        "wan-14b-720p": ("blocks",),
        "hunyuan-720p": ("transformer_blocks", "single_transformer_blocks"),
    }[name]
    with shortened(model):
        assert [len(getattr(model, kind)) for kind in kinds] == [1] * len(kinds)
    assert [len(getattr(model, kind)) for kind in kinds] == [2] * len(kinds)


SDPA = F.scaled_dot_product_attention


def plain(_, *qkv):
    return SDPA(*qkv)


def test_the_fastest_backend_that_runs_is_stock(monkeypatch):
    def no_kernel(module, *qkv):
        raise RuntimeError("No available kernel.\nAborting")

    def backend(name, call=plain):
        return Backend(Peer(name, FULL, "H", "H", ("torch",), "torch", call))

    given = torch.zeros(3, 1, 2, 8, 16)
    seen = []
    known = (backend("slow"), backend("none", no_kernel), backend("fast", lambda _, *qkv: seen.extend(qkv)))
    times = {"slow": {"ms": 2.0}, "fast": {"ms": 1.0}}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(backends, "draw", lambda *_: [tuple(given)])
    monkeypatch.setattr(
        backends, "take_turns", lambda calls, _: {each: times[each.peer.name] for each in calls}
    )
    found, fastest = fastest_backend(Shape("", 1, 2, 8, 16), H200, 0, known)
    assert found == {"none": {"absent": "No available kernel."}} | times
    assert fastest.peer.name == "fast"
    assert [x.shape for x in seen] == [given.shape[1:]] * 3
    assert all(x.transpose(1, 2).is_contiguous() for x in seen)  # as models lay tokens out
    with pytest.raises(ValueError, match="no backend of stock attention runs here"):
        fastest_backend(Shape("", 1, 2, 8, 16), H200, 0, known[1:2])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_a_peer_stands_in_for_stock_attention(monkeypatch, name, compiled):
    """Twice what attention gives shows that it ran, in every call without a mask, inside compiled graphs as well."""

    def doubled(_, *qkv):
        calls.append(qkv[0].shape)
        return 2 * plain(None, *qkv)

    calls = []
    peer = Peer(f"doubles {name}, compiled {compiled}", FULL, "H", "H", ("torch",), "torch", doubled)
    monkeypatch.setattr(backends, "PEERS", (peer,))
    model = TINY[name].build(CPU, 0)
    inputs = TINY[name].inputs(model, 0)
    before = forward(model, inputs)
    torch.compiler.reset()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with Backend(peer).running():
        found = forward(model, inputs)
    assert not torch.equal(found, before)
    assert len(calls) == {"wan-14b-720p": 4}.get(name, len(model_blocks(model)))

    def every_plain_call_doubled(query, key, value, attn_mask=None, *args, **kwargs):
        out = SDPA(query, key, value, attn_mask, *args, **kwargs)
        return 2 * out if attn_mask is None else out

    monkeypatch.setattr(F, "scaled_dot_product_attention", every_plain_call_doubled)
    for module in model.modules():
        module._compiled_call_impl = None
    assert torch.equal(found, forward(model, inputs))
    monkeypatch.undo()
    assert torch.equal(forward(model, inputs), before)
    torch.compiler.reset()


def model_blocks(model):
    return [m for m in model.modules() if type(m).__name__.endswith("TransformerBlock")]


def test_pytorchs_own_kernels_leave_the_others_for_calls_that_they_cannot_take():
    q = torch.randn(1, 2, 8, 16)
    for backend in backends.BACKENDS:
        if backend.sdpa is not None:
            with backend.running():
                assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


@pytest.mark.parametrize(("folder", "kind", "grid"), [
    (DEMO_MODEL, "FluxTransformer2DModel", 2), (VIDEO_DEMO_MODEL, "WanTransformer3DModel", 3),
])  # fmt: skip
def test_a_pipelines_folder_gives_the_step_that_the_pipeline_makes(folder, kind, grid):
    own = named(str(folder))
    assert (own.kind, len(own.grid), own.is_video) == (kind, grid, grid == 3)
    model = own.build(CPU, 0)
    with LargestCall() as seen:
        out = forward(model, own.inputs(model, 0))
    assert out.isfinite().all() and out.std() > 0.1
    assert seen.dispatched and seen.shape.tokens >= math.prod(own.grid)


def test_a_transformers_folder_gets_inputs_of_the_size_that_is_asked_for(tmp_path):
    TINY["wan-14b-720p"].build(CPU, 0).save_pretrained(tmp_path)
    own = named(str(tmp_path), (256, 128), 13)
    assert (own.grid, own.size, own.is_video) == ((4, 8, 16), "256×128, 13 frames", True)
    model = own.build(CPU, 0)
    assert isinstance(model, WanTransformer3DModel) and model.dtype == torch.bfloat16
    assert forward(model, own.inputs(model, 0)).shape == (1, 16, 4, 16, 32)


@pytest.mark.parametrize(("config", "size", "words"), [
    (None, None, "neither a pipeline's model_index.json nor a transformer's config.json"),
    ({"_class_name": "SanaTransformer2DModel"}, None, "a SanaTransformer2DModel, whose inputs only its pipeline makes"),
    ({"_class_name": "FluxTransformer2DModel"}, (1000, 1024), "--size 1000x1024: give multiples of 16"),
    ({"_class_name": "FluxTransformer2DModel"}, (64,), "--size 64: give width and height"),
])  # fmt: skip
def test_folders_that_cannot_be_measured(tmp_path, config, size, words):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        named(str(tmp_path), size)


def test_names_that_are_no_models():
    with pytest.raises(ValueError, match="unknown model 'flux': choose from flux-dev-1k, flux-dev-2k"):
        named("flux")
    with pytest.raises(ValueError, match="flux-dev-1k has its own size"):
        named("flux-dev-1k", (512, 512))
    assert named("flux-dev-1k") is MODELS["flux-dev-1k"]


def test_a_recorded_call_without_names_is_refused(monkeypatch, tmp_path):
    from dma_diffusers.eval.bench import own_model
    from dma_diffusers.pipelines import load

    model = TINY["wan-14b-720p"].build(CPU, 0)
    pipe = SimpleNamespace(components={"transformer": model})

    class Pipe(SimpleNamespace):
        def __call__(self, prompt, num_inference_steps):
            model(torch.zeros(1, 16, 4, 16, 32))

    (tmp_path / "model_index.json").touch()
    monkeypatch.setattr(load, "recommended_call", lambda _: {})
    monkeypatch.setattr(load, "load_pipeline", lambda *_, **__: Pipe(**vars(pipe)))
    with pytest.raises(ValueError, match="Pipe gives its transformer arguments without names"):
        own_model.named(str(tmp_path))
