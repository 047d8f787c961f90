"""Runs the attention's backward: the forward's statistics and quantiser once more, then the kernels of gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from dma_diffusers.kernels.attention.encoding import Inputs, Operands, Variant, operands_of
from dma_diffusers.kernels.attention.turn_back import turn_back
from dma_diffusers.kernels.backward import kernel
from dma_diffusers.kernels.backward.int8 import is_in_int8
from dma_diffusers.kernels.backward.reference import (
    Gradients,
    check,
    empty_gradients,
    through_rope,
    without_hidden,
)
from dma_diffusers.kernels.backward.tuning import Blocks, Tuning, tuning
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser.launch import Encoded
from dma_diffusers.kernels.quantiser.operands import Operand, Stored, row_descriptor
from dma_diffusers.kernels.tiling.layout import TILE, tiles


class Scaled(NamedTuple):
    """The scales of q and k in INT8, float32 `[B·H·tiles·128]` and `[B·Hkv·tiles]`, and both transposed, `[.., D, S]`.

    q_scales: 0 for a row of zeros, which would else have a scale of 1 and hide the rest of dS.
    """

    q_scales: torch.Tensor
    k_scales: torch.Tensor
    transposed_q: torch.Tensor
    transposed_k: torch.Tensor

    @classmethod
    def of(cls, q: Operand, k: Operand) -> "Scaled":
        """Returns the scales of operands that the quantiser wrote."""
        q_scales = q.scales * q.elements.any(-1).flatten()
        return cls(q_scales, k.scales, *(x.elements.mT.contiguous() for x in (q, k)))


@dataclass(frozen=True)
class Multiplied:
    """One class's operands, as the kernels multiply them: the forward's, in bf16, or with `scaled` in INT8.

    q: `[B, H, tiles·128, D]`, k and v `[B, Hkv, tiles·128, D]`. lse: float32 `[B·H·tiles·128]`, in base 2. factor: of
    the products, of which exponents are less the lse. is_raw: whether the keys are not smoothed. rounds: whether
    probabilities are in e4m3, as the forward had them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lse: torch.Tensor
    factor: float
    is_raw: bool
    rounds: bool
    scaled: Scaled | None

    @property
    def name(self) -> str:
        """The class's constant, as `kernel.query_gradients` has it."""
        return "raw" if self.is_raw else "smoothed"


Classes = tuple[Multiplied | None, Multiplied | None, Multiplied | None]
"""The operands of HIGH, LOW and MEAN; None for a class without tiles."""


class Results(NamedTuple):
    """The results of the forward, output and log-sum-exp, and their gradients; None for one that there is not."""

    out: torch.Tensor
    lse: torch.Tensor
    out_gradient: torch.Tensor
    lse_gradient: torch.Tensor | None


class Rows(NamedTuple):
    """The tensors that the kernels read of each row, in the order of slots, as `kernel.prepare` has them."""

    gradient: torch.Tensor
    int8_gradient: torch.Tensor | None
    gradient_scales: torch.Tensor | None
    delta: torch.Tensor
    lse_2: torch.Tensor
    smoothed_lse_2: torch.Tensor


