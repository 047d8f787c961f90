"""Policies on the way through models: every family's neighbourhood, modules' own, dense steps, bad input."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dma_diffusers import DMAConfig, apply, report
from dma_diffusers.families import FAMILIES
from dma_diffusers.forward import ForwardContext
from dma_diffusers.interception import FUSES, Interception
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.tiling.neighborhood import mask as neighborhood_mask
from dma_diffusers.kernels.tiling.neighborhood import neighborhood
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Importance, Neighborhood
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.stages import stages
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

NOWHERE_DENSE = {"dense_above_sigma": 1, "dense_layers": ()}
WINDOWS = {2: (9, 8), 3: (2, 7, 5)}  # by the grid's dimensions


def near(grid: tuple[int, ...], **fields) -> Neighborhood:
    return Neighborhood(WINDOWS[len(grid)], **fields)


class Masked(TorchFunctionMode):
    """Full precision in the place of the calls that have the grid, each query seeing its neighbourhood and text."""

    def __init__(self, case: tiny_models.Case):
        super().__init__()
        self.case = case
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value, mask = self._named(*args, **kwargs)
            text = self.case.text if query.shape[2] > self.case.tokens else (0, 0)
            if query.shape[2] == key.shape[2] == self.case.tokens + text[1] - text[0]:
                self.calls += 1
                seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
                on_grid = torch.tensor([t for t in range(len(seen)) if not text[0] <= t < text[1]])
                axes = neighborhood(self.case.grid, WINDOWS[len(self.case.grid)])[0]
                seen[on_grid[:, None], on_grid] = neighborhood_mask(axes)
                seen = seen if mask is None else seen & mask
                return F.scaled_dot_product_attention(query, key, value, seen)
        return func(*args, **kwargs)

    def _named(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        return query, key, value, attn_mask


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in tiny_models.CASES if "as much text" not in name])
def test_every_familys_neighbourhood_is_where_its_pixels_are(name):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    stock = case.run(text)
    with Masked(case) as mode:
        expected = case.run(text)
    assert mode.calls == case.joint_calls + case.image_calls
    apply(case.model, policy=near(case.grid), high="bf16", low="bf16", min_length=0, **NOWHERE_DENSE)
    found = case.run(text)
    effect = relative_l2(expected, stock)
    assert relative_l2(found, expected) < min(0.01, effect / 4)


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """Records the arguments of the operator, call by call."""
    genuine, calls = operator.attention, []

    def spy(query, key, value, **kwargs):
        calls.append(kwargs)
        return genuine(query, key, value, **kwargs)

    monkeypatch.setattr(operator, "attention", spy)
    return calls


def test_modules_have_policies_of_their_own(asked):
    pipe = tiny_pipelines.flux()
    modules = {
        "transformer_blocks.0.attn": {"policy": Neighborhood((5, 5))},
        "single_transformer_blocks.1.attn": {"window": 384},
    }
    apply(pipe, policy="neighborhood(window=9x8, high=3x3)", modules=modules, **NOWHERE_DENSE)
    draw(pipe, num_inference_steps=1)
    words = [
        "neighborhood(window=5x5)",
        "neighborhood(window=9x8, high=3x3)",
        "diagonal(window=384, sink=128)",
    ]
    assert [call["policy"] for call in asked] == words
    assert [call["grid"] for call in asked] == [(24, 20), (24, 20), ()]
    assert [module.policy for module in report(pipe).modules] == words


def test_a_modules_policy_replaces_the_others_window():
    config = DMAConfig(window=384, modules={"a": {"policy": "neighborhood(window=5x5)"}, "b": {"sink": 0}})
    assert config.of_module("a").words == "neighborhood(window=5x5)"
    assert config.of_module("b").words == "diagonal(window=384, sink=0)"
    with pytest.raises(ValueError, match="modules: a: window and sink are those of a diagonal"):
        DMAConfig(modules={"a": {"policy": "dense()", "window": 0}})


def test_nobody_looks_for_a_grid_that_no_policy_asks_for(asked):
    pipe = tiny_pipelines.flux()
    apply(pipe, policy="diagonal(window=384)", modules={"transformer_blocks.0.attn": {"dense": True}})
    draw(pipe)
    assert {call["grid"] for call in asked} == {()}


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan"])
@pytest.mark.parametrize(
    "policy", [Diagonal(near="grid"), Diagonal(near="grid") | Diagonal(384), Importance(0.1)]
)
def test_dense_steps_and_layers_are_high_everywhere_with_every_policy(name, policy, asked):
    pipe = getattr(tiny_pipelines, name)()
    apply(pipe, policy=Dense())
    dense = draw(pipe)
    apply(pipe, policy=policy, dense_above_sigma=0.0)
    assert torch.equal(draw(pipe), dense)
    apply(pipe, policy=policy, dense_layers=(0, 1))
    modules = len([module for module in report(pipe).modules if module.policy])
    asked.clear()
    draw(pipe)
    words = [str(Dense())] * 2 + [str(policy)] * (modules - 2)
    assert [call["policy"] for call in asked[:modules]] == words


def assert_logged_once(pipe, note: str, caplog) -> None:
    with caplog.at_level(logging.WARNING, "dma_diffusers"):
        draw(pipe)
        draw(pipe)
    assert [record.getMessage() for record in caplog.records] == [f"FluxTransformer2DModel: {note}"]


def test_a_clamped_window_is_noted_once(caplog):
    pipe = tiny_pipelines.flux()
    apply(pipe, policy="neighborhood(window=9x30)", **NOWHERE_DENSE)
    note = "window 30 in dimension 2 was clamped to the grid's 20"
    assert_logged_once(pipe, note, caplog)
    assert {module.notes for module in report(pipe).modules} == {(note, FUSES)}
    assert f"  note: {note}\n" in f"{report(pipe)}\n"
    draw(pipe, height=60, width=64)
    assert {module.notes for module in report(pipe).modules} == {(FUSES,)}


def test_means_without_far_tiles_are_noted_once_where_no_grid_is_needed(caplog):
    pipe = tiny_pipelines.flux()
    apply(pipe, policy="importance(budget=0.5, low=0.5, beyond=mean)", **NOWHERE_DENSE)
    note = "beyond=mean changes nothing: budget and low take every tile"
    assert_logged_once(pipe, note, caplog)
    assert all(note in module.notes for module in report(pipe).modules)


class Unknown(torch.nn.Module):
    """Flux's inside, of no known family."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden_states, encoder_hidden_states, **inputs):
        return self.model(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **inputs)


