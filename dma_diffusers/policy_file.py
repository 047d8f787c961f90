"""Policy files: for each quality of a ladder, the formats and policies that `calibrate` chose for a model.

    {"format": "dma-diffusers policy", "version": 1, "quality": .7,
     "model": {"class": "FluxTransformer2DModel", "modules": ["transformer_blocks.0.attn", …], "fingerprint": "…"},
     "choices": [{"quality": 0, "config": {fields of DMAConfig},
                  "modules": {"transformer_blocks.0.attn": {"window": [128, 384, 0, 128]},
                              "transformer_blocks.1.attn": {"schedule": "sigma>0.9: dense(); …"}, …},
                  "evidence": {what it costs and errs}}, …],
     "evidence": {what it was chosen from, and for}}

`config` may have `linears`: a file of linear layers (`linears.files`) in the policy file's folder, a method, or the
recipe by which `finetune` trained them. `modules` has only those that differ from `config`, and of them the fields
that do (`config.MODULE_FIELDS`). Either may have a `schedule`.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from dma_diffusers.linears.methods import is_file

FORMAT, VERSION = "dma-diffusers policy", 1


def check_quality(quality: Any) -> None:
    """Raises ValueError unless `quality` is a number from 0 to 1."""
    if isinstance(quality, bool) or not isinstance(quality, int | float) or not 0 <= quality <= 1:
        raise ValueError(f"quality must be a number from 0 (cheapest) to 1 (most precise), got {quality!r}")


def read_choice(path: str | PathLike[str], quality: float | None = None) -> dict[str, Any]:
    """Fields of `DMAConfig`: the file's choice at or above `quality`, None for the quality that it was made for.

    Raises OSError where the file cannot be read, ValueError for another kind of file, or a quality that it has not.
    """
    if quality is not None:
        check_quality(quality)
    document = _read(Path(path))
    try:
        wanted = document["quality"] if quality is None else quality
        names, kind = document["model"]["modules"], document["model"]["class"]
        weights = document["model"].get("fingerprint")
        choices = sorted(document["choices"], key=lambda choice: choice["quality"])
        choice = next((choice for choice in choices if choice["quality"] >= wanted), None)
        if choice:
            modules = {name: dict(choice["modules"].get(name, {})) for name in names} | choice["modules"]
            config = dict(choice["config"])
            if config.get("linears") and is_file(config["linears"]):
                config["linears"] = str(Path(path).parent / config["linears"])
            return {**config, "modules": modules, "model": kind, "weights": weights}
        best = choices[-1]["quality"]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} ({error})") from None
    raise ValueError(f"{path} has no choice of quality {wanted} or more, its best is {best}: calibrate again")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no policy file {path}")
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is no policy file: `dma-diffusers calibrate` writes them")
    if document.get("version") != VERSION:
        raise ValueError(f"{path} has version {document.get('version')}, and only {VERSION} can be read")
    return document
