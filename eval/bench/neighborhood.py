"""`bench neighborhood` measures neighbourhoods, dense attention, and FlexAttention with the same block mask."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dma_diffusers.eval.bench import flex, result
from dma_diffusers.eval.bench.bound import current_gpu
from dma_diffusers.eval.bench.entries import FULL, OURS, SPARSE, Config, Entry
from dma_diffusers.eval.bench.measure import measure
from dma_diffusers.eval.bench.peers import PEERS
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.kernels import plan
from dma_diffusers.kernels.defaults import default_formats
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import shape_text
from dma_diffusers.kernels.tiling.policies import Neighborhood

# These are the grids, windows and strides that arXiv 2504.16922 measures.
NAMED = {
    "flux-4k": ((256, 256), (80, 80), (16, 16)),
    "hunyuan-720p": ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
}
TEXT = (0, 512)
HIGH, LOW = default_formats("sm_90")
PARTS = ("whole", "kernel")
FLEX, OUR_NAME = "FlexAttention bf16", f"neighbourhood LOW {LOW}"
_SHARES = ("of_simulated", "of_simulated_over_dense")
_UNITS = ("over_cudnn", "over_dense", "over_flex")


def named(name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the grid, window and stride of a name; raises ValueError for one that isn't in `NAMED`."""
    if name not in NAMED:
        raise ValueError(
            f"unknown shape {name!r}: choose from {', '.join(NAMED)}, or give --grid and --window"
        )
    return NAMED[name]


@dataclass(frozen=True)
class Case:
    """A case is one neighbourhood on one grid, for one sequence: text tokens first, then the grid's in row-major order.

    name: a key of `NAMED`, or empty. Raises ValueError for a neighbourhood that can't be had on the grid.
    """

    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    text: int = 0
    heads: int = 24
    head_dim: int = 128

    def __post_init__(self):
        self.policy.axes(self.layout.grid)

    @property
    def policy(self) -> Neighborhood:
        """Return the policy: LOW within the window, SKIP beyond, text HIGH."""
        return Neighborhood(self.window, self.stride)

    @property
    def layout(self) -> Layout:
        """Return the layout of the tokens."""
        tokens = self.text + math.prod(self.grid)
        return Layout(tokens, tokens, (0, self.text), self.grid)

    @property
    def shape(self) -> Shape:
        """Return the shape of the call."""
        return Shape(self.name, 1, self.heads, self.layout.k_length, self.head_dim)

    @property
    def label(self) -> str:
        """Return the label that results are filed under."""
        sizes = f"{shape_text(self.grid)}, window {shape_text(self.window)}, stride {shape_text(self.stride)}"
        text = f", {self.text} text tokens" * (self.text > 0)
        return f"{self.name} {sizes}{text}, {self.heads} heads × {self.head_dim}".strip()

    @property
    def simulated(self) -> float:
        """Return the tiles of dense attention over the tiles visited, if every Q tile were the busiest."""
        box = self.policy.box(self.grid)
        return Count(self.policy.axes(self.grid), box, box, self.text).speedup_worst

    def entries(self) -> list[Entry]:
        """Return the entries: dense attention, others' and ours, then FlexAttention's neighbourhood and ours."""
        asked = {"high": HIGH, "low": LOW, "text_stop": self.text}
        dense = Config(**asked, window=0, sink=0)
        ours = replace(Config(**asked, policy=str(self.policy), grid=self.grid).entry, name=OUR_NAME)
        flex_prepare = partial(flex.prepare, plan.make(self.policy, self.layout))
        full = [peer.entry for peer in PEERS if peer.kind == FULL]
        return [*full, dense.entry, Entry(FLEX, SPARSE, flex_prepare, ours.seen), ours]


