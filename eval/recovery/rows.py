"""The rows of the study: a precision, and whether the model is trained for it."""

from dataclasses import dataclass, replace

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.quality.configurations import DEFAULT, parse

_EVERYWHERE = ",dense_above_sigma=1,dense_layers=[]"
_SKIPPING = parse("policy=importance(budget=0.48, beyond=skip, by=pools)" + _EVERYWHERE)
_IN_FP8 = parse("high=mxfp8/fp8,policy=importance(budget=0.52, beyond=skip)" + _EVERYWHERE)
_MXFP8, _MXFP4 = DEFAULT["all MXFP8"], DEFAULT["all MXFP4"]
_ROTATED = replace(_MXFP4, rotation="head_dim")


@dataclass(frozen=True)
class Row:
    """A precision, as `dma_diffusers.finetune.prepare` takes it.

    trains: whether the model is trained for it. quantised: linear layers as `quantize_linears` quantises them after
    training, instead of `linears`. free: the row of the same precision without training.
    """

    attention: DMAConfig | None = None
    linears: str | None = None
    rounding: str = "nearest"
    trains: bool = True
    quantised: str | None = None
    free: str | None = None


PICTURES = {
    "all MXFP8": Row(_MXFP8, trains=False),
    "all MXFP4": Row(_MXFP4, trains=False),
    "all MXFP4, rotated": Row(_ROTATED, trains=False),
    "QuEST linears": Row(linears="qat", trains=False),
    "MXFP4 linears": Row(quantised="mxfp4", trains=False),
    "Quartet II linears": Row(linears="quartet2", trains=False),
    "both": Row(_MXFP4, "quartet", trains=False),
    "bf16, trained": Row(),
    "all MXFP4, trained": Row(_MXFP4, free="all MXFP4"),
    "all MXFP4, rotated, trained": Row(_ROTATED, free="all MXFP4, rotated"),
    "QuEST linears, trained": Row(linears="qat", free="QuEST linears"),
    "Quartet, nearest": Row(linears="quartet", free="QuEST linears"),
    "Quartet, stochastic": Row(linears="quartet", rounding="stochastic", free="QuEST linears"),
    "Quartet II, trained": Row(linears="quartet2", free="Quartet II linears"),
    "both, nearest": Row(_MXFP4, "quartet", free="both"),
    "both, stochastic": Row(_MXFP4, "quartet", "stochastic", free="both"),
}
"""Rows of the demo model of pictures."""

CLIPS = {
    "all HIGH": Row(parse("policy=dense(everywhere=high)" + _EVERYWHERE), trains=False),
    "HIGH 48 %, SKIP far": Row(_SKIPPING, trains=False),
    "HIGH 48 %, SKIP far, trained": Row(_SKIPPING, free="HIGH 48 %, SKIP far"),
    "HIGH 52 % in FP8, SKIP far": Row(_IN_FP8, trains=False),
    "HIGH 52 % in FP8, SKIP far, trained": Row(_IN_FP8, free="HIGH 52 % in FP8, SKIP far"),
}
"""Rows of the demo model of clips: all tiles HIGH, and maps that skip at a predicted cost of .44."""

ROWS = {"demo": PICTURES, "demo-video": CLIPS}

GAPS = {
    "demo": [
        (row, "all MXFP4", "all MXFP8")
        for row in ("all MXFP4, trained", "all MXFP4, rotated", "all MXFP4, rotated, trained")
    ],
    "demo-video": [
        ("HIGH 48 %, SKIP far, trained", "HIGH 48 %, SKIP far", "all HIGH"),
        ("HIGH 52 % in FP8, SKIP far", "HIGH 48 %, SKIP far", "all HIGH"),
        ("HIGH 52 % in FP8, SKIP far, trained", "HIGH 48 %, SKIP far", "all HIGH"),
        ("HIGH 52 % in FP8, SKIP far, trained", "HIGH 52 % in FP8, SKIP far", "all HIGH"),
    ],
}
"""The rows that close a gap, each with its ends: the row without the remedy, and the one to come to."""

ORDER = ("bf16, trained", "QuEST linears, trained", "Quartet, nearest", "QuEST linears")
"""Rows whose losses are expected to rise in this order (arXiv 2505.14669)."""
