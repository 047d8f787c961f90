"""The backward's kernels against the reference, in the interpreter or on a GPU."""

from dataclasses import replace

import pytest
import torch

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.attention import reference as forward
from dma_diffusers.kernels.backward import reference
from dma_diffusers.kernels.backward.tuning import tuning
from dma_diffusers.kernels.call import Call as KernelCall
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse
from tests.kernels.calls import Call, relative_l2, split

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]

CALLS = [
    Call(63, 63, 40, heads=1, kv_heads=1, high="bf16", low="int8", dtype=torch.bfloat16, tokens_first=True),
    Call(200, 200, 64, heads=2, kv_heads=1, high="bf16", low="int8", window=0, sink=0, is_causal=True),
    Call(
        111, 260, 128, heads=1, kv_heads=1, high="mxfp8", low="nvfp4/bf16", sink=0, masks_keys=True,
        rotation="hadamard16",
    ),
    Call(260, 260, 64, heads=2, kv_heads=1, high="bf16", low="int8", means=1, sink=0),
    Call(
        150, 150, 64, heads=1, kv_heads=1, high="bf16", low="fp8", has_token_order=True, empty_slots=110, has_rope=True
    ),
    Call(200, 200, 64, heads=1, kv_heads=1, high="bf16", low="int4", window=0, sink=0, rotation="none/head_dim"),
    Call(130, 260, 96, heads=2, kv_heads=1, high="mxfp8", low="mxfp4", window=0, sink=0, rotation="hadamard32"),
    Call(70, 70, 256, heads=1, kv_heads=1, high="bf16", low="int8/bf16"),
    Call(150, 150, 64, heads=1, kv_heads=1, high="bf16/fp16", low="int8/fp16", means=1, window=0),
    Call(
        156, 156, 64, heads=1, kv_heads=1, high="bf16", low="int8", text=(0, 12), grid=(9, 16),
        policy="neighborhood(window=5x9, stride=4x4)",
    ),
]  # fmt: skip


