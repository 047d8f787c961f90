"""This module predicts what a schedule costs over the noise levels of a whole run."""

from collections import Counter
from typing import Any

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.simulator import policy as simulator
from dma_diffusers.eval.simulator.predict import predict_policy
from dma_diffusers.families import Family
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Dense
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.stages import stages

_MODULE = "attention"
_MEANS = (*simulator.CLASSES, "cost")


def noise_levels(steps: int, shift: float) -> list[float]:
    """Return the noise level of each step, as flow matching has them: shift·t / (1 + (shift − 1)·t).

    t falls evenly from 1 to 1/steps. FLUX's `mu` is the logarithm of its shift. Raises ValueError for less than one
    step, or a shift that is not positive.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"a run has at least 1 step and a shift over 0, got {steps} and {shift}")
    times = [1 - step / steps for step in range(steps)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


def record(
    schedule: str,
    levels: list[float],
    layout: Layout,
    gpu: str,
    heads: int,
    head_dim: int,
    high: str,
    low: str,
) -> dict[str, Any]:
    """Return a schedule as JSON: what `policy.record` has, as means over the steps, and the same of each entry.

    levels: the noise level (0 to 1) of each step. `steps` of an entry: how many of them it holds in, not 0. Raises
    ValueError as `DMAConfig` and `policy.record` do.
    """
    config = DMAConfig(schedule=schedule, high=high, low=low)
    found = stages(config, Family("none"), "", (_MODULE,))
    steps = Counter(found.at(_MODULE, level) for level in levels)
    entries = [
        simulator.record(one.asked, layout, gpu, heads, head_dim, one.high, one.low) | {"steps": count}
        for one, count in steps.items()
    ]

    def mean(values: list[float]) -> float:
        return sum(value * entry["steps"] for value, entry in zip(values, entries, strict=True)) / len(levels)

    dense = predict_policy(Dense(Class.LOW), layout, gpu, heads, head_dim, high, low)
    ms = mean([entry["prediction"]["ms"] for entry in entries])
    labels = [entry["prediction"]["label"] for entry in entries]
    label = next((label for label in labels if label != dense.label), dense.label)  # the least of them
    prediction = dense._replace(label=label, ms=ms, speedup=dense.full_precision_ms / ms)
    return {
        "schedule": config.schedule,
        **{name: entries[0][name] for name in ("tokens", "text", "grid", "left_out")},
        **{name: mean([entry[name] for entry in entries]) for name in _MEANS},
        "prediction": prediction._asdict(),
        "levels": levels,
        "entries": entries,
    }


def lines(counted: dict[str, Any]) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Return header and rows of one record: each entry's steps and cost, then the means."""
    total = len(counted["levels"])
    of_entries = [
        (f"{entry['policy']}, {entry['steps']} of {total} steps: cost", f"{entry['cost']:.3f}")
        for entry in counted["entries"]
    ]
    header, rows = simulator.lines(counted | {"policy": "mean over the steps"})
    return header, of_entries + rows
