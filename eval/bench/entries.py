"""This module says what is timed side by side, and describes our own configurations."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.bench.bound import Products, letters
from dma_diffusers.eval.bench.inputs import Seen
from dma_diffusers.eval.bench.shapes import GRIDS, Shape
from dma_diffusers.eval.bench.timing import Call
from dma_diffusers.kernels import lowerings, operator, plan
from dma_diffusers.kernels.call import Call as AttentionCall
from dma_diffusers.kernels.defaults import default_formats
from dma_diffusers.kernels.device.launch import Launcher, run
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling import policies
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import Axis
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy
from dma_diffusers.kernels.tiling.precision_map import Class, PrecisionMap

FULL, LOW_BIT, SPARSE, OURS = "full precision", "low bit", "sparse", "ours"

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Prepared:
    """Calls are prepared for given inputs.

    whole: makes the whole call, quantisation included, and returns the result `[B, H, S, D]`. kernel: launches the
    attention kernel alone; quantise: launches the kernels before it. Each of the two is None where there is nothing to
    launch.
    """

    products: list[Products]
    whole: Call
    kernel: Call | None = None
    quantise: Call | None = None


@dataclass(frozen=True)
class Entry:
    """An entry is one way to compute attention.

    prepare: raises, with the reason, where it can't take the inputs. seen: the keys that it is asked to attend to; all
    if None.
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
    """A configuration has our operator's own keywords, with its own defaults, and those of `Diagonal`.

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
    rotation: str = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    backward: str = "bf16"
    policy: str | None = None
    grid: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Config":
        """Read text such as `high=bf16,low=int8,window=0,sink=0`; raises ValueError, in one line, for anything else."""
        known = {field.name: field.type for field in fields(cls)}
        given = {}
        for item in re.split(r",(?![^(]*\))", text):  # a policy's words may have commas in parentheses
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
        # It raises for those that don't exist.
        DMAConfig(high=config.high, low=config.low, rotation=config.rotation, backward=config.backward)
        _ = config.map_policy
        return config

    @property
    def map_policy(self) -> Policy:
        """Return the policy that fills the map."""
        if self.policy is not None:
            return policies.parse(self.policy)
        return Diagonal(self.window, self.sink) if self.mapped else Dense(Class.HIGH)

    @property
    def prepared(self) -> dict[str, Any]:
        """Return how q, k and v are prepared, as fields of a call."""
        return {name: getattr(self, name) for name in ("rotation", "smooth_k", "smooth_v")}

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the operator's keywords."""
        given = asdict(self) | {"policy": self.map_policy}
        return {name: value for name, value in given.items() if name not in ("window", "sink")}

    @property
    def text(self) -> tuple[int, int]:
        """Return the range of text tokens."""
        return self.text_start, self.text_stop

    @property
    def name(self) -> str:
        text = f", text {self.text_start} to {self.text_stop}" * (self.text_stop > 0)
        lowering = f", {self.lowering}" * (self.lowering != "auto")
        lowering += f", rotation {self.rotation}" * (self.rotation != "none")
        lowering += f", backward {self.backward}" * (self.backward != "bf16")
        lowering += ", K's mean" * (not self.smooth_k) + ", V's mean" * (not self.smooth_v)
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


def check_different(configs: Sequence[Config]) -> None:
    """Raise ValueError if two configurations are the same."""
    names = [config.name for config in configs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two configs are the same: {repeated}")


def default_configs(architecture: str, shape: Shape) -> list[Config]:
    """Return configurations that show what a plan costs, in the formats that the GPU multiplies.

    The first has LOW everywhere, the second the diagonal and the first tile HIGH. The third is the second on a grid, so
    that tokens are gathered, for a shape of `GRIDS`. In the last, importance chooses a twentieth to be HIGH; by pools,
    because single calls remember nothing.
    """
    formats = default_formats(architecture)
    configs = [Config(*formats, window=0, sink=0), Config(*formats)]
    if shape.model in GRIDS:
        text, grid = GRIDS[shape.model]
        configs.append(Config(*formats, policy="diagonal(near=grid)", text_stop=text, grid=grid))
    return [*configs, Config(*formats, policy="importance(budget=0.05, by=pools)")]


def _prepare(config: Config, copies: Sequence[Tensors]) -> Prepared:
    from dma_diffusers.kernels.attention import launch

    q = copies[0][0]
    chosen = operator.choose(q.device, q.shape[3], config.high, config.low, config.lowering)
    if chosen.lowering == "reference":
        raise ValueError(f"there is no kernel for it: {chosen.reason}")
    layout = Layout(q.shape[2], q.shape[2], config.text, config.grid)
    planned = plan.make(config.map_policy, layout).to(q.device)

    def recorded(copy: Tensors) -> tuple[list[Callable[[], None]], torch.Tensor]:
        """Return the call's launches, each of which can be made again with the same arguments, and what they write."""
        launches = []

        def record(*arguments: Any, **options: Any) -> None:
            launches.append(partial(run, *arguments, **options))
            launches[-1]()

        out, *_ = launch.attention(
            AttentionCall(*copy, **config.prepared), planned, Precisions.parse(config.high, config.low),
            lowering=chosen.lowering, return_lse=False, launcher=Launcher(record),
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
    """Say how the tiles of a square map are multiplied; skipped ones have no share, and MEAN ones that of their means.

    high, low: the words of precisions.
    """
    ends = precision_map.bounds.double().mean((0, 1, 2)) / precision_map.bounds.shape[2]
    of_high, of_low, visited = ends.tolist()  # HIGH, LOW and MASKED end there
    low_share = of_low - of_high if precision_map.has_high else visited
    precisions = Precisions.parse(high, low)
    shares = [(visited - low_share, precisions.high), (low_share, precisions.low)]
    if precision_map.means is not None:
        walks = (precision_map.means != 0).any(-1).double().mean().item()
        of_means = walks * precision_map.means.shape[-1] / precision_map.means.shape[-2]
        shares.append((of_means, precisions.of_means(precision_map.has_low)))
    return [Products(share, *letters(each, lowerings.named(lowering))) for share, each in shares if share]


def _seen(axes: Sequence[Axis], text: tuple[int, int], queries: torch.Tensor) -> torch.Tensor:
    """Say which keys a neighbourhood's queries see, by its definition; text sees all and is seen by all."""
    start, stop = text
    is_text = (queries >= start) & (queries < stop)
    on_grid = torch.where(queries < stop, queries, queries - (stop - start)).masked_fill(is_text, 0)
    seen = torch.ones(len(queries), 1, dtype=torch.bool)
    for axis, place in zip(axes, torch.unravel_index(on_grid, [axis.length for axis in axes]), strict=True):
        seen = (seen[:, :, None] & axis.mask()[place][:, None]).flatten(1)
    of_text = torch.ones(len(queries), stop - start, dtype=torch.bool)
    return torch.cat((seen[:, :start], of_text, seen[:, start:]), dim=1) | is_text[:, None]
