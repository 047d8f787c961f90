"""The kernels of training compiled ahead of time, on any machine, with what the compiler made of each."""

from collections.abc import Iterator
from typing import Any

import torch

from dma_diffusers.kernels.ahead_of_time.compile import compile_launch, resources
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES
from dma_diffusers.kernels.training import launch
from dma_diffusers.kernels.training.launch import Step
from dma_diffusers.kernels.training.lowering import choose
from dma_diffusers.kernels.training.recipe import RECIPES, Quantiser, Recipe
from dma_diffusers.kernels.training.reference import Towards

TARGETS = (*BLOCK_SCALED_ARCHITECTURES, "sm_90")
_ROWS, _COLUMNS = 256, 3072


def compile_all(target: str, recipes: dict[str, Recipe] = RECIPES) -> list[dict[str, Any]]:
    """Compiles each kernel of training for `target`, one of `TARGETS`, and describes the result.

    Returns dictionaries of `recipe, kernel, step, registers, spills` (bytes of stack that a thread needs) and
    `shared_bytes`. Raises ValueError for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    described = []
    for name, recipe in recipes.items():
        for step, (kernel, arguments, options) in launches(target, recipe):
            compiled = compile_launch(kernel, arguments, options, target)
            registers, spills = resources(compiled.asm["cubin"])
            described.append(
                {
                    "recipe": name,
                    "kernel": kernel.__name__,
                    "step": step,
                    "registers": registers,
                    "spills": spills,
                    "shared_bytes": compiled.metadata.shared,
                }
            )
    return described


def launches(target: str, recipe: Recipe) -> Iterator[tuple[str, tuple[Any, tuple, dict[str, Any]]]]:
    """The kernels that a layer in bf16 launches, each with the step that it is for: kernel, arguments and options."""
    recorded: list[tuple[Any, tuple, dict[str, Any]]] = []
    launcher = Launcher(
        lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options))
    )
    x = torch.empty(_ROWS, _COLUMNS, dtype=torch.bfloat16)
    seed = torch.zeros(1, dtype=torch.int64)
    of_rows, of_all = torch.ones(_ROWS), torch.ones(1)
    is_plain = choose(target, recipe).lowering == "plain"
    steps = [(Step.FORWARD, Towards.INPUT)]
    if recipe.backward is not Quantiser.NONE:
        steps += [(Step.BACKWARD, towards) for towards in Towards]
        steps += [(Step.REQUANTISED, towards) for towards in Towards]
    for step, towards in steps:
        first = recipe.forward is Quantiser.FOUR_OVER_SIX
        outside = of_all if recipe.backward is Quantiser.MS_EDEN else None
        launch.quantise(
            x, recipe, step, towards, None if step is Step.FORWARD else seed,
            of_rows if first and step is Step.REQUANTISED else None,
            (of_rows if first else None) if step is Step.FORWARD else outside, is_plain, launcher,
        )  # fmt: skip
    names = [f"{step} {towards.name.lower()}" for step, towards in steps]
    if recipe.rotates:
        launch.finish(x, x, recipe, 1.5, launcher)
        names.append("finish")
    return zip(names, recorded, strict=True)
