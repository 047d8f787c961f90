"""Runs the attention's backward: the forward's statistics and quantiser once more, then the kernels of gradients."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.attention.encoding import Inputs, Operands, Variant, operands_of
from dma_diffusers.kernels.backward import kernel
from dma_diffusers.kernels.backward.reference import Gradients, empty_gradients, through_rope, without_hidden
from dma_diffusers.kernels.backward.tuning import Tuning, tuning
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.formats import rotate_back
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser.launch import Encoded
from dma_diffusers.kernels.quantiser.operands import Operand, Stored, row_descriptor
from dma_diffusers.kernels.tiling.layout import TILE, tiles


@dataclass(frozen=True)
class Multiplied:
    """One class's operands, as the kernels multiply them: the forward's, in bf16.

    q: `[B, H, tiles·128, D]`, k and v `[B, Hkv, tiles·128, D]`. lse: float32 `[B·H·tiles·128]`, in base 2. factor: of
    the products, of which exponents are less the lse. is_raw: whether the keys are not smoothed. rounds: whether the
    forward had its probabilities in e4m3.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lse: torch.Tensor
    factor: float
    is_raw: bool
    rounds: bool

    @property
    def name(self) -> str:
        """The class's constant, as `kernel.query_gradients` has it."""
        return "raw" if self.is_raw else "smoothed"


