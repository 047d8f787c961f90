"""This prototype of row-wise FP8 linears measures what they would gain beside our attention; no user gets it."""

import torch
from torch import nn

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_MULTIPLE = 16  # torch._scaled_mm takes sides of such lengths alone


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
    """Replace the linear layers of a model's repeated blocks that see every token; return how many they are.

    Layers inside norms, which make shifts and scales of the timestep, have one row of input and stay as they are.
    """
    replaced = 0
    for block in [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]:
        for name, module in list(block.named_modules()):
            in_norm = any(part.startswith("norm") for part in name.split("."))
            if (
                isinstance(module, nn.Linear)
                and not in_norm
                and not any(n % _MULTIPLE for n in module.weight.shape)
            ):
                block.set_submodule(name, Fp8Linear(module))
                replaced += 1
    return replaced


def _quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[n, channels]` as e4m3, and their scales, float32 `[n, 1]`."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows / scale).to(torch.float8_e4m3fn), scale
