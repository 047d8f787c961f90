"""Counts what the loops of a compiled attention kernel issue to each pipe of an SM, and the clocks that it takes.

The machine code is disassembled, cut into basic blocks and searched for its natural loops. Where the rates
come from is told in ahead_of_time/instructions.md.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import triton

# An instruction is of the first kind whose pattern matches its whole name, less modifiers.
KINDS = {
    "mma": r"\w*MMA",
    "mufu": r"MUFU",
    "convert": r"F2F|F2I|I2F|FRND",
    "pack": r"F2FP|F2IP|I2FP|I2IP|I2I",
    "fma": r"F(FMA|MUL|ADD)(32I)?",
    "packed": r"[FH](FMA|MUL|ADD)2(_32I)?",
    "imad": r"IMAD|IMUL|IDP",
    "alu": r"[FHI]MNMX[23]?|VH?I?MNMX3?|VIADD(MNMX)?|IADD3?|[FHI]SETP?2?|HSETP2|F?SEL|P?LOP3|IABS|LEA|SHF|PRMT"
    r"|SGXT|BMSK|MOV|P2R|R2P",
    "control": r"BAR|BRA|BRX|BSSY|BSYNC|CALL|DEPBAR|ELECT|ENDCOLLECTIVE|EXIT|FENCE|LDGDEPBAR|MEMBAR|NANOSLEEP|NOP"
    r"|RET|S2R|SYNCS|UTCBAR|VOTE|WARPGROUP|WARPSYNC|YIELD",
    "memory": r"LDC|LD[GLSTM]*|LDGSTS|ST[GLSTM]*|ATOM\w*|RED[GS]?|SHFL|UTMA\w+|UTCCP|UBLK\w+",
    "uniform": r"U\w+|VOTEU|R2UR|S2UR|LDCU",
    "other": r"\w+",
}  # fmt: skip
PIPES = {"xu": ("mufu", "convert"), "fma": ("fma", "packed", "imad"), "alu": ("alu", "pack")}

# Lanes per clock and SM. IMAD alone runs at half its figure here: it may share the clock with an FMA.
_HOPPER = {"mufu": 16, "convert": 16, "fma": 128, "packed": 128, "imad": 128, "alu": 64, "pack": 64}
_BLACKWELL = _HOPPER | {"packed": 64}
RATES = {
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "sm_103": _BLACKWELL | {"mufu": 32},
    "sm_120": _BLACKWELL | {"alu": 128},
}
# Dense matrix FLOP per clock and SM, by the letter of the instruction: 16-bit H, 8-bit Q and I, 4-bit O.
MATRIX_RATES = {
    "sm_90": {"H": 4096, "Q": 8192, "I": 8192},
    "sm_100": {"H": 8192, "Q": 16384, "I": 16384, "O": 32768},
    "sm_103": {"H": 8192, "Q": 16384, "O": 49152},
    "sm_120": {"H": 1024, "Q": 2048, "I": 2048, "O": 4096},
}
_WARP, _SCHEDULERS, _TILE = 32, 4, 128


class Loop(TypedDict):
    """The instructions that one warp issues in one iteration, by kind (`KINDS`).

    every: in every iteration, of those that take exponentials if there are others (which skip a tile). some: behind
    a branch, so in some iterations or one elected warp alone: waiting for a barrier, copies, Blackwell's matrix
    products, a rescale that can be skipped. matrix: the matrix instructions among both, by name.
    """

    every: dict[str, int]
    some: dict[str, int]
    matrix: dict[str, int]


def loops(cubin: bytes) -> list[Loop]:
    """The innermost loops of a kernel that multiply matrices or take exponentials, in program order.

    A warp-specialised kernel does the two in different loops. cubin: one kernel, as Triton compiles it.
    Raises CalledProcessError if nvdisasm can't read it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return loops_in(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def loops_in(sass: str) -> list[Loop]:
    """`loops` of a disassembled kernel."""
    blocks, edges = _blocks(sass)
    exponential = {block for block, names in enumerate(blocks) if "MUFU" in names}
    bodies = {
        head: (body, _always(edges, head, body, exponential))
        for head, body in _natural_loops(edges).items()
        if {"mma", "mufu"} & _kinds(blocks, body).keys()
    }
    return [
        {
            "every": dict(_kinds(blocks, always)),
            "some": dict(_kinds(blocks, body - always)),
            "matrix": dict(Counter(n for i in sorted(body) for n in blocks[i] if kind(n) == "mma")),
        }
        for head, (body, always) in bodies.items()
        if body & bodies.keys() == {head}
    ]


def kind(name: str) -> str:
    """The kind (`KINDS`) of the instruction `name`, which has no modifiers."""
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name))


def per_score_element(loop: Loop, threads: int, tile_m: int, tile_n: int) -> dict[str, float]:
    """Instructions of a thread for each score, by kind; those behind a branch are left out.

    threads: how many run the loop. tile_m, tile_n: the scores they finish in one iteration.
    """
    return {name: count * threads / (tile_m * tile_n) for name, count in loop["every"].items()}


