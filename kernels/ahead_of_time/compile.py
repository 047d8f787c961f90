"""Every kernel variant compiled ahead of time, on any machine, with what the compiler made of it.

The variants are what `attention.launch` really launches: it runs on small CPU tensors, and each kernel is
compiled for the target with its arguments' types in place of a launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.ahead_of_time.sass import RATES, describe, markdown
from dma_diffusers.kernels.attention import hopper, launch
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.defaults import FORMAT_PAIRS, default_formats
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES, NATIVE, WITHOUT_TMA, choose
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.routing.reference import Routing
from dma_diffusers.kernels.tiling.fine_mask import hide_empty_slots
from dma_diffusers.kernels.tiling.layout import TILE, Layout
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy
from dma_diffusers.kernels.tiling.precision_map import Class, PrecisionMap, build_map

TARGETS = (*BLOCK_SCALED_ARCHITECTURES, "sm_90", *WITHOUT_TMA)
HEAD_DIMS = (64, 128)
PAIRS = {target: FORMAT_PAIRS[target] for target in TARGETS}
PAIRS["sm_90"] += (default_formats("sm_100"),)  # a B200's numbers, re-encoded by the lowering `faithful`
TOKENS, HEADS = 256, 16
"""The size of the calls whose launches are compiled."""
_COMPILED: dict[str, Any] = {}

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def compile_all(target: str, high: str | None = None, low: str | None = None) -> list[dict[str, Any]]:
    """Compiles each kernel variant for `target`, one of `TARGETS`, and describes the result.

    high, low: compile this pair alone, with the target's default for one that is None; all of the target's pairs
    if both are. Each pair has three variants of the attention kernel at each head dimension: mixed, HIGH alone and
    LOW alone.
    Returns dictionaries of `kernel, formats, head_dim, mma_kinds, registers, spills` (bytes of stack that a
    thread needs), `shared_bytes` and `loops` (of the attention kernel, where `sass.RATES` are known:
    see `sass.describe`). Raises ValueError for an unknown target or a pair no kernel runs.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    default = default_formats(target)
    pairs = PAIRS[target] if high is None and low is None else ((high or default[0], low or default[1]),)
    for pair in pairs:
        for precision in Precisions.parse(*pair):
            if precision.qk not in NATIVE:
                known = ", ".join(NATIVE)
                raise ValueError(f"no kernel multiplies {precision.qk} on {target}: choose from {known}")
        choice = choose(target, HEAD_DIMS[0], *pair)
        if choice.lowering == "reference":
            raise ValueError(f"no kernel multiplies {'|'.join(pair)} on {target}: {choice.reason}")
    results: dict[tuple, dict[str, Any]] = {}
    for (high_format, low_format), head_dim in product(pairs, HEAD_DIMS):
        for formats in ((high_format, low_format), (high_format, None), (None, low_format)):
            for kernel, arguments, options in launches(target, *formats, head_dim):
                key = (kernel.__name__, formats, head_dim)
                if key not in results:
                    compiled = compile_launch(kernel, arguments, options, target)
                    results[key] = _describe(compiled, target, options, *key)
    return list(results.values())


def loops_of_mixed_kernels() -> str:
    """The table of ahead_of_time/instructions.md: every loop of each target's first pair at head_dim 128."""
    rows = []
    for target in [name for name in TARGETS if name in RATES]:
        kernel, arguments, options = list(launches(target, *PAIRS[target][0], 128))[-1]
        compiled = compile_launch(kernel, arguments, options, target)
        described = _describe(compiled, target, options, kernel.__name__, PAIRS[target][0], 128)
        # A kernel with several warpgroups has the three loops for each.
        for phase, loop in zip(("HIGH", "LOW", "MASKED"), described["loops"], strict=False):
            rows.append({"architecture": target, "head_dim": 128, "loop": phase} | loop)
    return markdown(rows)


