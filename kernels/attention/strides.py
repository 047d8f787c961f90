"""The strides with which kernels read q, k and v, and copies of tensors that have others."""

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.quantiser.launch import are_paired


def bf16_for_tma(x: torch.Tensor) -> torch.Tensor:
    """x in bfloat16 with strides that TMA takes (multiples of 16 bytes); a copy only where x has others."""
    x = x.to(torch.bfloat16)
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if aligned else row_major(F.pad(x, (0, -x.shape[-1] % 8)))


def is_read_as_it_is(x: torch.Tensor) -> bool:
    """Says whether rows lie as the kernels read them fastest: otherwise sums had another order, so other bits."""
    return x.stride(-1) == 1 and (x.shape[-1] % 2 == 1 or are_paired(x))


def row_major(x: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of its shape; `contiguous` leaves dimensions of size 1 any stride."""
    return x.clone(memory_format=torch.contiguous_format)
