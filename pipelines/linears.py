"""Calibration of low-bit linear layers on prompts that are built in, for commands that are given no others."""

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DiffusionPipeline

from dma_diffusers.config import DMAConfig
from dma_diffusers.linears.calibration import STEPS
from dma_diffusers.linears.quantise import calibrate_linears, is_calibrated, restore_linears

PROMPTS = (
    "a portrait photo of an old fisherman in soft window light",
    "a red vintage car parked in a narrow street at night, neon signs, rain",
    "a bowl of fruit on a wooden table, oil painting",
    "an aerial view of snowy mountains at sunrise",
    "a cat walks over a meadow full of yellow flowers",
    'a shop sign that says "open"',
    "a blue circle and a green square on a white background",
    "a crowded market, many people, bright colours, wide shot",
)
"""Generic prompts. For other subjects, `calibrate_linears` takes one's own."""


def calibrate_where_needed(
    pipe: DiffusionPipeline,
    config: DMAConfig,
    call: Mapping[str, Any],
    on_step: Callable[[str, int, int], None],
) -> None:
    """Calibrates on `PROMPTS` if the configuration's linear layers need that and nobody has done it.

    Args:
        call: keyword arguments of the coming calls; calibration takes no more steps than `STEPS` of them.
    """
    if config.linears != "micromix" or is_calibrated(pipe):
        return
    restore_linears(pipe)
    steps = min(call.get("num_inference_steps", STEPS), STEPS)
    calibrate_linears(pipe, PROMPTS, call={**call, "num_inference_steps": steps}, progress=on_step)
