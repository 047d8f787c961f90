"""A quantised linear layer in the place of a stock one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.linear import multiply, quantise_input
from dma_diffusers.kernels.linears.lowering import choose
from dma_diffusers.kernels.linears.weight import LinearWeight
from dma_diffusers.kernels.lowerings import Choice, architecture

_NAMES = ("narrow", "narrow_scales", "wide", "wide_scales", "row_scales", "permutation")
_NO_WEIGHT = (
    "this linear layer is quantised, and its weight can't be read or changed: fuse LoRA or projections, and save the "
    "model, before quantize_linears, or call dma_diffusers.restore first; save_linears saves what is quantised"
)


class LastInput:
    """The last tensor that a layer of one block quantised, for the layers of that block that read the same tensor.

    It is the very same tensor that is meant, not an equal one. A layer after which nobody reads the same tensor empties
    it, so that the tensors are freed, and a compiled block has no outputs for them. One attribute holds everything:
    threads that run the block at the same time may lose what they share, but never mix it up.
    """

    def __init__(self) -> None:
        self.entry: tuple[Tensor, int, tuple[Tensor, ...]] | None = None


class QuantisedLinear(torch.nn.Linear):
    """A linear layer whose weight, and in each call its input, are in the formats of `groups`.

    groups: the formats of its input channels. bias: as the stock layer's. dtype, training: the stock layer's.
    input_scale: of the whole input, for fp8 with fixed scales. lowering: "auto", or the one that is asked for.
    last: the place where the layers of a block keep what they quantised. share: a number that layers have in common if
    they quantise an input the same way. keeps: whether another layer is to read the same tensor next. The three are
    set where a layer is put into its block.

    It has buffers, and no `weight` that could be read: of that there is a stand-in with the shape, the dtype and the
    device. LoRA layers go on top. Casting a model leaves the formats as they are, and casts the bias.
    """

    narrow: Tensor | None
    narrow_scales: Tensor | None
    wide: Tensor | None
    wide_scales: Tensor | None
    row_scales: Tensor | None
    permutation: Tensor | None
    input_scale: Tensor | None
    like: Tensor

    def __init__(
        self,
        stock: torch.nn.Linear,
        weight: LinearWeight,
        input_scale: Tensor | None,
        lowering: str = "auto",
    ):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = stock.in_features, stock.out_features
        self.groups: Groups = weight.groups
        tensors = weight.tensors()
        for name in _NAMES:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("input_scale", input_scale)
        # It has the dtype of the model, whatever the formats have, and goes where the model goes.
        device = next(iter(tensors.values())).device
        self.register_buffer("like", torch.empty(0, dtype=stock.weight.dtype, device=device))
        bias = None if stock.bias is None else stock.bias.detach().to(device, copy=True)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.lowering = lowering
        self.last, self.share, self.keeps = LastInput(), 0, False
        # Looked up in a call by the device's type: a compiled graph can't ask for the architecture.
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self.lowerings = {device: self._lowering_on(torch.device(device)) for device in devices}
        self.train(stock.training)

    @property
    def quantised(self) -> LinearWeight:
        """The quantised weight."""
        return LinearWeight(
            self.groups, self.out_features, self.narrow, self.narrow_scales, self.wide, self.wide_scales,
            self.row_scales, self.permutation,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a stand-in for the parameter
        """A stand-in that tells shape, dtype and device, and refuses everything else."""
        return _StandIn((self.out_features, self.in_features), self.like.dtype, self.like.device)

    def choice(self, device: torch.device) -> Choice:
        """The lowering on a device, and why; ValueError if the one that is asked for can't run there."""
        return choose(architecture(device), self.groups, self.lowering, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """The output `[..., N]` for x `[..., K]`, in x's dtype; ValueError where a backward pass would follow."""
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "quantised linear layers don't train: call dma_diffusers.restore first, or model.eval()"
            )
        lowering = self.lowerings.get(x.device.type, "reference")
        if not lowering:
            raise ValueError(f"lowering {self.lowering} can't run these linear layers on {x.device.type}")
        entry = self.last.entry
        if entry is not None and entry[0] is x and entry[1] == self.share:
            inputs = entry[2]
        else:
            inputs = quantise_input(x, self.permutation, self.groups, lowering, self.input_scale)
        self.last.entry = (x, self.share, inputs) if self.keeps else None
        y = multiply(inputs, self.quantised, lowering, self.bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The sides of the layer, and its groups."""
        words = " | ".join(f"{f} {w}" for f, w in zip(self.groups.formats, self.groups.widths, strict=True))
        return f"in_features={self.in_features}, out_features={self.out_features}, {words}"

    def _lowering_on(self, device: torch.device) -> str:
        """The name of the lowering on a device; empty if the one that is asked for can't run there."""
        try:
            return self.choice(device).lowering
        except ValueError:
            return ""

    def _apply(self, fn, recurse: bool = True):
        stored = {id(self._buffers[name]) for name in (*_NAMES, "input_scale")}

        def without_casting(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in stored or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        return super()._apply(without_casting, recurse)

    def _save_to_state_dict(self, destination: Mapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        # Diffusers looks up the shapes of FLUX's weights there before it loads a LoRA.
        destination[f"{prefix}weight"] = self.weight  # type: ignore[index]


class _StandIn(torch.Tensor):
    """A tensor without numbers: whoever wants to read or change them is told why there are none."""

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<the weight of a quantised linear layer, {list(self.shape)}>"

    def untyped_storage(self) -> torch.UntypedStorage:
        """Refuses: `save_pretrained` looks at the memory, not at numbers."""
        raise ValueError(_NO_WEIGHT)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise ValueError(_NO_WEIGHT)
