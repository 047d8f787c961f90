"""The kernels of linear layers compiled ahead of time, on any machine, with what the compiler made of each."""

from collections.abc import Iterator
from typing import Any

import torch

from dma_diffusers.kernels.ahead_of_time.compile import compile_launch, mma_kinds, resources
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.linears import launch
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.lowering import choose
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES

TARGETS = (*BLOCK_SCALED_ARCHITECTURES, "sm_90")
SIZES = ((3072, 9216), (12288, 3072))
"""Inputs and outputs of two of FLUX.1's layers: what comes after a modulated LayerNorm, and what comes after GELU."""
_ROWS = 256


def compile_all(target: str) -> list[dict[str, Any]]:
    """Compiles each kernel of linear layers for `target`, one of `TARGETS`, and describes the result.

    Returns dictionaries of `kernel, formats, size` ("inputs×outputs"), `mma_kinds, registers, spills` (bytes of stack
    that a thread needs) and `shared_bytes`. Raises ValueError for an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    described = []
    for size in SIZES:
        for groups in variants(target, size[0]):
            for kernel, arguments, options in launches(target, groups, *size):
                compiled = compile_launch(kernel, arguments, options, target)
                registers, spills = resources(compiled.asm["cubin"])
                described.append(
                    {
                        "kernel": kernel.__name__,
                        "formats": list(groups.formats),
                        "size": "×".join(map(str, size)),
                        "mma_kinds": mma_kinds(compiled.asm["ptx"]),
                        "registers": registers,
                        "spills": spills,
                        "shared_bytes": compiled.metadata.shared,
                    }
                )
    return described


def variants(target: str, in_features: int) -> list[Groups]:
    """Groups that the target's kernels handle: MicroMix, and layers in one format.

    nvfp4 is there for the shorter rows alone: over 12,288 numbers its quantiser, which divides three times, spills up
    to 336 bytes a thread.
    """
    mixed = Groups(("mxfp4", "mxfp6_e2m3", "mxfp8"), (in_features - 768, 512, 256))
    has_nvfp4 = target in BLOCK_SCALED_ARCHITECTURES and in_features == SIZES[0][0]
    whole = ["mxfp4", "mxfp8", *(["nvfp4"] if has_nvfp4 else [])]
    return [mixed, *(Groups.whole(name, in_features) for name in whole)]


def launches(
    target: str, groups: Groups, in_features: int, out_features: int
) -> Iterator[tuple[Any, tuple, dict[str, Any]]]:
    """The kernels that one layer in bf16 launches, with arguments and options: permuted, with prologue and bias."""
    recorded: list[tuple[Any, tuple, dict[str, Any]]] = []
    launcher = Launcher(
        lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options))
    )
    x, weight = (torch.empty(n, in_features, dtype=torch.bfloat16) for n in (_ROWS, out_features))
    modulation = torch.empty(2, in_features, dtype=torch.bfloat16)
    prologue = Prologue(1e-6, modulation, modulation) if in_features < out_features else Prologue(gelu=True)
    permutation = torch.arange(in_features, dtype=torch.int32)
    reencodes = choose(target, groups, out_features=out_features).lowering == "scaled_mm"
    launch.quantise(x, permutation, groups, prologue, reencodes, launcher)
    operand = Operand.empty(weight, groups, reencoded=False)
    if reencodes:
        launch.reencode(operand, groups, launcher)
    else:
        bias = torch.empty(out_features, dtype=torch.bfloat16)
        rows = Operand.empty(x, groups, reencoded=False)
        launch.multiply(rows, operand, bias, groups, torch.bfloat16, target, launcher)
    return iter(recorded)
