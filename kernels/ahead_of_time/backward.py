"""The kernels of attention's backward compiled ahead of time, on any machine, with what the compiler made of each."""

from typing import Any

import torch

from dma_diffusers.kernels.ahead_of_time.compile import (
    HEADS,
    TARGETS,
    TOKENS,
    compile_launch,
    map_of,
    mma_kinds,
    resources,
)
from dma_diffusers.kernels.backward import launch
from dma_diffusers.kernels.backward.tuning import Tuning
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.lowerings import choose
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class

KERNELS = ("query_gradients", "mean_gradients", "key_gradients")
"""The kernels that are compiled. `mean_gradients` is launched only where a map has MEAN tiles."""


def compile_backward(
    target: str,
    head_dim: int,
    high: str | None,
    low: str | None,
    products: str = "bf16",
    tuned: Tuning | None = None,
    has_means: bool = False,
) -> list[dict[str, Any]]:
    """Compiles the `KERNELS` for `target`, one of `TARGETS`; a precision that is None has no tile.

    products, tuned: as of `launch.gradients`. has_means: whether the last Q tile takes the first KV tile by its means.

    Returns dictionaries of `kernel, mma_kinds, registers, spills` (bytes of stack that a thread needs) and
    `shared_bytes`. Raises ValueError for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    policy = Diagonal(sink=0) if high and low else Dense(Class.HIGH if high else Class.LOW)
    words = high or low, low or high
    q, k, v, out = (torch.ones(2, HEADS, TOKENS, head_dim, dtype=torch.bfloat16) for _ in range(4))
    recorded: list[tuple[Any, tuple, dict[str, Any]]] = []
    launch.gradients(
        Call(q, k, v), Plan(map_of(policy, has_means)), Precisions.parse(*words), out, out[..., 0].float(), out,
        products=products, lowering=choose(target, head_dim, *words).lowering, target=target, tuned=tuned,
        launcher=Launcher(lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options))),
    )  # fmt: skip
    found = []
    for kernel, arguments, options in recorded:
        if kernel.__name__ in KERNELS:
            compiled = compile_launch(kernel, arguments, options, target)
            registers, spills = resources(compiled.asm["cubin"])
            found.append(
                {
                    "kernel": kernel.__name__,
                    "mma_kinds": mma_kinds(compiled.asm["ptx"]),
                    "registers": registers,
                    "spills": spills,
                    "shared_bytes": compiled.metadata.shared,
                }
            )
    return found
