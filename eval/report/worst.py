"""The worst pictures of an evaluation, beside the baseline's, inside the page."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dma_diffusers.eval.report.columns import value_text
from dma_diffusers.eval.report.evaluation import baseline
from dma_diffusers.pipelines.picture import amplified_difference, encode

_SIDE = 512  # pixels; larger pictures are shrunk to keep the page small
_EXACT = {"lossless": True, "quality": 100, "method": 6}
_FOR_THE_EYE = {"quality": 90, "method": 6}  # a difference times 64 is nothing to read values from


class Worst(NamedTuple):
    """A picture, the baseline's of the same prompt and seed, and their difference times `factor`, as data URIs."""

    row: str
    prompt: str
    seed: int
    metric: str
    value: str
    reference: str
    picture: str
    difference: str
    factor: int


def worst(evaluation: dict[str, Any], folder: Path) -> list[Worst]:
    """The evaluation's worst pictures, read from its run folder.

    Raises FileNotFoundError for a file that is missing, ValueError for one that holds no picture or one of
    another size than the baseline's.
    """
    return [_worst(evaluation, folder, entry) for entry in evaluation.get("worst") or ()]


def _worst(evaluation: dict[str, Any], folder: Path, entry: dict[str, Any]) -> Worst:
    reference, picture = (_read(folder, entry["pictures"][which]) for which in (baseline(evaluation), "row"))
    if picture.size != reference.size:
        sizes = (f"{image.width} × {image.height}" for image in (picture, reference))
        raise ValueError(
            "{} has {} pixels, the baseline's {}".format(folder / entry["pictures"]["row"], *sizes)
        )
    difference, factor = amplified_difference(picture, reference)
    about = evaluation["metrics"].get(entry["metric"], {"title": entry["metric"], "digits": 4})
    return Worst(
        row=entry["row"],
        prompt=evaluation["prompts"][entry["prompt"]]["text"],
        seed=entry["seed"],
        metric=about["title"],
        value=value_text(entry["value"], about["digits"]),
        reference=_uri(reference, _EXACT),
        picture=_uri(picture, _EXACT),
        difference=_uri(difference, _FOR_THE_EYE),
        factor=factor,
    )


def _read(folder: Path, name: str) -> Image.Image:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of the run folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, one of the evaluation's worst pictures")
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is no picture, or a broken one: {error}") from None


def _uri(picture: Image.Image, options: dict[str, Any]) -> str:
    if max(picture.size) > _SIDE:
        picture = picture.copy()
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return "data:image/webp;base64," + base64.b64encode(encode(picture, "WEBP", **options)).decode()
