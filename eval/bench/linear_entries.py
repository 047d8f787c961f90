"""This module prepares the calls of linear layers that are timed side by side: torch's, torchao's, and ours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dma_diffusers.eval.bench.bound import Gpu, letter
from dma_diffusers.eval.bench.entries import FULL, LOW_BIT, OURS
from dma_diffusers.eval.bench.linear_shapes import LinearShape
from dma_diffusers.eval.bench.timing import Call
from dma_diffusers.kernels.ahead_of_time.sass import MATRIX_RATES
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.linear import linear, multiply, quantise_input
from dma_diffusers.kernels.linears.lowering import choose
from dma_diffusers.kernels.linears.weight import LinearWeight, quantise
from dma_diffusers.linears.allocation import groups_of
from dma_diffusers.linears.plans import input_scale_of

FIXED = "fp8, fixed input scale"
METHODS = ("fp8", FIXED, "int8", "mxfp8", "mxfp4", "nvfp4", "micromix")
MICROMIX_SHARES = (0.6, 0.3, 0.1)  # of the channels that get 4, 6 and 8 bits


class Tensors(NamedTuple):
    """A layer's input `[rows, K]`, its weight `[N, K]` and its bias `[N]`, all bf16."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """Calls are prepared for copies of the tensors, which they are given by number.

    whole: the whole call, input quantisation included; None where the product alone is of interest. kernel: the product
    alone, of an input that was quantised before. quantise: what quantises the input. bits: an element of the weight
    takes so many. letters: the shares of the channels that each matrix instruction multiplies.
    """

    whole: Call | None
    kernel: Call | None
    quantise: Call | None
    bits: float
    letters: dict[str, float]


@dataclass(frozen=True)
class Entry:
    """An entry is one way to compute a linear layer. prepare: raises, with the reason, where it can't be had."""

    name: str
    kind: str
    prepare: Callable[[Sequence[Tensors], str], Prepared]


def entries(methods: Sequence[str]) -> list[Entry]:
    """Return torch's, torchao's and ours of these methods; raises ValueError for one that there is not."""
    if strange := [method for method in methods if method not in METHODS]:
        raise ValueError(f"unknown method {strange[0]!r}: choose from {'; '.join(METHODS)}")
    return [
        Entry("bf16", FULL, _bf16),
        Entry("torch._scaled_mm, rows", LOW_BIT, partial(_scaled_mm, False)),
        Entry("torch._scaled_mm, tensors", LOW_BIT, partial(_scaled_mm, True)),
        Entry(
            "torchao fp8", LOW_BIT, partial(_torchao, "Float8DynamicActivationFloat8WeightConfig", "Q", 8.0)
        ),
        Entry("torchao int8", LOW_BIT, partial(_torchao, "Int8DynamicActivationInt8WeightConfig", "I", 8.0)),
        *(Entry(method, OURS, partial(_ours, method)) for method in methods),
    ]


def bound_tflops(prepared: Prepared, gpu: Gpu) -> float | None:
    """Return the most TFLOP/s that the matrix instructions allow at the highest clock; None for an unknown rate."""
    rates = MATRIX_RATES.get(gpu.architecture, {})
    if any(name not in rates for name in prepared.letters):
        return None
    clocks = sum(share / rates[name] for name, share in prepared.letters.items())
    return gpu.multiprocessors * gpu.hz / clocks / 1e12


