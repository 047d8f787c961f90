"""An evaluation as `dma-diffusers eval` writes it, made up, with pictures from the demo's contact sheet."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.pipelines.load import DEMO_MODEL

PROMPTS, SEEDS, STEPS = 24, 2, 24
SIDE = 80  # pixels: files of lossless WebP take their time
NASTY = """<script>alert(1)</script> "x" & 'y' {{ 7 * 7 }}"""
_METRICS = {
    "psnr_db": {"title": "PSNR, dB", "better": "higher", "digits": 2},
    "ssim": {"title": "SSIM", "better": "higher", "digits": 4},
    "lpips": {"title": "LPIPS", "better": "lower", "digits": 4},
    "latents_relative_l2": {"title": "Latents, relative L2", "better": "lower", "digits": 4},
    "fid": {"title": "FID", "better": "lower", "digits": 2},
    "kid": {"title": "KID × 1,000", "better": "lower", "digits": 3},
    "clip_score": {"title": "CLIPScore", "better": "higher", "digits": 2},
    "alignment": {"title": "Alignment (nobody has it)", "better": "higher", "digits": 4},
}
# Damage done to a picture, and seconds for one.
_ROWS = {
    "full precision": ("baseline", 0.0, 0.0521),
    "noise floor": ("noise floor", 0.002, 0.0518),
    "all MXFP8": ("configuration", 0.011, 0.0497),
    "all INT8": ("configuration", 0.016, 0.0433),
    "DMA, window 640": ("configuration", 0.012, 0.0471),
    "DMA, window 128": ("configuration", 0.035, 0.0442),
    "all NVFP4": ("configuration", 0.048, 0.0428),
    "all MXFP4": ("configuration", 0.074, 0.0421),
}
_MODULES = [f"transformer_blocks.{i}.attn" for i in range(4)] + [
    f"single_transformer_blocks.{i}.attn" for i in range(8)
]


def evaluation() -> dict:
    """The contents of evaluation.json, to be edited at will."""
    return deepcopy(_evaluation())


@cache
def _evaluation() -> dict:
    random = np.random.default_rng(0)
    texts = [f"{i} green foxes left of a big lemon on a white background" for i in range(PROMPTS)]
    texts[3] = NASTY
    categories = ["one thing", "two things", "three things", "tints", "corners", "counts"]
    rows = {name: _row(name, *what, random) for name, what in _ROWS.items()}
    chosen = [name for name, (role, *_) in _ROWS.items() if role == "configuration"]
    layers = {
        name: [
            [
                _ROWS[name][1] * 1.5 * (1 + i / 4) * np.exp(random.normal(0, 0.3) - step / 20)
                for step in range(0, STEPS, 4)
            ]
            for i in range(len(_MODULES))
        ]
        for name in chosen
    }
    return {
        "command": "dma-diffusers eval --seeds 2 --config preset=b200 -o out/<run>",
        "created": "2026-11-21T20:00:00Z",
        "settings": {
            "model": "demo",
            "pipeline": "FluxPipeline",
            "prompts": PROMPTS,
            "seeds": SEEDS,
            "call": {"num_inference_steps": STEPS, "guidance_scale": 3.0},
            "seed": 0,
            "batch": 32,
            "stepped": 8,
        },
        "versions": {"python": "3.12.3", "torch": "2.11.0", "diffusers": "0.42.0"},
        "hardware": "NVIDIA H200",
        "sources": {"dma_diffusers": "ab" * 32, "kernels": "cd" * 32},
        "prompts": [{"text": text, "category": categories[i % 6]} for i, text in enumerate(texts)],
        "notes": [f"FID over {PROMPTS * SEEDS} pictures, fewer than 2,000: it is biased upwards, KID leads."],
        "metrics": _METRICS,
        "rows": rows,
        "layers": {
            "prompts": 2,
            "modules": _MODULES,
            "steps": list(range(0, STEPS, 4)),
            "relative_l2": layers,
        },
        "worst": [
            {
                "row": chosen[-1 - i % 3],
                "prompt": 3 if i == 1 else i,
                "seed": i % SEEDS,
                "metric": "lpips",
                "value": 0.31 - 0.017 * i,
                "pictures": {"full precision": f"worst/{i}-baseline.png", "row": f"worst/{i}-row.png"},
            }
            for i in range(10)
        ],
    }


def write(folder: Path, contents: dict) -> None:
    """Lay out the run folder of an evaluation: evaluation.json and ten pairs of pictures."""
    (folder / "worst").mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(contents))
    sheet = Image.open(DEMO_MODEL.parent / "contact_sheet.webp").convert("RGB")
    for i in range(10):
        left, top = 56 + 184 * (i % 8), 56 + 230 * (i // 8)  # amid a picture of 176²
        picture = sheet.crop((left, top, left + SIDE, top + SIDE))
        picture.save(folder / "worst" / f"{i}-baseline.png")
        picture.filter(ImageFilter.GaussianBlur(0.5 + i / 8)).save(folder / "worst" / f"{i}-row.png")


def _row(name: str, role: str, damage: float, seconds: float, random: np.random.Generator) -> dict:
    spread = np.exp(random.normal(0, 0.4, (PROMPTS, SEEDS)))
    exact = role == "baseline"
    values = {
        "psnr_db": [None] * spread.size if exact else (20 - 20 * np.log10(damage * spread)).ravel().tolist(),
        "ssim": (1 - damage * spread / 2).ravel().tolist(),
        "lpips": (damage * spread).ravel().tolist(),
        "latents_relative_l2": (3 * damage * spread).ravel().tolist(),
        "clip_score": (31 - 4 * damage + random.normal(0, 1, spread.shape)).ravel().tolist(),
    }
    summary = {metric: _figure(series) for metric, series in values.items()}
    if not exact:
        fid = 190 * damage
        summary["fid"] = {"estimate": fid, "low": 0.9 * fid, "high": 1.12 * fid, "n": PROMPTS * SEEDS}
        summary["kid"] = {
            "estimate": 20 * damage - 0.1,
            "low": 18 * damage - 0.3,
            "high": 22 * damage,
            "n": PROMPTS * SEEDS,
        }
    config = {"high": "mxfp8", "low": "mxfp4", "window": 128, "dense_layers": [], "dense_above_sigma": None}
    modules = [
        {
            "module": module,
            "lowering": "faithful",
            "high": "mxfp8",
            "low": "mxfp4",
            "policy": "diagonal",
            "reason": "sm_90 has no block-scaled MMA",
            "intercepted": 1536,
            "fallbacks": {},
            "architecture": "sm_90",
            "inexact_rows": 0,
        }
        for module in _MODULES
    ]
    return {
        "role": role,
        "config": config if role == "configuration" else None,
        "label": name,
        "seconds_per_picture": seconds,
        "summary": summary,
        "pictures": values,
        "steps": [
            damage * (0.3 + 2 * np.exp(-step / 5)) * np.exp(random.normal(0, 0.05)) for step in range(STEPS)
        ],
        "receipt": {"modules": modules} if role == "configuration" else None,
    }


def _figure(series: list[float | None]) -> dict:
    if None in series:
        return {"estimate": None, "low": None, "high": None, "n": len(series)}
    interval = bootstrap([np.reshape(series, (PROMPTS, SEEDS)).mean(axis=1)])
    return interval._asdict() | {"n": len(series)}
