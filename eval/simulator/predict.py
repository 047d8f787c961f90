"""This module predicts the times that attention would take on a GPU from the clocks of its tiles.

The SMs work in rounds: each takes a program's queries through all tiles that they visit, then the next's. A pair of
tiles costs its two products and its exponentials (`cost.clocks_of`) at the clock with which the data sheet's peak rates
are reached; quantising costs its bytes at the memory's bandwidth. One constant is fitted: `START`.

On an H200 this predicts all that is committed of our kernel and of the best full-precision one, dense from 1,024 to
118,800 tokens and neighbourhoods, within `WITHIN` (tests/eval/simulator/test_predict.py). Nobody measured on other
GPUs.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from dma_diffusers.eval.cost import (
    clocks_of,
    lowering_of,
    means_clocks,
    pairs,
    routing_clocks,
    share_left,
    tile_clocks,
)
from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.kernels.attention.tuning import tuning
from dma_diffusers.kernels.defaults import default_formats as formats_of
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.precision import VALUES_ALONE, Precisions
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, Layout
from dma_diffusers.kernels.tiling.neighborhood import shape_text
from dma_diffusers.kernels.tiling.policies import Policy
from dma_diffusers.kernels.tiling.precision_map import SHARED_BLOCKS, SHARED_ROWS
from dma_diffusers.kernels.tiling.tile_order import TileOrder

START = 8.5e-6  # a round of programs, and each step before the kernel, takes so many seconds to start
WITHIN = 0.15
MEASURED = ("h200", "bf16|int8")
LABEL_OF_MEANS = "predicted by a model that is within 4 % of the kernel with MEAN tiles on an H200"
_STEPS_BEFORE = 3  # they are statistics, encoding, and the ways between them and the kernel
_FULL_ROWS = 128  # FlashAttention handles so many queries together
# FlashAttention-4 overlaps products and exponentials, and reaches this share of the larger: 1,613 TFLOP/s of
# 2,250 on a B200 (arXiv 2603.05451). On Hopper it takes their sum.
_OVERLAPPED = 0.71


class Machine(NamedTuple):
    """A GPU is described by its data sheet; `hz` is the clock with which its peak rates are reached."""

    architecture: str
    multiprocessors: int
    hz: float
    bytes_per_second: float


MACHINES = {
    "h100": Machine("sm_90", 132, 1.83e9, 3.35e12),
    "h200": Machine("sm_90", 132, 1.83e9, 4.8e12),
    "b200": Machine("sm_100", 148, 1.856e9, 8e12),
    "b300": Machine("sm_103", 148, 1.856e9, 8e12),
}


@dataclass(frozen=True)
class Call:
    """A call is attention of `heads` heads (times the batch) over so many tokens, in our formats, on a GPU.

    gpu: a key of `MACHINES`. Raises ValueError for an unknown GPU, and for formats that it has no kernel for.
    """

    gpu: str
    heads: int
    tokens: int
    head_dim: int
    high: str
    low: str

    def __post_init__(self):
        if self.gpu not in MACHINES:
            raise ValueError(f"unknown GPU {self.gpu!r}: choose from {', '.join(MACHINES)}")
        lowering_of(
            self.machine.architecture, self.head_dim, self.high, self.low
        )  # raises where there is none

    @property
    def label(self) -> str:
        """Say what a prediction for this GPU is worth."""
        formats = f"{self.high}|{self.low}"
        if (self.gpu, formats) == MEASURED:
            return f"predicted by a model that is within {WITHIN:.0%} of all times measured on an H200"
        others = f" with {formats}" * (self.gpu == MEASURED[0])
        return f"predicted, not measured on any {self.gpu.upper()}{others}"

    @property
    def machine(self) -> Machine:
        """Return the GPU."""
        return MACHINES[self.gpu]

    def full_precision(self) -> float:
        """Predict the seconds of dense attention in bf16, by the best kernel there is."""
        products, exponentials = clocks_of(self.machine.architecture, self.head_dim, "H", "H")
        clocks = products + exponentials
        if self.machine.architecture != "sm_90":
            clocks = max(products, exponentials) / _OVERLAPPED
        tiles = -(-self.tokens // TILE)
        return self._rounds(_FULL_ROWS) * tiles * clocks / self.machine.hz + START

    def kernel(self, high_pairs: float, low_pairs: float, walked: float = 0.0) -> float:
        """Predict the seconds of our kernel where each head visits so many pairs of tiles in HIGH and in LOW.

        walked: the tiles of means that each head walks beside them.
        """
        formats = self.machine.architecture, self.head_dim, self.high, self.low
        of_high, of_low = tile_clocks(*formats)
        of_means = means_clocks(*formats, has_low=low_pairs > 0)
        rows = self._rows(high_pairs > 0, low_pairs > 0)
        clocks = high_pairs * of_high + low_pairs * of_low + walked * of_means
        of_program = clocks * rows / TILE / -(-self.tokens // TILE)
        return self._rounds(rows) * (of_program / self.machine.hz + START)

    def whole(
        self, high_pairs: float, low_pairs: float, walked: float = 0.0, *, in_boxes: bool = False
    ) -> float:
        """Predict the seconds of the whole call, quantisation included.

        walked: as `kernel` takes it. in_boxes: says if it gathers tokens into tile order.
        """
        elements = self.heads * self.tokens * self.head_dim
        moved = elements * self._moved_bytes(high_pairs > 0, low_pairs > 0, walked > 0, in_boxes)
        steps = _STEPS_BEFORE + (walked > 0)  # means are encoded in a step of their own
        before = moved / self.machine.bytes_per_second + steps * START
        return before + self.kernel(high_pairs, low_pairs, walked)

    @property
    def _precisions(self) -> Precisions:
        return Precisions.parse(self.high, self.low)

    def _rounds(self, rows: int) -> int:
        programs = self.heads * -(-self.tokens // rows)
        return -(-programs // self.machine.multiprocessors)

    def _rows(self, has_high: bool, has_low: bool) -> int:
        """Return the number of queries of one program."""
        lowering = lowering_of(self.machine.architecture, self.head_dim, self.high, self.low)
        classes = tuple(
            lowering.storage(precision.qk, self.machine.architecture) if has_class else None
            for precision, has_class in zip(self._precisions, (has_high, has_low), strict=True)
        )
        padded = max(64, 1 << (self.head_dim - 1).bit_length())
        low_values = lowering.stores_values[self._precisions.low.pv]
        tuned = tuning(self.machine.architecture, padded, classes, low_values if has_low else None)
        return tuned.rows if tuned.slots is None else SHARED_BLOCKS * SHARED_ROWS

    def _moved_bytes(self, has_high: bool, has_low: bool, has_means: bool, in_boxes: bool) -> float:
        """Return the bytes moved for each element of q, k and v together: read, and written in each class's formats."""
        moved, (high, low) = 3 * 2.0, self._precisions
        if has_low:
            moved += 2 * get_format(low.qk).average_bits / 8
        if has_high and (in_boxes or high.qk != "bf16"):
            moved += 2 * get_format(high.qk).average_bits / 8
        values = {each.pv for each, has_class in ((high, has_high), (low, has_low)) if has_class}
        written = {"fp8": 1, "fp16": 2}
        if in_units := values & written.keys():  # V's range is read, and V is written in each format
            moved += 2 + sum(written[each] for each in in_units)
        if "bf16" in values and in_boxes:
            moved += 2  # bf16 V is read as it is, unless its tokens are gathered
        if has_means:  # of k and v, written in float32, read, and encoded
            lender = self._precisions.of_means(has_low)
            bits_of_values = 16 if lender.pv in VALUES_ALONE else get_format(lender.pv).average_bits
            encoded = (get_format(lender.qk).average_bits + bits_of_values) / 8
            moved += (2 * 2 * 4 + encoded) / SUBTILE
        return moved


