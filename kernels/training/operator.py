"""The kernels of training as registered torch operators, of which `torch.compile` sees one node each."""

import torch
from torch import Tensor

from dma_diffusers.kernels.training.launch import Step, empty, finish, is_transposed, quantise
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe
from dma_diffusers.kernels.training.reference import Towards


def run_quantise(
    source: Tensor,
    recipe: Recipe,
    step: Step,
    towards: Towards,
    seed: Tensor | None,
    first_outside: Tensor | None,
    outside: Tensor | None,
    is_plain: bool,
) -> list[Tensor]:
    """`launch.quantise`, registered."""
    return torch.ops.dma_diffusers.training_quantise(
        source, *_words(recipe), step.value, int(towards), seed, first_outside, outside, is_plain
    )


def run_finish(product: Tensor, source: Tensor, recipe: Recipe, factor: float) -> Tensor:
    """`launch.finish`, registered."""
    return torch.ops.dma_diffusers.training_finish(product, source, *_words(recipe), factor)


def _words(recipe: Recipe) -> tuple[str, str, bool]:
    return recipe.forward.value, recipe.backward.value, recipe.rotates


def _recipe(forward: str, backward: str, rotates: bool) -> Recipe:
    return Recipe(Quantiser(forward), Quantiser(backward), rotates)


def _quantise(source, forward, backward, rotates, step, towards, seed, first_outside, outside, is_plain):
    recipe = _recipe(forward, backward, rotates)
    return quantise(
        source, recipe, Step(step), Towards(towards), seed, first_outside, outside, is_plain
    )  # fmt: skip


def _fake_quantise(source, forward, backward, rotates, step, towards, seed, first_outside, outside, is_plain):
    quantiser = Quantiser(forward if step == Step.FORWARD else backward)
    return empty(source, quantiser, is_transposed(Step(step), Towards(towards)), is_plain)


def _finish(product, source, forward, backward, rotates, factor):
    return finish(product, source, _recipe(forward, backward, rotates), factor)


def _fake_finish(product, source, forward, backward, rotates, factor):
    return source.new_empty(source.shape)


_LIBRARY = torch.library.Library("dma_diffusers", "FRAGMENT")
for _signature, _run, _fake in (
    (
        "training_quantise(Tensor source, str forward, str backward, bool rotates, str step, int towards, "
        "Tensor? seed, Tensor? first_outside, Tensor? outside, bool is_plain) -> Tensor[]",
        _quantise, _fake_quantise,
    ),
    (
        "training_finish(Tensor product, Tensor source, str forward, str backward, bool rotates, float factor) "
        "-> Tensor",
        _finish, _fake_finish,
    ),
):  # fmt: skip
    _name = _signature.partition("(")[0]
    _LIBRARY.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dma_diffusers::{_name}", _fake, lib=_LIBRARY)
