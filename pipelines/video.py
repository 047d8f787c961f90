"""Prepare calls of video pipelines, and check the frames, sizes and rates that each pipeline can take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from dma_diffusers.components import transformers_of
from dma_diffusers.lengths import frames_per_latent, pixels_per_latent
from dma_diffusers.pipelines.load import arguments, outline, recommended_call
from dma_diffusers.pipelines.reading import UNREADABLE, UnknownRange, to_rgb

_SIDE_MULTIPLE = 16  # sides are multiples of this in all of Diffusers' video pipelines
# The calls of these families take no frame rate. Their authors show clips at so many frames per second; others get 24.
_FAMILY_FPS = {"Wan": 16, "CogVideoX": 8, "Mochi": 30, "Cosmos": 16, "Allegro": 15}


@dataclass(frozen=True)
class ClipCall:
    """A call that a video pipeline can take.

    arguments: keyword arguments of the call, without prompt and seed.
    size: (width, height) of the clip in pixels, or None if the pipeline decides it during the call.
    fps: frames per second.
    """

    arguments: dict[str, Any]
    size: tuple[int, int] | None
    fps: float


def clip_call(
    model: str | Path,
    *,
    steps: int | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    fps: float | None = None,
    image: Image.Image | None = None,
) -> ClipCall:
    """Prepare the call of a model that passes `check_model(model, video=True, image=…)`; no weights are loaded.

    An argument of None stands for what the model's folder recommends, or else for the pipeline's default.

    Args:
        model: a local folder or hub id.
        size: (width, height) in pixels.
        fps: frames per second.
        image: the first frame; it is cropped around its middle to the clip's shape.

    Raises ValueError for frames or sides that the pipeline would round or refuse, and names the nearest valid ones.
    """
    pipe = outline(model)
    known = arguments(type(pipe))
    width, height = size or (None, None)
    asked = {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
    asked = {name: value for name, value in asked.items() if value is not None}
    if unknown := asked.keys() - known.keys():
        names = " and ".join(sorted(unknown))
        raise ValueError(f"{type(pipe).__name__} takes no {names}: leave that to the image")
    rate = next((name for name in ("frame_rate", "fps") if name in known), None)
    call = recommended_call(model) | asked | ({rate: fps} if rate and fps is not None else {})

    chosen = {name: parameter.default for name, parameter in known.items()} | call
    width, height = (chosen.get(name) or _default_side(pipe, name) for name in ("width", "height"))
    size = (width, height) if "height" in known and width and height else None
    if size:
        _check_size(pipe, size)
        call |= {"width": width, "height": height}
    if chosen["num_frames"]:
        _check_frames(pipe, chosen["num_frames"])
    if image is not None:
        call["image"] = ImageOps.fit(image, size) if size else image
    if fps is None:
        fps = chosen[rate] if rate else _family_fps(pipe)
    return ClipCall(call, size, fps)


def read_image(path: Path) -> Image.Image:
    """Read a picture to start a clip from: upright, in RGB, over white where it is transparent.

    Raises a one-line OSError if it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return to_rgb(ImageOps.exif_transpose(picture))
    except UnknownRange as error:
        raise OSError(f"cannot read {path}: {error}") from error
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "it holds no picture that Pillow can read"
        raise OSError(f"cannot read {path}: {reason}") from error


def _check_frames(pipe: DiffusionPipeline, frames: int) -> None:
    name = type(pipe).__name__
    stride = frames_per_latent(pipe)
    if name.startswith("CogVideoX"):
        stride *= 2  # its VAE draws 4 frames too many for an even number of latent frames
    if name.startswith("Allegro"):
        return  # it draws 4·k frames, and takes any number
    below = (frames - 1) // stride * stride + 1
    if frames != below:
        nearest = f"{below} or {below + stride}"
        raise ValueError(f"{name} draws {stride}·k + 1 frames, not {frames}: take {nearest}")


def _config(pipe: DiffusionPipeline) -> Mapping[str, Any]:
    """The configuration of a pipeline's first transformer."""
    (_, transformer), *_ = transformers_of(pipe)
    return cast(Mapping[str, Any], transformer.config)


def _check_size(pipe: DiffusionPipeline, size: tuple[int, int]) -> None:
    patch = _config(pipe).get("patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[-1]
    multiple = math.lcm(pixels_per_latent(pipe) * patch, _SIDE_MULTIPLE)
    if any(side % multiple for side in size):
        near = "x".join(str(max(round(side / multiple), 1) * multiple) for side in size)
        raise ValueError(
            f"{type(pipe).__name__} draws sides that are multiples of {multiple}, not {size[0]}x{size[1]}: "
            f"take {near}"
        )


def _default_side(pipe: DiffusionPipeline, name: str) -> int | None:
    """Return the default side of a pipeline whose signature has None for it, if it is known before the call."""
    latent = _config(pipe).get(f"sample_{name}")
    return latent * pixels_per_latent(pipe) if latent else getattr(pipe, f"default_{name}", None)


def _family_fps(pipe: DiffusionPipeline) -> float:
    name = type(pipe).__name__
    return next((rate for family, rate in _FAMILY_FPS.items() if name.startswith(family)), 24)
