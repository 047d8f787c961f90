"""Linear layers that draw with the numbers with which they were fine-tuned."""

from typing import Any

from dma_diffusers.finetune.layers import layers_of
from dma_diffusers.finetune.swap import put_in
from dma_diffusers.kernels.training.recipe import recipe_of
from dma_diffusers.linears.quantise import Attachment, quantisable, sample_of


def round_as_trained(pipe_or_model: Any, linears: str) -> None:
    """Makes linear layers round as `dma_diffusers.finetune.prepare` does by the recipe of this name.

    Weights stay in full precision, and are rounded in each call. Raises ValueError where layers are quantised already,
    and where none can be; nothing is changed then.
    """
    recipe = recipe_of(linears)
    found = [(model, *layers_of(model, recipe)) for _, model in quantisable(pipe_or_model)]
    for model, layers, left in found:
        samples = {name: sample_of(layer.weight) for name, layer in layers.items()}
        put_in(model, layers, recipe)
        record = Attachment(linears, tuple(layers), {}, left, keeps_original=True, samples=samples)
        model._dma_linears = record  # type: ignore[assignment]  # an attribute like any other
