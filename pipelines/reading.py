"""Turn pictures of any depth, opaque or not, into RGB in 8 bits."""

import numpy as np
from PIL import Image

PAPER = (255, 255, 255)  # what shows through where a picture is transparent

# Pillow raises these for files that it cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnknownRange(ValueError):
    """The numbers of a picture do not tell which of them is white."""


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB, 8 bits a channel, over white where it is transparent.

    16 bits become the nearest of 8 bits, floats from 0 to 1 the nearest of 256 levels; Pillow alone would clip both.
    Raises `UnknownRange` for other floats, and for integers of 32 bits.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return _grey(np.asarray(picture, np.float64) / 65535)
    if picture.mode == "I":
        raise UnknownRange("it has integers of 32 bits: save it with 8 or 16 bits a channel")
    if picture.mode == "F":
        values = np.asarray(picture, np.float64)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise UnknownRange(f"its numbers go from {low:.4g} to {high:.4g}: floats have to be from 0 to 1")
        return _grey(values)
    if "transparency" in picture.info or picture.mode.endswith(("A", "a")):
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, PAPER), layer).convert("RGB")
    return picture.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """Return a grey picture of numbers from 0 to 1."""
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
