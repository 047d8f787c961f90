"""From a call to what kernels read: the variant, the inputs, and the operands that the quantiser writes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton

from dma_diffusers.kernels.attention.strides import bf16_for_tma, is_read_as_it_is, row_major
from dma_diffusers.kernels.attention.tuning import Tuning, tuning
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.formats import rotate_blocks
from dma_diffusers.kernels.lowerings import WITHOUT_FP8, WITHOUT_TMA, Storage, architecture, named
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.quantiser.launch import Encoded, Source, Statistics, encode, statistics_of
from dma_diffusers.kernels.quantiser.operands import Classes, Stored, padded_dim
from dma_diffusers.kernels.routing.launch import route_call
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.precision_map import PrecisionMap


@dataclass(frozen=True)
class Variant:
    """The way in which the kernels run one kind of call.

    classes: of HIGH and of LOW tiles. means: of MEAN tiles; it has one of the classes' formats, and their q.
    target: the architecture that they are tuned for. dim: the head dimension that they compute with.
    counts_inexact: whether rows are counted that e4m3 can't hold as their format says.
    """

    classes: Classes
    means: Stored | None
    tuned: Tuning
    target: str
    dim: int
    counts_inexact: bool

    @classmethod
    def of(
        cls, call: Call, plan: Plan, precisions: Precisions, lowering: str, target: str | None = None
    ) -> "Variant":
        """The variant for a call. target: None for the architecture of the call's device.

        Raises ValueError where tiles may be skipped and shared memory does not hold them.
        """
        target, dim = target or architecture(call.q.device), padded_dim(call.q.shape[-1])
        high, low, means = (
            precision and Stored.by(named(lowering), precision, target) for precision in plan.used(precisions)
        )
        encoded = _encoded(high, low, means)
        tuned = tuning(target, dim, tuple(c and c.scales for c in encoded), encoded[1] and encoded[1].values)
        if plan.skip_below is not None:
            _check_tiles_fit(encoded, precisions, target, call.q.shape[-1])
            tuned = tuned.skipping
        return cls((high, low), means, tuned, target, dim, lowering == "faithful")

    @property
    def encoded(self) -> Classes:
        """The classes that q, k and v are encoded for: those with tiles, and the one that MEAN shares."""
        return _encoded(*self.classes, self.means)

    @property
    def in_gluon(self) -> bool:
        """Says whether hopper.py runs it: it knows one pair of P·V, and neither packed elements nor tensor scales."""
        high, low = self.encoded
        return (
            self.tuned.slots is not None
            and not self.has_tensor_scale
            and not any(c and c.is_packed for c in self.encoded)
            and (high is None or high.values is Storage.PLAIN)
            and (low is None or low.values is Storage.CHANNEL)
            and not triton.knobs.runtime.interpret
        )

    @property
    def has_tensor_scale(self) -> bool:
        """Says whether a format has a scale for the whole tensor."""
        return any(c and c.format.has_tensor_scale for c in self.encoded)

    @property
    def has_bf16(self) -> bool:
        """Says whether a class multiplies the model's own numbers."""
        return any(c and c.format.name == "bf16" for c in self.encoded)

    @property
    def smooths(self) -> bool:
        """Says whether K's mean is subtracted for one of the classes."""
        return quantiser.smooths(*(c and c.format.name for c in self.encoded))

    @property
    def has_units(self) -> bool:
        """Says whether a class has V in units of its channels."""
        return self.stores_values(Storage.CHANNEL) or self.stores_values(Storage.HALF)

    def stores_values(self, storage: Storage) -> bool:
        """Says whether a class has V in this storage."""
        return any(c and c.values is storage for c in self.encoded)