def bound(
    loop: Loop, architecture: str, head_dim: int, threads: int, tile_m: int, tile_n: int
) -> dict[str, float]:
    """The clocks each pipe of an SM is busy with 128×128 scores: the longest is the least an SM can take.

    `matrix` is Q·K and P·V at the peak rates of the loop's own instructions, `issue` all warp instructions at
    one per scheduler. Instructions behind a branch are left out. Raises KeyError for an architecture, or
    a matrix instruction on it, without a rate.
    """
    elements = per_score_element(loop, threads, tile_m, tile_n)
    scores = _TILE * _TILE
    rates, matrix_rates = RATES[architecture], MATRIX_RATES[architecture]
    product = 2 * scores * head_dim
    letters = [re.sub("^UTC", "", name)[0] for name in loop["matrix"]]
    clocks = {"matrix": sum(2 * product / matrix_rates[letter] for letter in letters) / max(len(letters), 1)}
    for pipe, kinds in PIPES.items():
        clocks[pipe] = scores * sum(elements.get(name, 0.0) / rates[name] for name in kinds)
    return clocks | {"issue": scores * sum(elements.values()) / (_WARP * _SCHEDULERS)}


def describe(
    cubin: bytes, architecture: str, head_dim: int, threads: int, tile_m: int, tile_n: int
) -> list[dict[str, Any]]:
    """For each of the kernel's `loops`: `matrix`, `per_score_element`, `clocks` (`bound`) and the `longest` pipe."""
    described = []
    for loop in loops(cubin):
        elements = per_score_element(loop, threads, tile_m, tile_n)
        clocks = bound(loop, architecture, head_dim, threads, tile_m, tile_n)
        longest = max(clocks, key=clocks.get)
        described.append(
            {"matrix": loop["matrix"], "per_score_element": elements, "clocks": clocks, "longest": longest}
        )
    return described


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of instructions.md: `describe`'s entries, each with an `architecture`, `head_dim` and `loop`."""
    kinds, pipes = [name for name in KINDS if name != "mma"], ["matrix", *PIPES, "issue"]
    header = ["architecture", "D", "loop", "matrix", *kinds, *(f"{pipe} clocks" for pipe in pipes), "longest"]
    lines = [header, ["---"] * 4 + ["---:"] * (len(header) - 5) + ["---"]]
    for row in rows:
        lines.append(
            [row["architecture"], str(row["head_dim"]), row["loop"], " + ".join(row["matrix"])]
            + [f"{row['per_score_element'].get(name, 0):.2f}" for name in kinds]
            + [f"{row['clocks'][pipe]:,.0f}" for pipe in pipes]
            + [row["longest"]]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass
class _Block:
    names: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls_through: bool = True


_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z]\w*)\S*\s*([^;]*)")


def _blocks(sass: str) -> tuple[list[list[str]], list[list[int]]]:
    """The basic blocks' instruction names, and the blocks that may follow each; calls come back."""
    blocks: list[_Block] = [_Block()]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].names:
                blocks.append(_Block())
            labels[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, name, operands = instruction.groups()
            blocks[-1].names.append(name)
            if name in ("BRA", "BRX", "EXIT", "RET"):
                blocks[-1].targets = re.findall(r"\.L_\w+", operands)
                # BRA.U and BRA.DIV take their condition as an operand before the target.
                blocks[-1].falls_through = bool(predicate) or (name == "BRA" and not operands.startswith("`"))
                blocks.append(_Block())
    blocks[-1].falls_through = False
    edges = [
        [labels[target] for target in block.targets] + [following] * block.falls_through
        for following, block in enumerate(blocks, 1)
    ]
    return [block.names for block in blocks], edges


def _natural_loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """For each loop's first block: the blocks of its body."""
    reverse = _reversed(edges)
    live = _reached(edges, {0})
    dominated = {block: live - _reached(edges, {0}, block) for block in live}
    return {
        head: live & _reached(reverse, latches, head) | {head}
        for head in sorted(live)
        if (latches := dominated[head].intersection(reverse[head]))
    }


def _always(edges: list[list[int]], head: int, body: set[int], wanted: set[int]) -> set[int]:
    """The blocks of a loop's body that no iteration avoids, of those that pass one of `wanted` if any does."""
    inside = [[to for to in targets if to in body and to != head] for targets in edges]
    latches = {block for block in body if head in edges[block]}
    wanted = wanted & body or {head}

    def avoided(block: int) -> bool:
        after = _reached(_reversed(inside), latches - {block}, block)
        return bool(wanted & _reached(inside, {head} - {block}, block) & after)

    return {block for block in body if not avoided(block)}


def _reversed(edges: list[list[int]]) -> list[list[int]]:
    reverse: list[list[int]] = [[] for _ in edges]
    for block, successors in enumerate(edges):
        for successor in successors:
            reverse[successor].append(block)
    return reverse


def _reached(edges: list[list[int]], start: set[int], avoiding: int | None = None) -> set[int]:
    reached, waiting = {avoiding}, list(start)
    while waiting:
        if (block := waiting.pop()) not in reached:
            reached.add(block)
            waiting += edges[block]
    return reached - {avoiding}


def _kinds(blocks: list[list[str]], which: set[int]) -> Counter[str]:
    return Counter(kind(name) for index in sorted(which) for name in blocks[index])