def gradients(
    call: Call,
    plan: Plan,
    precisions: Precisions,
    out: torch.Tensor,
    lse: torch.Tensor,
    out_gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None = None,
    *,
    lowering: str = "native",
    target: str | None = None,
    tuned: Tuning | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Gradients:
    """The reference's gradients by the kernels, with the plan on q's device; the same inputs give the same bits.

    out, lse: the forward's, of the same call. lowering, target: as of the forward's launch. tuned: None for the table's
    variant. Raises ValueError for a call that has no backward, as the reference does.
    """
    call = without_hidden(call)
    variant = _of_backward(Variant.of(call, plan, precisions, lowering, target))
    inputs = Inputs.of(call, plan, variant, in_tiles=True)
    operands = operands_of(call, inputs, plan, variant, wants_lse=True, launcher=launcher)
    q_length, k_length, token_count = inputs.source.lengths
    (batch, heads, _, head_dim), kv_heads, dim = call.q.shape, call.k.shape[1], variant.dim
    device, rows = call.q.device, batch * heads * tiles(q_length) * TILE
    gradient = launcher.empty((batch, heads, tiles(q_length) * TILE, dim), torch.bfloat16, device)
    delta, lse_2 = (launcher.empty((rows,), torch.float32, device) for _ in range(2))
    offset = operands.encoded.offset
    smoothed_lse_2 = lse_2 if offset is None else launcher.empty((rows,), torch.float32, device)
    lse_gradient = None if lse_gradient is None else lse_gradient.contiguous()
    out_gradient, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (out_gradient, out))
    launcher(
        kernel.prepare, (batch * heads * tiles(q_length),),
        out_gradient, out, lse.contiguous(), lse_gradient, offset,
        plan.token_order, gradient, delta, lse_2, smoothed_lse_2, heads, q_length, token_count,
        *out_gradient.stride()[:3], *out.stride()[:3], HEAD_DIM=head_dim, D=dim, num_warps=8,
    )  # fmt: skip
    high, low = (
        stored and _multiplied(stored, q, k, operands.encoded, call, lse_2, smoothed_lse_2)
        for stored, q, k in zip(variant.classes, operands.encoded.q, operands.encoded.k, strict=True)
    )
    means = _of_means(operands, variant, call, lse_2, smoothed_lse_2)
    classes = [each for each in (high, low, means) if each]
    lists, transposed = operands.block_lists, plan.transposed(operands.block_lists, tiles(k_length))
    tuned = tuned or tuning(variant.target, dim)
    descriptor = _pointer if tuned.by_pointers else row_descriptor
    found = empty_gradients(call)
    fine_mask = plan.fine_mask
    masks = inputs.source.key_mask, fine_mask and fine_mask.packed, plan.token_order
    sizes = heads, kv_heads, q_length, k_length, token_count, fine_mask and fine_mask.guards, head_dim
    flags = {"CAUSAL": call.is_causal, "MASKS_ALL": plan.masks_all, "D": dim}

    blocks = tuned.of_queries
    log_counts = operands.encoded.means and operands.encoded.means.log_counts
    loses_mean = any(each.is_raw for each in (high, low) if each) and operands.k_mean is not None
    launcher(
        kernel.query_gradients, (-(-q_length // blocks.rows) * batch * heads,),
        *(
            argument for each in (high, low, means)
            for argument in _arguments(each, blocks.rows, blocks.keys, descriptor)
        ),
        descriptor(gradient, blocks.rows, dim), delta, lse_gradient, operands.k_mean if loses_mean else None,
        call.softmax_scale_log2, lists.indices, lists.bounds, lists.means, log_counts, *masks, found.q, *sizes,
        *_strides(lists.bounds), lists.indices.shape[-1], *_strides(lists.means), *found.q.stride()[:3],
        HIGH=high and high.name, LOW=low and low.name, MEAN=means is not None,
        CORRECTS=any(each.rounds for each in classes), **flags,
        ROWS=blocks.rows, KEYS=blocks.keys, STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    blocks = tuned.of_keys
    of_means = [None, None]
    if means is not None:
        shape = (batch * kv_heads, means.k.shape[2], dim)
        of_means = [launcher.empty(shape, torch.float32, device) for _ in range(2)]
        launcher(
            kernel.mean_gradients, (batch * kv_heads * means.k.shape[2] // blocks.keys,),
            *_arguments(means, blocks.rows, blocks.keys, descriptor), descriptor(gradient, blocks.rows, dim), delta,
            lists.means, log_counts, *of_means, *sizes[:4], *_strides(lists.means),
            ROUNDS=means.rounds, ROWS=blocks.rows, KEYS=blocks.keys, D=dim, STAGES=blocks.stages,
            num_warps=blocks.warps,
        )  # fmt: skip
    launcher(
        kernel.key_gradients, (-(-k_length // blocks.keys) * batch * kv_heads,),
        *(argument for each in (high, low) for argument in _arguments(each, blocks.rows, blocks.keys, descriptor)),
        descriptor(gradient, blocks.rows, dim), delta, transposed.indices, transposed.bounds,
        *of_means, *masks, found.k, found.v, *sizes,
        *_strides(transposed.bounds), transposed.indices.shape[-1], *found.k.stride()[:3],
        HIGH=high and high.name, HIGH_ROUNDS=bool(high and high.rounds),
        LOW=low and low.name, LOW_ROUNDS=bool(low and low.rounds), **flags,
        ROWS=blocks.rows, KEYS=blocks.keys, STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return through_rope(found, call)


def _of_backward(variant: Variant) -> Variant:
    """The variant with block formats as plain bf16 numbers, which hold all of them exactly."""

    def stored(each: Stored | None) -> Stored | None:
        is_block = each is not None and each.storage in (Storage.BLOCK, Storage.ROW)
        return replace(each, storage=Storage.PLAIN) if is_block else each

    high, low = map(stored, variant.classes)
    return replace(variant, classes=(high, low), means=stored(variant.means))


def _multiplied(
    stored: Stored,
    q: Operand,
    k: Operand,
    encoded: Encoded,
    call: Call,
    lse_2: torch.Tensor,
    smoothed_lse_2: torch.Tensor,
    v: torch.Tensor | None = None,
) -> Multiplied:
    """v: in bf16, where `encoded` has none such."""
    is_raw, rounds = stored.format.name == "bf16", stored.values is Storage.CHANNEL
    if v is None:
        v = _values(encoded) if rounds else encoded.values[Storage.PLAIN]
    factor, lse = (call.softmax_scale_log2, lse_2) if is_raw else (1.0, smoothed_lse_2)
    return Multiplied(_numbers(q, stored, call), _numbers(k, stored, call), v, lse, factor, is_raw, rounds)


def _of_means(
    operands: Operands, variant: Variant, call: Call, lse_2: torch.Tensor, smoothed_lse_2: torch.Tensor
) -> Multiplied | None:
    """The operands of MEAN tiles, in whole tiles of means; their keys are smoothed in every format."""
    if variant.means is None:
        return None
    stored, encoded = variant.means, operands.encoded
    q = encoded.q[variant.encoded.index(stored)]
    of_means = operands.encoded_means
    k = of_means.k[0] or Operand(_whole(encoded.means.k))
    v = None if stored.values is Storage.CHANNEL else _whole(encoded.means.v)
    found = _multiplied(stored, q, k, of_means, call, lse_2, smoothed_lse_2, v)
    return replace(found, lse=smoothed_lse_2, is_raw=False)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """x `[.., S, D]` with zeros up to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % TILE))


def _numbers(operand: Operand, stored: Stored, call: Call) -> torch.Tensor:
    """The numbers of an operand in bf16, rounded where it can't hold them, without the rotation of channels."""
    x, scales = operand.elements, operand.scales
    if operand.tensor_scale is not None:
        scales = operand.tensor_scale.flatten()
    if scales is not None:
        elements = x.bfloat16() if x.dtype is torch.float8_e4m3fn else x  # which torch multiplies by no other
        x = (elements.view(len(scales), -1) * scales[:, None]).view(x.shape)
    if call.rotated_block > 1 and stored.format.name != "bf16":
        head_dim = call.q.shape[-1]
        x = F.pad(rotate_back(x[..., :head_dim], call.rotation), (0, x.shape[-1] - head_dim))
    return x.bfloat16()


def _values(encoded: Encoded) -> torch.Tensor:
    """The numbers that V has in e4m3, in bf16."""
    v = encoded.values[Storage.CHANNEL]
    scale, mean = (x.view(*v.shape[:2], 1, -1) for x in encoded.v_units.unbind(1))
    return torch.addcmul(mean, v.float(), scale).bfloat16()


def _arguments(multiplied: Multiplied | None, rows: int, keys: int, descriptor) -> list:
    """The kernels' arguments of one class."""
    if multiplied is None:
        return [None] * 5
    dim = multiplied.q.shape[-1]
    return [
        descriptor(multiplied.q, rows, dim), descriptor(multiplied.k, keys, dim), descriptor(multiplied.v, keys, dim),
        multiplied.lse, multiplied.factor,
    ]  # fmt: skip


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """The rows from one batch entry, and from one head, to the next in `bounds` or `means`; 0 where all share them."""
    if x is None:
        return 0, 0
    return tuple(x.stride(d) // x.shape[-1] if x.shape[d] > 1 else 0 for d in (0, 1))


def _pointer(x: torch.Tensor, *_: int) -> torch.Tensor:
    """The tensor itself, of whole tiles."""
    return x
