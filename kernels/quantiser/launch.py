"""Runs the quantiser's kernels: from q, k and v to the operands that the attention kernel's descriptors read."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch

from dma_diffusers.kernels.call import Norms, Rope
from dma_diffusers.kernels.device.launch import Launcher, multiprocessors
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.quantiser import kernel, means, statistics
from dma_diffusers.kernels.quantiser.operands import Classes, Operand, Stored, padded_dim
from dma_diffusers.kernels.quantiser.reference import SAMPLED_TOKENS
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, tiles


@dataclass(frozen=True)
class Source:
    """The tensors of one call that the kernels read; None where nothing is wanted.

    q, k, v: `[B, H or Hkv, S, D]`, last dimension contiguous; q and k go through `norms` and are rotated by q_rope and
        k_rope first, whose tables are contiguous.
    softmax_scale_log2: the factor of q.
    key_mask: uint8 `[B, tiles·128]` in the order of slots, 0 for keys that nobody sees.
    token_order: int32 `[slots]`, the token that stands at each slot, −1 where none does. What the kernels write stands
        in that order.
    rotated_block: so many channels of q and of k are mixed in formats other than bf16, 1 for none. rotated_values: the
        same of v, in bf16 too, which is then written.
    in_tiles: whether bf16 numbers are written too, in whole tiles, though they could be read where the model has them.
    """

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    softmax_scale_log2: float = 1.0
    q_rope: Rope | None = None
    k_rope: Rope | None = None
    key_mask: torch.Tensor | None = None
    token_order: torch.Tensor | None = None
    norms: Norms | None = None
    rotated_block: int = 1
    rotated_values: int = 1
    in_tiles: bool = False

    @property
    def is_copied(self) -> bool:
        """Says whether bf16 numbers are written, too."""
        return self.in_tiles or self.token_order is not None

    @property
    def lengths(self) -> tuple[int, int, int | None]:
        """Slots of queries and of keys; how many tokens there are, None if as many as slots."""
        if self.token_order is not None:
            slots, tokens = (
                len(self.token_order),
                next(x for x in (self.k, self.q, self.v) if x is not None).shape[2],
            )
            return slots, slots, None if slots == tokens else tokens
        keys = self.v if self.k is None else self.k
        return 1 if self.q is None else self.q.shape[2], 1 if keys is None else keys.shape[2], None

    @property
    def strides(self) -> list[int]:
        """Batch, head and token strides of q, of k and of v."""
        return [stride for x in (self.q, self.k, self.v) for stride in _strides(x)]

    @property
    def rope_tables(self) -> tuple[torch.Tensor | None, ...]:
        """Cosines and sines of q and of k."""
        return *(self.q_rope or (None, None)), *(self.k_rope or (None, None))


class Means(NamedTuple):
    """The means of sub-tiles, further keys and values that are still to be encoded, as quantiser/reference.py has them.

    k, v: `[B, Hkv, 4·tiles, D]`, bfloat16 where MEAN multiplies such numbers, else float32. log_counts: float32
    `[B, tiles(4·tiles)·128]`, −inf past the end.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_counts: torch.Tensor

    @classmethod
    def empty(cls, launcher: Launcher, stored: Stored, k: torch.Tensor, length: int) -> "Means":
        """Room for the means of k, and of as many values, at `length` slots. stored: how MEAN stores its operands."""
        (batch, heads, _, head_dim), subtiles = k.shape, tiles(length) * (TILE // SUBTILE)
        are_bf16 = stored.format.name == "bf16", stored.values is Storage.PLAIN
        k_means, v_means = (
            launcher.empty(
                (batch, heads, subtiles, padded_dim(head_dim)),
                torch.bfloat16 if is_bf16 else torch.float32,
                k.device,
            )
            for is_bf16 in are_bf16
        )
        return cls(k_means, v_means, launcher.empty((batch, tiles(subtiles) * TILE), torch.float32, k.device))


@dataclass(frozen=True)
class Encoded:
    """The operands that the attention kernel reads; None where nothing is wanted.

    q, k: HIGH's operand and LOW's; None also for bf16 numbers that are read where the model has them.
    values: V as each storage has it. PLAIN is bf16 `[B, Hkv, tiles·128, D]`, and absent if V is read where the model
        has it. HALF is float16, the same. CHANNEL is e4m3, the same, or `[B, Hkv, D, tiles·128]` and in the MMA's order
        of tokens.
    v_units: float32 `[B·Hkv, 2, D]`, powers of two, 1 for channels past the head dimension, and what was taken from v.
    offset: float32 `[B·H·tiles·128]`: what smoothing takes from the scores of each row, in base 2.
    means: of the sub-tiles.
    """

    q: list[Operand | None]
    k: list[Operand | None]
    values: dict[Storage, torch.Tensor]
    v_units: torch.Tensor | None
    offset: torch.Tensor | None
    means: Means | None


def of_norms(norms: Norms | None) -> list[Any]:
    """The arguments by which kernels know the norms: weights of q and of k, and the numbers of `Norms`."""
    if norms is None:
        return [*[None] * 6, False]
    return [*norms.tensors, norms.eps, norms.first, norms.rounds_twice]


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def are_paired(*tensors: torch.Tensor | None) -> bool:
    """Says whether two neighbouring channels of each tensor, which begins at 16 bytes, always lie in one word."""
    return all(
        x is None or (x.data_ptr() % 16 == 0 and all(n % 2 == 0 for n in (x.shape[-1], *x.stride()[:-1])))
        for x in tensors
    )


def chunks(heads: int, device: torch.device) -> int:
    """The number of chunks into which the statistics divide each of B·Hkv heads of K and of V.

    All programs run at once, if they can: of 256 threads with up to 80 registers a multiprocessor has three.
    """
    fitting = 3 * multiprocessors(device) // (2 * heads)
    return min(max(4, 1 << fitting.bit_length() >> 1), 32)


class Statistics(NamedTuple):
    """These are K's mean, float32 `[B·Hkv, D]`, and V's units, `[B·Hkv, 2, D]`; each is None where it is not wanted."""

    mean: torch.Tensor | None = None
    v_units: torch.Tensor | None = None


def statistics_of(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rope: Rope | None = None,
    key_mask: torch.Tensor | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
    norms: Norms | None = None,
    smooths_v: bool = True,
    rotated_values: int = 1,
    registers: int | None = None,
) -> Statistics:
    """K's mean and V's units, as quantiser/reference.py defines them; None for a tensor that is None.

    k, v: `[B, Hkv, S, D]`, last dimension contiguous; k goes through `norms` and is rotated by `rope` first.
    key_mask: bool `[B, S]`, True for keys that are seen, in the order of tokens, any strides.
    smooths_v: whether V's mean is taken from it. rotated_values: so many of its channels are mixed first, 1 for none.
    registers: the most that a thread may use; None leaves it to the compiler.
    """
    x = v if k is None else k
    if x is None:
        return Statistics()
    batch, heads, length, head_dim = x.shape
    dim, of_all, device = padded_dim(head_dim), batch * heads, x.device
    count = chunks(of_all, device)
    partials = launcher.empty((7, of_all, count, dim), torch.float32, device)
    finished = launcher.counters((2, of_all), device)
    mean, v_units = (
        None if y is None else launcher.empty(shape, torch.float32, device)
        for y, shape in ((k, (of_all, dim)), (v, (of_all, 2, dim)))
    )
    *weights, eps, first, rounds_twice = of_norms(None if k is None else norms)[2:]
    programs = of_all * count * ((k is not None) + (v is not None))
    launcher(
        statistics.statistics, (programs,),
        k, v, partials, finished, mean, v_units, *((k is not None and rope) or (None, None)),
        *weights, eps, first, rounds_twice, None if key_mask is None else key_mask.view(torch.uint8),
        of_all, heads, length, max(1, length // SAMPLED_TOKENS), *_strides(k), *_strides(v),
        *((0, 0) if key_mask is None else key_mask.stride()),
        SMOOTHS_V=smooths_v, ROTATED_VALUES=rotated_values, CHUNKS=count, PAIRED=are_paired(k, v, *weights),
        HEAD_DIM=head_dim, D=dim, num_warps=8, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return Statistics(mean, v_units)


def encode(
    source: Source,
    classes: Classes,
    known: Statistics = Statistics(),  # noqa: B008 (it never changes)
    *,
    of_means: Stored | None = None,
    amax: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    wants_offset: bool = False,
    transposed_v: bool = False,
    inexact_rows: torch.Tensor | None = None,
    registers: int | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Encoded:
    """q times its factor and k less its mean for HIGH and LOW, in bf16 q and k as they are; and v.

    known: `statistics_of` k and v, as far as they are encoded.
    of_means: how MEAN stores its operands, for which means are wanted of k and v.
    amax: of what is encoded of q and of k, `[B, H or Hkv, 1, 1]`, needed by formats with a tensor scale.
    wants_offset: whether `offset` is, of q rounded to bf16 if one of the classes is in bf16.
    inexact_rows: int32 `[1]`, counts the rows whose blocks' scales span too far for e4m3 and one power of two.
    registers: the most that a thread may use; None leaves it to the compiler.
    """
    q, k, v = source.q, source.k, source.v
    q_length, k_length, token_count = source.lengths
    q_operands, k_operands = (
        [
            None
            if x is None
            or stored is None
            or (
                stored.format.name == "bf16"
                and rope is None
                and source.norms is None
                and not source.is_copied
            )
            else Operand.empty(launcher, stored, x, length, x_amax, is_key)
            for stored in classes
        ]
        for x, rope, length, x_amax, is_key in zip(
            (q, k), (source.q_rope, source.k_rope), (q_length, k_length), amax, (False, True), strict=True
        )
    )
    first = next(x for x in (v, k, q) if x is not None)
    device, (batch, kv_heads, _, head_dim) = first.device, first.shape
    heads = kv_heads if q is None else q.shape[1]
    dim, rows = padded_dim(head_dim), tiles(k_length) * TILE
    offset, values = None, {}
    if wants_offset:
        offset = launcher.empty((batch * heads * tiles(q_length) * TILE,), torch.float32, device)
    stored_values = {stored.values for stored in classes if stored is not None}
    if v is not None and Storage.CHANNEL in stored_values:
        shape = (batch, kv_heads, dim, rows) if transposed_v else (batch, kv_heads, rows, dim)
        values[Storage.CHANNEL] = launcher.empty(shape, torch.float8_e4m3fn, device)
    writes_plain = source.is_copied or source.rotated_values > 1
    if v is not None and Storage.HALF in stored_values:
        values[Storage.HALF] = launcher.empty((batch, kv_heads, rows, dim), torch.float16, device)
    if v is not None and writes_plain and Storage.PLAIN in stored_values:
        values[Storage.PLAIN] = launcher.empty((batch, kv_heads, rows, dim), torch.bfloat16, device)
    found = None if of_means is None else _means_of(source, known.mean, of_means, launcher)
    encoded = Encoded(q_operands, k_operands, values, known.v_units, offset, found)
    read = replace(
        source,
        q=q if wants_offset or any(q_operands) else None,
        k=k if any(k_operands) else None,
        v=v if values else None,
    )
    of_keys = kv_heads * tiles(k_length)
    of_each = (heads * tiles(q_length), of_keys, of_keys)
    programs = batch * sum(
        0 if x is None else n for x, n in zip((read.q, read.k, read.v), of_each, strict=True)
    )
    if programs == 0:
        return encoded
    pointers = [operand.pointers if operand else [None] * 3 for operand in (*q_operands, *k_operands)]
    launcher(
        kernel.encode, (programs,),
        read.q, read.k, read.v, *known, source.softmax_scale_log2, *source.rope_tables, *of_norms(source.norms),
        source.key_mask, offset,
        *chain(*pointers), *(values.get(each) for each in (Storage.PLAIN, Storage.HALF, Storage.CHANNEL)),
        source.token_order, inexact_rows,
        heads, kv_heads, batch * kv_heads, q_length, k_length, token_count, *read.strides,
        *chain(*(c.quantised if c else [None] * 6 for c in classes)),
        ROTATED=source.rotated_block, ROTATED_VALUES=source.rotated_values,
        ROUND=any(c is not None and c.format.name == "bf16" for c in classes),
        TRANSPOSED=transposed_v,
        PAIRED=are_paired(read.q, read.k, *of_norms(source.norms)[:4]), HEAD_DIM=head_dim, D=dim,
        num_warps=8 if head_dim <= 64 else 16, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return encoded


def _means_of(source: Source, mean: torch.Tensor | None, stored: Stored, launcher: Launcher) -> Means:
    """Find the means of sub-tiles, in a pass of its own. mean: what is taken from k first, `[B·Hkv, D]`, or None."""
    k, v, length = source.k, source.v, source.lengths[1]
    batch, heads, _, head_dim = k.shape
    found, dim = Means.empty(launcher, stored, k, length), padded_dim(head_dim)
    *weights, eps, first, rounds_twice = of_norms(source.norms)[2:]
    launcher(
        means.means, (2 * batch * heads * tiles(length),),
        k, v, mean, *(source.k_rope or (None, None)), *weights, eps, first, rounds_twice,
        source.key_mask, source.token_order, *found,
        heads, batch * heads, length, source.lengths[2], *source.strides[3:],
        ROTATED_VALUES=source.rotated_values, PAIRED=are_paired(k, *weights), HEAD_DIM=head_dim, D=dim,
        num_warps=max(1, dim // 128), enable_fp_fusion=False,
    )  # fmt: skip
    return found
