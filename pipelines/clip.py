"""Write clip files: PyAV writes H.264 in .mp4, Pillow writes .webp and .gif."""

import importlib.util
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = {".mp4": "mp4", ".webp": "webp", ".gif": "gif"}
_FPS_RANGE = 0.1, 1000  # beyond these frame rates, the time counters in the files round or overflow
_CRF = 16  # the quality of H.264 goes from 0 (lossless) to 51
# Both are in milliseconds. Pillow's formats store how long a frame stays in this unit. Browsers honour no shorter
# frame than this: they show a shorter one for 100 ms.
_TIME_UNIT, _SHORTEST_FRAME = {"webp": 1, "gif": 10}, {"webp": 11, "gif": 20}


def clip_format(path: Path) -> str:
    """Return the name that `encode_clip` has for the format of `path`.

    Raises ValueError for an extension that cannot be written here.
    """
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
    """Check that a clip of this size and frame rate can be encoded as `kind`.

    .mp4 needs even sides, because its chroma has half the resolution, and nothing is padded or cut here.

    Args:
        kind: a format of `clip_format`.
        size: (width, height) in pixels, or None while it is not known.
        fps: frames per second.

    Raises ValueError if it cannot.
    """
    least, most = _FPS_RANGE
    if not least <= fps <= most:
        raise ValueError(f"a clip needs {least:g} to {most:g} frames per second, got {fps:g}")
    if kind == "mp4" and size and any(side % 2 for side in size):
        raise ValueError(f".mp4 needs even sides, got {size[0]}x{size[1]}; .webp and .gif take any")
    if kind != "mp4" and fps > (most := 1000 // _SHORTEST_FRAME[kind]):
        raise ValueError(f"a .{kind} holds at most {most} frames per second, got {fps:g}; .mp4 takes more")


def encode_clip(frames: np.ndarray, fps: float, kind: str) -> bytes:
    """Return the bytes of a clip file.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB.
        fps: frames per second. A frame of a .webp lasts whole milliseconds, one of a .gif whole hundredths of a
            second. If 1/fps is no multiple of that unit, durations differ by one unit, so that each frame starts at
            its time, rounded.
        kind: a format of `clip_format`: "mp4" (H.264, yuv420p, BT.709, with its index in front), "webp" or "gif". A
            .gif merges a frame that equals the one before it into one longer frame.

    Raises ValueError where `check_clip` does.
    """
    count, height, width, _ = frames.shape
    check_clip(kind, (width, height), fps)
    if kind == "mp4":
        return _h264(frames, fps)
    unit = _TIME_UNIT[kind]
    times = [round(i * 1000 / (fps * unit)) * unit for i in range(count + 1)]
    first, *others = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    durations = np.diff(times).tolist()
    first.save(buffer, kind, save_all=True, append_images=others, duration=durations, loop=0, quality=90)
    return buffer.getvalue()


def _h264(frames: np.ndarray, fps: float) -> bytes:
    import av

    buffer = io.BytesIO()
    # To put the index in front, the muxer reads its own output again.
    reopened: dict[str, Any] = {"io_open": lambda *_: io.BytesIO(buffer.getvalue())}
    with av.open(buffer, "w", format="mp4", options={"movflags": "faststart"}, **reopened) as file:
        stream = file.add_stream("libx264", Fraction(fps).limit_denominator(1001), options={"crf": str(_CRF)})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = frames.shape[1:3]
        codec = stream.codec_context
        # In H.264's numbering, the matrix, primaries and transfer of BT.709 and its narrow range are all 1.
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for values in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24")
            file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode(None))
    return buffer.getvalue()
