"""Runs the kernels of training: matrices of any size, in tiles."""

from enum import StrEnum

import torch
from torch import Tensor

from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.linears.layout import COLUMNS, ROWS
from dma_diffusers.kernels.training import kernel
from dma_diffusers.kernels.training.quantisers import ROTATED
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe
from dma_diffusers.kernels.training.reference import Towards

TILE = 64
"""The rows and columns of a program's tile; a tile of scales is twice as high, and at most twice as wide."""


class Step(StrEnum):
    """The step for which a matrix is quantised, named after the functions of reference.py that end with `_side`."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REQUANTISED = "requantised"


def is_transposed(step: Step, towards: Towards) -> bool:
    """Says whether the columns of a source are the rows of what is written."""
    return step is Step.REQUANTISED or (step is Step.BACKWARD and towards is Towards.WEIGHT)


def empty(source: Tensor, quantiser: Quantiser, transposed: bool, is_plain: bool) -> list[Tensor]:
    """Room for a quantised source: bf16 numbers `[rows, inner]` if it is plain, else e2m1 elements and scales."""
    rows, inner = source.shape[::-1] if transposed else source.shape
    inner = (inner + ROTATED - 1) // ROTATED * ROTATED
    if is_plain:
        return [torch.empty((rows, inner), dtype=torch.bfloat16, device=source.device)]
    format = get_format(quantiser.format)
    assert format.block is not None
    tiles = (rows + ROWS - 1) // ROWS, (inner // format.block + COLUMNS - 1) // COLUMNS
    dtype = torch.float8_e4m3fn if format.has_tensor_scale else torch.uint8
    return [
        torch.empty((rows, inner // 2), dtype=torch.uint8, device=source.device),
        torch.empty((1, *tiles, 2, 256), dtype=dtype, device=source.device),
    ]


def quantise(
    source: Tensor,
    recipe: Recipe,
    step: Step,
    towards: Towards,
    seed: Tensor | None,
    first_outside: Tensor | None,
    outside: Tensor | None,
    is_plain: bool,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> list[Tensor]:
    """The source `[height, width]`, of any float dtype, as `empty` has room for it.

    seed: of `random.seed_of`, for the steps of the backward pass. first_outside: float32 `[height]`, of what
    FOUR_OVER_SIX makes of the source before it is requantised. outside: float32 `[height]` of FOUR_OVER_SIX, `[1]` of
    MS_EDEN; None for others.
    """
    source = source if source.stride(1) == 1 else source.contiguous()
    quantiser = recipe.forward if step is Step.FORWARD else recipe.backward
    first = recipe.forward if step is Step.REQUANTISED else None
    transposed = is_transposed(step, towards)
    out = empty(source, quantiser, transposed, is_plain)
    if 0 in source.shape:
        return [x.zero_() for x in out]
    elements, scales = out[0], None if is_plain else out[1].view(torch.uint8)
    (height, width), inner = source.shape, elements.shape[1] * (1 if is_plain else 2)
    across, along = _tiles(width if transposed else height), _tiles(inner, 2)
    launcher(
        kernel.quantise_tiles, (along, across) if transposed else (across, along),
        source, first_outside, outside, seed, elements, scales, height, width, source.stride(0), inner,
        int(towards), int(towards) + (2 if step is Step.BACKWARD else 4),
        FIRST=None if first is None else first.value, FIRST_BLOCK=None if first is None else _block(first),
        ROTATES=recipe.rotates and step is not Step.BACKWARD, QUANTISER=quantiser.value, BLOCK=_block(quantiser),
        ROTATES_AT_RANDOM=step is not Step.FORWARD and quantiser.is_rotated, TRANSPOSES=transposed, P=TILE, Q=TILE,
        num_warps=_warps(quantiser), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def finish(
    product: Tensor,
    source: Tensor,
    recipe: Recipe,
    factor: float,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Tensor:
    """`reference.finish` of a product `[height, width]` and its source."""
    product, source = (x if x.stride(1) == 1 else x.contiguous() for x in (product, source))
    height, width = source.shape
    out = launcher.empty((height, width), source.dtype, source.device)
    if 0 not in source.shape:
        launcher(
            kernel.finish_tiles, (_tiles(height), _tiles(width)),
            product, source, out, height, width, product.stride(0), source.stride(0), factor,
            CLIPS=recipe.forward is Quantiser.QUEST, ROTATES=recipe.rotates, P=TILE, Q=TILE,
            num_warps=_warps(recipe.forward), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _tiles(length: int, multiple: int = 1) -> int:
    """The number of tiles that cover a length, a multiple of `multiple`."""
    return -(-length // (TILE * multiple)) * multiple


def _warps(quantiser: Quantiser) -> int:
    """The warps of a program: NVFP4 takes so many registers that four would spill with Triton 3.6."""
    return 8 if get_format(quantiser.format).has_tensor_scale else 4


def _block(quantiser: Quantiser) -> int:
    block = get_format(quantiser.format).block
    assert block is not None
    return block
