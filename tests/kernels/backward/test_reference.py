"""The backward's reference against autograd: through exact attention in float64, and through fake quantisers."""

import math

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.kernels.attention import reference as forward
from dma_diffusers.kernels.backward import reference
from dma_diffusers.kernels.backward.reference import Part, gradients_of_head
from dma_diffusers.kernels.formats import rotate, rotate_back
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.tiling.precision_map import LOOPS, Phase
from tests.kernels.calls import Call, relative_l2, seen, split
from tests.kernels.oracle import rotated


class OfHead(torch.autograd.Function):
    """Attention of one head whose keys are two parts, with the reference's backward; scores are in base e."""

    @staticmethod
    def forward(ctx, q, k, v, visible):
        scores = (q @ k.mT).masked_fill(~visible, -math.inf)
        lse = scores.logsumexp(-1)
        ctx.save_for_backward(q, k, v, scores - lse[:, None])
        return scores.softmax(-1) @ v, lse

    @staticmethod
    def backward(ctx, out_gradient, lse_gradient):
        q, k, v, exponents = ctx.saved_tensors
        parts = [
            Part(q / math.log(2), k[own], v[own], exponents[:, own] / math.log(2))
            for own in (slice(0, 3), slice(3, None))
        ]
        found = gradients_of_head(parts, out_gradient, lse_gradient[:, None])
        dq = sum(of_q for _, of_q, _, _ in found)
        return dq, *(torch.cat(each) for each in list(zip(*found, strict=True))[2:]), None


def test_the_formulas_are_the_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    visible = torch.rand(5, 7) > 0.3
    visible[:, 0] = True
    assert torch.autograd.gradcheck(OfHead.apply, (q, k, v, visible))


def call_of(call: Call, tensors=None):
    """The call, its plan and its precisions, and random gradients of its results."""
    q, k, v, mask = call.tensors() if tensors is None else tensors
    given = split(
        q, k, v, call.map(), call.high, call.low, key_mask=mask, is_causal=call.is_causal,
        token_order=call.token_order, fine_mask=call.fine_mask, **call.ropes(), **call.prepared,
    )[:3]  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    return *given, torch.randn(q.shape, generator=generator), torch.randn(q.shape[:3], generator=generator)


