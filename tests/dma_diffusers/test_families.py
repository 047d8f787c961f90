"""Where text stands, told by the models themselves: the keys that change when the text does are the text."""

from dataclasses import dataclass

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dma_diffusers import apply
from dma_diffusers.families import FAMILIES, family_of
from dma_diffusers.kernels import operator
from tests import tiny_pipelines

TEXT = 21  # tokens
AXES = tiny_pipelines.rope_axes(16)


def ids(tokens: int, axes: int = 3) -> torch.Tensor:
    return torch.arange(tokens)[:, None].expand(tokens, axes).float()


@dataclass
class Case:
    model: torch.nn.Module
    text: tuple[int, int]  # for joint calls
    tokens: int  # of the image or video
    inputs: dict
    joint_calls: int
    image_calls: int = 0  # of the image alone


def flux(cls=diffusers.FluxTransformer2DModel, double=1, **config) -> Case:
    settings = dict(
        in_channels=4, num_layers=double, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=AXES,
    )  # fmt: skip
    inputs = dict(hidden_states=torch.randn(1, 300, 4), img_ids=ids(300), txt_ids=ids(TEXT))
    if cls is diffusers.FluxTransformer2DModel:
        settings["pooled_projection_dim"] = 8
        inputs["pooled_projections"] = torch.randn(1, 8)
    return Case(cls(**settings | config), (0, TEXT), 300, inputs, 2 + double)


def chroma() -> Case:
    return flux(
        diffusers.ChromaTransformer2DModel,
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def flux2() -> Case:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 300, 4),
        img_ids=ids(300, 4),
        txt_ids=ids(TEXT, 4),
        guidance=torch.ones(1),
    )
    return Case(model, (0, TEXT), 300, inputs, 2)


def sd3() -> Case:
    inputs = dict(hidden_states=torch.randn(2, 4, 20, 19), pooled_projections=torch.randn(2, 64))
    return Case(tiny_pipelines.sd3().transformer, (380, 380 + TEXT), 380, inputs, 2, image_calls=1)


def hunyuan() -> Case:
    inputs = dict(
        hidden_states=torch.randn(1, 4, 3, 10, 14), pooled_projections=torch.randn(1, 32),
        guidance=torch.ones(1), encoder_attention_mask=torch.ones(1, TEXT),
    )  # fmt: skip
    return Case(tiny_pipelines.hunyuan().transformer, (420, 420 + TEXT), 420, inputs, 2)


def wan() -> Case:
    inputs = dict(hidden_states=torch.randn(2, 16, 3, 18, 22))
    return Case(tiny_pipelines.wan().transformer, (0, 0), 297, inputs, 0, image_calls=2)


def wan_with_as_much_text_as_video() -> Case:
    inputs = dict(hidden_states=torch.randn(1, 16, 1, 6, 14))
    return Case(tiny_pipelines.wan().transformer, (0, 0), TEXT, inputs, 0, image_calls=2)


def qwen() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=AXES,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 304, 4), img_shapes=[[(1, 16, 19)]],
        encoder_hidden_states_mask=torch.arange(TEXT)[None] < TEXT - 2,
    )  # fmt: skip
    return Case(model, (0, TEXT), 304, inputs, 2)


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=20, sample_height=20, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT,
    )  # fmt: skip
    return Case(model, (0, TEXT), 300, dict(hidden_states=torch.randn(1, 3, 4, 20, 20)), 2)


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 3 * 10 * 11, 4), num_frames=3, height=10, width=11,
        encoder_attention_mask=torch.ones(1, TEXT),
    )  # fmt: skip
    return Case(model, (0, 0), 330, inputs, 0, image_calls=2)


CASES = {
    "chroma": chroma,
    "cogvideox": cogvideox,
    "flux": flux,
    "flux, single blocks alone": lambda: flux(double=0),
    "flux2": flux2,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "qwen": qwen,
    "sd3": sd3,
    "wan": wan,
    "wan, as much text as video": wan_with_as_much_text_as_video,
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    case = CASES[request.param]()
    case.model.eval()
    hidden = case.inputs["hidden_states"]
    case.inputs["timestep"] = torch.full((hidden.shape[0],), 0.5)
    return case


def texts(case: Case) -> list[torch.Tensor]:
    config = case.model.config
    names = ("joint_attention_dim", "text_dim", "text_embed_dim", "caption_channels")
    width = next(config[name] for name in names if config.get(name))
    return [torch.randn(case.inputs["hidden_states"].shape[0], TEXT, width) for _ in range(2)]


class Keys(TorchFunctionMode):
    """Records the keys of every attention call over a sequence that holds all of the image."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            if query.shape[2] >= self.tokens:
                self.seen.append(key)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_text_range_is_where_the_keys_follow_the_text(case, monkeypatch):
    first, second = texts(case)
    keys = []
    for text in (first, second):
        with Keys(case.tokens) as mode:
            case.model(**case.inputs, encoder_hidden_states=text)
        keys.append(mode.seen[0])
    changed = (keys[0] != keys[1]).any(-1).any(1).any(0).nonzero().flatten().tolist()
    assert changed == list(range(*case.text))

    calls = []
    genuine = operator.attention

    def spy(query, key, value, **kwargs):
        calls.append((key.shape[2], kwargs["text_start"], kwargs["text_stop"]))
        return genuine(query, key, value, **kwargs)

    monkeypatch.setattr(operator, "attention", spy)
    apply(case.model, min_length=0)
    case.model(**case.inputs, encoder_hidden_states=first)
    joint = (case.tokens + case.text[1] - case.text[0], *case.text)
    image = (case.tokens, 0, 0)
    assert calls.count(image) == case.image_calls
    assert calls.count(joint) - (joint == image) * case.image_calls == case.joint_calls
    assert len(calls) == case.joint_calls + case.image_calls


def test_every_family_is_told_by_a_model():
    assert {type(make().model).__name__ for make in CASES.values()} == set(FAMILIES)


class Unknown(torch.nn.Module):
    pass


def test_a_model_of_no_known_family_needs_its_text():
    with pytest.raises(ValueError, match=r"Unknown is of no known family .*text="):
        family_of(Unknown())
    assert family_of(Unknown(), "last").text == "last"


def test_a_subclass_belongs_to_the_family_of_its_base():
    class Mine(diffusers.WanTransformer3DModel):
        pass

    assert family_of(Mine.__new__(Mine)) == FAMILIES["WanTransformer3DModel"]


def test_text_that_is_given_replaces_what_is_known():
    model = diffusers.FluxTransformer2DModel.__new__(diffusers.FluxTransformer2DModel)
    assert family_of(model, "none").text == "none"
    assert FAMILIES["FluxTransformer2DModel"].text == "first"


def test_single_stream_text_comes_from_the_model_and_must_fit():
    family = FAMILIES["FluxTransformer2DModel"]
    assert family.text_range(keys=300, hidden=300, encoder=0, model=20) == (0, 20)
    assert family.text_range(keys=300, hidden=300, encoder=0, model=None) is None
    assert family.text_range(keys=300, hidden=300, encoder=0, model=301) is None
