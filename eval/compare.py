"""Full precision and DMA side by side: the picture that `generate --compare` writes."""

from PIL.Image import Image

from dma_diffusers.eval.metrics.paired import paired_metrics
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
