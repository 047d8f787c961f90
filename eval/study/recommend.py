"""The format that errs least in each layer at each width, and the precisions that calibration should choose from."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dma_diffusers.components import transformers_of
from dma_diffusers.eval.cost import tile_clocks
from dma_diffusers.eval.study.options import UNSIGNED
from dma_diffusers.kernels.formats import FORMATS

FORMAT, VERSION = "dma-diffusers study", 1
HEADER = (
    "layer",
    "part",
    "bits",
    "format",
    "rotation",
    "less its mean",
    "relative L2",
    "usual",
    "× less error",
)
PARTS = ("qk", "p", "v", "linear")
USUAL = {8: "mxfp8", 6: "mxfp6_e2m3", 4: "mxfp4"}
"""The format that others are compared with at each width, unrotated; of q and k, with K smoothed as kernels do it."""
_BITS = {name: format.bits for name, format in FORMATS.items()} | {
    format.name: format.bits for format in UNSIGNED.values()
}


def recommended(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each layer, part and width the variant of least error, a mean over steps and prompts.

    rows: those of a study. gain: the error of the usual format over it, None where that was not measured.
    """
    errors = _errors(rows)
    found = []
    for layer, part in dict.fromkeys((layer, part) for layer, part, *_ in errors if part in PARTS):
        of_part = {key[2:]: error for key, error in errors.items() if key[:2] == (layer, part)}
        for bits, usual in USUAL.items():
            if not (of_width := {key: error for key, error in of_part.items() if _BITS[key[0]] == bits}):
                continue
            best = min(of_width, key=of_width.__getitem__)
            usual_error = of_part.get((usual, "none", part == "qk"))
            gain = usual_error / of_width[best] if usual_error and of_width[best] else None
            found.append(
                {"layer": layer, "part": part, "bits": bits}
                | dict(zip(("format", "rotation", "smooth"), best, strict=True))
                | {"relative_l2": of_width[best], "usual": usual, "gain": gain}
            )
    return found


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows under `HEADER`."""
    return [
        [
            each["layer"], each["part"], str(each["bits"]), each["format"], each["rotation"],
            "yes" if each["smooth"] else "no", f"{each['relative_l2']:.4f}", each["usual"],
            "–" if each["gain"] is None else f"{each['gain']:.2f}",
        ]
        for each in document["recommended"]
    ]  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """Read the file that a study wrote; raises ValueError, in one line, for another file, OSError for none."""
    try:
        document = json.loads(path.read_bytes())
        found = document["format"], document["version"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is not a file that `dma-diffusers study` wrote: give its study.json")
    return document


def check_model(document: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
    """Raise ValueError, in one line, where a study is of another kind of transformer than the pipeline's."""
    studied, kinds = (
        document["settings"]["model"]["class"],
        {type(m).__name__ for _, m in transformers_of(pipe)},
    )
    if studied not in kinds:
        raise ValueError(f"the study is of a {studied}, the pipeline has a {', '.join(sorted(kinds))}")


def pairs(document: Mapping[str, Any], target: str) -> list[tuple[str, str]]:
    """Return the words of HIGH and LOW for calibration to choose from on a GPU, by architecture.

    In each attention module precisions count that no other one beats in both error, measured, and clocks, predicted; of
    those the most exact, the cheapest, and the one of least error times clocks. Each two of these three are a pair.
    Raises ValueError for a study without attention, or of formats that the GPU doesn't multiply.
    """
    errors = {key: error for key, error in _errors(document["rows"]).items() if key[1] == "pair"}
    chosen: dict[tuple[str, str], None] = {}
    for layer in dict.fromkeys(layer for layer, *_ in errors):
        of_words = {key[2]: error for key, error in errors.items() if key[0] == layer} | {"bf16/bf16": 0.0}
        clocks = {words: _clocks(target, document["head_dims"][layer], words) for words in of_words}
        options = sorted((cost, of_words[words], words) for words, cost in clocks.items() if cost < math.inf)
        front = [each for number, each in enumerate(options) if all(each[1] < o[1] for o in options[:number])]
        middle = min(front[1:-1], key=lambda each: each[0] * each[1], default=front[0])
        three = dict.fromkeys(each[2] for each in (front[-1], middle, front[0]))
        chosen |= dict.fromkeys(combinations(three, 2))
    if not chosen:
        raise ValueError(
            f"the study has no precision that {target} multiplies faster than bf16: leave it out"
        )
    return list(chosen)


def rotation(document: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> str:
    """Return the rotation with which these precisions' formats of Q·K err least, K smoothed: by the mean logarithm.

    A rotation that not all heads of the model can have, or that was not studied, is none of those.
    """
    formats = {words.split("/")[0] for pair in pairs for words in pair}
    found: dict[str, list[float]] = {}
    for (_, part, format, rotation, smooth), error in _errors(document["rows"]).items():
        if part == "qk" and smooth and format in formats:
            found.setdefault(rotation, []).append(math.log(max(error, 1e-12)))
    most = max(map(len, found.values()), default=0)
    whole = {rotation: np.mean(errors) for rotation, errors in found.items() if len(errors) == most}
    return min(whole, key=whole.__getitem__, default="none")


def _errors(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str, str, bool], float]:
    """The mean error over steps by layer, part, format, rotation and smoothing."""
    found: dict[tuple[str, str, str, str, bool], list[float]] = {}
    for row in rows:
        if row["relative_l2"] is not None:
            key = row["layer"], row["part"], row["format"], row["rotation"], row["smooth"]
            found.setdefault(key, []).append(row["relative_l2"])
    return {key: float(np.mean(errors)) for key, errors in found.items()}


def _clocks(target: str, head_dim: int, words: str) -> float:
    """The predicted clocks of a pair of tiles; ∞ where no kernel multiplies these formats there."""
    try:
        return tile_clocks(target, head_dim, words, words)[0]
    except ValueError:
        return math.inf
