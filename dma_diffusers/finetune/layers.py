"""The linear layers of a model that train at low precision, and the reasons for which others don't."""

import torch

from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.training.recipe import Recipe
from dma_diffusers.linears.exclusions import block_of, choose, linear_layers, why_unfit
from dma_diffusers.linears.quantise import check_not_quantised

_MULTIPLE = 32


def layers_of(model: torch.nn.Module, recipe: Recipe) -> tuple[dict[str, torch.nn.Linear], dict[str, str]]:
    """The layers by name that a recipe rounds, and the reasons for which others are left alone.

    Raises ValueError where there are none, and where layers are quantised already.
    """
    check_not_quantised(model)
    layers, left = _layers_to_train(model, get_format(recipe.forward.format).bits >= 8)
    if not layers:
        reasons = "; ".join(sorted(set(left.values()))) or "it has none"
        raise ValueError(f"{type(model).__name__} has no linear layer to train at low precision: {reasons}")
    return layers, left


def _layers_to_train(
    model: torch.nn.Module, has_eight_bits: bool
) -> tuple[dict[str, torch.nn.Linear], dict[str, str]]:
    """The layers by name, and the reasons for which others are left alone.

    Of a model with lists of blocks, as every Diffusers transformer is, these are the layers that `quantize_linears`
    takes: no embedders, modulation, final projection, nor parts that are known as sensitive. Without such lists, these
    are all of its linear layers.
    has_eight_bits: takes the parts that are known to need eight bits, too.
    """
    named = linear_layers(model)
    if not any(block_of(model, name)[0] for name in named):
        left = {name: reason for name, layer in named.items() if (reason := _why_unfit(layer))}
        if "" in named:
            left[""] = "the model is this layer itself: wrap it in another module"
        return {name: layer for name, layer in named.items() if name not in left}, left
    choice = choose(model)
    left = dict(choice.left)
    for name, layer in choice.layers.items():
        if name in choice.kept and not has_eight_bits:
            left[name] = f"needs eight bits: {choice.kept[name]}"
        elif reason := _why_unfit(layer):
            left[name] = reason
    return {name: layer for name, layer in choice.layers.items() if name not in left}, left


def _why_unfit(layer: torch.nn.Linear) -> str:
    """The reason for which a layer can't train at low precision; empty if it can."""
    if reason := why_unfit(layer):
        return reason
    if layer.out_features % _MULTIPLE:
        return (
            f"its {layer.out_features} outputs are no multiple of {_MULTIPLE}, the numbers that share a scale"
        )
    return ""
