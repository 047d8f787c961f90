"""Splitting the last round of the sm_90 kernel's programs over their keys, in Gluon.

Programs of 192 queries fill an H200's 132 multiprocessors in rounds; the last round leaves most of them idle. Its
programs are therefore split: each piece walks a part of the KV tiles and stores its sums, and the last piece of a
warpgroup to finish adds up all of them, in one order: the same inputs give the same bits.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dma_diffusers.kernels.tiling import precision_map

WARPGROUPS = gl.constexpr(precision_map.SHARED_BLOCKS)
ROWS = gl.constexpr(precision_map.SHARED_ROWS)
_MOST_PIECES = 8
_FIXED_COST = 6  # of a piece, in KV tiles: loading queries, filling the ring, storing and adding sums

# Triton 3.6 knows it by another name.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@dataclass(frozen=True)
class Split:
    """The programs of a launch: so many whole ones, and behind them those of `rest` blocks in `pieces` each."""

    whole: int
    rest: int
    pieces: int

    @classmethod
    def of(cls, blocks: int, tiles: int, multiprocessors: int) -> "Split":
        """The split of `blocks` programs, each over `tiles` KV tiles, that takes the least time; 1 piece for none."""
        rest = blocks % multiprocessors

        def cost(pieces: int) -> float:
            rounds = -(-rest * pieces // multiprocessors)
            return rounds * (tiles / pieces + _FIXED_COST * (pieces > 1))

        pieces = min(range(1, _MOST_PIECES + 1), key=cost)
        return cls(blocks - rest, rest, pieces) if pieces > 1 else cls(blocks, 0, 1)

    @property
    def programs(self) -> int:
        return self.whole + self.rest * self.pieces


@gluon.jit
def place_of(program, whole, pieces):
    """The block of queries of a program, and which of its pieces this is: −1 for a whole block."""
    block, piece = program, -1
    if program >= whole:
        block = whole + (program - whole) // pieces
        piece = (program - whole) % pieces
    return block, piece


@gluon.jit
def own_share(high_end, low_end, end, piece, pieces):
    """Where a piece's entries of a block list begin, and where in it the three phases end."""
    first = 0
    if piece >= 0:
        first = piece * end // pieces
        last = (piece + 1) * end // pieces
        high_end = gl.minimum(gl.maximum(high_end, first), last)
        low_end = gl.minimum(gl.maximum(low_end, first), last)
        end = last
    return first, high_end, low_end, end


@gluon.jit
def _record(records, number, row: gl.constexpr, layout: gl.constexpr, D: gl.constexpr):
    """Addresses of a piece's l `[64]`, m `[64]` and accumulator `[64, D]`, which lie behind each other."""
    start = records + number.to(gl.int64) * (ROWS * (D + 2))
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    totals = start + gl.arange(0, ROWS, layout=row)
    return totals, totals + ROWS, start + (2 * ROWS + rows[:, None] * D + columns[None, :])


@gluon.jit
def joined(accumulator, l, m, split, warpgroup, pieces, D: gl.constexpr):
    """Store the sums of a piece; returns those of all pieces, and whether this piece is the last to store.

    split: float32 records `[split blocks, 3, pieces, 64 · (D + 2)]`; int32 counters `[split blocks, 3]`, which are zero
    before the first piece and after the last; the number of whole blocks.
    """
    records, finished, whole = split
    program = gl.program_id(0) - whole  # is read again, for a register would hold it throughout the loops
    piece = program % pieces
    number = program // pieces * WARPGROUPS + warpgroup
    finished += number
    records += number.to(gl.int64) * pieces * (ROWS * (D + 2))
    layout: gl.constexpr = accumulator.type.layout
    row: gl.constexpr = l.type.layout
    totals, largest, sums = _record(records, piece, row, layout, D)
    gl.store(totals, l)
    gl.store(largest, m)
    gl.store(sums, accumulator)
    barrier()  # the whole warpgroup has stored
    is_last = gl.atomic_add(finished, 1, sem="acq_rel") == pieces - 1
    if is_last:
        gl.store(finished, 0)
        for number in range(pieces):
            _, largest, _ = _record(records, number, row, layout, D)
            m = gl.maximum(m, gl.load(largest, cache_modifier=".cg"))
        l = gl.zeros_like(l)
        accumulator = gl.zeros_like(accumulator)
        for number in range(pieces):
            totals, largest, sums = _record(records, number, row, layout, D)
            factor = gl.exp2(gl.load(largest, cache_modifier=".cg") - m)
            l += gl.load(totals, cache_modifier=".cg") * factor
            factor = gl.convert_layout(factor, gl.SliceLayout(1, layout))
            accumulator += gl.load(sums, cache_modifier=".cg") * factor[:, None]
    return accumulator, l, m, is_last
