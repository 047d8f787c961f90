"""This prototype of row-wise FP8 linears measures what they would gain beside our attention; no user gets it."""

import torch
from torch import nn

from dma_diffusers.eval.bench.block_linears import linears_of_blocks

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8Linear(nn.Module):
    """This linear layer multiplies e4m3 numbers, with a scale for each row of its input and of its weight.

    Its input is quantised by plain torch operations, which torch.compile fuses.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = _quantise(linear.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.T)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = _quantise(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return out.unflatten(0, x.shape[:-1])


def use_fp8_linears(model: nn.Module) -> int:
    """Replace the layers that `linears_of_blocks` names; return how many they are."""
    linears = linears_of_blocks(model)
    for name, linear in linears.items():
        model.set_submodule(name, Fp8Linear(linear))
    return len(linears)


def _quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[n, channels]` as e4m3, and their scales, float32 `[n, 1]`."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows / scale).to(torch.float8_e4m3fn), scale
