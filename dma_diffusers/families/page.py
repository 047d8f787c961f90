"""The tables of families.md, which `python -m dma_diffusers.families.page` writes anew in a checkout."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dma_diffusers.families.family import Family
from dma_diffusers.families.table import CONTROLNETS, TRANSFORMERS

PAGE = Path(__file__).parents[1] / "families.md"
_TABLES = re.compile(r"(?<=<!-- tables -->\n).*(?=<!-- end of tables -->)", re.DOTALL)


def tables() -> str:
    """The tables of transformers, of ControlNets, and of what can't be had, in Markdown."""
    refused = [
        f"| `{name}` | {family.refusal} |"
        for name, family in (TRANSFORMERS | CONTROLNETS).items()
        if family.refusal
    ]
    lines = [
        "| Transformer | Text | Grid | Noise | Left to stock |", "| --- | --- | --- | --- | --- |",
        *_rows(TRANSFORMERS), "", "| ControlNet | Text | Grid | Noise | Left to stock |",
        "| --- | --- | --- | --- | --- |", *_rows(CONTROLNETS), "", "| Refused | Reason |", "| --- | --- |", *refused,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """This page with its tables written anew."""
    return _TABLES.sub(lambda _: tables(), page)


def _rows(families: Mapping[str, Family]) -> Iterator[str]:
    for name, family in families.items():
        if not family.refusal:
            grid = f"`{family.grid.__name__}`" if family.grid else "–"
            yield f"| `{name}` | {family.text} | {grid} | {_noise(family)} | {_left(family)} |"


def _noise(family: Family) -> str:
    """How the noise level follows from the timestep t."""
    if family.timestep_scale is None:
        return "–"
    share = "t" if family.timestep_scale == 1 else f"t / {family.timestep_scale:g}"
    return f"1 − {share}" if family.timestep_rises else share


def _left(family: Family) -> str:
    """The modules and the calls that stock attention keeps."""
    modules = {
        "cross-attention": family.cross_attention,
        "sound": family.sound,
        "text alone": family.text_only,
        "the transformer's": family.borrowed,
    }
    words = [
        f"{role}: {', '.join(f'`{part}`' for part in parts)}" for role, parts in modules.items() if parts
    ]
    return "; ".join([*words, *([f"calls: {family.falls_back}"] if family.falls_back else [])]) or "–"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
