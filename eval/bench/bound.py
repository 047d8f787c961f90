"""This module computes the least time that an attention call can take on a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.kernels.ahead_of_time.sass import MATRIX_RATES, RATES
from dma_diffusers.kernels.lowerings import NATIVE, Lowering, Storage, architecture
from dma_diffusers.kernels.precision import Precision

_FOUR_BIT = ("mxfp4", "nvfp4")


class Gpu(NamedTuple):
    """A GPU has the properties that set the bound; `hz` is its highest clock."""

    name: str
    architecture: str
    multiprocessors: int
    hz: float
    l2_bytes: int


class Products(NamedTuple):
    """A share of all scores is multiplied in one way: `qk` and `pv` are letters of MATRIX_RATES for Q·K and P·V."""

    share: float
    qk: str
    pv: str


def current_gpu() -> Gpu:
    """Return the current CUDA device."""
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    driver = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Gpu(
        properties.name, architecture(device), properties.multi_processor_count,
        1e3 * driver["sm_clock_rate"], properties.L2_cache_size,
    )  # fmt: skip


def letters(precision: Precision, lowering: Lowering) -> tuple[str, str]:
    """Return the matrix instructions of Q·K and of P·V, as a lowering stores the precision's formats."""
    return letter(precision.qk, lowering.stores), letter(precision.pv, lowering.stores_values)


def letter(fmt: str, stores: dict[str, Storage] = NATIVE) -> str:
    """Return the matrix instruction that multiplies numbers in `fmt`, as a lowering stores them."""
    match stores[fmt]:
        case Storage.PLAIN | Storage.PACKED | Storage.HALF:
            return "H"
        case Storage.ROW | Storage.TILE | Storage.SHARED | Storage.CHANNEL:
            return "I" if fmt.startswith("int") else "Q"
        case Storage.BLOCK:
            return "O" if fmt in _FOUR_BIT else "Q"


def bound_tflops(shape: Shape, products: Sequence[Products], gpu: Gpu) -> float | None:
    """Return the most TFLOP/s (of `shape.flop`) that these products allow; None where a rate isn't known.

    Where shares sum to less than 1, scores are left out, and `shape.flop` counts them all the same. The time is the
    larger of the matrix products at their peak rates and one exponential for each score on the special-function unit,
    both at the highest clock. Polynomial exponentials run on another pipe, so a kernel that has them can come out above
    the bound where the exponentials are the larger.
    """
    if gpu.architecture not in RATES:
        return None
    rates = MATRIX_RATES[gpu.architecture]
    if any(name not in rates for part in products for name in (part.qk, part.pv)):
        return None
    product = 2 * shape.head_dim  # a product takes so many FLOP for each score
    matrix = sum(part.share * (product / rates[part.qk] + product / rates[part.pv]) for part in products)
    exponentials = sum(part.share for part in products) / RATES[gpu.architecture]["mufu"]
    clocks = max(matrix, exponentials)  # an SM takes so many for each score
    return 2 * product / clocks * gpu.multiprocessors * gpu.hz / 1e12
