"""This module compares full precision with DMA: the panels and the figures of `generate --compare`."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.eval.metrics.video import each_frame, flicker, pooled_psnr_db
from dma_diffusers.pipelines.comparison import clips_side_by_side
from dma_diffusers.pipelines.generate import Drawing
from dma_diffusers.pipelines.picture import amplified, side_by_side


def compare(
    exact: Drawing, drawing: Drawing, prompt: str, label: str
) -> tuple[Image.Image, dict[str, float | None]]:
    """Return the first picture of each drawing beside their amplified difference, and the paired metrics.

    Args:
        label: what the second drawing was made with, for its caption.
    """
    metrics = {name: values[0] for name, values in paired_metrics(drawing, exact).items()}
    panels, captions = _panels(exact, drawing, prompt, label, _figures(metrics["psnr_db"], metrics["ssim"]))
    return side_by_side([Image.fromarray(panel[0]) for panel in panels], captions), metrics


def compare_clips(
    exact: Drawing, drawing: Drawing, prompt: str, label: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the first clip of each drawing with their difference and PSNR over time, and the paired metrics.

    The frames are uint8 `[F, H, W, 3]`. To the metrics come those of videos: flicker (None of a single frame), each
    frame's PSNR, which is None where it is identical, and the frame that is worst, counted from 1 (None where all are
    identical).
    """
    metrics: dict[str, Any] = {name: values[0] for name, values in paired_metrics(drawing, exact).items()}
    clip, reference = (_channels_first(each)[:1] for each in (drawing, exact))
    psnr = each_frame(psnr_db, clip, reference)[0]
    metrics |= {
        "flicker": flicker(clip, reference).item() if len(psnr) > 1 else None,
        "frames_psnr_db": [_finite(value) for value in psnr.tolist()],
        "worst_frame": psnr.argmin().item() + 1 if psnr.isfinite().any() else None,
    }
    figures = _figures(metrics["psnr_db"], metrics["ssim"])
    panels, captions = _panels(exact, drawing, prompt, label, figures)
    return clips_side_by_side(panels, captions, metrics["frames_psnr_db"]), metrics


def in_words(metrics: dict[str, Any]) -> str:
    """Put the figures of `compare` or `compare_clips` in one line."""
    words = "identical pictures" if metrics["psnr_db"] is None else f"PSNR {metrics['psnr_db']:.2f} dB"
    words += f", SSIM {metrics['ssim']:.4f}, relative L2 of latents {metrics['latents_relative_l2']:.4f}"
    if metrics.get("flicker") is not None:
        words += f", flicker {metrics['flicker']:.2f} of 255"
    if worst := metrics.get("worst_frame"):
        frames = metrics["frames_psnr_db"]
        words += f"; worst is frame {worst} of {len(frames)}, {frames[worst - 1]:.2f} dB"
    return words


def paired_metrics(drawing: Drawing, reference: Drawing) -> dict[str, list[float | None]]:
    """Compute three metrics of two drawings of the same prompts and seeds, one value per prompt.

    A clip's PSNR is that of all its pixels, its SSIM the mean over frames. An identical drawing has an infinite PSNR,
    which JSON cannot hold: it is None here.
    """
    clips, references = _channels_first(drawing), _channels_first(reference)
    psnr = pooled_psnr_db(each_frame(psnr_db, clips, references), dim=1)
    return {
        "psnr_db": [_finite(value) for value in psnr.tolist()],
        "ssim": each_frame(ssim, clips, references).mean(1).tolist(),
        "latents_relative_l2": relative_l2(drawing.latents, reference.latents).tolist(),
    }


def _panels(
    exact: Drawing, drawing: Drawing, prompt: str, label: str, figures: str
) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Return the panels full precision, DMA and difference, uint8 `[F, H, W, 3]` each, and their captions."""
    difference, factor = amplified(drawing.frames[0], exact.frames[0])
    captions = [("full precision", prompt), (label, figures), ("difference", f"{factor} times amplified")]
    return [exact.frames[0], drawing.frames[0], difference], captions


def _figures(psnr: float | None, ssim: float) -> str:
    return f"{'identical' if psnr is None else f'PSNR {psnr:.1f} dB'}, SSIM {ssim:.3f}"


def _channels_first(drawing: Drawing) -> torch.Tensor:
    """Return the frames as `[prompts, F, 3, height, width]`."""
    return torch.from_numpy(drawing.frames).permute(0, 1, 4, 2, 3)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