class Prediction(NamedTuple):
    """A prediction has milliseconds of a call, quantisation included, and speed-ups over dense full precision."""

    gpu: str
    label: str
    high: str
    low: str
    heads: int
    head_dim: int
    full_precision_ms: float
    dense_low_ms: float
    ms: float
    speedup_dense_low: float
    speedup: float


def predict(count: Count, gpu: str, heads: int, head_dim: int, high: str, low: str) -> Prediction:
    """Predict what a neighbourhood would take, LOW within its window, SKIP beyond, text HIGH.

    Raises ValueError as `Call` does, and for tiles of other than the kernel's 128 tokens.
    """
    if wrong := next((box for box in (count.q_tile, count.kv_tile) if math.prod(box) != TILE), None):
        raise ValueError(
            f"times are predicted for the kernel's tiles, of {TILE} tokens, got {shape_text(wrong)}: "
            "leave out the tiles, or the GPU"
        )
    tokens = count.text + math.prod(axis.length for axis in count.axes)
    of_grid = count.visits - count.text_visits
    masked = count.cut * of_grid if count.text else 0.0  # where there is HIGH, masked tiles are HIGH
    slots = TILE * (count.grid_tiles[0] + count.text_tiles[0])
    dense = Call(gpu, heads, tokens, head_dim, high, low)
    ours = replace(dense, tokens=slots).whole(count.text_visits + masked, of_grid - masked, in_boxes=True)
    return _beside_dense(dense, count.text, ours)


