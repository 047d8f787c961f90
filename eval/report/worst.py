"""The worst pictures or clips of an evaluation stand beside the baseline's, inside the page."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from dma_diffusers.eval.report.columns import value_text
from dma_diffusers.eval.report.evaluation import baseline
from dma_diffusers.eval.report.verdicts import of_sample
from dma_diffusers.pipelines.picture import amplified_difference, animation, encode

_SIDE, _CLIP_SIDE = 512, 256  # a side of more pixels is shrunk to keep the page small
_GAP, _PAPER = 8, (128, 128, 128)  # so many pixels of this colour lie between the panels of a clip
_EXACT: dict[str, Any] = {"lossless": True, "quality": 100, "method": 6}
_FOR_THE_EYE: dict[str, Any] = {"quality": 90, "method": 6}  # nobody reads values from a difference times 64


class Worst(NamedTuple):
    """A picture, the baseline's of the same prompt and seed, and their difference times `factor` are data URIs here.

    A clip has one URI, `clip`, with the three side by side, so that browsers show them in step.
    """

    row: str
    prompt: str
    seed: int
    metric: str
    value: str
    verdict: str | None
    factor: int
    reference: str = ""
    picture: str = ""
    difference: str = ""
    clip: str = ""


def worst(evaluation: dict[str, Any], folder: Path) -> dict[str, list[Worst]]:
    """Read the evaluation's worst pictures from its run folder, by row.

    Raises FileNotFoundError for a file that is missing, ValueError for one that holds no picture or one of another size
    than the baseline's.
    """
    found: dict[str, list[Worst]] = {}
    for entry in evaluation.get("worst") or ():
        found.setdefault(entry["row"], []).append(_worst(evaluation, folder, entry))
    return found


def _worst(evaluation: dict[str, Any], folder: Path, entry: dict[str, Any]) -> Worst:
    reference, picture = (_read(folder, entry["pictures"][which]) for which in (baseline(evaluation), "row"))
    if _size(picture) != _size(reference):
        raise ValueError(
            "{} has {}, the baseline's {}".format(
                folder / entry["pictures"]["row"], _size(picture), _size(reference)
            )
        )
    difference, factor = amplified_difference(
        _strip(picture), _strip(reference)
    )  # all frames have one factor
    about = evaluation["metrics"].get(entry["metric"], {"title": entry["metric"], "digits": 4})
    return Worst(
        row=entry["row"],
        prompt=evaluation["prompts"][entry["prompt"]]["text"],
        seed=entry["seed"],
        metric=about["title"],
        value=value_text(entry["value"], about["digits"]),
        verdict=of_sample(evaluation, entry["row"], entry["prompt"], entry["seed"]),
        factor=factor,
        **(_clip if len(picture) > 1 else _pictures)(reference, picture, difference),
    )


def _pictures(
    reference: list[Image.Image], picture: list[Image.Image], difference: Image.Image
) -> dict[str, str]:
    return {
        "reference": _shown(reference[0]),
        "picture": _shown(picture[0]),
        "difference": _uri(encode(_shrunk(difference, _SIDE), "WEBP", **_FOR_THE_EYE)),
    }


def _shown(picture: Image.Image) -> str:
    """Return a picture exactly, or one that is shrunk, which is exact no more, in a file that is small, too."""
    quality = _EXACT if max(picture.size) <= _SIDE else _FOR_THE_EYE
    return _uri(encode(_shrunk(picture, _SIDE), "WEBP", **quality))


def _clip(
    reference: list[Image.Image], picture: list[Image.Image], difference: Image.Image
) -> dict[str, str]:
    width, height = picture[0].size
    differences = [difference.crop((0, i * height, width, (i + 1) * height)) for i in range(len(picture))]
    shown = []
    for panels in zip(reference, picture, differences, strict=True):
        panels = [_shrunk(panel, _CLIP_SIDE) for panel in panels]
        width, height = panels[0].size
        row = Image.new("RGB", (3 * width + 2 * _GAP, height), _PAPER)
        for i, panel in enumerate(panels):
            row.paste(panel, (i * (width + _GAP), 0))
        shown.append(row)
    return {"clip": _uri(animation(shown, quality=80))}


def _strip(frames: list[Image.Image]) -> Image.Image:
    """Put frames below each other."""
    return Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames]))


def _size(frames: list[Image.Image]) -> str:
    of_frames = f", {len(frames)} frames" if len(frames) > 1 else ""
    return f"{frames[0].width} × {frames[0].height} pixels{of_frames}"


def _read(folder: Path, name: str) -> list[Image.Image]:
    """Read the frames of a picture file, one or more."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of the run folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, one of the evaluation's worst pictures")
    try:
        with Image.open(path) as picture:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no picture, or a broken one: {error}") from None


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()