def bench_neighborhood(
    cases: Sequence[Case],
    inputs: str = "normal",
    seed: int = 0,
    seconds: float = 0.3,
    output: Path | None = None,
    command: str = "",
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time each case's `entries`, and return the result that `result.collect` describes, with `compared` for each case.

    inputs: one of `KINDS`. seconds: GPU time for each thing that is timed. output: the file that the result is written
    to, case by case. command: how this was started, for the record. Raises ValueError as `bench_attention` does.
    """
    require_gpu()
    gpu = current_gpu()
    peers = {peer.name: peer.version for peer in PEERS if peer.kind == FULL}
    settings = result.settings(gpu, inputs, seed, seconds, peers=peers, formats=[HIGH, LOW])

    def measured(case: Case) -> dict[str, Any]:
        found = measure(case.shape, case.entries(), gpu, inputs, seed, seconds, on_step)
        sides = {name: list(getattr(case, name)) for name in ("grid", "window", "stride")}
        entries = compared(found["entries"], case.simulated)
        return found | sides | {"text": case.text, "simulated": case.simulated, "entries": entries}

    return result.collect({case.label: partial(measured, case) for case in cases}, settings, output, command)


def compared(entries: list[dict[str, Any]], simulated: float) -> list[dict[str, Any]]:
    """Add speeds to `whole` and `kernel` of a case's entries.

    `over_cudnn`, `over_dense` and `over_flex` are in units of cuDNN's dense attention, of our own dense LOW, and of
    FlexAttention's kernel on tokens that were permuted before; None where that is absent. Neighbourhoods also have
    `of_simulated` and `of_simulated_over_dense`: the first two in units of `simulated`, the speed-up that counted tiles
    predict.
    """
    cudnn, *_, dense, flexible, _ = entries
    units = ((cudnn, "whole"), (dense, "whole"), (flexible, "kernel"))
    ms = [entry[part]["ms"] if part in entry else None for entry, part in units]
    for entry in entries:
        for part in PARTS:
            if part in entry:
                over = [unit and unit / entry[part]["ms"] for unit in ms]
                entry[part] = entry[part] | dict(zip(_UNITS, over, strict=True))
                if entry in entries[-2:]:
                    shares = [ratio and ratio / simulated for ratio in over[:2]]
                    entry[part] |= dict(zip(_SHARES, shares, strict=True))
    return entries


# The count is the speed-up that counted tiles predict, over cuDNN and over our own dense LOW.
HEADER = (
    "Attention",
    "ms",
    "× cuDNN",
    "× dense LOW",
    "× Flex kernel",
    "% of count",
    "% of count, LOW",
    "% of bound",
    "relative L2",
    "peak MiB",
    "host µs",
)
_TITLES = {
    OURS: {"kernel": "– without quantisation", "quantise": "– its quantiser's kernels"},
    SPARSE: {"kernel": "– tokens permuted before", "quantise": "– the permutation"},
}


def cells(entries: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`."""
    lines = []
    for entry in entries:
        if "whole" not in entry:
            lines.append([f"{entry['name']}: {entry['absent']}", *[""] * (len(HEADER) - 1)])
            continue
        error = "NaN" if entry["relative_l2"] is None else f"{entry['relative_l2']:.4f}"
        title = entry["name"] + " (WRONG)" * entry["wrong"]
        lines.append([title, *_speeds(entry["whole"]), error, f"{entry['peak_bytes'] / 2**20:,.0f}"])
        lines[-1].append(f"{entry['whole']['host_us']:.0f}")
        for part, title in _TITLES.get(entry["kind"], {}).items():
            if part in entry:
                lines.append([title, *_speeds(entry[part]), "", "", f"{entry[part]['host_us']:.0f}"])
    return lines


def _speeds(part: dict[str, Any]) -> list[str]:
    ratios = [part.get(name) for name in _UNITS]
    shares = [part.get(name) for name in (*_SHARES, "share_of_bound")]
    return [
        f"{part['ms']:.3f}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *("" if share is None else f"{100 * share:.0f}" for share in shares),
    ]
