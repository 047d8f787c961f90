"""The metrics of videos are paired metrics of each frame, their values over several frames, and flicker."""

from collections.abc import Callable

import torch

_PIXELS = 2**21  # so many are measured at once: SSIM takes some 500 bytes for each


def each_frame(
    metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    videos: torch.Tensor,
    references: torch.Tensor,
) -> torch.Tensor:
    """Compute a paired metric of pictures (`psnr_db`, `ssim`, LPIPS...) of every frame, `[B, F]` float64.

    However long a video is, only so many frames are measured at once as have two million pixels.

    Args:
        metric: takes two uint8 `[n, 3, H, W]`, gives `[n]`.
        videos: uint8 `[B, F, 3, H, W]`.
        references: the same shape; each frame is compared with the one of `videos`.
    """
    _check(videos, references)
    at_once = max(_PIXELS // (videos.shape[3] * videos.shape[4]), 1)
    pairs = zip(*(frames.flatten(0, 1).split(at_once) for frames in (videos, references)), strict=True)
    return torch.cat([metric(*pair).double() for pair in pairs]).unflatten(0, videos.shape[:2])


def pooled_psnr_db(psnr: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the PSNR of the mean of the squared errors over `dim`, from each one's PSNR in dB, float64.

    A video's is the PSNR of all its pixels: infinite only where every frame is identical to its reference, whereas a
    mean of dB would be infinite as soon as one is. One frame's is its own.
    """
    return -10 * torch.log10((10 ** (-psnr.double() / 10)).mean(dim))


def flicker(videos: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Measure a video's flicker as the mean of `flicker_of_frames`, `[B]` float32; the arguments are the same."""
    return flicker_of_frames(videos, references).mean(1)


def flicker_of_frames(videos: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Measure the change from each frame to the next that the reference has not, in steps of 0 to 255.

    It is `[B, F - 1]` float32: the mean over pixels and channels of |(x[t+1] − x[t]) − (y[t+1] − y[t])| for a video x
    and its reference y. It is 0 for a video that differs from its reference by the same picture in every frame: what
    stands still does not flicker. VBench's temporal flickering (https://arxiv.org/abs/2311.17982) is 1 − mean
    |x[t+1] − x[t]| / 255 over static scenes alone, where all change is a fault; here the reference says which change
    is due, so that moving scenes can be measured as well.

    Args:
        videos: uint8 `[B, F, 3, H, W]`, F at least 2.
        references: the same shape.
    """
    _check(videos, references)
    found = []
    for t in range(_steps(videos)):  # it goes frame by frame, because long videos are large in float32
        errors = (videos[:, t : t + 2].float() - references[:, t : t + 2].float()).diff(dim=1)
        found.append(errors.abs().mean((1, 2, 3, 4)))
    return torch.stack(found, 1)


def _check(videos: torch.Tensor, references: torch.Tensor) -> None:
    if videos.shape != references.shape:
        raise ValueError(f"videos are {list(videos.shape)}, their references {list(references.shape)}")


def _steps(videos: torch.Tensor) -> int:
    if videos.shape[1] < 2:
        raise ValueError("one frame does not flicker: two or more are needed")
    return videos.shape[1] - 1
