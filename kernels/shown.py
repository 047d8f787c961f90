"""How each pair of formats was shown on each architecture: run, compiled, interpreted, or refused, and why."""

from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.kernels.lowerings import KERNEL_ARCHITECTURES, LOWERINGS
from dma_diffusers.kernels.precision import Precisions

RUN = ("sm_90",)
"""Architectures on which the tests of the kernels ran, and with them all pairs (eval/results/h200_tests.txt)."""
PAIRS = (
    ("bf16", "int8"),
    ("bf16", "int8/bf16"),
    ("bf16", "fp8"),
    ("mxfp8", "mxfp8/bf16"),
    ("mxfp8", "mxfp4"),
    ("mxfp8", "nvfp4"),
    ("mxfp8", "mxfp6_e2m3"),
)
_HEAD_DIM = 128


def shown(architecture: str, high: str, low: str) -> str:
    """The way in which a pair, words of HIGH and of LOW, was shown on an architecture at head_dim 128, in words.

    "compiled": ahead of time, by `dma-diffusers compile` and the tests. "interpreted": on the CPU, where the kernel's
    numbers are compared with the reference's, as those of every pair are. "refused: …" says why.
    """
    precisions = Precisions.parse(high, low)
    refusals = [
        refusal
        for lowering in LOWERINGS
        if lowering.name != "reference" and (refusal := lowering.refuses(architecture, _HEAD_DIM, precisions))
    ]
    if len(refusals) == len(LOWERINGS) - 1:
        return f"refused: {refusals[-1]}"
    lowering = "faithful" if refusals else "native"
    if architecture in RUN:
        return f"run ({lowering})"
    is_compiled = (high, low) in FORMAT_PAIRS[architecture]
    return f"{'compiled' if is_compiled else 'interpreted'} ({lowering})"


def markdown() -> str:
    """The table of kernels/README.md: a row for each pair, a column for each architecture; needs Triton."""
    lines = [
        f"| HIGH \\| LOW | {' | '.join(KERNEL_ARCHITECTURES)} |",
        f"| --- |{' --- |' * len(KERNEL_ARCHITECTURES)}",
    ]
    reasons: dict[str, int] = {}
    for pair in PAIRS:
        cells = []
        for architecture in KERNEL_ARCHITECTURES:
            how, _, reason = shown(architecture, *pair).partition("refused: ")
            if reason:
                reason = reason.replace(architecture, "it")
                how = f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"
            cells.append(how)
        lines.append(f"| `{pair[0]}` \\| `{pair[1]}` | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes]) + "\n"
