"""Layers as wide as those of large models, with random weights: inputs whose channels have different scales."""

from collections.abc import Callable

import torch
from torch import Tensor

from dma_diffusers.eval.linears.errors import squared_errors
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.linears.allocation import factor_for, groups_of, permutation_of
from dma_diffusers.linears.calibration import InputStatistics
from dma_diffusers.linears.plans import Plan

WIDTH = 3072  # of FLUX.1
_OUTPUTS, _ROWS, _DRAWS = 512, 256, 5


def _log_normal(spread: float) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: (spread * torch.randn(WIDTH, generator=generator)).exp()


def _outliers(generator: torch.Generator) -> Tensor:
    """One channel in a hundred is 30 times as large."""
    return 1 + 29 * (torch.rand(WIDTH, generator=generator) < 0.01).float()


SCALES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "log-normal scales, σ = 0.5": _log_normal(0.5),
    "log-normal scales, σ = 1": _log_normal(1.0),
    "log-normal scales, σ = 1.5": _log_normal(1.5),
    "1 % of channels × 30": _outliers,
}
"""Scales of channels `[K]`; their elements are Gaussian."""


def measure(
    scales: Callable[[torch.Generator], Tensor], bits: float | None, method: str | Callable
) -> dict[str, object]:
    """Return the average bits and the squared relative errors of a method, one for each of a few random layers.

    bits: the average that MicroMix is to have; None for its thresholds as they are. method: a format of all channels,
    or one of `variants.ORDERS`. Each layer is calibrated on other rows than it is measured on.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors, taken = [], 0.0
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        of_channels = scales(generator)
        layer = torch.nn.Linear(WIDTH, _OUTPUTS, bias=False)
        layer.weight.data = torch.randn(_OUTPUTS, WIDTH, generator=generator) / WIDTH**0.5
        rows = torch.randn(2 * _ROWS, WIDTH, generator=generator) * of_channels
        if isinstance(method, str):
            plan = Plan(Groups.whole(method, WIDTH))
        else:
            plan = _micromix(rows[:_ROWS], bits, lambda total, g=generator: method(total, g))
        errors += squared_errors(layer, plan, [rows[_ROWS:]], device)
        taken += plan.groups.average_bits / _DRAWS
    return {"bits": taken, "errors": {"layer": [float(f"{x:.4g}") for x in errors]}}


def _micromix(rows: Tensor, bits: float | None, order: Callable[[Tensor], Tensor]) -> Plan:
    seen = InputStatistics(torch.zeros(WIDTH, dtype=torch.float64))
    seen.add(rows, 0.0)

    def groups_at(layer: str, factor: float) -> Groups:
        return groups_of(WIDTH, seen.shares().at(factor))

    factor = 1.0 if bits is None else factor_for(bits, {"layer": _OUTPUTS * WIDTH}, groups_at)
    return Plan(groups_at("layer", factor), permutation_of(order(seen.total)))
