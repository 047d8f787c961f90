"""This module writes a count as data, and as the lines of a table."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dma_diffusers.eval.simulator.count import Count, end_to_end
from dma_diffusers.kernels.tiling.boxes import padding, plan
from dma_diffusers.kernels.tiling.neighborhood import shape_text

if TYPE_CHECKING:
    from dma_diffusers.eval.simulator.predict import Prediction  # it needs Triton

_LARGEST_BOX = 1024  # other shapes of a box are looked at up to so many tokens
_CANDIDATES = (
    "Window",
    "Stride",
    "Q tile",
    "KV tile",
    "Cost",
    "Cut",
    "Speed-up, worst",
    "Mean",
    "End to end",
)


def record(
    count: Count,
    attention_share: float | None = None,
    dense_steps: tuple[int, int] = (0, 1),
    predict: Callable[[Count], "Prediction"] | None = None,
) -> dict[str, Any]:
    """Return what was counted, as JSON: sizes as lists, tiles as numbers, shares from 0 to 1; and its prediction.

    `end_to_end` is of the worst Q tile's speed-up, as published figures are; None without an attention share.
    `prediction` has an `end_to_end` of its own, of the speed-up in time; None without `predict`.
    """

    prediction = predict and with_run(predict(count)._asdict(), attention_share, dense_steps)
    axes = {
        name: [getattr(axis, name) for axis in count.axes]
        for name in ("window", "stride", "dilation", "causal")
    }
    q_padding, kv_padding = count.padding
    return {
        "grid": [axis.length for axis in count.axes],
        **axes,
        "q_tile": list(count.q_tile),
        "kv_tile": list(count.kv_tile),
        "text": count.text,
        "q_tiles": count.grid_tiles[0] + count.text_tiles[0],
        "tiles_all": count.all,
        "tiles_worst": count.worst,
        "tiles_mean": count.mean,
        "tiles_cut": count.cut,
        "padding_q": q_padding,
        "padding_kv": kv_padding,
        "cost": count.cost,
        "speedup_worst": count.speedup_worst,
        "speedup_mean": count.speedup_mean,
        "end_to_end": _of_run(count.speedup_worst, attention_share, dense_steps),
        "prediction": prediction,
    }


def with_run(
    prediction: dict[str, Any], attention_share: float | None, dense_steps: tuple[int, int]
) -> dict[str, Any]:
    """Return a prediction with `end_to_end`, of its speed-up in time; None without an attention share."""
    return prediction | {"end_to_end": _of_run(prediction["speedup"], attention_share, dense_steps)}


def lines(counted: dict[str, Any]) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """Return header and rows of one record."""
    boxes = f"{shape_text(counted['q_tile'])}, {shape_text(counted['kv_tile'])}"
    rows = [
        ("window, stride", f"{shape_text(counted['window'])}, {shape_text(counted['stride'])}"),
        ("Q tile, KV tile", boxes),
        ("Q tiles", f"{counted['q_tiles']:,}"),
        ("KV tiles in all", f"{counted['tiles_all']:,}"),
        ("KV tiles visited, worst Q tile", f"{counted['tiles_worst']:,}"),
        ("KV tiles visited, mean", f"{counted['tiles_mean']:,.2f}"),
        ("visited tiles that the window cuts", f"{counted['tiles_cut']:.1%}"),
        ("padding of Q tiles, of KV tiles", f"{counted['padding_q']:.1%}, {counted['padding_kv']:.1%}"),
        ("speed-up, worst Q tile", f"{counted['speedup_worst']:.2f}"),
        ("speed-up, mean", f"{counted['speedup_mean']:.2f}"),
    ]
    if counted["end_to_end"] is not None:
        rows.append(("end to end (worst Q tile)", f"{counted['end_to_end']:.2f}"))
    return (f"Grid {shape_text(counted['grid'])}", "tiles counted"), rows


def times(prediction: dict[str, Any]) -> tuple[tuple[str, str, str], list[tuple[str, str, str]]]:
    """Return header and rows of a record's prediction."""
    shape = f"{prediction['heads']} heads × {prediction['head_dim']}"
    formats = (prediction["high"], prediction["low"])
    rows = [
        ("dense, full precision, the best kernel", f"{prediction['full_precision_ms']:.3f}", ""),
        (
            f"dense, LOW {formats[1]}",
            f"{prediction['dense_low_ms']:.3f}",
            f"{prediction['speedup_dense_low']:.2f}",
        ),
        (
            f"this, {'|'.join(formats)}",
            f"{prediction['ms']:.3f}",
            f"{prediction['speedup']:.2f}",
        ),
    ]
    if prediction["end_to_end"] is not None:
        rows.append(("end to end", "", f"{prediction['end_to_end']:.2f}"))
    return (f"{prediction['gpu'].upper()}, {shape}, quantisation included", "ms", "speed-up"), rows


def candidates(records: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return header and rows of a search's records."""
    rows = [
        [shape_text(found[name]) for name in ("window", "stride", "q_tile", "kv_tile")]
        + [f"{found['cost']:.3f}", f"{found['tiles_cut']:.1%}"]
        + [
            f"{found[name]:.2f}"
            for name in ("speedup_worst", "speedup_mean", "end_to_end")
            if found[name] is not None
        ]
        for found in records
    ]
    header = _CANDIDATES[: len(rows[0])]
    if records[0]["prediction"]:
        header += (f"ms on {records[0]['prediction']['gpu'].upper()}",)
        for row, found in zip(rows, records, strict=True):
            row.append(f"{found['prediction']['ms']:.3f}")
    return header, rows


def box_notes(count: Count) -> list[str]:
    """Say what another shape of box would save in padding, for each of the two that has a better one."""
    grid = [max(axis.class_lengths) for axis in count.axes]
    notes = []
    for name, box in (("Q tiles", count.q_tile), ("KV tiles", count.kv_tile)):
        if math.prod(box) <= _LARGEST_BOX:
            best = plan(grid, math.prod(box))[0]
            wasted, least = padding(grid, box), padding(grid, best)
            if least < wasted:
                notes.append(
                    f"{name} of {shape_text(box)} pad the grid by {wasted:.0%}, {shape_text(best)} by {least:.0%}"
                )
    return notes


def _of_run(speedup: float, attention_share: float | None, dense_steps: tuple[int, int]) -> float | None:
    return None if attention_share is None else end_to_end(speedup, attention_share, dense_steps)