def _check_tiles_fit(classes: Classes, precisions: Precisions, target: str, head_dim: int) -> None:
    """A tile that may be skipped is held whole, K and V, and V for both classes.

    Raises ValueError where that is more than the 99 KB that sm_86 and sm_89 have.
    """
    wide = [c for c in classes if c is not None and c.values is not Storage.CHANNEL]  # V has 16 bits
    holds_much = len(wide) > 1 or any(c.storage in (Storage.PLAIN, Storage.PACKED) for c in wide)
    if target in ("sm_86", "sm_89") and padded_dim(head_dim) > 128 and holds_much:
        words = " | ".join(precisions.words)
        advice = "" if target in WITHOUT_FP8 else "write P·V in fp8, as in bf16/fp8 | int8/fp8, or "
        raise ValueError(
            f"a softmax threshold was given for {words} at head_dim {head_dim}, where {target} has too little shared "
            f"memory for whole tiles of K and V; it is allowed up to head_dim 128: {advice}leave the threshold out"
        )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call that the kernels read.

    source: what the quantiser reads. key_mask: the call's, in the order of tokens, which the statistics read.
    bf16: q, k and v as TMA reads the model's own numbers; None where nothing does.
    """

    source: Source
    key_mask: torch.Tensor | None
    bf16: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

    @classmethod
    def of(cls, call: Call, plan: Plan, variant: Variant, in_tiles: bool = False) -> "Inputs":
        """Copies are made only where the kernels can't read the call's own tensors.

        in_tiles: the quantiser writes bf16 numbers too, in whole tiles, on every GPU.
        """
        q, k, v = (x if is_read_as_it_is(x) else row_major(x) for x in (call.q, call.k, call.v))
        order = plan.token_order
        mask = None if call.key_mask is None else whole_tiles(call.key_mask, order)
        ropes = [rope and (rope[0].contiguous(), rope[1].contiguous()) for rope in (call.q_rope, call.k_rope)]
        source = Source(
            q, k, v, call.softmax_scale_log2, *ropes, mask, order, call.norms, call.rotated_block,
            call.rotated_values if variant.has_units else 1,
            in_tiles=in_tiles or variant.target in WITHOUT_TMA,
        )  # fmt: skip
        read = (
            variant.has_bf16 and not call.changes_q,
            variant.has_bf16 and not call.changes_k,
            variant.stores_values(Storage.PLAIN) and source.rotated_values == 1,
        )
        bf16 = tuple(
            bf16_for_tma(x) if is_read and not source.is_copied else None
            for x, is_read in zip((q, k, quantiser.narrowed(v, torch.bfloat16)), read, strict=True)
        )
        return cls(source, call.key_mask, bf16)

    def are_of(self, call: Call) -> bool:
        """Says whether the kernels read the call's own tensors, none of them copied."""
        own = (call.q, call.k, call.v, *tables(call))
        read = (self.source.q, self.source.k, self.source.v, *tables(self.source))
        copies = (x is None or x is y for x, y in zip(self.bf16, own[:3], strict=True))
        return all(x is y for x, y in zip(read, own, strict=True)) and all(copies)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that differ from call to call, each once."""
        source = self.source
        found = [source.q, source.k, source.v, *tables(source), source.key_mask, self.key_mask, *self.bf16]
        return each_once(found)


@dataclass(frozen=True)
class Operands:
    """The operands that the kernels multiply, as they lie in memory.

    encoded: of HIGH and LOW. encoded_means: of MEAN; None without such tiles. k_mean: what was taken from k, float32
    `[B·Hkv, D]`; None for nothing.
    """

    encoded: Encoded
    encoded_means: Encoded | None
    k_mean: torch.Tensor | None
    block_lists: PrecisionMap


def operands_of(
    call: Call,
    inputs: Inputs,
    plan: Plan,
    variant: Variant,
    *,
    wants_lse: bool,
    transposed_v: bool = False,
    is_shared: bool = False,
    inexact_rows: torch.Tensor | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Operands:
    """Launch the statistics, the quantiser and, where content decides of the map, the routing.

    wants_lse: whether the log-sum-exp is written, which needs the scores' offset. transposed_v: as of `encode`.
    is_shared: whether the block lists are the map's `shared` ones. inexact_rows: int32 `[1]`, as of `encode`.
    """
    source = inputs.source
    smooths, has_units = variant.smooths and call.smooth_k, variant.has_units
    known = statistics_of(
        source.k if smooths else None, source.v if has_units else None, source.k_rope, inputs.key_mask, launcher,
        source.norms, call.smooth_v, source.rotated_values,
        registers=80 if variant.target == "sm_80" else None,  # left alone, ptxas spills there to let four share one
    )  # fmt: skip
    needs_v = has_units or source.is_copied or variant.means is not None
    # On sm_90 two programs share a multiprocessor, unless they re-encode rotated blocks, for which they would spill.
    # Elsewhere Triton 3.7 would spill to let two share it, and 3.9 on sm_80 to let four, if they were not told.
    reencodes = any(c and c.storage is Storage.ROW for c in variant.encoded)
    shares = variant.target == "sm_90" and not (call.rotated_block > 1 and reencodes)
    of_other_dims = 80 if variant.target == "sm_80" else None
    registers = of_other_dims if variant.dim != 128 else 64 if shares else 128
    encoded = encode(
        replace(source, v=source.v if needs_v else None), variant.encoded, known, of_means=variant.means,
        amax=quantiser.encoded_amax(call) if variant.has_tensor_scale else (None, None),
        wants_offset=smooths and (wants_lse or variant.has_bf16), transposed_v=transposed_v,
        inexact_rows=inexact_rows, registers=registers, launcher=launcher,
    )  # fmt: skip
    encoded_means = None
    if variant.means is not None:
        encoded_means = _encode_means(
            encoded, source.rotated_block, variant.means, transposed_v, inexact_rows, registers, launcher
        )
    if plan.routing is None:
        block_lists = plan.block_lists(call.q.device, is_shared)
    else:
        block_lists = route_call(
            source, known.mean, plan.routing, call.memory, is_shared, variant.target, launcher
        )
        if variant.means is not None and block_lists.means is None:
            block_lists = replace(block_lists, means=plan.block_lists(call.q.device, is_shared).means)
    return Operands(encoded, encoded_means, known.mean, block_lists)


def _encode_means(
    encoded: Encoded,
    rotated_block: int,
    stored: Stored,
    transposed_v: bool,
    inexact_rows: torch.Tensor | None,
    registers: int | None,
    launcher: Launcher,
) -> Encoded:
    """Encode the means of sub-tiles as MEAN multiplies them; those that are bf16 numbers already stay as they are."""
    k, v, _ = encoded.means
    takes_v = stored.values is not Storage.PLAIN
    amax = None
    if stored.format.has_tensor_scale:
        amax = quantiser.finite_amax(rotate_blocks(k, rotated_block), (-2, -1))
    return encode(
        Source(k=k, v=v if takes_v else None, rotated_block=rotated_block), (stored, None),
        Statistics(v_units=encoded.v_units if takes_v else None), amax=(None, amax),
        transposed_v=transposed_v, inexact_rows=inexact_rows, registers=registers, launcher=launcher,
    )  # fmt: skip


def tables(call: Call | Source) -> tuple[torch.Tensor | None, ...]:
    """Cosines and sines of q and of k, which may be the same tensors, and the weights of their norms."""
    return (*(call.q_rope or ()), *(call.k_rope or ()), *(() if call.norms is None else call.norms.tensors))


def each_once(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(x): x for x in tensors if x is not None}.values())


def _encoded(high: Stored | None, low: Stored | None, means: Stored | None) -> Classes:
    return (means if high is None and means != low else high), low


def whole_tiles(key_mask: torch.Tensor, token_order: torch.Tensor | None) -> torch.Tensor:
    """uint8 `[B, tiles·128]` in the order of slots, 0 past the keys, and where no token stands."""
    if token_order is not None:
        hidden = key_mask.shape[1]  # what −1, or another number that is no token's, finds
        key_mask = F.pad(key_mask, (0, 1))[:, token_order.clamp(-1, hidden)]
    return F.pad(key_mask.to(torch.uint8), (0, -key_mask.shape[-1] % TILE)).contiguous()
