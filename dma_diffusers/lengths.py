"""The tokens of a pipeline's pictures and videos, told from their sizes before anything is drawn."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

import torch

# Pipelines use one of these names for the number of frames, or of pixels along a side, that make one latent.
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_SPATIAL = (
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
    "vae_scale_factor",
)


def pixels_per_latent(pipe: Any) -> int:
    """Returns how many pixels along a side make one latent. Raises ValueError for a pipeline that doesn't tell."""
    return _attribute(pipe, _SPATIAL, "pixels")


def frames_per_latent(pipe: Any) -> int:
    """Returns how many frames make one latent. Raises ValueError for a pipeline that doesn't tell."""
    return _attribute(pipe, _TEMPORAL, "frames")


def grid_of(pipe: Any, model: torch.nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the rows and columns of tokens of a picture, or the frames, rows and columns of a video.

    model: the pipeline's transformer. size: (width, height) in pixels, or (width, height, frames); a video of which no
    frames are given has as many as the pipeline draws by default.
    Raises ValueError for a pipeline that does not tell, and for frames of a pipeline that draws pictures.
    """
    config = cast(Mapping[str, Any], model.config)
    patch = next((config[name] for name in ("patch_size", "all_patch_size") if config.get(name)), 1)
    patch_t, side = (1, patch) if isinstance(patch, int) else (patch[0] if len(patch) == 3 else 1, patch[-1])
    patch_t = config.get("patch_size_t") or patch_t
    # Processors of pictures round sizes to whole tokens where the pipeline, and not the model, makes patches.
    processor = getattr(getattr(pipe, "image_processor", None), "config", {})
    pixels = max(pixels_per_latent(pipe) * side, processor.get("vae_scale_factor", 1))
    width, height, *frames = size
    rows, columns = height // pixels, width // pixels
    known = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" not in known:
        if frames:
            raise ValueError(
                f"{type(pipe).__name__} draws pictures: give width and height, not {_words(size)}"
            )
        is_video = "patch_size_t" in config or (not isinstance(patch, int) and len(patch) == 3)
        return (1, rows, columns) if is_video else (rows, columns)
    count = frames[0] if frames else known["num_frames"].default
    if not count:
        raise ValueError(
            f"{type(pipe).__name__} has no number of frames by default: give width, height and frames"
        )
    return (math.ceil(((count - 1) // frames_per_latent(pipe) + 1) / patch_t), rows, columns)


def text_length_of(pipe: Any) -> int:
    """Returns the most text tokens that the pipeline gives its transformer. Raises ValueError if it doesn't tell."""
    longest = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    length = longest.default if longest else getattr(pipe, "tokenizer_max_length", None)
    if not isinstance(length, int):
        raise ValueError(
            f"{type(pipe).__name__} does not tell how many text tokens it has: say so, with text="
        )
    return length


def _attribute(pipe: Any, names: tuple[str, ...], what: str) -> int:
    found = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), None)
    if found is None:
        raise ValueError(
            f"{type(pipe).__name__} does not tell how many {what} make a latent: give the number of tokens instead"
        )
    return found


def _words(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
