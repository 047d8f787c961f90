"""Clip files: H.264 in .mp4 by PyAV, .webp and .gif by Pillow."""

import importlib.util
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = {".mp4": "mp4", ".webp": "webp", ".gif": "gif"}
_RATES = 0.1, 1000  # frames per second: beyond, files' counters of time round or overflow
_CRF = 16  # of H.264, from 0, lossless, to 51
# Milliseconds: the unit in which Pillow's formats say how long a frame stays, and the shortest stay that browsers
# honour; what is shorter, they show for 100.
_UNIT, _SHORTEST = {"webp": 1, "gif": 10}, {"webp": 11, "gif": 20}


def clip_format(path: Path) -> str:
    """What `encode_clip` calls the format of `path`; ValueError where nothing here can write it."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(
            f"cannot write {path}: {path.suffix or 'no extension'} is no clip format; there are {', '.join(KINDS)}"
        )
    if kind == "mp4" and importlib.util.find_spec("av") is None:
        raise ValueError(
            f"cannot write {path}: .mp4 needs PyAV (pip install 'dma-diffusers[demo]'); .webp and .gif don't"
        )
    return kind


def check_clip(kind: str, size: tuple[int, int] | None, fps: float) -> None:
    """ValueError unless a clip of this size and rate in frames per second can be encoded as `kind`.

    size: width and height in pixels; None while they are not known.
    .mp4 needs even sides: its chroma has half the resolution, and nothing is padded or cut here.
    """
    least, most = _RATES
    if not least <= fps <= most:
        raise ValueError(f"a clip needs {least:g} to {most:g} frames per second, got {fps:g}")
    if kind == "mp4" and size and any(side % 2 for side in size):
        raise ValueError(f".mp4 needs even sides, got {size[0]}x{size[1]}; .webp and .gif take any")
    if kind != "mp4" and fps > (most := 1000 // _SHORTEST[kind]):
        raise ValueError(f"a .{kind} holds at most {most} frames per second, got {fps:g}; .mp4 takes more")


def encode_clip(frames: np.ndarray, fps: float, kind: str) -> bytes:
    """The bytes of a clip file.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB.
        fps: frames per second. Frames of a .webp last whole milliseconds, of a .gif hundredths of a second: where
            that is not 1/fps they differ by one unit, so that each is shown at its time, rounded.
        kind: as `clip_format` says: "mp4" (H.264, yuv420p, BT.709, its index in front), "webp" or "gif". A .gif merges
            frames that equal the one before into a longer one.

    Raises ValueError for what `check_clip` refuses.
    """
    count, height, width, _ = frames.shape
    check_clip(kind, (width, height), fps)
    if kind == "mp4":
        return _h264(frames, fps)
    unit = _UNIT[kind]
    times = [round(i * 1000 / (fps * unit)) * unit for i in range(count + 1)]
    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    durations = np.diff(times).tolist()
    first.save(buffer, kind, save_all=True, append_images=others, duration=durations, loop=0, quality=90)
    return buffer.getvalue()


def _h264(frames: np.ndarray, fps: float) -> bytes:
    import av

    buffer = io.BytesIO()
    # To put the index in front, the muxer reads again what it has written.
    reopened: dict[str, Any] = {"io_open": lambda *_: io.BytesIO(buffer.getvalue())}
    with av.open(buffer, "w", format="mp4", options={"movflags": "faststart"}, **reopened) as file:
        stream = file.add_stream("libx264", Fraction(fps).limit_denominator(1001), options={"crf": str(_CRF)})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        codec = stream.codec_context
        # Matrix, primaries and transfer of BT.709, and its narrow range, as H.264 counts them: all are 1.
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for values in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
            file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode(None))
    return buffer.getvalue()
