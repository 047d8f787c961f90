"""Errors of quantised linear layers on sampled rows of their inputs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.kernels.linears import reference
from dma_diffusers.kernels.linears.weight import quantise
from dma_diffusers.linears.plans import Plan


@torch.no_grad()
def squared_errors(
    layer: torch.nn.Linear,
    plan: Plan | None,
    inputs: Sequence[Tensor],
    device: torch.device | str = "cpu",
) -> list[float]:
    """Return ‖y − exact‖² / ‖exact‖² of a layer's output for each of `inputs` `[n, K]`, on a device.

    plan: how weight and inputs are rounded, by the reference; None for the layer as it is, which errs by its dtype's
    rounding. exact: the output in float32, of weights and inputs as they are stored.
    """
    weight, bias = (None if x is None else x.to(device) for x in (layer.weight, layer.bias))
    rounded = None
    if plan is not None:
        one_scale = plan.input_scale is not None
        permutation = None if plan.permutation is None else plan.permutation.to(device)
        rounded = quantise(weight, plan.groups, permutation, one_scale=one_scale)
        scale = torch.tensor(plan.input_scale, device=device) if one_scale else None
    # Every format scales rows by themselves, so those of all inputs can go together.
    x = torch.cat(list(inputs)).to(device)
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).double()
    y = F.linear(x, weight, bias) if rounded is None else reference.linear(x, rounded, bias, scale)
    sizes = [len(each) for each in inputs]
    error, norm = (
        [float(part.sum()) for part in each.square().sum(1).cpu().split(sizes)]
        for each in (y.double() - exact, exact)
    )
    return [own / whole for own, whole in zip(error, norm, strict=True)]