@torch.no_grad()
def test_unknown_families_are_asked_for_their_grid():
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    policy = {"policy": near(case.grid), "min_length": 0}
    apply(case.model, **policy)
    expected = case.run(text)

    case.model = Unknown(case.model)
    words = r"neighborhood\(window=9x8\) needs to know what the tokens of Unknown lie on: .*grid=\(rows, columns\)"
    with pytest.raises(ValueError, match=words):
        apply(case.model, text="first", **policy)
    apply(case.model, text="first", **policy, grid="12x25")
    assert torch.equal(case.run(text), expected)
    apply(case.model, text="first", **policy, grid=(25, 12))
    assert not torch.equal(case.run(text), expected)
    apply(case.model, text="first", **policy, grid=(12, 24))
    with pytest.raises(
        ValueError, match="grid 12×24 has 288 tokens, but of the call's 321, 21 of them text, 300"
    ):
        case.run(text)


@torch.no_grad()
def test_several_images_in_one_call_are_refused():
    case = tiny_models.make("flux")
    case.inputs["img_ids"] = case.inputs["img_ids"].clone()
    case.inputs["img_ids"][200:, 0] = 1
    apply(case.model, policy="neighborhood(window=9x8)", min_length=0)
    with pytest.raises(ValueError, match=r"2 images in one call, of 200 \+ 100 tokens, are no single grid"):
        case.run(*case.texts(1))
    apply(case.model, policy="diagonal(window=384)", min_length=0)
    case.run(*case.texts(1))


