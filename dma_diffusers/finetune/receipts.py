"""Receipts of linear layers that train at low precision."""

from collections.abc import Iterator

import torch

from dma_diffusers.finetune.module import QuartetLinear
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.linears.receipt import LinearReceipt

_REASON = "as in training: the weight stays in full precision, and is rounded in each call"


def trained_receipts(prefix: str, model: torch.nn.Module) -> Iterator[LinearReceipt]:
    """The receipts of the layers that round as in training; none where a model has none."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuartetLinear):
            device, format_ = layer.weight.device, get_format(layer.recipe.forward.format)
            lowering = layer.lowerings.get(device.type, "reference")
            size = layer.weight.numel() * layer.weight.element_size()
            yield LinearReceipt(
                prefix + name.removesuffix(".base_layer"), (format_.name,), (layer.in_features,),
                format_.average_bits, lowering, _REASON, architecture(device), "", size, size,
            )  # fmt: skip