def gradients(
    call: Call,
    plan: Plan,
    precisions: Precisions,
    out: torch.Tensor,
    lse: torch.Tensor,
    out_gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None = None,
    *,
    products: str = "bf16",
    lowering: str = "native",
    target: str | None = None,
    tuned: Tuning | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Gradients:
    """The reference's gradients by the kernels, with the plan on q's device; the same inputs give the same bits.

    out, lse: the forward's, of the same call. products: as in the reference, whose `at_once` is that of the tuning.
    lowering, target: as of the forward's launch. tuned: None for the table's
    variant. Raises ValueError for a call that has no backward, as the reference does.
    """
    check(call, plan)
    call = without_hidden(call)
    variant = _of_backward(Variant.of(call, plan, precisions, lowering, target))
    inputs = Inputs.of(call, plan, variant, in_tiles=True)
    operands = operands_of(call, inputs, plan, variant, wants_lse=True, launcher=launcher)
    if lse_gradient is not None:
        # A row that sees no key has a log-sum-exp of −inf, which depends on nothing.
        lse_gradient = lse_gradient.where(lse > -math.inf, 0).contiguous()
    results = Results(out, lse, out_gradient, lse_gradient)
    in_int8 = any(each and is_in_int8(each.format.name, products) for each in variant.encoded)
    rows = _rows(results, inputs, operands.encoded.offset, variant, in_int8, launcher)
    high, low = (
        stored and _multiplied(stored, q, k, operands.encoded, call, rows, products, launcher)
        for stored, q, k in zip(variant.classes, operands.encoded.q, operands.encoded.k, strict=True)
    )
    classes = high, low, _of_means(operands, variant, call, rows, products, launcher)
    if inputs.source.rotated_values > 1:
        turned = partial(_turned_back, block=inputs.source.rotated_values, call=call, launcher=launcher)
        classes = tuple(x and replace(x, v=turned(x.v)) for x in classes)
    tuned, found = tuned or tuning(variant.target, variant.dim, in_int8), empty_gradients(call)
    _launch_of_queries(found.q, classes, rows, results, call, inputs, operands, plan, tuned, launcher)
    of_means = _launch_of_means(classes[2], rows, inputs, operands, tuned, launcher)
    _launch_of_keys(found, classes, of_means, rows, call, inputs, operands, plan, tuned, launcher)
    return through_rope(found, call)


def _rows(
    results: Results,
    inputs: Inputs,
    offset: torch.Tensor | None,
    variant: Variant,
    in_int8: bool,
    launcher: Launcher,
) -> Rows:
    """Launch the kernel that prepares rows. offset: as of `Encoded`. in_int8: whether a class has INT8 products."""
    source, dim = inputs.source, variant.dim
    (batch, heads, _, head_dim), device = source.q.shape, source.q.device
    q_length, _, token_count = source.lengths
    count = batch * heads * tiles(q_length)
    gradient = launcher.empty((batch, heads, tiles(q_length) * TILE, dim), torch.bfloat16, device)
    delta, lse_2 = (launcher.empty((count * TILE,), torch.float32, device) for _ in range(2))
    int8_gradient = scales = None
    if in_int8:
        int8_gradient = launcher.empty((batch, heads, dim, tiles(q_length) * TILE), torch.int8, device)
        scales = launcher.empty((count,), torch.float32, device)
    smoothed_lse_2 = lse_2 if offset is None else torch.empty_like(lse_2)
    out_gradient, out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (results.out_gradient, results.out)
    )
    launcher(
        kernel.prepare, (count,),
        out_gradient, out, results.lse.contiguous(), results.lse_gradient, offset, source.token_order,
        gradient, int8_gradient, scales, delta, lse_2, smoothed_lse_2, heads, q_length, token_count,
        *out_gradient.stride()[:3], *out.stride()[:3], HEAD_DIM=head_dim, D=dim, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return Rows(gradient, int8_gradient, scales, delta, lse_2, smoothed_lse_2)


def _launch_of_queries(
    dq: torch.Tensor, classes: Classes, rows: Rows, results: Results, call: Call, inputs: Inputs, operands: Operands,
    plan: Plan, tuned: Tuning, launcher: Launcher,
) -> None:  # fmt: skip
    """Launch the kernel for dQ, which may correct the rows' delta."""
    high, low, means = classes
    blocks, lists, encoded = tuned.of_queries, operands.block_lists, operands.encoded
    batch, heads, q_length = *call.q.shape[:2], inputs.source.lengths[0]
    needs_mean = results.lse_gradient is not None or any(each.is_raw for each in (high, low) if each)
    launcher(
        kernel.query_gradients, (-(-q_length // blocks.rows) * batch * heads,),
        *_of_classes(classes, blocks, tuned, "k"), _descriptor(rows.gradient, blocks.rows, tuned), rows.delta,
        results.lse_gradient, operands.k_mean if needs_mean else None, call.softmax_scale_log2,
        lists.indices, lists.bounds, lists.means, encoded.means and encoded.means.log_counts, *_masks(inputs, plan),
        dq, *_sizes(inputs, plan), *_strides(lists.bounds), lists.indices.shape[-1], *_strides(lists.means),
        *dq.stride()[:3],
        HIGH=high and high.name, LOW=low and low.name, MEAN=means is not None,
        CORRECTS=rows.int8_gradient is None and any(each.rounds for each in classes if each),
        CAUSAL=call.is_causal, MASKS_ALL=plan.masks_all,
        **_options(blocks, rows),
    )  # fmt: skip


def _launch_of_means(
    means: Multiplied | None,
    rows: Rows,
    inputs: Inputs,
    operands: Operands,
    tuned: Tuning,
    launcher: Launcher,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launch the kernel for the keys and values of means; None, twice, where there are none."""
    if means is None:
        return None, None
    blocks, lists = tuned.of_keys, operands.block_lists
    batch, kv_heads, length, dim = means.k.shape
    found = [launcher.empty((batch * kv_heads, length, dim), torch.float32, means.k.device) for _ in range(2)]
    launcher(
        kernel.mean_gradients, (batch * kv_heads * length // blocks.keys,),
        *_of_classes((means,), blocks, tuned, "q"), *_of_gradient(rows, blocks, tuned), rows.delta,
        lists.means, operands.encoded.means.log_counts, *found, inputs.source.q.shape[1], kv_heads,
        *inputs.source.lengths[:2], *_strides(lists.means), ROUNDS=means.rounds, **_options(blocks, rows),
    )  # fmt: skip
    return tuple(found)


def _launch_of_keys(
    found: Gradients, classes: Classes, of_means: tuple[torch.Tensor | None, torch.Tensor | None], rows: Rows,
    call: Call, inputs: Inputs, operands: Operands, plan: Plan, tuned: Tuning, launcher: Launcher,
) -> None:  # fmt: skip
    """Launch the kernel for dK and dV."""
    high, low, _ = classes
    blocks, k_length = tuned.of_keys, inputs.source.lengths[1]
    lists = plan.transposed(operands.block_lists, tiles(k_length))
    batch, kv_heads = call.k.shape[:2]
    launcher(
        kernel.key_gradients, (-(-k_length // blocks.keys) * batch * kv_heads,),
        *_of_classes((high, low), blocks, tuned, "q"), *_of_gradient(rows, blocks, tuned), rows.delta,
        lists.indices, lists.bounds, *of_means, *_masks(inputs, plan), found.k, found.v, *_sizes(inputs, plan),
        *_strides(lists.bounds), lists.indices.shape[-1], *found.k.stride()[:3],
        HIGH=high and high.name, HIGH_ROUNDS=bool(high and high.rounds),
        LOW=low and low.name, LOW_ROUNDS=bool(low and low.rounds),
        CAUSAL=call.is_causal, MASKS_ALL=plan.masks_all, **_options(blocks, rows),
    )  # fmt: skip


def _of_backward(variant: Variant) -> Variant:
    """The variant with block formats as plain bf16 numbers, which hold all of them exactly."""

    def stored(each: Stored | None) -> Stored | None:
        is_block = each is not None and each.storage in (Storage.BLOCK, Storage.ROW, Storage.PACKED)
        return replace(each, storage=Storage.PLAIN) if is_block else each

    high, low = map(stored, variant.classes)
    return replace(variant, classes=(high, low), means=stored(variant.means))


def _multiplied(
    stored: Stored,
    q: Operand,
    k: Operand,
    encoded: Encoded,
    call: Call,
    rows: Rows,
    products: str,
    launcher: Launcher,
    v: torch.Tensor | None = None,
) -> Multiplied:
    """v: in bf16, where `encoded` has none such."""
    is_raw, in_e4m3 = stored.format.name == "bf16", stored.values is Storage.CHANNEL
    if v is None:
        v = encoded.values[stored.values]
        v = v if stored.values is Storage.PLAIN else _values(v, encoded.v_units)
    if stored.is_packed:
        q, k = (replace(x, elements=_unpacked(x.elements)) for x in (q, k))
    if is_in_int8(stored.format.name, products):
        scaled = Scaled.of(q, k)
        return Multiplied(q.elements, k.elements, v, rows.smoothed_lse_2, 1.0, False, False, scaled)
    factor, lse = (call.softmax_scale_log2, rows.lse_2) if is_raw else (1.0, rows.smoothed_lse_2)
    numbers = (_numbers(x, stored, call, launcher) for x in (q, k))
    return Multiplied(*numbers, v, lse, factor, is_raw, in_e4m3, None)


def _of_means(
    operands: Operands, variant: Variant, call: Call, rows: Rows, products: str, launcher: Launcher
) -> Multiplied | None:
    """The operands of MEAN tiles, in whole tiles of means; their keys are smoothed in every format."""
    if variant.means is None:
        return None
    stored, encoded = variant.means, operands.encoded
    q = encoded.q[variant.encoded.index(stored)]
    of_means = operands.encoded_means
    k = of_means.k[0] or Operand(_whole(encoded.means.k))
    v = _whole(encoded.means.v) if stored.values is Storage.PLAIN else None
    found = _multiplied(stored, q, k, of_means, call, rows, products, launcher, v)
    return replace(found, lse=rows.smoothed_lse_2, is_raw=False)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """x `[.., S, D]` with zeros up to whole tiles."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % TILE))


def _numbers(operand: Operand, stored: Stored, call: Call, launcher: Launcher) -> torch.Tensor:
    """The numbers of an operand in bf16, rounded where it can't hold them, without the rotation of channels."""
    x, scales = operand.elements, operand.scales
    if operand.tensor_scale is not None:
        scales = operand.tensor_scale.flatten()
    if scales is not None:
        # torch multiplies numbers in e4m3 by no others.
        elements = x.bfloat16() if x.dtype is torch.float8_e4m3fn else x
        x = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        torch.mul(elements.view(len(scales), -1), scales[:, None], out=x.view(len(scales), -1))
    if call.rotated_block > 1 and stored.format.name != "bf16":
        x = _turned_back(x, call.rotated_block, call, launcher)
    return x.bfloat16()


def _unpacked(elements: torch.Tensor) -> torch.Tensor:
    """Integers of four bits as int8, one to a byte."""
    return torch.stack((elements << 4 >> 4, elements >> 4), -1).flatten(-2)


def _turned_back(x: torch.Tensor, block: int, call: Call, launcher: Launcher) -> torch.Tensor:
    """A copy of x `[.., padded D]` in bf16 without the rotation of its channels, in blocks of so many."""
    x = x.to(torch.bfloat16, copy=True)
    turn_back(x[..., : call.q.shape[-1]], block, launcher)
    return x


def _values(v: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """The numbers that V has in its channels' units, in bf16."""
    scale, mean = (x.view(*v.shape[:2], 1, -1) for x in units.unbind(1))
    found = torch.empty(v.shape, dtype=torch.bfloat16, device=v.device)
    return torch.addcmul(mean, v.bfloat16(), scale, out=found)


def _of_classes(classes: Sequence[Multiplied | None], blocks: Blocks, tuned: Tuning, transposed: str) -> list:
    """The kernels' arguments of classes, one after the other. transposed: what INT8 needs so, "q" or "k"."""
    return [
        argument
        for each in classes
        for argument in (
            [None] * 8
            if each is None
            else [
                _descriptor(each.q, blocks.rows, tuned), _descriptor(each.k, blocks.keys, tuned),
                _descriptor(each.v, blocks.keys, tuned), each.lse, each.factor,
                *_of_scaled(each.scaled, blocks, tuned, transposed),
            ]
        )
    ]  # fmt: skip


def _of_scaled(scaled: Scaled | None, blocks: Blocks, tuned: Tuning, transposed: str) -> list:
    if scaled is None:
        return [None] * 3
    x, columns = (
        (scaled.transposed_q, blocks.rows) if transposed == "q" else (scaled.transposed_k, blocks.keys)
    )
    return [scaled.q_scales, scaled.k_scales, _transposed_descriptor(x, columns, tuned)]


def _of_gradient(rows: Rows, blocks: Blocks, tuned: Tuning) -> list:
    """The output's gradient in bf16, in INT8, and its scales there, as the kernels of dK and dV read them."""
    int8 = rows.int8_gradient
    return [
        _descriptor(rows.gradient, blocks.rows, tuned),
        None if int8 is None else _transposed_descriptor(int8, blocks.rows, tuned),
        rows.gradient_scales,
    ]


def _descriptor(x: torch.Tensor, rows: int, tuned: Tuning) -> TensorDescriptor | torch.Tensor:
    """The argument by which a kernel loads rows of x `[B, H, tiles·128, D]`."""
    return x if tuned.by_pointers else row_descriptor(x, rows, x.shape[-1])


def _transposed_descriptor(x: torch.Tensor, columns: int, tuned: Tuning) -> TensorDescriptor | torch.Tensor:
    """The argument by which a kernel loads columns of x `[B, H, D, tiles·128]`."""
    return x if tuned.by_pointers else row_descriptor(x, x.shape[-2], columns)


def _masks(inputs: Inputs, plan: Plan) -> tuple[torch.Tensor | None, ...]:
    """The mask over keys, the fine mask and the token order."""
    return inputs.source.key_mask, plan.fine_mask and plan.fine_mask.packed, plan.token_order


def _sizes(inputs: Inputs, plan: Plan) -> tuple[int | None, ...]:
    """Heads, lengths, the fine mask's guards and the head dimension."""
    source = inputs.source
    guards = plan.fine_mask and plan.fine_mask.guards
    return source.q.shape[1], source.k.shape[1], *source.lengths, guards, source.q.shape[3]


def _options(blocks: Blocks, rows: Rows) -> dict[str, Any]:
    """The constants by which all kernels are built."""
    return {
        "ROWS": blocks.rows, "KEYS": blocks.keys, "D": rows.gradient.shape[-1], "STAGES": blocks.stages,
        "num_warps": blocks.warps, "enable_fp_fusion": True,
    }  # fmt: skip


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """The rows from one batch entry, and from one head, to the next in `bounds` or `means`; 0 where all share them."""
    if x is None:
        return 0, 0
    return tuple(x.stride(d) // x.shape[-1] if x.shape[d] > 1 else 0 for d in (0, 1))
