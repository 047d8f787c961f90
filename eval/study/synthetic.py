"""`dma-diffusers study --synthetic`: the theory, and what the codecs do on random numbers, without any model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dma_diffusers.eval.study.blocks import sums
from dma_diffusers.eval.study.theory import crossovers
from dma_diffusers.kernels.formats import FORMATS, INT8, pack

HEADER = ("format", "bits", "QSNR", "predicted")
ROWS, COLUMNS = 4096, 1024
_INTEGERS = ("int8", "int8_tile", "mxint8")


class Bias(NamedTuple):
    """The shares of block maxima that are stored as −128.

    asymmetric: where scales and quotients are bf16 and the range is −128 to 127, as arXiv 2510.25602 found it.
    symmetric: where the same quotients are clipped to ±127. codecs: in our 8-bit integer formats, the most of any.
    """

    asymmetric: float
    symmetric: float
    codecs: float


def document(seed: int = 0) -> dict[str, Any]:
    """Return crossovers, QSNRs of Gaussian numbers in dB, as measured and as predicted, and the bias of int8."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    found = {name: sums(x, format) for name, format in FORMATS.items() if format.element}
    return {
        "crossovers": crossovers(),
        "gaussian_qsnr_db": {name: each.qsnr for name, each in found.items()},
        "predicted_qsnr_db": {name: each.predicted_qsnr for name, each in found.items()},
        "int8_bias": bias(x)._asdict(),
    }


def bias(x: Tensor) -> Bias:
    """Return what share of the block maxima of x `[rows, columns]`, in blocks of 128, becomes −128."""
    blocks = x.bfloat16().unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True)
    is_largest = blocks.abs() == amax
    quotients = blocks / (amax.float() / INT8.max).bfloat16()
    largest = quotients[is_largest].float()
    codes = [pack(blocks.flatten(0, -2), name).data.view(torch.int8) for name in _INTEGERS]
    return Bias(
        _share(largest.round().clamp(-128, 127)),
        _share(INT8.round(largest)),
        max(_share(each[is_largest.flatten(0, -2)]) for each in codes),
    )


def _share(codes: Tensor) -> float:
    return float((codes == -128).float().mean())


def rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows under `HEADER`."""
    return [
        [name, f"{FORMATS[name].average_bits:g}", f"{qsnr:.2f}", f"{document['predicted_qsnr_db'][name]:.2f}"]
        for name, qsnr in document["gaussian_qsnr_db"].items()
    ]


def lines(document: Mapping[str, Any]) -> list[str]:
    """Return what stands under the table."""
    points = ", ".join(f"{name} {crest:.2f}" for name, crest in document["crossovers"].items())
    asymmetric, symmetric, codecs = (f"{share:.1%}" for share in document["int8_bias"].values())
    return [
        f"An integer errs less than the float of its size below these crest factors: {points}",
        f"At the largest of 128 numbers, int8 from -128 to 127 with bf16 scales stores -128 in {asymmetric}; "
        f"clipped to ±127, in {symmetric}; our formats, in {codecs}",
    ]
