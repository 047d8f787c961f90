"""Test that PyAV and Pillow read the written clip files back correctly."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dma_diffusers.pipelines import clip
from dma_diffusers.pipelines.clip import clip_format, encode_clip

WIDTH, HEIGHT, FRAMES = 96, 64, 13


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Draw a green square that moves to the right over red, by four pixels per frame."""
    drawn = np.full((FRAMES, HEIGHT, WIDTH, 3), (200, 30, 60), np.uint8)
    for i, frame in enumerate(drawn):
        frame[16:48, 4 * i : 4 * i + 32] = (20, 220, 90)
    return drawn


def decoded(data: bytes, kind: str) -> tuple[np.ndarray, list[int]]:
    """Decode the frames of a clip file, uint8 `[F, H, W, 3]`, and the time in ms at which each is shown."""
    if kind == "mp4":
        with av.open(io.BytesIO(data)) as file:
            shown = [(frame.to_ndarray(format="rgb24"), round(frame.time * 1000)) for frame in file.decode()]
        return np.stack([pixels for pixels, _ in shown]), [time for _, time in shown]
    picture = Image.open(io.BytesIO(data))
    pixels, times = [], [0]
    for i in range(picture.n_frames):
        picture.seek(i)
        pixels.append(np.asarray(picture.convert("RGB")))
        times.append(times[-1] + picture.info["duration"])
    return np.stack(pixels), times[:-1]


@pytest.mark.parametrize("fps", [12, 23.976, 25])
@pytest.mark.parametrize(("kind", "unit"), [("mp4", 1), ("webp", 1), ("gif", 10)])
def test_frames_colours_and_times(frames, kind, unit, fps):
    pixels, times = decoded(encode_clip(frames, fps, kind), kind)
    assert pixels.shape == frames.shape
    # Chroma at half resolution blurs the square's edges.
    assert np.abs(pixels.astype(int) - frames).mean() < 4
    flat = np.abs(pixels[:, 28:36].astype(int) - frames[:, 28:36]).max(-1)
    assert np.median(flat) <= 4  # BT.601 instead of BT.709 would be 20 off
    assert times == pytest.approx([i * 1000 / fps for i in range(FRAMES)], abs=unit / 2 + 1e-9)


def test_a_file_larger_than_the_muxers_buffers():
    noise = np.random.default_rng(0).integers(0, 256, (12, 160, 240, 1)).repeat(3, 3)
    data = encode_clip(noise.astype(np.uint8), 8, "mp4")
    assert len(data) > 2**18
    assert data.index(b"moov") < data.index(b"mdat")  # with its index in front, it plays while it loads
    pixels, _ = decoded(data, "mp4")
    assert np.abs(pixels.astype(int) - noise).mean() < 6


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="no ffprobe")
def test_what_ffprobe_says(frames, tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(encode_clip(frames, 16, "mp4"))
    report = subprocess.run(
        ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", path],
        capture_output=True,
        check=True,
    )
    (stream,) = json.loads(report.stdout)["streams"]
    expected = {
        "codec_name": "h264", "pix_fmt": "yuv420p", "color_space": "bt709", "width": WIDTH, "height": HEIGHT,
        "avg_frame_rate": "16/1", "nb_read_frames": str(FRAMES),
    }  # fmt: skip
    assert stream | expected == stream


@pytest.mark.parametrize("kind", ["mp4", "webp", "gif"])
def test_one_frame_is_a_clip(frames, kind):
    pixels, _ = decoded(encode_clip(frames[:1], 8, kind), kind)
    assert pixels.shape == (1, HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("cut", "fps", "kind", "words"),
    [
        (1, 8, "mp4", r"^\.mp4 needs even sides, got 95x64; .*webp.*gif"),
        (0, 0, "webp", "0.1 to 1000 frames per second, got 0"),
        (0, 0.0001, "mp4", "0.1 to 1000 frames per second, got 0.0001"),
        (0, float("inf"), "mp4", "0.1 to 1000 frames per second, got inf"),
        (0, float("nan"), "gif", "0.1 to 1000 frames per second, got nan"),
        (0, 60, "gif", "at most 50 frames per second, got 60"),
        (0, 120, "webp", "at most 90 frames per second, got 120"),
    ],
)
def test_what_a_format_cannot_hold(frames, cut, fps, kind, words):
    with pytest.raises(ValueError, match=words):
        encode_clip(frames[:, :, cut:], fps, kind)


def test_odd_sides_elsewhere(frames):
    for kind in ("webp", "gif"):
        assert decoded(encode_clip(frames[:, 1:, 1:], 8, kind), kind)[0].shape[1:3] == (HEIGHT - 1, WIDTH - 1)


def test_formats_by_extension(monkeypatch):
    assert [clip_format(Path(f"out.{name}")) for name in ("mp4", "WEBP", "gif")] == ["mp4", "webp", "gif"]
    for name in ("out.mov", "out.png", "out"):
        with pytest.raises(ValueError, match=r"^cannot write out.*there are \.mp4, \.webp, \.gif$"):
            clip_format(Path(name))
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs PyAV \(pip install"):
        clip_format(Path("out.mp4"))
    assert clip_format(Path("out.gif")) == "gif"
