"""One attention call in every format: what q, k, v and the probabilities lose, and what the output loses by it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dma_diffusers.eval.recordings.store import Recording, Tensors
from dma_diffusers.eval.study.blocks import Sums, crest_quantiles, sums
from dma_diffusers.eval.study.options import UNSIGNED, Options, Variant
from dma_diffusers.kernels.formats import fake_quantize, get_format, rotate, rotate_back

QUERIES = range(32, 257)
"""So many queries of a call, drawn at random, have their probabilities and outputs measured: fewer the longer it is."""
CREST_BLOCKS = (16, 32)
_PROBABILITIES = 2**21  # about so many are rounded at a time


class Call(NamedTuple):
    """One batch entry of a call, float32.

    q: `[H, S, D]`, times the softmax scale and log2 e. k, v: `[Hkv, S, D]`, the keys that are seen. rows: int64 `[n]`,
    the queries that are measured. hidden: bool `[n, S]`, True where a query doesn't see a key, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    hidden: Tensor | None


def calls(recording: Recording, tensors: Tensors, seed: int) -> Iterator[Call]:
    """Yield the batch entries of a recording that see any key; seed: of the queries that are drawn."""
    scale = recording.shape[-1] ** -0.5 if recording.scale is None else recording.scale
    generator = torch.Generator().manual_seed(seed)
    for entry, (q, k, v) in enumerate(zip(*tensors[:3], strict=True)):
        places = torch.arange(k.shape[1], device=k.device)
        if tensors.key_mask is not None:
            places = places[tensors.key_mask[entry]]
        if len(places):
            count = min(max(_PROBABILITIES // (len(q) * len(places)), QUERIES[0]), QUERIES[-1])
            rows = torch.randperm(q.shape[1], generator=generator)[:count].sort().values.to(q.device)
            rows = rows[rows >= places[0]] if recording.is_causal else rows
            hidden = places > rows[:, None] if recording.is_causal else None
            yield Call(
                q.float() * (scale * math.log2(math.e)),
                k[:, places].float(),
                v[:, places].float(),
                rows,
                hidden,
            )


@dataclass
class _Products:
    """The exact products of a call, and those of which one factor is rounded."""

    call: Call

    def __post_init__(self) -> None:
        self.p = self.probabilities(self.call.q, self.call.k)
        self.exact = self.output(self.p, self.call.v)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """2 to the power of scores less the row's largest, `[Hkv, group * n, S]`."""
        scores = q[:, self.call.rows].reshape(len(k), -1, q.shape[-1]) @ k.mT
        if self.call.hidden is not None:
            scores.masked_fill_(
                self.call.hidden.repeat(scores.shape[1] // len(self.call.rows), 1), -torch.inf
            )
        return torch.exp2(scores - scores.amax(-1, keepdim=True))

    def output(self, p: Tensor, v: Tensor) -> Tensor:
        """The output `[Hkv, group * n, D]` of probabilities that are summed as they are multiplied."""
        return p @ v / p.sum(-1, keepdim=True)

    def errors(self, output: Tensor) -> Sums:
        """The sums of an output's error."""
        error, norm = ((x).double().square().sum() for x in (output - self.exact, self.exact))
        return Sums(output_error=float(error), output_norm=float(norm))


def measure(call: Call, options: Options) -> dict[Variant, Sums]:
    """Return the sums of every variant of q, k, v and p, of both q and k (`qk`), and of pairs of formats (`pair`).

    v and p are rounded along the keys, over which they are multiplied. Where one part is rounded all others are exact;
    in pairs all four are, without rotations and with K smoothed.
    """
    products, found = _Products(call), {}
    named = [get_format(name) for name in options.formats]
    # Queries that share a scale are no longer together once some of them are drawn.
    of_pv = [format for format in named if format.block_rows == 1]
    for format in [*of_pv, *options.unsigned]:
        rounded = fake_quantize(products.p, format)
        lost = products.errors(products.output(rounded, call.v))
        found[Variant("p", format.name)] = sums(products.p, format, rounded) + lost
    for rotation, smooth in product(options.of_head_dim(call.q.shape[-1]), (False, True)):
        k_mean, v_mean = (x.mean(1, keepdim=True) * smooth for x in (call.k, call.v))
        q, k = rotate(call.q, rotation), rotate(call.k - k_mean, rotation)
        v = rotate(call.v - v_mean, rotation).mT.contiguous()
        for format in named:
            variant = Variant("q", format.name, rotation, smooth)
            rounded_q, rounded_k = (fake_quantize(x, format) for x in (q, k))
            p = products.probabilities(rounded_q, rounded_k)
            found[variant._replace(part="k")] = sums(k, format, rounded_k)
            found[variant._replace(part="qk")] = products.errors(products.output(p, call.v))
            if not smooth:
                found[variant] = sums(q, format, rounded_q)
            elif rotation == "none":
                found |= _pairs(products, options, format.name, p)
            if format in of_pv:
                rounded_v = fake_quantize(v, format)
                output = products.output(products.p, rotate_back(rounded_v.mT, rotation)) + v_mean
                found[variant._replace(part="v")] = sums(v, format, rounded_v) + products.errors(output)
    return found


def _pairs(products: _Products, options: Options, qk: str, p: Tensor) -> dict[Variant, Sums]:
    """The errors of outputs whose probabilities `p` come of rounded q and k, with p and v rounded as well.

    Where P·V is of integers, p is unsigned.
    """
    v = products.call.v
    found = {
        Variant("pair", f"{qk}/bf16", smooth=True): products.errors(
            products.output(p.bfloat16().float(), v.bfloat16().float())
        )
    }
    for pv in options.paired:
        rounded = fake_quantize(p, UNSIGNED.get(pv, pv)), fake_quantize(v.mT.contiguous(), pv).mT
        output = products.output(*rounded)
        found[Variant("pair", f"{qk}/{pv}", smooth=True)] = products.errors(output)
    return found


def crests(call: Call, options: Options) -> dict[tuple[str, int, str, bool], list[float]]:
    """Return the quantiles of κ by part, block, rotation and smoothing, as of `measure`'s tensors."""
    parts: dict[tuple[str, str, bool], Tensor] = {("p", "none", False): _Products(call).p}
    for rotation, smooth in product(options.of_head_dim(call.q.shape[-1]), (False, True)):
        k, v = (x - x.mean(1, keepdim=True) * smooth for x in (call.k, call.v))
        parts["k", rotation, smooth] = rotate(k, rotation)
        parts["v", rotation, smooth] = rotate(v, rotation).mT
        if not smooth:
            parts["q", rotation, smooth] = rotate(call.q, rotation)
    return {
        (part, block, rotation, smooth): crest_quantiles(x, block)
        for (part, rotation, smooth), x in parts.items()
        for block in CREST_BLOCKS
    }
