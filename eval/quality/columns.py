"""This module lists the metrics of an evaluation, in the order in which a table shows them."""

from typing import Any

COLUMNS: dict[str, dict[str, Any]] = {
    "psnr_db": {"title": "PSNR, dB", "better": "higher", "digits": 2},
    "ssim": {"title": "SSIM", "better": "higher", "digits": 4},
    "lpips": {"title": "LPIPS", "better": "lower", "digits": 4},
    "latents_relative_l2": {"title": "Latents, relative L2", "better": "lower", "digits": 4},
    "flicker": {"title": "Flicker, levels", "better": "lower", "digits": 3},
    "fid": {"title": "FID to full precision", "better": "lower", "digits": 2},
    "kid": {"title": "KID to full precision, × 1000", "better": "lower", "digits": 3},
    "fid_reference": {"title": "FID to the reference folder", "better": "lower", "digits": 2},
    "kid_reference": {"title": "KID to the reference folder, × 1000", "better": "lower", "digits": 3},
    "fvd": {"title": "FVD to full precision", "better": "lower", "digits": 2},
    "clip_score": {"title": "CLIPScore", "better": "higher", "digits": 2},
    "clip_iqa": {"title": "CLIP-IQA", "better": "higher", "digits": 4},
    "alignment": {"title": "Alignment score", "better": "higher", "digits": 2},
}