def given(call: Call, device: torch.device, hidden: float = 0.0):
    """A call, its plan, its precisions, and random gradients of its results; what is hidden is added to hidden keys."""
    q, k, v, mask = call.tensors(device)
    if mask is not None:
        k, v = (x + torch.where(mask[:, None, :, None], 0, hidden) for x in (k, v))
    made, planned, precisions, _ = split(
        q, k, v, call.map(), call.high, call.low, key_mask=mask, is_causal=call.is_causal,
        token_order=call.token_order, fine_mask=call.fine_mask, **call.ropes(device), **call.prepared,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    gradients = (torch.randn(shape, generator=generator).to(device) for shape in (q.shape, q.shape[:3]))
    return made, planned.to(device), precisions, *gradients


IN_INT8 = [
    Call(
        200, 200, 64, heads=2, kv_heads=1, high="bf16", low="int8/bf16", window=0, sink=0, tokens_first=True
    ),
    Call(111, 150, 100, heads=1, kv_heads=1, high="bf16", low="int8_tile", window=0, sink=0, masks_keys=True),
    Call(260, 260, 64, heads=1, kv_heads=1, high="bf16", low="int8/bf16", means=2, sink=0),
]


def assert_agree(made, planned, precisions, gradient, lse_gradient, lowering="faithful"):
    from dma_diffusers.kernels.backward import launch

    out, lse = forward.attention(made, planned, precisions)
    expected = reference.gradients(made, planned, precisions, lse, gradient, lse_gradient)
    found = launch.gradients(made, planned, precisions, out, lse, gradient, lse_gradient, lowering=lowering)
    has_fp8 = any(precision and precision.pv == "fp8" for precision in planned.used(precisions))
    for name, own, other in zip("qkv", found, expected, strict=True):
        assert own.shape == other.shape and own.stride() == other.stride() and own.dtype == other.dtype
        # Where numbers are rounded to bf16 once more, some probabilities fall to e4m3's neighbouring number.
        assert relative_l2(own, other) <= (3e-2 if has_fp8 and name == "v" else 8e-3), name


def test_the_same_inputs_give_the_same_bits(kernel_device):
    from dma_diffusers.kernels.backward import launch

    made, planned, precisions, gradient, _ = given(CALLS[0], kernel_device)
    out, lse = forward.attention(made, planned, precisions)
    first, second = (launch.gradients(made, planned, precisions, out, lse, gradient) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernels_give_the_references_gradients(call, kernel_device):
    assert_agree(*given(call, kernel_device))


@pytest.mark.parametrize("call", IN_INT8, ids=str)
def test_int8_products_are_the_references(call, kernel_device):
    from dma_diffusers.kernels.backward import launch

    made, planned, precisions, gradient, lse_gradient = given(call, kernel_device)
    gradient = gradient.bfloat16().float()
    gradient[:, :, :3] = 0
    made.q[:, :, 5] = 0  # its scale is 1, which must hide nothing
    out, lse = forward.attention(made, planned, precisions)
    results = lse, gradient, lse_gradient
    tuned = tuning(architecture(kernel_device), made.q.shape[-1], in_int8=True)
    tuned = replace(tuned, by_pointers=call.masks_keys)
    expected = reference.gradients(
        made, planned, precisions, *results, out=out, products="int8", at_once=tuned.at_once
    )
    found = launch.gradients(made, planned, precisions, out, *results, products="int8", tuned=tuned)
    others = reference.gradients(made, planned, precisions, *results)
    for name, own, other, in_bf16 in zip("qkv", found, expected, others, strict=True):
        # Nearly all numbers round to the same integers; where tiles are means few are rounded at all.
        assert relative_l2(own, other) < 2e-3, name
        assert call.means or relative_l2(in_bf16, other) > 8e-3, name


@pytest.mark.parametrize("bad", ["q", "gradient"])
def test_a_bad_query_is_no_finite_gradient_in_int8(bad, kernel_device):
    """NaN has no integer: scales must tell of it, or dK and dV of all keys would be garbage in silence."""
    from dma_diffusers.kernels.backward import launch

    call = Call(70, 70, 64, heads=1, kv_heads=1, high="bf16", low="int8", window=0, sink=0)
    made, planned, precisions, gradient, lse_gradient = given(call, kernel_device)
    (made.q if bad == "q" else gradient)[0, 0, 7, 3] = torch.nan
    out, lse = forward.attention(made, planned, precisions)
    tuned = tuning(architecture(kernel_device), 64, in_int8=True)
    found = launch.gradients(
        made, planned, precisions, out, lse, gradient, lse_gradient, products="int8", tuned=tuned
    )
    assert not any(x[0, 0, :70].isfinite().all(-1).any() for x in found[1:])
    assert found[0][0, 0, 7].isnan().all() and found[0][0, 0, 8].isfinite().all()


def test_content_decides_of_the_map_as_in_the_forward(kernel_device):
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(1, 1, 256, 64, device=kernel_device) for _ in range(4))
    policy = parse("importance(budget=0.3)")
    planned = plan.make(policy, Layout(256, 256)).to(kernel_device)
    precisions = Precisions.parse("bf16", "int8/bf16")
    assert_agree(
        KernelCall(q, k, v), planned, precisions, gradient, torch.zeros(1, 1, 256, device=kernel_device)
    )


def test_hidden_keys_have_no_gradient_whatever_they_hold(kernel_device):
    from dma_diffusers.kernels.backward import launch

    call = Call(70, 130, 64, heads=1, kv_heads=1, high="bf16", low="int8", masks_keys=True)
    found = []
    for hidden in (0.0, float("nan")):
        made, planned, precisions, gradient, _ = given(call, kernel_device, hidden)
        made.key_mask[:, 64:] = False
        made = replace(made, k=torch.where(made.key_mask[:, None, :, None], made.k, hidden))
        clean = replace(made, v=made.v.nan_to_num())
        out, lse = forward.attention(clean, planned, precisions)
        found.append(launch.gradients(made, planned, precisions, out, lse, gradient))
    assert all(map(torch.equal, *found))
    _, of_k, of_v = found[0]
    hidden = ~made.key_mask[0]
    assert not of_k[0, 0, hidden].any() and not of_v[0, 0, hidden].any()
    assert of_k[0, 0, ~hidden].any(-1).all()


def test_rows_that_see_no_key_have_no_gradient(kernel_device):
    from dma_diffusers.kernels.backward import launch

    call = Call(70, 70, 64, heads=1, kv_heads=1, high="bf16", low="int8/bf16", masks_keys=True)
    made, planned, precisions, gradient, _ = given(call, kernel_device)
    made.key_mask[:] = False
    out, lse = forward.attention(made, planned, precisions)
    found = launch.gradients(made, planned, precisions, out, lse, gradient)
    assert lse.isinf().all() and not any(x.any() for x in found)


def test_equal_values_leave_scores_alone(kernel_device):
    """Their output does not depend on scores, but with rounded probabilities it isn't quite these values."""
    from dma_diffusers.kernels.backward import launch

    call = Call(130, 130, 64, heads=1, kv_heads=1, high="bf16", low="int8", window=0, sink=0, smooth_v=False)
    made, planned, precisions, gradient, _ = given(call, kernel_device)
    made = replace(made, v=torch.ones_like(made.v))
    out, lse = forward.attention(made, planned, precisions)
    of_q, of_k, _ = launch.gradients(made, planned, precisions, out, lse, gradient)
    usual = replace(made, v=torch.randn_like(made.v))
    out, lse = forward.attention(usual, planned, precisions)
    usual_q, usual_k, _ = launch.gradients(usual, planned, precisions, out, lse, gradient)
    assert of_q.norm() <= 2e-3 * usual_q.norm() and of_k.norm() <= 2e-3 * usual_k.norm()
