"""A linear layer that trains at low precision, in the place of a stock one."""

import torch
from torch import Tensor

from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.kernels.training.linear import check_sides, train_linear
from dma_diffusers.kernels.training.lowering import choose
from dma_diffusers.kernels.training.recipe import Recipe


class QuartetLinear(torch.nn.Linear):
    """A linear layer that rounds input and weight in each forward pass, and the gradients as its recipe has it.

    stock: the layer whose parameters it shares, under the same names: `weight` `[N, K]` and `bias` `[N]`, in full
        precision, which optimisers change and `save_pretrained` saves.
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
        self.train(stock.training)

    def forward(self, x: Tensor) -> Tensor:
        """The output `[..., N]` for x `[..., K]`, in x's dtype, or in autocast's."""
        lowering = self.lowerings.get(x.device.type, "reference")
        return train_linear(x, self.weight, self.bias, self.recipe, lowering, self.seed)

    def stock(self) -> torch.nn.Linear:
        """A stock layer with the very same parameters."""
        has_bias = self.bias is not None
        layer = torch.nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        layer.weight = self.weight
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """The sides of the layer, and its quantisers."""
        return f"{super().extra_repr()}, forward={self.recipe.forward}, backward={self.recipe.backward}"
