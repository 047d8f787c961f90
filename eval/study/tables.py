"""The tables of eval/results/formats.md, out of the figures of `verdicts`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dma_diffusers.eval.study.verdicts import FORMATS, PAIRS, RIVALS, UNSIGNED

MODELS = {"demo": "Pictures", "demo-video": "Clips", "language-model": "SmolLM2"}
PARTS = {"qk": "Q·K", "v": "V", "p": "P", "linear": "linear"}
ROTATIONS = ("hadamard16", "hadamard32", "head_dim")
_ROTATED = ("int8", "mxint8", "mxfp8", "nvint4", "nvfp4", "mxfp4")
_OF_P = (
    "fp8", "mxfp8", "int8", "uint8", "mxint8", "mxuint8", "mxfp6_e2m3", "nvfp4", "nvint4", "nvuint4", "mxfp4", "mxint4",
    "mxuint4",
)  # fmt: skip


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables as Markdown, by what they are about. results: of `verdicts`, model by model."""
    return {
        "q and k": _errors(results, "qk", FORMATS),
        "p": _errors(results, "p", _OF_P),
        "v": _errors(results, "v", FORMATS),
        "pairs": _errors(results, "pair", PAIRS),
        "rivals": _rivals(results),
        "unsigned": _ratios(results, "rivals", [f"p {one} / {other}" for one, other in UNSIGNED]),
        "rotations": _ratios(
            results, "rotated", [f"{part} {name} {r}" for part in ("qk", "v") for name in _ROTATED for r in ROTATIONS]
        ),
        "smoothing": _ratios(
            results, "smoothed",
            [f"{part} {name}{r}" for part in ("qk", "v") for name in _ROTATED for r in ("", " hadamard32")],
        ),
        "linear": _errors(results, "linear", [f"{name}{r}" for name in FORMATS for r in ("", " hadamard32")]),
        "crest factors": _crests(results),
        "theory": _theory(results),
    }  # fmt: skip


def _rivals(results: Mapping[str, Any]) -> str:
    """One line a part, rotation and pair of rivals: the ratio of errors, and where the integer errs less."""
    names = [
        f"{part} {one}{rotation} / {other}"
        for one, other in RIVALS
        for part, rotations in (
            ("qk", ("none", *ROTATIONS)),
            ("v", ("none",)),
            ("p", ("none",)),
            ("linear", ("none", "hadamard32")),
        )
        for rotation in (f" {name}" * (name != "none") for name in rotations)
    ]
    return _ratios(results, "rivals", names)


def _ratios(results: Mapping[str, Any], section: str, names: Sequence[str]) -> str:
    """One line a variant: ratios of errors, of rivals also the share of layers and steps where the first errs less."""
    rows = []
    for name in names:
        part, _, variant = name.partition(" ")
        found = [model[section].get(name) for model in _models(results)]
        rows.append([PARTS[part], f"`{variant}`", *("–" if f is None else _interval(f) for f in found)])
    return _table(["Part", "Format", *_titles(results)], rows)


def _errors(results: Mapping[str, Any], part: str, names: Sequence[str]) -> str:
    """One line a variant: the error of the output."""
    models = zip(_titles(results), _models(results), strict=True)
    shown = {title: found["errors"][part] for title, found in models if part in found["errors"]}
    rows = [[f"`{name}`", *(_interval(errors[name]) for errors in shown.values())] for name in names]
    return _table(["Format", *shown], rows)


def _crests(results: Mapping[str, Any]) -> str:
    """One line a tensor: the median and the 95 % quantile of κ in blocks of 32."""
    names = [
        "q none", "q hadamard32", "k none", "k none-mean", "k hadamard32-mean", "v none", "v none-mean",
        "v hadamard32", "p none", "linear none", "linear hadamard32",
    ]  # fmt: skip
    rows = []
    for name in names:
        quantiles = [found["crests"].get(name) for found in _models(results)]
        rows.append([name.replace("-mean", ", less its mean").replace(" none", ""), *(
            "–" if q is None else f"{q[2]:.2f}, {q[4]:.2f}" for q in quantiles
        )])  # fmt: skip
    return _table(["Tensor", *_titles(results)], rows)


def _theory(results: Mapping[str, Any]) -> str:
    rows = [
        [part, *(f"{f['from_theory'][part]:.2f} dB" if part in f["from_theory"] else "–" for f in _models(results))]
        for part in ("q", "k", "v", "p", "linear", "all")
    ]  # fmt: skip
    return _table(["Tensor", *_titles(results)], rows)


def _models(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [results[name] for name in MODELS if name in results]


def _titles(results: Mapping[str, Any]) -> list[str]:
    return [title for name, title in MODELS.items() if name in results]


def _interval(values: Sequence[float]) -> str:
    """An estimate with its bounds, without the zero before the point, and a share if there is one."""
    estimate, low, high = (f"{value:.3g}" for value in values[:3])
    text = re.sub(r"\b0\.", ".", f"{estimate} [{low}, {high}]")
    return text + "".join(f", {share:.0%}" for share in values[3:])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---" if n == 0 else "---:" for n in range(len(header))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
