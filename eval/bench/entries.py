"""What is timed side by side, and our own configurations among it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch

from dma_diffusers.eval.bench.bound import Products, letter
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.layout import Layout
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES, LOWERINGS
from dma_diffusers.kernels.maps import Class, PrecisionMap, build_map
from dma_diffusers.kernels.policies import Dense, Diagonal
from dma_diffusers.kernels.run import run

FULL, LOW_BIT, OURS = "full precision", "low bit", "ours"

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Call = Callable[[int], Any]
"""One launch or more, on the copy of the inputs that has this number (modulo their count)."""


@dataclass(frozen=True)
class Prepared:
    """Calls on given inputs.

    whole: everything, quantisation included; returns the result `[B, H, S, D]`.
    kernel: the attention kernel alone, and quantise: the kernels launched before it; None where there are none.
    """

    products: list[Products]
    whole: Call
    kernel: Call | None = None
    quantise: Call | None = None


@dataclass(frozen=True)
class Entry:
    """One way to compute attention; `prepare` raises, with the reason, where it can't take such inputs."""

    name: str
    kind: str
    prepare: Callable[[Sequence[Tensors]], Prepared]


@dataclass(frozen=True)
class Config:
    """What our operator is asked for: its own keywords, with its own defaults."""

    high: str = "mxfp8"
    low: str = "mxfp4"
    window: int = 128
    sink: int = 128
    text_start: int = 0
    text_stop: int = 0
    mapped: bool = True
    lowering: str = "auto"

    @classmethod
    def parse(cls, text: str) -> "Config":
        """From text such as `high=bf16,low=int8,window=0,sink=0`; ValueError, in one line, for anything else."""
        known = {field.name: field.type for field in fields(cls)}
        given = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in known or name in given:
                raise ValueError(
                    f"config {text!r}: give each of {', '.join(known)} once at most, as in high=bf16,low=int8"
                )
            if known[name] is int and not value.isdecimal():
                raise ValueError(f"config {text!r}: {name} must be a whole number of tokens, got {value!r}")
            if known[name] is bool and value not in ("true", "false"):
                raise ValueError(f"config {text!r}: {name} must be true or false, got {value!r}")
            given[name] = value == "true" if known[name] is bool else known[name](value)
        config = cls(**given)
        get_format(config.high), get_format(config.low)
        return config

    @property
    def policy(self) -> Diagonal:
        """Which tiles are HIGH."""
        return Diagonal(self.window, self.sink)

    @property
    def name(self) -> str:
        text = f", text {self.text_start} to {self.text_stop}" * (self.text_stop > 0)
        lowering = f", {self.lowering}" * (self.lowering != "auto")
        if not self.mapped:
            return f"HIGH {self.high}{lowering}"
        if not (self.window or self.sink or text):
            return f"LOW {self.low}{lowering}"
        return f"{self.high}|{self.low}, window {self.window}, sink {self.sink}{text}{lowering}"

    @property
    def entry(self) -> Entry:
        return Entry(self.name, OURS, partial(_prepare, self))


def default_configs(architecture: str) -> list[Config]:
    """LOW everywhere, and the diagonal and the first tile HIGH, in the formats that the GPU multiplies."""
    block_scaled = architecture in BLOCK_SCALED_ARCHITECTURES
    high, low = ("mxfp8", "mxfp4") if block_scaled else ("bf16", "int8")
    return [Config(high, low, window=0, sink=0), Config(high, low)]


def _prepare(config: Config, copies: Sequence[Tensors]) -> Prepared:
    from dma_diffusers.kernels.attention import launch

    q = copies[0][0]
    chosen = operator.choose(q.device, q.shape[3], config.high, config.low, config.lowering)
    if chosen.lowering == "reference":
        raise ValueError(f"there is no kernel for it: {chosen.reason}")
    layout = Layout(q.shape[2], q.shape[2], (config.text_start, config.text_stop))
    policy = config.policy if config.mapped else Dense(Class.HIGH)
    precision_map = build_map(policy.classes(layout), layout).to(q.device)

    def recorded(copy: Tensors) -> tuple[list[Callable[[], None]], torch.Tensor]:
        """The call's launches, each to be launched again with the same arguments, and what they write."""
        launches = []

        def record(*arguments: Any, **options: Any) -> None:
            launches.append(partial(run, *arguments, **options))
            launches[-1]()

        out, *_ = launch.attention(
            *copy, precision_map, config.high, config.low, key_mask=None, scale=q.shape[3] ** -0.5,
            is_causal=False, lowering=chosen.lowering, return_lse=False, run=record,
        )  # fmt: skip
        return launches, out

    def again(part: slice, number: int) -> torch.Tensor:
        launches, out = calls[number % len(calls)]
        for each in launches[part]:
            each()
        return out

    def whole(number: int) -> torch.Tensor:
        keywords = {name: value for name, value in asdict(config).items() if name not in ("window", "sink")}
        return operator.attention(*copies[number % len(copies)], policy=config.policy, **keywords).out

    calls = [recorded(copy) for copy in copies]
    return Prepared(
        products(precision_map, config.high, config.low, chosen.lowering),
        whole,
        partial(again, slice(-1, None)),  # the attention kernel comes last
        partial(again, slice(-1)) if len(calls[0][0]) > 1 else None,
    )


def products(precision_map: PrecisionMap, high: str, low: str, lowering: str) -> list[Products]:
    """How the tiles of a map are multiplied: HIGH has bf16 P·V, LOW has FP8."""
    stores = next(candidate.stores for candidate in LOWERINGS if candidate.name == lowering)
    ends = precision_map.bounds.double().mean((0, 1, 2)).tolist()  # of HIGH, LOW and MASKED
    share = (ends[1] - ends[0]) / ends[2] if precision_map.has_high else 1.0
    both = [Products(1 - share, letter(high, stores), "H"), Products(share, letter(low, stores), "Q")]
    return [part for part in both if part.share]
