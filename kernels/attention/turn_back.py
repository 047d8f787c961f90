"""Turns rotated channels back: the output's, where V's were rotated, and those that the backward multiplies.

It is one more pass, which reads and writes each number once: at 24 × 16,384 × 128 in bf16 that is 200 MB, which by its
bandwidth alone takes an H200 47 µs, a fortieth of the call. In return it serves every kernel, and none mixes channels
of sums in registers.
"""

import torch
import triton
import triton.language as tl

from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.device.rounding import to_output
from dma_diffusers.kernels.quantiser.operands import padded_dim
from dma_diffusers.kernels.quantiser.tile import load_tile, rows_rotated_back

ROWS = 128


def turn_back(x: torch.Tensor, block: int, launcher: Launcher) -> None:
    """Undo in place the rotation of x's channels `[B, H, S, D]`, last dimension contiguous, in blocks of so many."""
    batch, heads, length, head_dim = x.shape
    launcher(
        _turn_back, (batch * heads * -(-length // ROWS),), x, heads, length, *x.stride()[:3],
        BLOCK=block, HEAD_DIM=head_dim, D=padded_dim(head_dim), ROWS=ROWS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def _turn_back(
    numbers, heads, length, stride_b, stride_h, stride_s,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn back ROWS tokens of one head."""
    blocks = tl.cdiv(length, ROWS)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    batch, head_in_batch = head // heads, head % heads
    tokens, columns = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, D)
    inside = (tokens < length) & (columns < HEAD_DIM)[None, :]
    x = load_tile(numbers, batch, head_in_batch, tokens, columns, inside, stride_b, stride_h, stride_s)
    x = rows_rotated_back(x, BLOCK)
    place = (
        batch.to(tl.int64) * stride_b + head_in_batch.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_s
    )
    tl.store(numbers + place + columns[None, :], to_output(x, numbers.dtype.element_ty), mask=inside)
