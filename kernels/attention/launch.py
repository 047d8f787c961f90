"""Runs the fused attention: statistics, quantiser, kernel."""

import functools
import math
from dataclasses import dataclass
from itertools import chain
from operator import or_

import torch
import triton

from dma_diffusers.kernels.attention import hopper
from dma_diffusers.kernels.attention.encoding import (
    Inputs,
    Operands,
    Variant,
    each_once,
    operands_of,
    tables,
    whole_tiles,
)
from dma_diffusers.kernels.attention.hopper_split import Split
from dma_diffusers.kernels.attention.kernel import attend
from dma_diffusers.kernels.attention.turn_back import turn_back
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher, multiprocessors
from dma_diffusers.kernels.device.recording import Recorder, Recording
from dma_diffusers.kernels.lowerings import TCGEN05_ARCHITECTURES, WITHOUT_TMA, Storage
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser.operands import Operand, Stored, row_descriptor, scale_descriptor
from dma_diffusers.kernels.tiling.precision_map import SHARED_ROWS, PrecisionMap


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
            addresses = _addresses((*_own_tensors(call, self._plan), *_remembered(call), *outputs.tensors))
            if addresses is not None:
                self._launch_again(call.q.device, addresses)
                return outputs.out, outputs.lse, outputs.inexact_rows
        inputs = Inputs.of(call, self._plan, self._variant)
        tensors = (*inputs.tensors, *_remembered(call))
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


def _remembered(call: Call) -> list[torch.Tensor]:
    return [] if call.memory is None else call.memory.tensors


def _own_tensors(call: Call, plan: Plan) -> list[torch.Tensor]:
    """The call's tensors where kernels can read them as they are, as `Inputs.tensors` would give them."""
    mask = None if call.key_mask is None else whole_tiles(call.key_mask, plan.token_order)
    return each_once([call.q, call.k, call.v, *tables(call), mask, call.key_mask])


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
    operands = operands_of(
        call, inputs, plan, variant, wants_lse=outputs.lse is not None, transposed_v=variant.tuned.transposed_v,
        is_shared=variant.in_gluon, inexact_rows=outputs.inexact_rows, launcher=launcher,
    )  # fmt: skip
    _attend(inputs, operands, outputs, call.is_causal, plan, variant, skipped, launcher)
    if inputs.source.rotated_values > 1:
        turn_back(outputs.out, inputs.source.rotated_values, launcher)


def _attend(
    inputs: Inputs,
    operands: Operands,
    outputs: Outputs,
    is_causal: bool,
    plan: Plan,
    variant: Variant,
    skipped: torch.Tensor | None,
    launcher: Launcher,
) -> None:
    """Launch the attention kernel on what the quantiser wrote."""
    source, tuned, dim = inputs.source, variant.tuned, variant.dim
    encoded, encoded_means, block_lists = operands.encoded, operands.encoded_means, operands.block_lists
    q_length, k_length, token_count = source.lengths
    (batch, heads, _, head_dim), kv_heads = source.q.shape, source.k.shape[1]
    bounds, fine_mask = block_lists.bounds, plan.fine_mask
    bf16_q, bf16_k, bf16_v = inputs.bf16
    of_classes = [
        argument
        for stored, q, k in zip(variant.classes, encoded.q, encoded.k, strict=True)
        for argument in _operands(
            stored, q or Operand(bf16_q), k or Operand(bf16_k), bf16_v, encoded.values, variant
        )
    ]
    arguments = (
        *of_classes, encoded.v_units, source.softmax_scale_log2, encoded.offset, block_lists.indices, bounds,
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
        COUNTS=_counts(variant, plan),
        num_warps=tuned.warps,
        enable_fp_fusion=True,
        # Variants that may skip tiles or take means would spill.
        maxnreg=None if tuned.slots or variant.means or plan.skip_below is not None else tuned.registers,
    )  # fmt: skip


def _counts(variant: Variant, plan: Plan) -> int:
    """The columns of ones by which the MMA sums the probabilities: as few as it takes, 0 where registers sum them.

    A head of 256 channels leaves them no tensor memory. sm_90 would spill with them in some variants, and before
    tcgen05 so would those that may skip tiles.
    """
    if variant.target in TCGEN05_ARCHITECTURES:
        return 16 if variant.dim <= 128 else 0
    return 0 if variant.target == "sm_90" or plan.skip_below is not None else 8


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