def test_a_text_length_that_the_call_contradicts():
    """Text and image as one sequence, 4 tokens longer than the model was told."""
    case = tiny_models.make("flux")
    family = FAMILIES["FluxTransformer2DModel"]
    forward = ForwardContext(case.model, family, DMAConfig(), wants_grid=True)
    config = DMAConfig(policy="neighborhood(window=9x8)", min_length=0)
    taken = Interception(stages(config, family, "Model", ("attn",)).modules["attn"], family, forward, None)
    forward.begin_on_device(
        case.model, (), case.inputs | {"encoder_hidden_states": torch.empty(1, tiny_models.TEXT, 8)}
    )
    q = torch.randn(1, 2, 325, 16)
    with (
        InterceptionMode(taken, 325, 0),
        pytest.raises(
            ValueError, match="grid 12×25 has 300 tokens, but of the call's 325, 21 of them text, 304 are"
        ),
    ):
        F.scaled_dot_product_attention(q, q, q)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"dense_above_sigma": 0.0}])
def test_a_window_of_other_dimensions_is_refused_before_the_first_call(fields, asked):
    case = tiny_models.make("sd3")
    apply(case.model, policy="neighborhood(window=18x24x24)", min_length=0, **fields)
    with pytest.raises(ValueError, match="window 18×24×24 is 3-D, but grid 20×19 is 2-D"):
        case.run(*case.texts(1))
    assert not asked


@pytest.mark.parametrize(("fields", "words"), [
    ({"policy": "neighbourhood(window=8x8)"}, r"'neighbourhood\(window=8x8\)' is no policy: give dense"),
    ({"policy": "neighborhood(window=8x8, stride=9x9)"}, "stride 9 exceeds window 8"),
    ({"policy": 3}, "policy must be a policy, its words, or None, got 3"),
    ({"policy": "dense()", "window": 384}, r"window and sink are those of a diagonal: leave them out, or dense\("),
    ({"policy": "dense()", "sink": 0}, "window and sink are those of a diagonal"),
    ({"policy": "neighborhood(window=8x8)", "protect_text": False}, "protect_text=False is for policies without"),
    ({"grid": (64, 0)}, r"grid must be 1 to 3 whole numbers of tokens, such as \(64, 64\), got \(64, 0\)"),
    ({"grid": "64 by 64"}, "grid must be 1 to 3 whole numbers"),
    ({"grid": (2, 2, 2, 2)}, "grid must be 1 to 3 whole numbers"),
    ({"grid": 64}, "grid must be 1 to 3 whole numbers"),
    ({"grid": (8.0, 8)}, "grid must be 1 to 3 whole numbers"),
])  # fmt: skip
def test_bad_fields_are_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        DMAConfig(**fields)
    assert "\n" not in str(error.value)


def test_policies_are_kept_as_words():
    policy = Neighborhood((8, 8), high=(4, 4)) | Importance(0.05)
    config = DMAConfig(policy=policy, modules={"a": {"policy": policy}})
    assert config == DMAConfig(policy=str(policy), modules={"a": {"policy": str(policy)}})
    assert config.asked == policy and hash(config) == hash(DMAConfig.of(config))
    assert DMAConfig().words == "diagonal(window=128, sink=128)"


@torch.no_grad()
@pytest.mark.parametrize("name", ["prx", "nucleus"])
def test_a_grid_is_refused_where_the_image_alone_asks(name):
    case = tiny_models.make(name)
    apply(case.model, min_length=0, policy="neighborhood(window=5x5)", **NOWHERE_DENSE)
    with pytest.raises(
        ValueError, match=r"neighborhood\(window=5x5\) needs the text among the queries, .* use a"
    ):
        case.run(case.texts(1)[0])