def predict_policy(
    policy: Policy,
    layout: Layout,
    gpu: str,
    heads: int,
    head_dim: int,
    high: str,
    low: str,
    left_out: float = 0.0,
) -> Prediction:
    """Predict what a policy would take on square attention.

    left_out: the share of LOW pairs that `SkipSoftmax` leaves out, which depends on what they hold; as measured. Raises
    ValueError as `Call`, `plan.make` and `share_left` do.
    """
    dense = Call(gpu, heads, layout.q_length, head_dim, high, low)
    visited, slots = pairs(policy, layout), layout.q_length
    if policy.on_grid:
        slots = TileOrder(layout, policy.box(layout.grid)).layout.q_length
    of_high, of_low, _, walked = (number.mean().item() for number in visited)
    of_low *= share_left(left_out, dense.machine.architecture, head_dim, high, low)
    ours = replace(dense, tokens=slots).whole(of_high, of_low, walked, in_boxes=policy.on_grid)
    machine = dense.machine
    routing = heads * routing_clocks(policy, layout, machine.architecture, head_dim)
    found = _beside_dense(dense, layout.text_length, ours + routing / (machine.multiprocessors * machine.hz))
    if routing:
        return found._replace(label=f"predicted, not measured with {policy} on any {gpu.upper()}")
    if walked and (gpu, f"{high}|{low}") == MEASURED:
        found = found._replace(label=LABEL_OF_MEANS)
    return found


def _beside_dense(dense: Call, text: int, seconds: float) -> Prediction:
    """Return a prediction of so many seconds; text: the tokens that dense LOW has HIGH, too."""
    tiles, text_tiles = -(-dense.tokens // TILE), -(-text // TILE)
    text_pairs = text_tiles * (2 * tiles - text_tiles)
    full, dense_low = dense.full_precision(), dense.whole(text_pairs, tiles**2 - text_pairs)
    return Prediction(
        dense.gpu, dense.label, dense.high, dense.low, dense.heads, dense.head_dim,
        1e3 * full, 1e3 * dense_low, 1e3 * seconds, full / dense_low, full / seconds,
    )  # fmt: skip


def default_formats(gpu: str) -> tuple[str, str]:
    """Return HIGH and LOW that a GPU multiplies fastest; raises ValueError for an unknown one."""
    if gpu not in MACHINES:
        raise ValueError(f"unknown GPU {gpu!r}: choose from {', '.join(MACHINES)}")
    return formats_of(MACHINES[gpu].architecture)
