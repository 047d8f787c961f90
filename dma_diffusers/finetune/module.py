"""A linear layer that trains at low precision, in the place of a stock one."""

from typing import Any

import torch
from torch import Tensor

from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.kernels.training.linear import check_sides, quantise_weight, train_linear
from dma_diffusers.kernels.training.lowering import choose
from dma_diffusers.kernels.training.recipe import Recipe


class QuartetLinear(torch.nn.Linear):
    """A linear layer that rounds input and weight in each forward pass, and the gradients as its recipe has it.

    stock: the layer whose parameters it shares, under the same names: `weight` `[N, K]` and `bias` `[N]`, in full
        precision, which optimisers change and `save_pretrained` saves.
    A weight that is frozen, as under adapters, is quantised once in training, and again after each call without it.
    recipe: the quantisers of its products. seed: of their random numbers; layers with different ones draw others.
    Raises ValueError for sides that are no multiples of 32.
    """

    def __init__(self, stock: torch.nn.Linear, recipe: Recipe, seed: int = 0):
        torch.nn.Module.__init__(self)
        check_sides(stock.out_features, stock.in_features)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.weight = stock.weight
        self.register_parameter("bias", stock.bias)
        self.recipe, self.seed = recipe, seed
        # Looked up in a call by the device's type: a compiled graph can't ask for the architecture.
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self.lowerings = {name: choose(architecture(torch.device(name)), recipe).lowering for name in devices}
        self._kept: tuple[tuple, Any] | None = None
        self.train(stock.training)

    def forward(self, x: Tensor) -> Tensor:
        """The output `[..., N]` for x `[..., K]`, in x's dtype, or in autocast's."""
        lowering = self.lowerings.get(x.device.type, "reference")
        weight = self._quantised_once(lowering)
        return train_linear(x, self.weight, self.bias, self.recipe, lowering, self.seed, weight)

    def stock(self) -> torch.nn.Linear:
        """A stock layer with the very same parameters."""
        has_bias = self.bias is not None
        layer = torch.nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        layer.weight = self.weight
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def _quantised_once(self, lowering: str) -> Any:
        """The quantised weight if it is frozen in training, which is kept until the weight changes; else None."""
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return None
        # Adapters are merged through `weight.data`, of which no version tells: what is drawn then must not be old.
        if self.weight.requires_grad or not self.training or not torch.is_grad_enabled():
            self._kept = None
            return None
        of = lowering, self.weight.device, self.weight.data_ptr(), self.weight._version
        if self._kept is None or self._kept[0] != of:
            self._kept = of, quantise_weight(self.weight, self.recipe, lowering)
        return self._kept[1]

    def extra_repr(self) -> str:
        """The sides of the layer, and its quantisers."""
        return f"{super().extra_repr()}, forward={self.recipe.forward}, backward={self.recipe.backward}"