CALLS = [
    Call(1, 1, 64),
    Call(63, 63, 128, is_causal=True),
    Call(111, 111, 40, has_rope=True),
    Call(300, 300, 64, heads=4, kv_heads=2, batch=2, masks_keys=True, tokens_first=True),
    Call(130, 300, 64),
    Call(300, 300, 64, has_token_order=True, empty_slots=60),
    Call(300, 300, 256, heads=1, kv_heads=1, is_causal=True),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_without_quantisers_it_is_the_gradient_of_exact_attention(call):
    call = Call(**vars(call) | {"high": "bf16", "low": "bf16/bf16"})
    given, plan, precisions, gradient, lse_gradient = call_of(call)
    _, lse = forward.attention(given, plan, precisions)
    found = reference.gradients(given, plan, precisions, lse, gradient, lse_gradient)

    tensors = [x.double().requires_grad_() for x in (given.q, given.k, given.v)]
    q, k = (rotated(x, rope).double() for x, rope in zip(tensors, (given.q_rope, given.k_rope), strict=False))
    k, v = (x.repeat_interleave(call.heads // call.kv_heads, 1) for x in (k, tensors[2]))
    scores = q @ k.mT * call.head_dim**-0.5
    if given.key_mask is not None:
        scores = scores.masked_fill(~given.key_mask[:, None, None], -math.inf)
    if call.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    results = scores.softmax(-1) @ v, scores.logsumexp(-1)
    expected = torch.autograd.grad(results, tensors, (gradient.double(), lse_gradient.double()))
    for own, other, x in zip(found, expected, tensors, strict=True):
        assert own.shape == x.shape and own.transpose(1, 2).is_contiguous()
        assert relative_l2(own, other) <= 8e-3  # q, k and v are rounded to bf16


def straight(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The rounded numbers, whose gradient is x's."""
    return x + (rounded - x).detach()


def in_e4m3(p: torch.Tensor) -> torch.Tensor:
    """p with the precision of e4m3: each number is brought to between 1 and 2 before it is rounded."""
    power = p.log2().floor().exp2()
    return torch.where(p > 0, (p / power).to(torch.float8_e4m3fn).float() * power, 0)


def fake_quantised(call: Call, given, plan, tensors, lse) -> torch.Tensor:
    """Attention with rounded numbers through which gradients pass, all keys at once, means after keys.

    lse: the forward's, whose sums have rounded probabilities; that passes for a constant factor of each row.
    """
    q, k, v = tensors
    group, precisions = call.heads // call.kv_heads, Precisions.parse(call.high, call.low)
    mean = quantiser.key_mean(k.detach(), key_mask=given.key_mask)
    mean = torch.where(torch.tensor(quantiser.smooths(*(x and x.qk for x in plan.used(precisions)))), mean, 0)
    phases = plan.precision_map.phases(-(-call.k_length // 128)).expand(1, 1, -1, -1)
    of_tile = phases.repeat_interleave(128, -2).repeat_interleave(128, -1)[
        ..., : call.q_length, : call.k_length
    ]
    scale = given.softmax_scale_log2
    masked = Phase.MASKED if plan.precision_map.has_high else Phase.HIGH
    of_high = (of_tile == Phase.HIGH) | (of_tile == masked) & (of_tile < len(LOOPS))
    of_low = (of_tile < len(LOOPS)) & ~of_high

    def products(precision, keys, values):
        if precision.qk == "bf16":
            own_q, own_k = (
                straight(q, q.bfloat16().float()) * scale,
                straight(keys + mean, (keys + mean).bfloat16()) - mean,
            )
        else:
            own_q = straight(q * scale, quantiser.quantised_q(q.detach() * scale, precision.qk))
            own_k = straight(keys, quantiser.quantised_k(keys.detach(), precision.qk))
        values = rotate(values, given.rotations.v)
        own_v = straight(values, values.bfloat16().float())
        if precision.pv != "bf16":
            units = quantiser.value_units(
                rotate(v.detach(), given.rotations.v), given.key_mask, call.smooth_v
            )
            own_v = straight(
                values, quantiser.quantised_v(values.detach(), units, precision.pv) * units.scale + units.mean
            )
        own_v = rotate_back(own_v, given.rotations.v)
        own_k, own_v = (x.repeat_interleave(group, 1) for x in (own_k, own_v))
        return own_q @ own_k.mT, own_v

    visible = seen(call, given.key_mask)
    parts = [
        (*products(p, k - mean, v), visible & taken, p)
        for p, taken in zip(precisions, (of_high, of_low), strict=True)
    ]
    if plan.precision_map.has_mean:
        count = 4 * phases.shape[-1]
        here = torch.ones(1, call.k_length) if given.key_mask is None else given.key_mask.float()
        here = F.pad(here, (0, 32 * count - call.k_length)).view(-1, 1, count, 32, 1)
        weights = here.sum(-2)
        of_keys = [
            (F.pad(x, (0, 0, 0, 32 * count - call.k_length)).unflatten(2, (count, 32)) * here).sum(-2)
            / weights.clamp(min=1)
            for x in (k - mean, v)
        ]
        precision = precisions.of_means(plan.precision_map.has_low)
        scores, values = products(
            precision, of_keys[0] + (0 if precision.qk != "bf16" else -mean), of_keys[1]
        )
        words = plan.precision_map.means.expand(1, 1, -1, -1)
        tile = torch.arange(count) // 4
        taken = (words[..., tile // 32] >> tile % 32 & 1 == 1).repeat_interleave(128, -2)[
            ..., : call.q_length, :
        ]
        parts.append((scores + weights.log2().mT, values, taken, precision))
    exponents = torch.cat([torch.where(taken, s, -math.inf) for s, _, taken, _ in parts], -1)
    p = torch.softmax(exponents * math.log(2), -1)
    used = [x and x.qk for x in plan.used(precisions)]
    own_lse = lse / math.log(2) - quantiser.key_offset(q.bfloat16() if "bf16" in used else q, mean, scale)
    p = p * (torch.logsumexp(exponents * math.log(2), -1) / math.log(2) - own_lse).exp2().detach()[..., None]
    own = p.split([s.shape[-1] for s, *_ in parts], -1)
    rounded = [
        straight(x, in_e4m3(x.detach())) if part[3].pv == "fp8" else x
        for x, part in zip(own, parts, strict=True)
    ]
    return sum(x @ part[1] for x, part in zip(rounded, parts, strict=True))


QUANTISED = [
    Call(300, 300, 64, high="bf16", low="int8"),
    Call(300, 300, 64, high="mxfp8", low="mxfp4", heads=4, kv_heads=2),
    Call(300, 300, 64, high="bf16", low="fp8", window=0, sink=0, smooth_v=False),
    Call(300, 300, 64, high="mxfp8", low="int8/bf16", masks_keys=True),
    Call(300, 300, 64, high="bf16", low="int8/fp16", masks_keys=True),
    Call(640, 640, 64, high="bf16", low="int8", means=2, rotation="none/head_dim"),
    Call(
        301, 301, 64, high="bf16", low="int8", means=1, window=0, sink=0, masks_keys=True, heads=2, kv_heads=1
    ),
    Call(640, 640, 64, high="mxfp8", low="mxfp4", means=2),
]


@pytest.mark.parametrize("call", QUANTISED, ids=str)
def test_with_quantisers_it_is_the_gradient_through_them(call):
    given, plan, precisions, gradient, _ = call_of(call)
    _, lse = forward.attention(given, plan, precisions)
    found = reference.gradients(given, plan, precisions, lse, gradient)
    tensors = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
    expected = torch.autograd.grad(fake_quantised(call, given, plan, tensors, lse), tensors, gradient)
    for own, other in zip(found, expected, strict=True):
        assert relative_l2(own, other) <= 1e-3


def integers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x over a scale that broadcasts to it, as whole numbers: those of a scale of 0 are 0."""
    return torch.where(scale > 0, x / scale, 0).round().long()


def sage_backward(q, q_scales, k, k_scales, v, p, gradient, delta):
    """dQ, dK and dV by integer products of blocks of 64, as SageBwd's algorithm has them; scores are in base 2.

    q, k: whole numbers. p, delta: of rows that add up to 1.
    """
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    for keys in torch.arange(len(k)).split(64):
        k_scale = k_scales[keys[0]]
        for queries in torch.arange(len(q)).split(64):
            own = gradient[queries]
            # The gradient has a scale for each tile of 128 tokens.
            of_tile = gradient[queries[0] // 128 * 128 :][:128].abs().max() / 127
            block = p[queries][:, keys]
            scale = block.amax(0, keepdim=True) / 127
            product = integers(block, scale).mT @ integers(own, of_tile)
            dv[keys] += product * (scale.mT * of_tile)
            ds = block * (own @ v[keys].mT - delta[queries])
            scale = ds.abs().amax(1, keepdim=True) / 127
            dq[queries] += integers(ds, scale) @ k[keys] * (scale * k_scale)
            ds = ds * q_scales[queries]
            scale = ds.abs().amax(0, keepdim=True) / 127
            dk[keys] += integers(ds, scale).mT @ q[queries] * scale.mT
    return dq, dk * math.log(2), dv


@pytest.mark.usefixtures("unrounded")
def test_int8_products_are_those_of_integers():
    call = Call(300, 300, 64, heads=1, kv_heads=1, high="bf16", low="int8/bf16", window=0, sink=0)
    given, plan, precisions, gradient, _ = call_of(call)
    out, lse = forward.attention(given, plan, precisions)
    found = reference.gradients(given, plan, precisions, lse, gradient, out=out, products="int8")

    q = given.q.double()[0, 0] * given.softmax_scale_log2
    k = (given.k - quantiser.key_mean(given.k)).double()[0, 0]
    q_scales = q.abs().amax(1, keepdim=True) / 127
    k_scales = torch.cat([tile.abs().amax().expand(len(tile)) / 127 for tile in k.split(128)])[:, None]
    q, k, v = integers(q, q_scales), integers(k, k_scales), given.v.bfloat16().double()[0, 0]
    p = ((q @ k.mT) * (q_scales * k_scales.mT) * math.log(2)).softmax(-1)
    gradient = gradient.double()[0, 0]
    delta = (gradient * (p @ v)).sum(-1, keepdim=True)
    dq, dk, dv = sage_backward(q, q_scales, k, k_scales, v, p, gradient, delta)
    others = reference.gradients(given, plan, precisions, lse, gradient[None, None].float())
    for own, other, in_bf16 in zip(found, (dq * given.scale, dk, dv), others, strict=True):
        assert relative_l2(own[0, 0], other) <= 2e-3 <= 0.3 * relative_l2(in_bf16[0, 0], other)
        assert F.cosine_similarity(own.flatten(), in_bf16.flatten(), dim=0) > 0.999
