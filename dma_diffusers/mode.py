"""The interception of every attention operation inside a `with`, by a mode that sees all of PyTorch's functions."""

import operator as operators
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dma_diffusers.interception import Change, Interception
from dma_diffusers.internals import scaled_dot_product_attention
from dma_diffusers.parallel import Spread


class InterceptionMode(TorchFunctionMode):
    """Hands each `scaled_dot_product_attention` inside to a module's interception; a `ProcessorCall`.

    hidden, encoder: the numbers of tokens of the `hidden_states` and `encoder_hidden_states` that the module was given.
    spread: the GPUs that exchange heads around such calls. reasons: a list that takes the call's.
    change: what the operator is to do to q and k first.
    """

    backend: Any = None  # what falls back here is inside Diffusers' native backend

    def __init__(
        self,
        interception: Interception,
        hidden: int,
        encoder: int,
        spread: Spread | None = None,
        reasons: list[str] | None = None,
        change: Change | None = None,
    ):
        super().__init__()
        self.change = change
        self.interception = interception
        self.spread = spread
        self.hidden = hidden
        self.encoder = encoder
        self.reasons: list[str] = [] if reasons is None else reasons

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return self.interception.attention(self, *args, **kwargs)
        if func in _SQUARING and self.interception.family.squares_masks and _is_mask(args[0]):
            return args[0]  # [B, 1, 1, S] all the way
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # torch.compile of PyTorch 2.11 cannot trace the method inside a mode
        return func(*args, **kwargs)


# These make [B, 1, S, S] of a mask of keys: repeat(1, 1, S, 1), and `&` with the transpose (in a graph `and_`).
_SQUARING = (torch.Tensor.repeat, torch.Tensor.__and__, operators.and_)


def _is_mask(x: torch.Tensor) -> bool:
    return x.dtype == torch.bool and x.ndim == 4
