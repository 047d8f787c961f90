"""This module predicts what any policy costs on a layout, in clocks and in time, to compare qualities at a cost."""

from typing import Any

from dma_diffusers.eval.cost import clocks_of, clocks_of_pairs, pairs, routing_clocks
from dma_diffusers.eval.simulator.predict import MACHINES, predict_policy
from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.kernels.tiling.neighborhood import shape_text
from dma_diffusers.kernels.tiling.policies import Policy

CLASSES = ("high", "low", "mean", "skip")


def record(
    policy: Policy,
    layout: Layout,
    gpu: str,
    heads: int,
    head_dim: int,
    high: str,
    low: str,
    left_out: float = 0.0,
) -> dict[str, Any]:
    """Return a policy as JSON: shares of all pairs of tiles from 0 to 1, cost, prediction.

    high, low, mean, skip: averaged over heads; in tile order, padding may bring their sum over 1, and skip is what is
    left. cost: clocks of the pairs taken over those of dense bf16 in our own kernel, as `calibrate` counts. left_out:
    the share of LOW, as `predict_policy` takes it. Raises ValueError as that does, and for pairs left out by a policy
    that leaves out none.
    """
    if left_out and not policy.skip_below:
        raise ValueError(f"{policy} leaves out no pairs for what they hold: unite it with skip_softmax(…)")
    prediction = predict_policy(policy, layout, gpu, heads, head_dim, high, low, left_out)
    target, every = MACHINES[gpu].architecture, tiles(layout.q_length) ** 2
    counted = pairs(policy, layout)
    in_high, in_low, in_mean, _ = (number.mean().item() / every for number in counted)
    clocks = clocks_of_pairs(counted, target, head_dim, high, low, left_out).mean().item()
    clocks = (clocks + routing_clocks(policy, layout, target, head_dim)) / every
    return {
        "policy": str(policy),
        "tokens": layout.q_length,
        "text": layout.text_length,
        "grid": list(layout.grid),
        "high": in_high,
        "low": in_low,
        "mean": in_mean,
        "left_out": left_out,
        "skip": max(1 - in_high - in_low - in_mean, 0.0),
        "cost": clocks / sum(clocks_of(target, head_dim, "H", "H")),
        "prediction": prediction._asdict(),
    }


def lines(counted: dict[str, Any]) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Return header and rows of one record."""
    rows = [(f"pairs of tiles {name.upper()}", f"{counted[name]:.1%}") for name in CLASSES]
    if counted["left_out"]:
        rows.append(("of LOW, left out by softmax", f"{counted['left_out']:.1%}"))
    rows.append(("cost, dense bf16 in our kernel being 1", f"{counted['cost']:.3f}"))
    return (f"{counted['policy']}, grid {shape_text(counted['grid'])}", ""), rows
