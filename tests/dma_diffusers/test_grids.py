"""Grids, told by the models themselves: where a pixel of the latents changes, one token's keys do."""

import math
from itertools import product

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dma_diffusers import DMAConfig, apply, grids, report
from dma_diffusers.families import FAMILIES, Family, family_of
from dma_diffusers.forward import ForwardContext
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models


def observed(model: torch.nn.Module, grid: tuple[int, ...] | None = None) -> ForwardContext:
    """Observes the model's calls from now on."""
    forward = ForwardContext(model, family_of(model, grid=grid), DMAConfig(), wants_grid=True)
    forward.watch(model)
    return forward


MIXED = (
    "basic",
    "controlnet of z_image",
    "dream_lite",
    "flux3",
    "refiners",
)  # pixels that meet before the first attention call


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_models.EVERY)
def test_the_token_of_a_pixel_is_where_the_grid_has_it(name):
    case = tiny_models.make(name)
    forward = observed(case.model)
    (text,) = case.texts(1)
    unchanged = case.keys(text)
    assert forward.grid == case.grid and bool(case.grid) == bool(family_of(case.model).grid)
    if name.endswith(MIXED) or not case.grid:
        return
    first = case.text[1] if case.text[0] == 0 else 0

    axes = case.axes or range(case.latents.ndim - len(case.grid), case.latents.ndim)
    patches = [case.latents.shape[axis] // length for axis, length in zip(axes, case.grid, strict=True)]
    for cell in product(*({0, length // 2, length - 1} for length in case.grid)):
        pixel = [slice(None)] * case.latents.ndim
        for axis, place, patch in zip(axes, cell, patches, strict=True):
            pixel[axis] = place * patch + patch - 1
        latents = case.latents.clone()
        latents[tuple(pixel)] += 1
        changed = (case.keys(text, latents) != unchanged).any(-1).any(1).any(0).nonzero().flatten().tolist()
        token = 0
        for place, length in zip(cell, case.grid, strict=True):
            token = token * length + place
        assert changed == [first + token]


# These are the grids of the calls that tests/tiny_pipelines.py draws.
DRAWN = {"flux": (24, 20), "sd3": (20, 19), "wan": (3, 9, 11), "hunyuan": (3, 10, 14)}


@pytest.mark.parametrize("name", DRAWN)
def test_the_grid_of_a_pipeline(name):
    pipe = getattr(tiny_pipelines, name)()
    forward = observed(pipe.transformer)
    tiny_pipelines.draw(pipe)
    assert forward.grid == DRAWN[name]


def test_a_pipeline_draws_two_sizes_one_after_the_other():
    pipe = tiny_pipelines.flux()
    forward = observed(pipe.transformer)
    tiny_pipelines.draw(pipe)
    tiny_pipelines.draw(pipe, height=20, width=36)
    assert forward.grid == (10, 18)


class Waits(TorchDispatchMode):
    """Counts numbers read off a device, and devices changed."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default)
        return func(*args, **(kwargs or {}))


def test_positions_are_read_once_for_all_steps_of_a_run():
    call = {"img_ids": flux_positions(12, 25)}
    with Waits() as first:
        assert grids.of_positions(None, call) == (12, 25)
    with Waits() as again:
        assert grids.of_positions(None, call) == (12, 25)
    assert first.number > again.number == 0
    assert grids.of_positions(None, {"img_ids": flux_positions(25, 12)}) == (25, 12)
    call["img_ids"].copy_(flux_positions(25, 12))
    assert grids.of_positions(None, call) == (25, 12)


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_only_positions_are_read_off_the_device(name):
    case = tiny_models.make(name)
    family = family_of(case.model)
    call = case.call(*case.texts(1))
    with Waits() as waits:
        family.grid(case.model, call)
    assert bool(waits.number) == family.grid_on_device


def flux_positions(rows: int, columns: int, image: int = 0) -> torch.Tensor:
    positions = diffusers.FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.bfloat16)
    positions[:, 0] = image
    return positions


@pytest.mark.parametrize("rows, columns", [(3, 300), (300, 3), (1, 7), (7, 1), (1, 1)])
def test_grids_whose_positions_coincide_or_have_one_line(rows, columns):
    positions = flux_positions(rows, columns)  # those above 256 coincide in bf16
    assert grids.of_positions(None, {"img_ids": positions}) == (rows, columns)
    assert grids.of_positions(None, {"img_ids": positions[None]}) == (rows, columns)


@pytest.mark.parametrize("rows, columns", [(12, 25), (4, 9)])
def test_several_images_have_no_grid(rows, columns):
    both = torch.cat((flux_positions(12, 25), flux_positions(rows, columns, image=1)))
    with pytest.raises(ValueError, match=rf"2 images in one call, of 300 \+ {rows * columns} tokens"):
        grids.of_positions(None, {"img_ids": both})
    for shapes in ([[(1, 12, 25), (1, rows, columns)]], [[(1, 12, 25), (1, rows, columns)]] * 2):
        with pytest.raises(ValueError, match=rf"2 images in one call, of 300 \+ {rows * columns} tokens"):
            grids.of_shapes(None, {"img_shapes": shapes})


def test_shapes_of_a_batch_are_those_of_its_first_entry():
    for shapes in ([[(1, 12, 25)]] * 3, [(1, 12, 25)] * 3):
        assert grids.of_shapes(None, {"img_shapes": shapes}) == (12, 25)


@pytest.mark.parametrize(
    "order",
    [
        lambda positions: positions.flip(0),
        lambda positions: positions.view(12, 25, 3).transpose(0, 1).reshape(-1, 3),
        lambda positions: positions[:-1],
        lambda positions: positions[torch.randperm(300)],
        lambda positions: positions.view(12, 25, 3).flip(1).reshape(-1, 3),
        lambda positions: positions + torch.tensor([0, 0, 1]) * (positions[:, 1:2] == 5),
    ],
)
def test_positions_in_another_order_are_no_grid(order):
    with pytest.raises(
        ValueError, match=r"img_ids of (300|299) tokens, \d+ of them in the first row, are no grid"
    ):
        grids.of_positions(None, {"img_ids": order(flux_positions(12, 25))})


def test_a_call_that_does_not_tell_its_grid():
    with pytest.raises(ValueError, match=r"the model was called without height, width, which tell its grid"):
        grids.of_lengths(None, {"hidden_states": torch.empty(1, 6, 1), "num_frames": 3, "height": None})


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        (
            "basic",
            {"hidden_states": torch.empty(1, 9, 4)},
            "hidden_states of 3 dimensions, not 4, do not tell",
        ),
        (
            "bria_fibo2",
            {"context_latents": [torch.empty(1)]},
            "other images join the call, in context_latents",
        ),
        ("cosmos3", {"sound_tokens": [torch.empty(1)]}, "sound or actions stand among the video's tokens"),
        (
            "cosmos3",
            {"vision_token_shapes": [(1, 2, 3), (1, 4, 5)]},
            r"2 images in one call, of 6 \+ 20 tokens",
        ),
        ("hidream", {"hidden_states": torch.empty(1, 4, 24, 20)}, "12×10, which is no square"),
        (
            "joy",
            {"hidden_states": torch.empty(1, 2, 4, 1, 8, 8)},
            r"2 images in one call, of 16 \+ 16 tokens",
        ),
        ("joy_plus", {"shape_list": [[(1, 2, 3)] * 2]}, r"2 images in one call, of 6 \+ 6 tokens"),
        ("joy_plus", {"shape_list": [[(1, 2, 3)], [(1, 3, 2)]]}, "images of several sizes in one call"),
        ("kandinsky5", {"sparse_params": {"P": 0.9}}, "sparse_params put the tokens into another order"),
        (
            "lumina2",
            {"encoder_attention_mask": torch.arange(21) < torch.tensor([[9], [7]])},
            "differ in length",
        ),
        ("motif", {"hidden_states": torch.empty(1, 4, 8, 8)}, "hidden_states of 2 sides, not 3, do not tell"),
        ("qwen21", {"img_shapes": [[(1, 4, 4), (1, 8, 8)]]}, r"2 images in one call, of 16 \+ 64 tokens"),
    ],
)
def test_calls_without_a_single_grid(name, call, words):
    case = tiny_models.make(name)
    with pytest.raises(ValueError, match=words) as error:
        family_of(case.model).grid(case.model, case.call(*case.texts(1)) | call)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_texts_of_several_lengths_before_the_image_are_left_to_stock():
    case = tiny_models.make("lumina2")
    case.inputs["encoder_attention_mask"] = torch.arange(21) < torch.tensor([[9], [7]])
    (text,) = case.texts(1)
    stock = case.run(text)
    apply(case.model, min_length=0)
    assert torch.equal(case.run(text), stock)
    assert not any(module.intercepted for module in report(case.model).modules)


def test_a_grid_that_is_given_replaces_what_is_known():
    pipe = tiny_pipelines.flux()
    assert family_of(pipe.transformer, grid=(20, 24)).text == FAMILIES["FluxTransformer2DModel"].text
    forward = observed(pipe.transformer, (20, 24))
    tiny_pipelines.draw(pipe)
    assert forward.grid == (20, 24)
    assert math.prod(forward.grid) == math.prod(DRAWN["flux"])


def test_families_know_their_grids_and_others_do_not():
    told = {type(tiny_models.make(name).model).__name__ for name in tiny_models.CASES}
    assert all(FAMILIES[kind].grid for kind in told)
    assert family_of(torch.nn.Linear(1, 1), "none") == Family("none", single_stream=True)
