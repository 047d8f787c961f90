"""Tiny models of every family: with an exact operation in the operator's place they are stock, with low bits not."""

from collections import Counter
from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from dma_diffusers import DMAConfig, apply, report, restore
from dma_diffusers.attach import interceptions
from dma_diffusers.components import transformers_of
from dma_diffusers.grids import of_list
from dma_diffusers.kernels import operator
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.dma_diffusers.tiny_case import TEXT

LOW = {"min_length": 0, "policy": "dense(everywhere=low)"}


class Exact:
    """The operator's calls, by full precision; `texts`: (tokens, start and stop of the text) of each."""

    def __init__(self, pipe_or_model):
        apply(pipe_or_model, min_length=0)
        self.texts = []
        for _, model in transformers_of(pipe_or_model):
            for interception in interceptions(model).values():
                interception.stand_in = self.attend

    def attend(self, query, key, value, key_mask, scale, is_causal, **call) -> operator.Result:
        self.texts.append((key.shape[2], call["text_start"], call["text_stop"]))
        mask = None if key_mask is None else key_mask[:, None, None]
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return operator.Result(out, torch.empty(0), torch.empty(0, dtype=torch.int32))


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_models.EVERY)
def test_exact_is_stock_and_low_is_not(name):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    stock = case.run(text)
    exact = Exact(case.model)
    drawn = case.run(text)
    assert len(exact.texts) == sum(case.calls.values()) > 0
    torch.testing.assert_close(drawn, stock, rtol=0, atol=1e-6 if name == "hunyuan15" else 0)
    apply(case.model, **LOW)
    assert (case.run(text) - stock).norm() > 1e-4 * stock.norm()
    restore(case.model)
    assert torch.equal(case.run(text), stock)


