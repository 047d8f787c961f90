"""Runs the fused attention: statistics, quantiser, kernel."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from operator import or_

import torch
import torch.nn.functional as F
import triton

from dma_diffusers.kernels.attention import hopper
from dma_diffusers.kernels.attention.hopper_split import Split
from dma_diffusers.kernels.attention.kernel import attend
from dma_diffusers.kernels.attention.strides import bf16_for_tma, is_read_as_it_is, row_major
from dma_diffusers.kernels.attention.tuning import Tuning, tuning
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher, multiprocessors
from dma_diffusers.kernels.device.recording import Recorder, Recording
from dma_diffusers.kernels.formats import rotate_blocks
from dma_diffusers.kernels.lowerings import (
    TCGEN05_ARCHITECTURES,
    WITHOUT_TMA,
    Storage,
    architecture,
    named,
)
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.quantiser.launch import (
    Encoded,
    Source,
    Statistics,
    encode,
    statistics_of,
)
from dma_diffusers.kernels.quantiser.operands import (
    Classes,
    Operand,
    Stored,
    padded_dim,
    row_descriptor,
    scale_descriptor,
)
from dma_diffusers.kernels.routing.launch import pooled, route
from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.precision_map import SHARED_ROWS, PrecisionMap


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
        """The variant for a call. target: None for the architecture of the call's device."""
        target, dim = target or architecture(call.q.device), padded_dim(call.q.shape[-1])
        high, low, means = (
            precision and Stored.by(named(lowering), precision) for precision in plan.used(precisions)
        )
        encoded = _encoded(high, low, means)
        tuned = tuning(target, dim, tuple(c and c.scales for c in encoded), encoded[1] and encoded[1].values)
        tuned = tuned if plan.skip_below is None else tuned.skipping
        return cls((high, low), means, tuned, target, dim, lowering == "faithful")

    @property
    def encoded(self) -> Classes:
        """The classes that q, k and v are encoded for: those with tiles, and the one that MEAN shares."""
        return _encoded(*self.classes, self.means)

    @property
    def in_gluon(self) -> bool:
        """Says whether hopper.py runs it: it knows no tensor scales and one pair of P·V, and needs a GPU."""
        high, low = self.encoded
        return (
            self.tuned.slots is not None
            and not self.has_tensor_scale
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

    def stores_values(self, storage: Storage) -> bool:
        """Says whether a class has V in this storage."""
        return any(c and c.values is storage for c in self.encoded)


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
    def of(cls, call: Call, plan: Plan, variant: Variant) -> "Inputs":
        """Copies are made only where the kernels can't read the call's own tensors."""
        q, k, v = (x if is_read_as_it_is(x) else row_major(x) for x in (call.q, call.k, call.v))
        order = plan.token_order
        mask = None if call.key_mask is None else _whole_tiles(call.key_mask, order)
        ropes = [rope and (rope[0].contiguous(), rope[1].contiguous()) for rope in (call.q_rope, call.k_rope)]
        source = Source(
            q, k, v, call.softmax_scale_log2, *ropes, mask, order, call.norms, call.rotated_block,
            in_tiles=variant.target in WITHOUT_TMA,
        )  # fmt: skip
        read = (
            variant.has_bf16 and not call.changes_q,
            variant.has_bf16 and not call.changes_k,
            variant.stores_values(Storage.PLAIN),
        )
        bf16 = tuple(
            bf16_for_tma(x) if is_read and not source.is_copied else None
            for x, is_read in zip((q, k, quantiser.narrowed(v, torch.bfloat16)), read, strict=True)
        )
        return cls(source, call.key_mask, bf16)

    def are_of(self, call: Call) -> bool:
        """Says whether the kernels read the call's own tensors, none of them copied."""
        own = (call.q, call.k, call.v, *_tables(call))
        read = (self.source.q, self.source.k, self.source.v, *_tables(self.source))
        copies = (x is None or x is y for x, y in zip(self.bf16, own[:3], strict=True))
        return all(x is y for x, y in zip(read, own, strict=True)) and all(copies)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that differ from call to call, each once."""
        source = self.source
        found = [source.q, source.k, source.v, *_tables(source), source.key_mask, self.key_mask, *self.bf16]
        return _each_once(found)


@dataclass(frozen=True)
class Outputs:
    """The results of a call: output `[B, H, Sq, D]`, natural log-sum-exp `[B, H, Sq]`, inexact rows `[1]`."""

    out: torch.Tensor
    lse: torch.Tensor | None
    inexact_rows: torch.Tensor | None

    @classmethod
    def empty(cls, call: Call, variant: Variant, return_lse: bool) -> "Outputs":
        batch, heads, length, head_dim = call.q.shape
        device, row = call.q.device, heads * head_dim
        strides = (length * row, head_dim, row, 1)  # as [B, S, H, D], which is what models go on with
        out = torch.empty_strided(call.q.shape, strides, dtype=call.q.dtype, device=device)
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=device) if return_lse else None
        inexact_rows = torch.zeros(1, dtype=torch.int32, device=device) if variant.counts_inexact else None
        return cls(out, lse, inexact_rows)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in (self.out, self.lse, self.inexact_rows) if x is not None]


def attention(
    call: Call,
    plan: Plan,
    precisions: Precisions,
    *,
    lowering: str = "native",
    return_lse: bool = True,
    skipped: torch.Tensor | None = None,
    target: str | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The reference's call on the fused kernel, with the plan on q's device.

    Only the classes that the map has are encoded and compiled. The plan's token order is contiguous, and not checked:
    numbers that are no token's are as −1, tokens that it doesn't name are undefined in the output; the fine mask or the
    key mask hides such slots.
    lowering: the name of one that has a kernel. target: the architecture to tune for, that of q's device by default.
    skipped: int32 `[B, H]`, to which the tiles are added that the softmax skipped, as the reference counts them.
    Returns the output, the natural log-sum-exp (None unless wanted), and how many rows of q and k are not what
    their format says, because e4m3 can't hold them (int32 `[1]`; None where that can't happen).
    """
    variant = Variant.of(call, plan, precisions, lowering, target)
    outputs = Outputs.empty(call, variant, return_lse)
    _launch(call, Inputs.of(call, plan, variant), outputs, plan, variant, skipped, launcher)
    return outputs.out, outputs.lse, outputs.inexact_rows


class Prepared:
    """One kind of call, ready to be launched: its shapes, strides, dtypes, plan and precisions stay as they are.

    The first call launches as `attention` does and is recorded; later ones launch the recording. Calls of which torch
    computes a part on the way (formats with a tensor scale) are launched as `attention` does.
    """

    def __init__(self, call: Call, plan: Plan, precisions: Precisions, lowering: str, return_lse: bool):
        self._plan, self._return_lse = plan, return_lse
        self._variant = Variant.of(call, plan, precisions, lowering)
        self._records = call.q.is_cuda and not triton.knobs.runtime.interpret
        self._reads_own = False  # whether the recorded kernels read the call's own tensors
        self._recording: Recording | None = None

    def attention(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The call's result, as of the function `attention`."""
        outputs = Outputs.empty(call, self._variant, self._return_lse)
        if self._reads_own:
            addresses = _addresses((*_own_tensors(call, self._plan), *outputs.tensors))
            if addresses is not None:
                self._launch_again(call.q.device, addresses)
                return outputs.out, outputs.lse, outputs.inexact_rows
        inputs = Inputs.of(call, self._plan, self._variant)
        tensors = inputs.tensors
        is_own = inputs.are_of(call)
        addresses = _addresses((*tensors, *outputs.tensors))
        if not self._records or addresses is None or (self._recording and is_own != self._reads_own):
            _launch(call, inputs, outputs, self._plan, self._variant)
        elif self._recording:
            self._launch_again(call.q.device, addresses)
        else:
            recorder = Recorder((*tensors, *outputs.tensors))
            _launch(call, inputs, outputs, self._plan, self._variant, launcher=recorder)
            try:
                self._recording, self._reads_own = Recording(recorder, self._plan.tensors), is_own
            except ValueError:
                self._records = False
        return outputs.out, outputs.lse, outputs.inexact_rows

    def _launch_again(self, device: torch.device, addresses: tuple[int, ...]) -> None:
        if device.index == torch.cuda.current_device():
            self._recording.launch(device, addresses)
        else:
            with torch.cuda.device(device):
                self._recording.launch(device, addresses)


def _own_tensors(call: Call, plan: Plan) -> list[torch.Tensor]:
    """The call's tensors where kernels can read them as they are, as `Inputs.tensors` would give them."""
    mask = None if call.key_mask is None else _whole_tiles(call.key_mask, plan.token_order)
    return _each_once([call.q, call.k, call.v, *_tables(call), mask, call.key_mask])


def _tables(call: Call | Source) -> tuple[torch.Tensor | None, ...]:
    """Cosines and sines of q and of k, which may be the same tensors, and the weights of their norms."""
    return (*(call.q_rope or ()), *(call.k_rope or ()), *(() if call.norms is None else call.norms.tensors))


def _each_once(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return list({id(x): x for x in tensors if x is not None}.values())


def _addresses(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...] | None:
    """The addresses of tensors; None if 16 doesn't divide one of them, for which other kernels are compiled."""
    addresses = tuple([x.data_ptr() for x in tensors])
    return addresses if functools.reduce(or_, addresses) % 16 == 0 else None


def _launch(
    call: Call,
    inputs: Inputs,
    outputs: Outputs,
    plan: Plan,
    variant: Variant,
    skipped: torch.Tensor | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> None:
    """Launch all kernels of a call."""
    source, tuned, dim = inputs.source, variant.tuned, variant.dim
    smooths, is_channel = variant.smooths and call.smooth_k, variant.stores_values(Storage.CHANNEL)
    known = statistics_of(
        source.k if smooths else None, source.v if is_channel else None, source.k_rope, inputs.key_mask, launcher,
        source.norms, call.smooth_v,
    )  # fmt: skip
    needs_v = is_channel or source.is_copied or variant.means is not None
    # On sm_90 two programs share a multiprocessor, unless they sum means too, or re-encode rotated blocks, for which
    # they would spill. Elsewhere Triton 3.7 would spill to let two share it, if it were not told.
    reencodes = any(c and c.storage is Storage.ROW for c in variant.encoded)
    shares = (
        variant.target == "sm_90" and variant.means is None and not (call.rotated_block > 1 and reencodes)
    )
    registers = None if dim != 128 else 64 if shares else 128
    encoded = encode(
        replace(source, v=source.v if needs_v else None), variant.encoded, known, of_means=variant.means,
        amax=quantiser.encoded_amax(call) if variant.has_tensor_scale else (None, None),
        wants_offset=smooths and (outputs.lse is not None or variant.has_bf16), transposed_v=tuned.transposed_v,
        inexact_rows=outputs.inexact_rows, registers=registers, launcher=launcher,
    )  # fmt: skip
    encoded_means = None
    if variant.means is not None:
        encoded_means = _encode_means(encoded, source.rotated_block, outputs, variant, registers, launcher)
    if plan.routing is None:
        block_lists = plan.block_lists(call.q.device, variant.in_gluon)
    else:
        pools = pooled(source, known.mean, launcher)
        block_lists = route(pools, plan.routing, variant.in_gluon, launcher)
        if variant.means is not None and block_lists.means is None:
            of_map = plan.block_lists(call.q.device, variant.in_gluon)
            block_lists = replace(block_lists, means=of_map.means)
    _attend(
        inputs, encoded, encoded_means, block_lists, outputs, call.is_causal, plan, variant, skipped, launcher
    )


def _encode_means(
    encoded: Encoded,
    rotated_block: int,
    outputs: Outputs,
    variant: Variant,
    registers: int | None,
    launcher: Launcher,
) -> Encoded:
    """Encode the means of sub-tiles as MEAN multiplies them; those that are bf16 numbers already stay as they are."""
    k, v, _ = encoded.means
    takes_v = variant.means.values is Storage.CHANNEL
    amax = None
    if variant.means.format.has_tensor_scale:
        amax = quantiser.finite_amax(rotate_blocks(k, rotated_block), (-2, -1))
    return encode(
        Source(k=k, v=v if takes_v else None, rotated_block=rotated_block), (variant.means, None),
        Statistics(v_units=encoded.v_units if takes_v else None), amax=(None, amax),
        transposed_v=variant.tuned.transposed_v, inexact_rows=outputs.inexact_rows, registers=registers,
        launcher=launcher,
    )  # fmt: skip


def _attend(
    inputs: Inputs,
    encoded: Encoded,
    encoded_means: Encoded | None,
    block_lists: PrecisionMap,
    outputs: Outputs,
    is_causal: bool,
    plan: Plan,
    variant: Variant,
    skipped: torch.Tensor | None,
    launcher: Launcher,
) -> None:
    """Launch the attention kernel on what the quantiser wrote."""
    source, tuned, dim = inputs.source, variant.tuned, variant.dim
    q_length, k_length, token_count = source.lengths
    (batch, heads, _, head_dim), kv_heads = source.q.shape, source.k.shape[1]
    bounds, fine_mask = block_lists.bounds, plan.fine_mask
    bf16_q, bf16_k, bf16_v = inputs.bf16
    operands = [
        argument
        for stored, q, k in zip(variant.classes, encoded.q, encoded.k, strict=True)
        for argument in _operands(
            stored, q or Operand(bf16_q), k or Operand(bf16_k), bf16_v, encoded.values, variant
        )
    ]
    arguments = (
        *operands, encoded.v_units, source.softmax_scale_log2, encoded.offset, block_lists.indices, bounds,
        source.key_mask, fine_mask and fine_mask.packed, source.token_order, outputs.out, outputs.lse,
        heads, kv_heads, q_length, k_length, token_count, fine_mask and fine_mask.guards, head_dim,
        *(bounds.stride(d) // 3 if bounds.shape[d] > 1 else 0 for d in (0, 1)), block_lists.indices.shape[-1],
        *outputs.out.stride()[:3], None if plan.skip_below is None else math.log2(plan.skip_below), skipped,
    )  # fmt: skip
    stored = (*variant.classes, variant.means)
    multiplied = chain(*(each.multiplied if each else [None] * 4 for each in stored))
    of_means = [None] * 11
    if variant.means is not None:
        k_means, v_means, log_counts = encoded.means
        q, means = encoded.q[variant.encoded.index(variant.means)], block_lists.means
        of_means = [
            *_operands(
                variant.means, q or Operand(bf16_q), encoded_means.k[0] or Operand(k_means), v_means,
                encoded_means.values, variant,
            ),
            means, log_counts,
            *(means.stride(d) // means.shape[-1] if means.shape[d] > 1 else 0 for d in (0, 1)),
        ]  # fmt: skip
    if variant.in_gluon:
        device, blocks = source.q.device, -(-q_length // hopper.QUERIES) * batch * heads
        split = _split(block_lists, blocks, is_causal, plan, variant, device)
        launcher(
            hopper.attend_hopper, (split.programs if split else blocks,), *arguments,
            *_pieces(split, dim, device, launcher), *of_means, *multiplied,
            CAUSAL=is_causal, MASKS_ALL=plan.masks_all, D=dim, SLOTS=tuned.slots, REGISTERS=tuned.registers,
            num_warps=tuned.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return
    is_tcgen05 = variant.target in TCGEN05_ARCHITECTURES
    loads_mask = source.key_mask is not None or fine_mask is not None
    blocks = -(-q_length // tuned.rows) * batch * heads
    most = blocks if tuned.programs is None else tuned.programs * multiprocessors(source.q.device)
    launcher(
        attend, (min(blocks, most),), *arguments, blocks, 0.0, *of_means, *multiplied,
        CAUSAL=is_causal, MASKS_ALL=plan.masks_all, V_TRANSPOSED=tuned.transposed_v, ROWS=tuned.rows, D=dim,
        EXP_SHARE=tuned.exp_share, TCGEN05=is_tcgen05,
        UNIT_SCALES=tuned.unit_scales, KEYS=tuned.keys, STAGES=tuned.stages,
        MASKED_STAGES=tuned.stages if loads_mask and not is_causal else tuned.masked_stages,
        # Where tiles may be skipped as well, sm_120 would spill with more.
        MEAN_STAGES=tuned.masked_stages if plan.skip_below is None or is_tcgen05 else 1,
        num_warps=tuned.warps,
        enable_fp_fusion=True,
        # Variants that may skip tiles or take means would spill.
        maxnreg=None if tuned.slots or variant.means or plan.skip_below is not None else tuned.registers,
    )  # fmt: skip


def _split(
    lists: PrecisionMap, blocks: int, is_causal: bool, plan: Plan, variant: Variant, device: torch.device
) -> Split | None:
    """Splits the last round where that gains; None for kinds of calls that are never split (hopper.md).

    In causal calls, and those that skip tiles, a list of another length or order would suffer.
    """
    gains = variant.dim == 128 and None in variant.classes and variant.means is None
    if not gains or is_causal or plan.skip_below is not None:
        return None
    return Split.of(blocks, lists.indices.shape[-1] - 1, multiprocessors(device))


def _pieces(split: Split | None, dim: int, device: torch.device, launcher: Launcher) -> tuple:
    """The kernel's arguments: room for the sums of pieces, counters of those that finished, `whole` and `pieces`.

    A kind of call that may be split has room even where it isn't, so that all its lengths run one compiled kernel.
    """
    if split is None:
        return None, None, 0, 0
    queries = max(split.rest, 1) * hopper.QUERIES
    records = launcher.empty((queries * split.pieces, dim + 2), torch.float32, device)
    finished = launcher.counters((queries // SHARED_ROWS,), device)
    return records, finished, split.whole, split.pieces


def _operands(
    stored: Stored | None,
    q: Operand,
    k: Operand,
    bf16_v: torch.Tensor | None,
    values: dict[Storage, torch.Tensor],
    variant: Variant,
) -> list:
    """Elements, scales and tensor scale of q and of k, and V, as the kernel takes those of one class.

    bf16_v: V where it is read in bf16 and `values` has none such.
    """
    if stored is None:
        return [None] * 7
    descriptor = hopper.descriptor if variant.in_gluon else row_descriptor
    if variant.target in WITHOUT_TMA:
        descriptor = _pointer
    columns, dim, tuned = stored.columns(variant.dim), variant.dim, variant.tuned
    value = values.get(stored.values, bf16_v)
    is_transposed = stored.values is Storage.CHANNEL and tuned.transposed_v
    return [
        descriptor(q.elements, tuned.rows, columns), q.scales, q.tensor_scale,
        descriptor(k.elements, tuned.keys, columns),
        scale_descriptor(k.scales) if stored.storage is Storage.BLOCK else k.scales, k.tensor_scale,
        descriptor(value, *((dim, tuned.keys) if is_transposed else (tuned.keys, dim))),
    ]  # fmt: skip


def _pointer(x: torch.Tensor, *_: int) -> torch.Tensor:
    """The tensor itself, which the quantiser wrote in whole tiles."""
    return x


def _encoded(high: Stored | None, low: Stored | None, means: Stored | None) -> Classes:
    return (means if high is None and means != low else high), low


def _whole_tiles(key_mask: torch.Tensor, token_order: torch.Tensor | None) -> torch.Tensor:
    """uint8 `[B, tiles·128]` in the order of slots, 0 past the keys, and where no token stands."""
    if token_order is not None:
        hidden = key_mask.shape[1]  # what −1, or another number that is no token's, finds
        key_mask = F.pad(key_mask, (0, 1))[:, token_order.clamp(-1, hidden)]
    return F.pad(key_mask.to(torch.uint8), (0, -key_mask.shape[-1] % TILE)).contiguous()
