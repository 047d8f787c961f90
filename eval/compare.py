"""Full precision and DMA side by side: the picture or clip, and the figures, of `generate --compare`."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.eval.metrics.video import flicker, mean_over_frames
from dma_diffusers.pipelines.comparison import clips_side_by_side
from dma_diffusers.pipelines.generate import Drawing
from dma_diffusers.pipelines.picture import amplified, side_by_side


def compare(
    exact: Drawing, drawing: Drawing, prompt: str, label: str
) -> tuple[Image.Image, dict[str, float | None]]:
    """The first picture of each drawing with their amplified difference, and the paired metrics.

    Args:
        label: what the second drawing was made with, for its caption.
    """
    metrics = {name: values[0] for name, values in paired_metrics(drawing, exact).items()}
    panels, captions = _panels(exact, drawing, prompt, label, _figures(metrics["psnr_db"], metrics["ssim"]))
    return side_by_side([Image.fromarray(panel[0]) for panel in panels], captions), metrics


def compare_clips(
    exact: Drawing, drawing: Drawing, prompt: str, label: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """The first clip of each drawing with their amplified difference and PSNR over time, uint8 `[F, H, W, 3]`.

    And the paired metrics, with those of videos: flicker (None of a single frame), each frame's PSNR, which is None
    where it is identical, and which frame is worst, counted from 1 (None where all are identical).
    """
    metrics: dict[str, Any] = {name: values[0] for name, values in paired_metrics(drawing, exact).items()}
    clip, reference = (_channels_first(each)[:1] for each in (drawing, exact))
    of_frames = [
        _finite(psnr_db(*pair).item()) for pair in zip(clip[0, :, None], reference[0, :, None], strict=True)
    ]
    differing = [i for i, value in enumerate(of_frames) if value is not None]
    metrics |= {
        "flicker": flicker(clip, reference).item() if len(of_frames) > 1 else None,
        "frames_psnr_db": of_frames,
        "worst_frame": min(differing, key=of_frames.__getitem__) + 1 if differing else None,
    }
    figures = _figures(_mean_of_differing(of_frames), metrics["ssim"])
    panels, captions = _panels(exact, drawing, prompt, label, figures)
    return clips_side_by_side(panels, captions, of_frames), metrics


def in_words(metrics: dict[str, Any]) -> str:
    """The figures of `compare` or `compare_clips`, in one line."""
    frames = metrics.get("frames_psnr_db", [metrics["psnr_db"]])
    mean, same = _mean_of_differing(frames), frames.count(None)
    words = "identical pictures" if mean is None else f"PSNR {mean:.2f} dB"
    if mean is not None and same:
        words += f" ({same} of {len(frames)} frames are identical and left out)"
    words += f", SSIM {metrics['ssim']:.4f}, relative L2 of latents {metrics['latents_relative_l2']:.4f}"
    if metrics.get("flicker") is not None:
        words += f", flicker {metrics['flicker']:.2f} of 255"
    if worst := metrics.get("worst_frame"):
        words += f"; worst is frame {worst} of {len(frames)}, {frames[worst - 1]:.2f} dB"
    return words


def paired_metrics(drawing: Drawing, reference: Drawing) -> dict[str, list[float | None]]:
    """Three metrics of two drawings of the same prompts and seeds, one value per prompt; of clips, means over frames.

    Identical pictures have an infinite PSNR, and so has a clip with one that is; JSON cannot hold it: it is None here.
    """
    clips, references = _channels_first(drawing), _channels_first(reference)
    return {
        "psnr_db": [_finite(value) for value in mean_over_frames(psnr_db, clips, references).tolist()],
        "ssim": mean_over_frames(ssim, clips, references).tolist(),
        "latents_relative_l2": relative_l2(drawing.latents, reference.latents).tolist(),
    }


def _panels(
    exact: Drawing, drawing: Drawing, prompt: str, label: str, figures: str
) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Full precision, DMA, difference: frames uint8 `[F, H, W, 3]` of each, and captions."""
    difference, factor = amplified(drawing.frames[0], exact.frames[0])
    captions = [("full precision", prompt), (label, figures), ("difference", f"{factor} times amplified")]
    return [exact.frames[0], drawing.frames[0], difference], captions


def _figures(psnr: float | None, ssim: float) -> str:
    return f"{'identical' if psnr is None else f'PSNR {psnr:.1f} dB'}, SSIM {ssim:.3f}"


def _channels_first(drawing: Drawing) -> torch.Tensor:
    """Frames `[prompts, F, 3, height, width]`."""
    return torch.from_numpy(drawing.frames).permute(0, 1, 4, 2, 3)


def _mean_of_differing(decibels: list[float | None]) -> float | None:
    finite = [value for value in decibels if value is not None]
    return sum(finite) / len(finite) if finite else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