def launches(
    target: str,
    high: str | None,
    low: str | None,
    head_dim: int,
    is_causal: bool = False,
    masks_keys: bool = False,
    slots: int | None = None,
    has_fine_mask: bool = False,
    routing: Routing | None = None,
    skips: bool = False,
    has_means: bool = False,
    rotation: str = "none",
) -> Iterator[tuple[Any, tuple, dict[str, Any]]]:
    """The kernels that one call launches, with arguments and options; a class that is None has no tile.

    slots: how many a token order has, 256 if it leaves none empty; None for a call without one. has_fine_mask: whether
    MASKED tiles have one. routing: what content decides. skips: whether the softmax may skip tiles. has_means: whether
    the last Q tile takes the first KV tile by its means. rotation: of the channels of q and k.
    """
    recorded = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        recorded.append((kernel, arguments, options))

    policy = Diagonal() if high and low else Dense(Class.HIGH if high else Class.LOW)
    high, low = high or low, low or high
    mask = torch.ones(2, TOKENS, dtype=torch.bool) if masks_keys else None
    q, k, v = (torch.ones(2, HEADS, TOKENS, head_dim, dtype=torch.bfloat16) for _ in range(3))
    plan = Plan(
        map_of(policy, has_means),
        routing,
        None if slots is None else torch.arange(slots, dtype=torch.int32),
        hide_empty_slots(torch.arange(slots or TOKENS)) if has_fine_mask else None,
        1e-3 if skips else None,
    )
    launch.attention(
        Call(q, k, v, mask, scale=1.0, is_causal=is_causal, rotation=rotation), plan, Precisions.parse(high, low),
        target=target, lowering=choose(target, head_dim, high, low).lowering, launcher=Launcher(record),
    )  # fmt: skip
    return iter(recorded)


def map_of(policy: Policy, has_means: bool) -> PrecisionMap:
    """The map of a policy for a call of `TOKENS`; with means the last Q tile takes the first KV tile by its means."""
    layout = Layout(TOKENS, TOKENS)
    classes = policy.classes(layout)
    if has_means:
        classes[..., -1, 0] = int(Class.MEAN)
    return build_map(classes, layout)


def compile_launch(kernel: Any, arguments: tuple, options: dict[str, Any], target: str) -> Any:
    """Triton's compiled kernel for `target`, specialised on the arguments as a launch would be; kept in the process."""
    compiled_in = specialisation(kernel, arguments, options)
    compile_options = {name: value for name, value in options.items() if name not in kernel.arg_names}
    variant = repr((kernel.__name__, compiled_in, compile_options, target))
    if variant not in _COMPILED:
        language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        source = language(kernel, *compiled_in)
        _COMPILED[variant] = triton.compile(source, target=gpu, options=compile_options)
    return _COMPILED[variant]


def specialisation(
    kernel: Any, arguments: tuple, options: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict]:
    """The parts of a launch that are compiled in: argument types, constants, and which arguments 16 divides."""
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = "constexpr" if parameter.is_constexpr or value is None else _type_of(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif parameter.do_not_specialize:
            continue
        elif kind.startswith("*") or (kind == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    match value:
        case TensorDescriptor():
            return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
        case GluonTensorDescriptor():
            return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        case torch.Tensor():
            return f"*{_TYPES[value.dtype]}"
        case float():
            return "fp32"
        case int():
            return "i32"
    raise TypeError(f"no kernel argument of type {type(value).__name__}")


def _describe(
    compiled: Any,
    target: str,
    options: dict[str, Any],
    kernel: str,
    formats: tuple[str | None, str | None],
    head_dim: int,
) -> dict[str, Any]:
    registers, spills = resources(compiled.asm["cubin"])
    rows = {"attend": options.get("ROWS"), "attend_hopper": hopper.ROWS.value}.get(kernel)
    is_counted = rows and target in RATES
    threads = 32 * options["num_warps"]
    return {
        "kernel": kernel,
        "formats": [name for name in formats if name],
        "head_dim": head_dim,
        "mma_kinds": mma_kinds(compiled.asm["ptx"]),
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "loops": describe(compiled.asm["cubin"], target, head_dim, threads, rows, options.get("KEYS", TILE))
        if is_counted
        else [],
    }


def mma_kinds(ptx: str) -> list[str]:
    """The matrix instructions in `ptx`: `kind::mxf4` and the like if there are kinds, else operand types."""
    kinds = set(re.findall(r"mma\S*?(kind::\w+)", ptx))
    kinds |= {f"wgmma {types}" for types in re.findall(r"wgmma\.mma_async\S*?\.[fs]32\.(\w+)\.\w+", ptx)}
    kinds |= {
        f"mma.sync {types}"
        for types in re.findall(r"mma\.sync\.aligned\.m\w+\.\S*?\.[fs]32\.(\w+)\.\w+\.[fs]32", ptx)
    }
    return sorted(kinds)


@lru_cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack that hold what was spilled.

    A stack that no instruction reads holds nothing: Triton 3.6 has eight such bytes on sm_120, in the branch for a copy
    to another multiprocessor's memory, which is never taken.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = _printed_by(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
        if stack and "LDL" not in _printed_by(triton.knobs.nvidia.nvdisasm.path, "-c", file.name):
            stack = 0
    return registers, stack


def _printed_by(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
