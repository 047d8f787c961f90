"""What is timed side by side, and our own configurations among it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch

from dma_diffusers.eval.bench.bound import Products, letter
from dma_diffusers.eval.bench.inputs import Seen
from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.defaults import default_formats
from dma_diffusers.kernels.device.launch import run
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.lowerings import LOWERINGS
from dma_diffusers.kernels.tiling import policies
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import Axis
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy
from dma_diffusers.kernels.tiling.precision_map import Class, PrecisionMap

FULL, LOW_BIT, SPARSE, OURS = "full precision", "low bit", "sparse", "ours"

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
    """One way to compute attention; `prepare` raises, with the reason, where it can't take such inputs.

    seen: the keys it is asked to attend to; all if None.
    """

    name: str
    kind: str
    prepare: Callable[[Sequence[Tensors]], Prepared]
    seen: Seen | None = None


_READ = {
    int: int,
    bool: lambda word: word == "true",
    tuple[int, ...]: lambda word: tuple(map(int, word.split("x"))),
}


@dataclass(frozen=True)
class Config:
    """What our operator is asked for: its own keywords, with its own defaults, and `Diagonal`'s.

    policy: words that replace window and sink.
    """

    high: str = "mxfp8"
    low: str = "mxfp4"
    window: int = 128
    sink: int = 128
    text_start: int = 0
    text_stop: int = 0
    mapped: bool = True
    lowering: str = "auto"
    policy: str | None = None
    grid: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Config":
        """From text such as `high=bf16,low=int8,window=0,sink=0`; ValueError, in one line, for anything else."""
        known = {field.name: field.type for field in fields(cls)}
        given = {}
        for item in re.split(r",(?![^(]*\))", text):  # a policy's words have commas in parentheses
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in known or name in given:
                raise ValueError(
                    f"config {text!r}: give each of {', '.join(known)} once at most, as in high=bf16,low=int8"
                )
            if name == "grid" and not re.fullmatch(r"\d+(x\d+)*", value):
                raise ValueError(f"config {text!r}: grid must be sides such as 256x256, got {value!r}")
            if known[name] is int and not value.isdecimal():
                raise ValueError(f"config {text!r}: {name} must be a whole number of tokens, got {value!r}")
            if known[name] is bool and value not in ("true", "false"):
                raise ValueError(f"config {text!r}: {name} must be true or false, got {value!r}")
            given[name] = _READ[known[name]](value) if known[name] in _READ else value
        config = cls(**given)
        get_format(config.high), get_format(config.low)
        _ = config.map_policy
        return config

    @property
    def map_policy(self) -> Policy:
        """What fills the map."""
        if self.policy is not None:
            return policies.parse(self.policy)
        return Diagonal(self.window, self.sink) if self.mapped else Dense(Class.HIGH)

    @property
    def keywords(self) -> dict[str, Any]:
        """The operator's."""
        given = asdict(self) | {"policy": self.map_policy}
        return {name: value for name, value in given.items() if name not in ("window", "sink")}

    @property
    def text(self) -> tuple[int, int]:
        """The range of text tokens."""
        return self.text_start, self.text_stop

    @property
    def name(self) -> str:
        text = f", text {self.text_start} to {self.text_stop}" * (self.text_stop > 0)
        lowering = f", {self.lowering}" * (self.lowering != "auto")
        if self.policy is not None:
            return f"{self.high}|{self.low}, {self.map_policy}{text}{lowering}"
        if not self.mapped:
            return f"HIGH {self.high}{lowering}"
        if not (self.window or self.sink or text):
            return f"LOW {self.low}{lowering}"
        return f"{self.high}|{self.low}, window {self.window}, sink {self.sink}{text}{lowering}"

    @property
    def entry(self) -> Entry:
        axes = self.map_policy.axes(self.grid) if self.grid else ()
        return Entry(
            self.name, OURS, partial(_prepare, self), partial(_seen, axes, self.text) if axes else None
        )


def default_configs(architecture: str) -> list[Config]:
    """LOW everywhere, and the diagonal and the first tile HIGH, in the formats that the GPU multiplies."""
    high, low = default_formats(architecture)
    return [Config(high, low, window=0, sink=0), Config(high, low)]


def _prepare(config: Config, copies: Sequence[Tensors]) -> Prepared:
    from dma_diffusers.kernels.attention import launch

    q = copies[0][0]
    chosen = operator.choose(q.device, q.shape[3], config.high, config.low, config.lowering)
    if chosen.lowering == "reference":
        raise ValueError(f"there is no kernel for it: {chosen.reason}")
    layout = Layout(q.shape[2], q.shape[2], config.text, config.grid)
    planned = plan.make(config.map_policy, layout).to(q.device)

    def recorded(copy: Tensors) -> tuple[list[Callable[[], None]], torch.Tensor]:
        """The call's launches, each to be launched again with the same arguments, and what they write."""
        launches = []

        def record(*arguments: Any, **options: Any) -> None:
            launches.append(partial(run, *arguments, **options))
            launches[-1]()

        out, *_ = launch.attention(
            *copy, planned.precision_map, config.high, config.low, key_mask=None, scale=q.shape[3] ** -0.5,
            is_causal=False, lowering=chosen.lowering, token_order=planned.token_order, fine_mask=planned.fine_mask,
            routing=planned.routing, skip_below=planned.skip_below, return_lse=False, run=record,
        )  # fmt: skip
        return launches, out

    def again(part: slice, number: int) -> torch.Tensor:
        launches, out = calls[number % len(calls)]
        for each in launches[part]:
            each()
        return out

    def whole(number: int) -> torch.Tensor:
        return operator.attention(*copies[number % len(copies)], **config.keywords).out

    calls = [recorded(copy) for copy in copies]
    return Prepared(
        products(planned.precision_map, config.high, config.low, chosen.lowering),
        whole,
        partial(again, slice(-1, None)),  # the attention kernel comes last
        partial(again, slice(-1)) if len(calls[0][0]) > 1 else None,
    )


def products(precision_map: PrecisionMap, high: str, low: str, lowering: str) -> list[Products]:
    """How the tiles of a square map are multiplied: HIGH has bf16 P·V, LOW has FP8. Skipped ones have no share."""
    stores = next(candidate.stores for candidate in LOWERINGS if candidate.name == lowering)
    ends = precision_map.bounds.double().mean((0, 1, 2)) / precision_map.bounds.shape[2]
    of_high, of_low, visited = ends.tolist()  # where HIGH, LOW and MASKED end
    low_share = of_low - of_high if precision_map.has_high else visited
    high_part = Products(visited - low_share, letter(high, stores), "H")
    return [part for part in (high_part, Products(low_share, letter(low, stores), "Q")) if part.share]


def _seen(axes: Sequence[Axis], text: tuple[int, int], queries: torch.Tensor) -> torch.Tensor:
    """`Seen` of a neighbourhood, by the definition; text sees all and is seen by all."""
    start, stop = text
    is_text = (queries >= start) & (queries < stop)
    on_grid = torch.where(queries < stop, queries, queries - (stop - start)).masked_fill(is_text, 0)
    seen = torch.ones(len(queries), 1, dtype=torch.bool)
    for axis, place in zip(axes, torch.unravel_index(on_grid, [axis.length for axis in axes]), strict=True):
        seen = (seen[:, :, None] & axis.mask()[place][:, None]).flatten(1)
    of_text = torch.ones(len(queries), stop - start, dtype=torch.bool)
    return torch.cat((seen[:, :start], of_text, seen[:, start:]), dim=1) | is_text[:, None]
