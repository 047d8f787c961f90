"""The blocks of a tensor in a format: their crest factors, their squared errors, and those that theory predicts."""

import math
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.eval.study.theory import noise
from dma_diffusers.kernels.formats import Format, fake_quantize
from dma_diffusers.kernels.formats.scale import Scale, ScaleRounding, decode_scales, encode_e8m0

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DRAWN = 2**16  # so many blocks at most say what the quantiles are


@dataclass(frozen=True)
class Sums:
    """Squared norms, which add up over calls; those that nothing is known of are zero.

    error, predicted, norm: of a tensor's error in a format, of the error that theory predicts, and of the tensor.
    output_error, output_norm: of the error that this makes in the attention's, or the linear layer's, output, and of
    the exact output.
    """

    error: float = 0.0
    predicted: float = 0.0
    norm: float = 0.0
    output_error: float = 0.0
    output_norm: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(own + more for own, more in zip(astuple(self), astuple(other), strict=True)))

    @property
    def qsnr(self) -> float | None:
        """Return the measured QSNR in dB; None where no tensor was measured."""
        return _decibels(self.norm, self.error)

    @property
    def predicted_qsnr(self) -> float | None:
        """Return the predicted QSNR in dB; None where no tensor was measured."""
        return _decibels(self.norm, self.predicted)

    @property
    def relative_l2(self) -> float | None:
        """Return the relative L2 error of the output; None where no output was measured."""
        return math.sqrt(self.output_error / self.output_norm) if self.output_norm else None


def sums(x: Tensor, format: Format, rounded: Tensor | None = None) -> Sums:
    """Return what a format loses of `x`, float32 `[..., rows, columns]`, along its last dimension.

    rounded: `x` in the format, if it is at hand. The prediction knows of each block its norm, its crest factor, and how
    far its scale reaches beyond its largest magnitude.
    """
    rounded = fake_quantize(x, format) if rounded is None else rounded
    block = format.block or x.shape[-1]
    square, amax = _square_and_amax(x, block, format.block_rows)
    size, _ = _square_and_amax(x.new_ones(()).expand(x.shape[-2:]), block, format.block_rows)
    predicted = noise(format, _crest(square, amax, size), size, _overhead(format, amax)) * square
    error = (rounded - x).double().square().sum()
    return Sums(*torch.stack((error, predicted.sum(), square.sum())).tolist())


def crest_quantiles(x: Tensor, block: int) -> list[float]:
    """Return `QUANTILES` of κ over the blocks of `block` columns of x `[..., columns]`; blocks of zeros don't count."""
    square, amax = _square_and_amax(x, block)
    there = square > 0
    crest = _crest(square[there], amax[there], block)
    crest = crest[:: -(-len(crest) // _DRAWN)] if len(crest) else crest.new_ones(1)
    return crest.quantile(crest.new_tensor(QUANTILES)).tolist()


def _square_and_amax(x: Tensor, block: int, block_rows: int = 1) -> tuple[Tensor, Tensor]:
    """The squared norm (float64) and the largest magnitude of each block; blocks at the end are filled with zeros."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    square, amax = blocks.double().square().sum(-1), blocks.abs().amax(-1)
    if block_rows == 1:
        return square, amax
    short = (0, 0, 0, -amax.shape[-2] % block_rows)
    square, amax = (F.pad(each, short).unflatten(-2, (-1, block_rows)) for each in (square, amax))
    return square.sum(-2), amax.amax(-2)


def _crest(square: Tensor, amax: Tensor, size: Tensor | int) -> Tensor:
    """κ of blocks of `size` numbers, 1 where all are zero."""
    return torch.where(square > 0, amax.double() / (square / size).sqrt(), 1.0)


def _overhead(format: Format, amax: Tensor) -> Tensor | float:
    """ρ of each block, by how much its scale exceeds the smallest one that does not clip."""
    if format.scale is not Scale.E8M0:
        return 1.0
    scales = decode_scales(encode_e8m0(amax, format.element, ScaleRounding.CEIL), format.scale)
    return torch.where(amax > 0, scales.double() * format.element.max / amax.double(), 1.0)


def _decibels(norm: float, error: float) -> float | None:
    """The ratio in dB, at most 200 where there is hardly an error."""
    return 10 * math.log10(norm / max(error, norm * 1e-20)) if norm else None