@torch.no_grad()
@pytest.mark.parametrize(
    "columns, refiners, captions", [(24, 1, (21,)), (25, 1, (21,)), (25, 1, (21, 33, 40))]
)
def test_z_image_has_its_padding_with_the_text(columns, refiners, captions):
    torch.manual_seed(0)
    case = tiny_models.z_image(12, columns, refiners, captions)
    texts = [torch.randn(tokens, 8) for tokens in captions]
    stock = case.run(texts)
    exact = Exact(case.model)
    assert torch.equal(case.run(texts), stock)
    tokens, image = 12 * columns, -(-12 * columns // 32) * 32
    refiner = (image, tokens, image) if image > tokens else (image, 0, 0)
    assert exact.texts == [refiner] + [(image + -(-max(captions) // 32) * 32, *case.text)] * 2
    refiners = {
        module.module
        for module in report(case.model).modules
        if module.reason == "attention among tokens of text"
    }
    assert refiners == {"context_refiner.0.attention"}

    apply(case.model, min_length=0, policy="neighborhood(window=5x5, high=3x3)")
    assert not torch.equal(case.run(texts), stock)
    assert [module.intercepted for module in report(case.model).modules if module.policy] == [1, 1, 1]


@torch.no_grad()
def test_images_of_several_sizes_in_one_call_of_z_image():
    torch.manual_seed(0)
    case = tiny_models.z_image()
    sizes = [torch.randn(4, 1, 24, 48), torch.randn(4, 1, 20, 40)]
    call = {
        "x": sizes,
        "t": torch.full((2,), 0.5),
        "cap_feats": list(torch.randn(2, 21, 8)),
        "return_dict": False,
    }
    stock = case.model(**call)[0]
    apply(case.model, min_length=0)
    assert all(map(torch.equal, case.model(**call)[0], stock))
    assert [module.fallbacks for module in report(case.model).modules if module.policy] == [
        {"cross-attention, or a model's call that does not tell where text is": 1}
    ] * 2
    for images in (sizes, [sizes[:1]], [[sizes[0], None]]):  # of several sizes, and with others for reference
        with pytest.raises(ValueError, match="no single grid"):
            of_list(case.model, {"x": images})
    apply(case.model, min_length=0, policy="neighborhood(window=5x5)")
    with pytest.raises(
        ValueError, match=r"images of several sizes .* no single grid: use a policy that needs none"
    ):
        case.model(**call)


class Largest(TorchDispatchMode):
    """The most elements of a tensor of booleans that anything made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.dtype == torch.bool
            and func is not torch.ops.aten.expand.default
        ):
            self.elements = max(self.elements, out.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("image", [0, 1])
def test_hunyuan_video_15_masks_keys_alone(image):
    torch.manual_seed(0)
    case = tiny_models.hunyuan15()
    valid, valid_2 = torch.tensor([[21], [9]]), torch.tensor([[0], [7]])
    text = torch.randn(2, 21, 8)
    case.latents = torch.randn(2, *case.latents.shape[1:])
    case.inputs = dict(
        encoder_attention_mask=torch.arange(21) < valid, encoder_attention_mask_2=torch.arange(7) < valid_2,
        encoder_hidden_states_2=torch.randn(2, 7, 6), image_embeds=torch.randn(2, 3, 5) * image,
    )  # fmt: skip
    with Largest() as stock_masks:
        stock = case.run(text)
    exact = Exact(case.model)
    with Largest() as masks:
        drawn = case.run(text)
    torch.testing.assert_close(drawn, stock, rtol=0, atol=1e-6)
    assert exact.texts == [(451, 420, 451)] * 2
    assert stock_masks.elements == 2 * 451**2 and masks.elements < 451**2

    apply(case.model, min_length=452)
    with Largest() as masks:
        torch.testing.assert_close(case.run(text), stock, rtol=0, atol=1e-6)
    assert masks.elements < 451**2


VALID = torch.arange(21) < torch.tensor([[21], [9], [1]])


def repeated(value: torch.Tensor) -> torch.Tensor:
    """The same for three batch entries, of a tensor that has a batch."""
    return value if value.ndim == 1 and len(value) > 1 else value.repeat(3, *[1] * (value.ndim - 1))


MASKED = {  # models whose texts differ in length, and the arguments of their calls that depend on the batch
    "hunyuan": lambda inputs: dict(
        pooled_projections=torch.randn(3, 32), guidance=torch.ones(3), encoder_attention_mask=VALID.float()
    ),
    "hunyuan15": lambda inputs: dict(
        encoder_attention_mask=VALID, encoder_hidden_states_2=torch.randn(3, 7, 6),
        encoder_attention_mask_2=torch.arange(7) < torch.tensor([[0], [7], [3]]), image_embeds=torch.randn(3, 3, 5),
    ),
    "qwen": lambda inputs: dict(img_shapes=[[(1, 16, 19)]] * 3, encoder_hidden_states_mask=VALID),
    "z_image": lambda inputs: {},
    "bria_fibo": lambda inputs: inputs | dict(
        text_encoder_layers=[torch.randn(3, 21, 4)] * 2,
        joint_attention_kwargs={"attention_mask": F.pad(VALID, (0, 130), value=True)[:, None, None]},
    ),
    "controlnet of qwen": lambda inputs: dict(
        img_shapes=inputs["img_shapes"] * 3, encoder_hidden_states_mask=VALID,
        controlnet_cond=inputs["controlnet_cond"].repeat(3, 1, 1),
    ),
    "ernie": lambda inputs: dict(text_lens=torch.tensor([21, 9, 1])),
    "framepack": lambda inputs: {name: repeated(value) for name, value in inputs.items()} | dict(
        encoder_attention_mask=VALID.float()
    ),
    "hunyuan_image": lambda inputs: dict(
        encoder_attention_mask=VALID, encoder_hidden_states_2=torch.randn(3, 7, 6),
        encoder_attention_mask_2=torch.arange(7) < torch.tensor([[0], [7], [3]]),
    ),
    "krea2": lambda inputs: inputs | dict(encoder_attention_mask=VALID),
    "motif": lambda inputs: dict(encoder_attention_mask=VALID, image_embeds=torch.randn(3, 5, 6)),
    "nucleus": lambda inputs: dict(img_shapes=inputs["img_shapes"] * 3, encoder_hidden_states_mask=VALID),
    "prx": lambda inputs: dict(attention_mask=VALID),
    "qwen21": lambda inputs: dict(
        img_shapes=inputs["img_shapes"] * 3, img_mask=inputs["img_mask"].repeat(3, 1), encoder_hidden_states_mask=VALID
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("fields", [{}, {"protect_text": False}])
def test_masks_that_are_said_to_hide_text_hide_nothing_else(name, fields, monkeypatch):
    case = tiny_models.make(name)
    case.latents, case.inputs = torch.randn(3, *case.latents.shape[1:]), MASKED[name](case.inputs)
    if name == "z_image":
        text = [torch.randn(length, 8) for length in (21, 33, 40)]
    else:
        text = torch.randn(3, TEXT, 3, 8) if name == "krea2" else case.texts(1)[0]
    stock = case.run(text)
    exact, said = Exact(case.model), []
    apply(case.model, min_length=0, **fields)

    def attend(query, key, value, key_mask, masks_text, **call):
        start, stop = call["text_start"], call["text_stop"]
        hidden = (~key_mask).any(0).nonzero().flatten()
        assert len(hidden)
        looks_at_text_alone = masks_text and stop > start  # as the operator has it
        assert not looks_at_text_alone or start <= hidden.min() <= hidden.max() < stop
        assert said.pop() == ("text" if looks_at_text_alone else "keys")
        return exact.attend(query, key, value, key_mask, masks_text=masks_text, **call)

    why_stock = DMAConfig.why_stock

    def spy(config, device, head_dim, masked=""):
        said.extend([masked] * bool(masked))  # not what is asked about whole modules
        return why_stock(config, device, head_dim, masked)

    monkeypatch.setattr(DMAConfig, "why_stock", spy)
    for interception in interceptions(case.model).values():
        interception.stand_in = attend
    torch.testing.assert_close(case.run(text), stock, rtol=0, atol=1e-6 if name == "hunyuan15" else 0)
    assert len(exact.texts) == case.joint_calls


@torch.no_grad()
def test_mochi_attends_to_each_prompt_as_long_as_it_is():
    torch.manual_seed(0)
    case = tiny_models.mochi()
    text, valid = torch.randn(3, 21, 8), torch.tensor([[21], [9], [0]])
    case.latents = torch.randn(3, *case.latents.shape[1:])
    case.inputs = dict(encoder_attention_mask=torch.arange(21) < valid)
    stock = case.run(text)
    exact = Exact(case.model)
    assert torch.equal(case.run(text), stock)
    assert exact.texts == [(441, 420, 441), (429, 420, 429), (420, 0, 0)] * 2


def by_hand(query, key, value, **_) -> torch.Tensor:
    """Attention that never asks PyTorch for it, of `[B, S, H, D]`."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@torch.no_grad()
def test_cosmos_is_intercepted_whatever_the_process_has_for_backend(monkeypatch):
    case = tiny_models.make("cosmos")
    (text,) = case.texts(1)
    apply(case.model, min_length=0)
    expected = case.run(text)
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLEX, by_hand)
    with attention_backend("flex"):
        torch.testing.assert_close(case.run(text), expected, rtol=0, atol=1e-5)
        assert _AttentionBackendRegistry.get_active_backend()[0] is AttentionBackendName.FLEX
    assert [module.intercepted for module in report(case.model).modules if module.policy] == [2, 2]


ROLES = {  # modules that keep stock attention, of one block
    "cosmos": {"attn2": "cross-attention"},
    "ltx2": {
        "audio_attn1": "attention among tokens of sound", "attn2": "cross-attention", "audio_attn2": "cross-attention",
        "audio_to_video_attn": "cross-attention", "video_to_audio_attn": "cross-attention",
    },
    "skyreels": {"attn2": "cross-attention"},
    "wan, of images": {"attn2": "cross-attention"},
    "wan, vace": {"attn2": "cross-attention"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_roles_left_to_stock(name):
    model = tiny_models.make(name).model
    apply(model)
    stock = {module.module: module.reason for module in report(model).modules if not module.policy}
    blocks = {module.rpartition(".")[0] for module in stock}
    assert stock == {f"{block}.{role}": reason for block in blocks for role, reason in ROLES[name].items()}
    intercepted = {module.module for module in report(model).modules if module.policy}
    assert intercepted == {f"{block}.attn1" for block in blocks}


@torch.no_grad()
def test_frames_that_attend_in_blocks_are_left_to_stock():
    case = tiny_models.make("skyreels")
    case.model._set_ar_attention(3)
    (text,) = case.texts(1)
    stock = case.run(text)
    apply(case.model, min_length=0)
    assert torch.equal(case.run(text), stock)
    assert {reason for module in report(case.model).modules for reason in module.fallbacks} == {
        "a mask that is not boolean over keys alone: each query has its own"
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["ltx", "ltx2"])
def test_conditions_among_the_tokens_have_no_grid(name):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    call = case.call(text) | {"hidden_states": torch.randn(1, 110 + 330, 4), "return_dict": False}
    coordinates = torch.randn(1, 3, 440) if name == "ltx" else torch.rand(1, 3, 440, 2)
    call["video_coords"] = coordinates
    apply(case.model, **LOW)
    case.model(**call)
    assert [module.intercepted for module in report(case.model).modules if module.policy] == [1, 1]
    apply(case.model, policy="neighborhood(window=3x5x5)")
    with pytest.raises(
        ValueError, match=r"440 tokens do not lie on 3×10×11, .* conditions may have joined them: use"
    ):
        case.model(**call)


# For two steps with guidance: how many calls have so many tokens, and from where to where their text stands.
DRAWN = {
    "cosmos": {(323, 0, 0): 8},
    "hunyuan15": {(420 + 5 + 9 + 21, 420, 455): 8},
    "mochi": {(420 + 13, 420, 433): 4, (420 + 2, 420, 422): 4},
    "wan22": {(297, 0, 0): 8},
    "z_image": {(320, 300, 320): 2, (352, 300, 352): 4},
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_pipelines_are_stock_with_an_exact_operation_and_every_transformer_is_intercepted(name):
    pipe = getattr(tiny_pipelines, name)()
    stock = tiny_pipelines.draw(pipe)
    exact = Exact(pipe)
    torch.testing.assert_close(
        tiny_pipelines.draw(pipe), stock, rtol=0, atol=1e-6 if name == "hunyuan15" else 0
    )
    assert Counter(exact.texts) == DRAWN[name]

    apply(pipe, policy=f"neighborhood(window={'5x5' if name == 'z_image' else '3x5x5'})")
    assert not torch.equal(tiny_pipelines.draw(pipe), stock)
    intercepted = {module.module: module.intercepted for module in report(pipe).modules if module.policy}
    assert sum(intercepted.values()) == len(exact.texts) and all(intercepted.values())
    covered = {module.partition(".")[0] for module in intercepted}
    assert covered == {prefix.removesuffix(".") for prefix, _ in transformers_of(pipe)}
    assert len(covered) == (2 if name == "wan22" else 1)
    restore(pipe)
    assert torch.equal(tiny_pipelines.draw(pipe), stock)


@pytest.mark.parametrize("name", ["hunyuan15", "mochi", "wan22", "z_image"])
def test_noise_levels_are_those_of_the_schedule(name):
    pipe = getattr(tiny_pipelines, name)()
    tiny_pipelines.draw(pipe)
    first, second = pipe.scheduler.sigmas[:2].tolist()
    if name == "mochi":
        first, second = 1 - first, 1 - second
    stages = []

    def spy(interception, *args):
        stages.append(interception.forward.call.stage)
        return ""

    apply(pipe, dense_above_sigma=(first + second) / 2)
    for _, model in transformers_of(pipe):
        for interception in interceptions(model).values():
            for decision in interception.decisions:
                decision.why_stock = partial(spy, interception)
    tiny_pipelines.draw(pipe)
    half = len(stages) // 2
    assert stages == [0] * half + [1] * half != []


def test_the_timestep_of_cosmos_does_not_tell_its_noise():
    with pytest.raises(
        ValueError, match="dense_above_sigma: the scale of CosmosTransformer3DModel's timestep"
    ):
        apply(tiny_pipelines.cosmos(), dense_above_sigma=0.9)
