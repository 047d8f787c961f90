"""The tables of formats.md say which lowering runs each format on each architecture, and how that was shown.

`python -m dma_diffusers.kernels.page` writes them anew in a checkout.
"""

import re
from pathlib import Path

from dma_diffusers.kernels.defaults import FORMAT_PAIRS
from dma_diffusers.kernels.formats import FORMATS
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES, KERNEL_ARCHITECTURES, RUN, choose
from dma_diffusers.kernels.precision import Precision, Precisions

PAGE = Path(__file__).parent / "formats.md"
_TABLES = re.compile(r"(?<=<!-- tables -->\n).*(?=<!-- end of tables -->)", re.DOTALL)
_HEAD_DIM = 128

_VALUES = {
    "bf16": "`bf16`",
    "fp16": "`fp16`",
    "fp8": "`fp8`",
    "int8": "`int8`",
    "mxfp8": "`mxfp8`, and so all others",
}
# Ahead of time, every format there; on other architectures, those of their own pairs.
COMPILED = ("sm_90", *BLOCK_SCALED_ARCHITECTURES)


def cell(architecture: str, qk: str, pv: str = "bf16") -> tuple[str, str]:
    """Says how LOW tiles of this precision run, in a word or two, and gives the reason where no kernel runs them."""
    asked = Precision(qk, pv)
    try:
        choice = choose(architecture, _HEAD_DIM, f"{qk}/bf16", f"{qk}/{pv}")
    except ValueError as error:
        return "refused", _last(str(error))
    if choice.lowering == "reference":
        return "reference", _last(choice.reason)
    if qk in RUN.get(architecture, ()):
        shown = "run"
    elif architecture in COMPILED or any(
        asked in Precisions.parse(*pair) for pair in FORMAT_PAIRS[architecture]
    ):
        shown = "compiled"
    else:
        shown = "interpreted"
    return f"{choice.lowering}: {shown}", ""


def tables() -> str:
    """The tables of Q·K and of P·V, and the reasons that they refer to, in Markdown."""
    reasons: dict[str, int] = {}

    def row(qk: str, pv: str) -> str:
        found = []
        for architecture in KERNEL_ARCHITECTURES:
            words, reason = cell(architecture, qk, pv)
            for own, any_one in (
                (architecture, "it"),
                (f"in {qk}", "in this format"),
                (f"of {qk}", "of this format"),
            ):
                reason = reason.replace(own, any_one)
            found.append(f"{words} ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else words)
        return " | ".join(found)

    head = f"{' | '.join(KERNEL_ARCHITECTURES)} |\n|{' --- |' * (len(KERNEL_ARCHITECTURES) + 1)}"
    of_keys = [f"| `{name}` | {row(name, 'bf16')} |" for name in FORMATS]
    of_values = [f"| {words} | {row('int8', name)} |" for name, words in _VALUES.items()]
    listed = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([
        f"| Q·K, with P·V in bf16 | {head}", *of_keys, "", f"| P·V, with Q·K in int8 | {head}", *of_values, "",
        *listed,
    ]) + "\n"  # fmt: skip


def with_tables(page: str) -> str:
    """This page with its tables written anew."""
    return _TABLES.sub(lambda _: tables(), page)


def _last(reasons: str) -> str:
    """The last lowering's reason among those of several: the one that could run most."""
    *_, last = re.split(r"; (?=\w+: )|: (?=native: )", reasons)
    return last


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