def draw(shape: LinearShape, seed: int, l2_bytes: int, device: torch.device) -> list[Tensors]:
    """Draw normal tensors, so many that a call finds none of them in the L2 cache."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).bfloat16()

    in_4_bits = (shape.rows + shape.outputs) * shape.inputs / 2
    copies = math.ceil(2 * l2_bytes / in_4_bits)
    return [
        Tensors(
            random(shape.rows, shape.inputs),
            random(shape.outputs, shape.inputs, scale=shape.inputs**-0.5),
            random(shape.outputs),
        )
        for _ in range(copies)
    ]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as models are compiled: into one graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _bf16(copies: Sequence[Tensors], architecture: str) -> Prepared:
    return Prepared(lambda number: F.linear(*copies[number % len(copies)]), None, None, 16.0, {"H": 1.0})


def _scaled_mm(one_scale: bool, copies: Sequence[Tensors], architecture: str) -> Prepared:
    """The product alone, which no way of ours can be faster than."""

    def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        amax = x.abs().amax() if one_scale else x.abs().amax(1, keepdim=True)
        scale = amax.float() / torch.finfo(torch.float8_e4m3fn).max
        return (x / scale).to(torch.float8_e4m3fn), scale

    operands = [(*quantised(each.x), *quantised(each.weight), each.bias) for each in copies]

    def product(number: int) -> torch.Tensor:
        x, x_scale, weight, scale, bias = operands[number % len(operands)]
        return torch._scaled_mm(
            x,
            weight.T,
            scale_a=x_scale,
            scale_b=scale if scale.ndim == 0 else scale.T,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Prepared(None, product, None, 8.0, {"Q": 1.0})


def _torchao(
    config: str, instruction: str, bits: float, copies: Sequence[Tensors], architecture: str
) -> Prepared:
    from torchao import quantization

    options = {"granularity": quantization.PerRow()} if config.startswith("Float8") else {}
    # Otherwise torchao changes Inductor's settings for all that this process compiles, ours too.
    options["set_inductor_config"] = False
    layers = []
    for each in copies:
        layer = nn.Sequential(nn.Linear(*each.weight.shape[::-1], device="meta"))
        layer[0].weight = nn.Parameter(each.weight.clone(), requires_grad=False)
        layer[0].bias = nn.Parameter(each.bias, requires_grad=False)
        quantization.quantize_(layer, getattr(quantization, config)(**options))
        layers.append(layer)
    run = compiled(lambda layer, x: layer(x))

    def whole(number: int) -> torch.Tensor:
        with torch.no_grad():
            return run(layers[number % len(layers)], copies[number % len(copies)].x)

    return Prepared(whole, None, None, bits, {instruction: 1.0})


def _ours(method: str, copies: Sequence[Tensors], architecture: str) -> Prepared:
    """Raises ValueError where nothing but the reference runs: that would be no speed to compare with."""
    in_features, out_features = copies[0].weight.shape[::-1]
    permutation = None
    if method != "micromix":
        groups = Groups.whole(method.partition(",")[0], in_features)
    else:
        groups = groups_of(in_features, MICROMIX_SHARES)
        permutation = torch.randperm(in_features, generator=torch.Generator().manual_seed(0)).int()
        permutation = permutation.to(copies[0].x.device)
    chosen = choose(architecture, groups, out_features=out_features)
    if chosen.lowering == "reference":
        raise ValueError(f"only the reference runs it here: {chosen.reason}")
    lowering, input_scale = chosen.lowering, None
    if method == FIXED:
        amax = max(float(each.x.abs().amax()) for each in copies)
        input_scale = torch.tensor(input_scale_of(amax), device=copies[0].x.device)
    weights = [
        quantise(each.weight, groups, permutation, one_scale=method == FIXED).tensors() for each in copies
    ]

    def call(x: torch.Tensor, tensors: dict[str, torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
        return linear(x, LinearWeight.from_tensors(groups, tensors), lowering, bias, input_scale)

    def prologue(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise_input(x, permutation, groups, lowering, input_scale)

    run, quantiser = compiled(call), compiled(prologue)
    inputs = [quantiser(each.x) for each in copies]

    def whole(number: int) -> torch.Tensor:
        number %= len(copies)
        return run(copies[number].x, weights[number], copies[number].bias)

    def product(number: int) -> torch.Tensor:
        number %= len(copies)
        weight = LinearWeight.from_tensors(groups, weights[number])
        return multiply(inputs[number], weight, lowering, copies[number].bias)

    return Prepared(
        whole, product, lambda number: quantiser(copies[number % len(copies)].x),
        8 * sum(x.nbytes for x in weights[0].values()) / copies[0].weight.numel(), _letters(groups, lowering),
    )  # fmt: skip


def _letters(groups: Groups, lowering: str) -> dict[str, float]:
    """Return the shares of the channels by matrix instruction; on Hopper, all formats are multiplied as e4m3."""
    shares: dict[str, float] = {}
    for name, width in zip(groups.formats, groups.widths, strict=True):
        instruction = "Q" if lowering == "scaled_mm" else letter(name)
        shares[instruction] = shares.get(instruction, 0.0) + width / groups.in_features
    return shares
