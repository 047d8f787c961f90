"""Full precision and DMA side by side: the picture and the figures of `generate --compare`."""

import math

import torch
from PIL.Image import Image

from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.pipelines.generate import Drawing
from dma_diffusers.pipelines.picture import amplified_difference, side_by_side


def compare(
    exact: Drawing, drawing: Drawing, prompt: str, label: str
) -> tuple[Image, dict[str, float | None]]:
    """The first picture of each drawing with their amplified difference, and the paired metrics.

    Args:
        label: what the second drawing was made with, for its caption.
    """
    metrics = {name: values[0] for name, values in paired_metrics(drawing, exact).items()}
    difference, factor = amplified_difference(drawing.pictures[0], exact.pictures[0])
    psnr = "identical" if metrics["psnr_db"] is None else f"PSNR {metrics['psnr_db']:.1f} dB"
    captions = (
        ("full precision", prompt),
        (label, f"{psnr}, SSIM {metrics['ssim']:.3f}"),
        ("difference", f"{factor} times amplified"),
    )
    return side_by_side([exact.pictures[0], drawing.pictures[0], difference], captions), metrics


def paired_metrics(drawing: Drawing, reference: Drawing) -> dict[str, list[float | None]]:
    """Three metrics of two drawings of the same prompts and seeds, one value per prompt; of videos, the first frames'.

    Identical pictures have an infinite PSNR, which JSON cannot hold: it is None here.
    """
    pictures, references = (
        torch.from_numpy(each.frames[:, 0]).permute(0, 3, 1, 2) for each in (drawing, reference)
    )
    return {
        "psnr_db": [
            value if math.isfinite(value) else None for value in psnr_db(pictures, references).tolist()
        ],
        "ssim": ssim(pictures, references).tolist(),
        "latents_relative_l2": relative_l2(drawing.latents, reference.latents).tolist(),
    }
