"""The reference against float64 oracles: what defines "correct" has to be correct itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing.reference import Routing
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class, build_map, visiting_phases
from tests.kernels.calls import (
    HIDDEN,
    HIDING_CALLS,
    NAMED_CALLS,
    Call,
    by_reference,
    random_calls,
    relative_l2,
    seen,
    with_hidden,
)
from tests.kernels.format_calls import FORMAT_CALLS
from tests.kernels.oracle import oracle


def run(call: Call, tensors=None):
    q, k, v, mask = call.tensors() if tensors is None else tensors
    return by_reference(
        q, k, v, call.map(), call.high, call.low,
        key_mask=mask, is_causal=call.is_causal, token_order=call.token_order, fine_mask=call.fine_mask,
        **call.ropes(), norms=call.norms(), **call.prepared,
        skip_below=call.skip_below,
    )  # fmt: skip


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("call", [*NAMED_CALLS, *FORMAT_CALLS, *random_calls(40)], ids=str)
def test_scores_equal_the_oracle(call):
    """The log-sum-exp sees every score of every tile."""
    out, lse = run(call)
    _, expected = oracle(call, *call.tensors())
    assert out.shape == call.tensors()[0].shape and out.dtype == call.dtype
    assert torch.equal(lse.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(lse[finite].double(), expected[finite], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("call", [*NAMED_CALLS, *FORMAT_CALLS, *random_calls(40)], ids=str)
def test_output_is_the_oracles_but_for_p_and_v(call):
    """Left over: P and V in e4m3 (3 mantissa bits each) in LOW tiles, in bf16 in HIGH ones.

    A sum of numbers that are each off by up to a 16th is off by no more. The largest of a row is a power of two, which
    is none of e4m3's subnormals; nor are those that count beside it.
    """
    out, lse = run(call)
    expected, expected_lse = oracle(call, *call.tensors())
    assert relative_l2(out, expected) < 0.06
    finite = expected_lse.isfinite()
    assert ((lse - expected_lse)[finite].abs() <= -math.log(1 - 2**-4)).all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e5, 1e33])
def test_values_of_any_size_fit_float16(size):
    """V's numbers may be too large or too small for float16, and each channel has a size of its own."""
    call = Call(300, 300, 64, high="bf16", low="bf16/fp16", window=0, sink=0)
    q, k, v, _ = call.tensors()
    v = (v * size * torch.logspace(-5, 0, 64)).bfloat16()
    out, _ = by_reference(q, k, v, call.map(), call.high, call.low)
    exact = F.scaled_dot_product_attention(q.bfloat16().double(), k.bfloat16().double(), v.double())
    error = (out.double() - exact).norm(dim=-2) / exact.norm(dim=-2)
    assert error.max() < 2e-3, "of each channel, bfloat16's own rounding of the output included"


@pytest.mark.parametrize("pv", ["bf16", "fp16", "fp8", "int8"])
def test_the_sum_has_probabilities_as_rounded(pv):
    """Then an output is a mean of values: where they are all alike, it is that value."""
    call = Call(300, 300, 64, high=f"bf16/{pv}", low=f"int8/{pv}", smooth_v=False)
    q, k, v, _ = call.tensors()
    out, lse = run(call, (q, k, torch.ones_like(v), None))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6, atol=0)
    _, exact = oracle(call, q, k, v, None)
    assert (lse - exact).abs().max() > 2e-5, "as far as the scores themselves agree"


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("low", ["bf16", "int8"])
def test_bf16_everywhere_is_near_bf16_attention(head_dim, low):
    """HIGH multiplies the model's own numbers, also where keys are smoothed for LOW."""
    call = Call(300, 300, head_dim, high="bf16", low=low, window=10_000, dtype=torch.bfloat16)
    q, k, v, _ = call.tensors()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    bf16 = F.scaled_dot_product_attention(q, k, v)
    assert relative_l2(run(call)[0], exact) <= 1.5 * relative_l2(bf16, exact)


@pytest.mark.parametrize(
    "low",
    [
        "fp8",
        "int8",
        "int8_tile",
        "int4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "nvfp4",
        "mxint8",
        "nvint4",
    ],
)
def test_every_format_can_be_previewed(low, request):
    call = Call(513, 513, 64, low=low, sink=0, text=(0, 30))
    expected, expected_lse = oracle(call, *call.tensors())
    assert relative_l2(run(call)[0], expected) < 0.06
    request.getfixturevalue("unrounded")
    _, lse = run(call)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


def test_probabilities_in_int8_are_unsigned():
    """One tile of keys, step by step in float64: 255 steps for probabilities, 127 to either side for values."""
    q, k, v = torch.randn(3, 1, 2, 100, 64, generator=torch.Generator().manual_seed(0))
    v = v + 3
    call = Call(100, 100, 64, high="bf16", low="bf16/int8", window=0, sink=0)
    out, _ = by_reference(q, k, v, call.map(), call.high, call.low)
    s = q.bfloat16().double() @ k.bfloat16().double().mT * 64**-0.5
    p = ((s - s.amax(-1, keepdim=True)).exp() * 255).round()
    mean = v.double().mean(-2, keepdim=True)
    step = (v - mean).abs().amax(-2, keepdim=True) / 127
    expected = p @ ((v - mean) / step).round() * step / p.sum(-1, keepdim=True) + mean
    assert relative_l2(out, expected) < 1e-4
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert 1e-4 < relative_l2(out, exact) < 1e-2


@pytest.mark.parametrize("token_order", [[0, 1, 1], [0, 1, 3], [0, 1, -1], [0, 1]])
def test_an_order_names_each_token_once(token_order):
    call = Call(3, 3, 64)
    with pytest.raises(ValueError, match="order must name each of the 3 tokens once"):
        token_order = torch.tensor(token_order, dtype=torch.int32)
        by_reference(*call.tensors()[:3], call.map(), "mxfp8", "mxfp4", token_order=token_order)


def test_more_bits_are_better():
    def error(**changes):
        call = Call(512, 512, 128, **changes)
        q, k, v, _ = call.tensors()
        return relative_l2(run(call)[0], F.scaled_dot_product_attention(q.double(), k.double(), v.double()))

    all_high = error(window=2000)
    banded = error(window=128, sink=128)
    all_low = error(window=0, sink=0)
    assert all_high < 0.6 * banded and banded < 0.95 * all_low


def test_smoothing_is_exact_and_helps():
    """A mean far from zero costs nothing: the same constant is taken from keys of every class."""
    call = Call(513, 513, 64)
    q, k, v, _ = call.tensors()
    shifted = k + 32.0
    plain = by_reference(q, k, v, call.map(), "mxfp8", "mxfp4")
    moved = by_reference(q, shifted, v, call.map(), "mxfp8", "mxfp4")
    assert relative_l2(moved[0], plain[0]) < 1e-3
    torch.testing.assert_close(moved[1], plain[1] + 32.0 * q.sum(-1) * 64**-0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("high", "low"), [("bf16", "bf16"), ("bf16", "int8"), ("mxfp8", "mxfp4")])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("is_alone", [False, True])
def test_means_of_equal_keys_are_exact(head_dim, high, low, is_alone):
    """So they are where a single key of each sub-tile is seen: MEAN differs from exact attention by roundings alone."""
    call = Call(600, 600, head_dim, high=high, low=low, kv_heads=1, window=0, sink=0, means=1)
    q, k, v, _ = call.tensors()
    token, mask = torch.arange(600), None
    if is_alone:
        mask = (token % 32 == 32 - 1 - token // 128)[None]
    else:
        k = k[:, :, token // 32 * 32]
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), None if mask is None else mask[:, None, None], enable_gqa=True
    )
    out, lse = by_reference(q, k, v, call.map(), high, low, key_mask=mask)
    whole = build_map(Dense(Class.HIGH).classes(call.layout), call.layout)
    expected, expected_lse = by_reference(q, k, v, whole, high, low, key_mask=mask)
    assert relative_l2(out, exact) < 1.2 * relative_l2(expected, exact)
    torch.testing.assert_close(lse, expected_lse, rtol=0.01, atol=0.01)


def test_the_means_of_keys_weigh_as_many_as_are_seen():
    """By hand: 5 keys of a sub-tile of which one is hidden, and a whole one, in float64."""
    call = Call(1, 37, 64, heads=1, kv_heads=1, high="bf16", low="bf16", window=0, sink=0, means=1)
    q, k, v, _ = call.tensors()
    mask = torch.ones(1, 37, dtype=torch.bool)
    mask[0, 34] = False
    k[0, 0, 34], v[0, 0, 34] = torch.nan, torch.inf
    runs = (torch.arange(32), torch.tensor([32, 33, 35, 36]))
    scores = [(q[0, 0, 0].double() @ k[0, 0, run].double().mean(0)) / 8 + math.log(len(run)) for run in runs]
    weights = torch.stack(scores).softmax(0)
    expected = sum(p * v[0, 0, run].double().mean(0) for p, run in zip(weights, runs, strict=True))
    out, lse = by_reference(q, k, v, call.map(), "bf16", "bf16", key_mask=mask)
    torch.testing.assert_close(out[0, 0, 0].double(), expected, rtol=0.02, atol=0.002)
    torch.testing.assert_close(
        lse[0, 0, 0].double(), torch.stack(scores).logsumexp(0), rtol=0.003, atol=0.003
    )


def test_the_mean_of_keys_of_which_the_sample_has_none_is_zero():
    k, mask = torch.ones(2, 1, 4096, 8), torch.ones(2, 4096, dtype=torch.bool)
    mask[0, ::4] = False
    assert quantiser.key_mean(k, key_mask=mask).flatten(1).tolist() == [[0.0] * 8, [1.0] * 8]


def test_a_row_that_sees_nothing_is_zero():
    call = Call(200, 200, 64, batch=2)
    q, k, v, _ = call.tensors()
    mask = torch.stack([torch.zeros(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)])
    out, lse = by_reference(q, k, v, call.map(), "mxfp8", "mxfp4", key_mask=mask)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@pytest.mark.parametrize("call", HIDING_CALLS, ids=str)
def test_hidden_keys_change_nothing(call):
    """Not a bit changes, whatever they hold, and however large their values are."""
    out, lse = run(call, with_hidden(call.tensors(), 0.0, 0.0))
    assert out.isfinite().all()
    for content in HIDDEN:
        other, other_lse = run(call, with_hidden(call.tensors(), *content))
        assert torch.equal(other, out) and torch.equal(other_lse, lse)


def test_hidden_values_change_no_route():
    call = Call(1024, 1024, 64, batch=2, masks_keys=True)
    layout, mask = call.layout, call.tensors()[3]
    mask[:, 512:600] = False
    classes = Diagonal(call.window, call.sink).classes(layout)
    routing = Routing.of(visiting_phases(classes, layout), 0.3)
    zeros, large = (
        by_reference(
            *with_hidden((*call.tensors()[:3], mask), 0.0, content)[:3], build_map(classes, layout), "bf16", "int8",
            key_mask=mask, routing=routing,
        )[0]
        for content in (0.0, 1e-30)
    )  # fmt: skip
    assert torch.equal(zeros, large)


@pytest.mark.parametrize("window", [0, 128, 10_000])
def test_the_largest_fp16_values_stay_finite(window):
    """Rounded in bf16 and in e4m3 they are 65536. Infinity stays infinite where V is in bf16."""
    call = Call(300, 300, 64, window=window, sink=window, dtype=torch.float16)
    q, k, v, _ = call.tensors()
    v[:, 0], v[:, 1] = 65504.0, -65504.0
    out, _ = run(call, (q, k, v, None))
    assert relative_l2(out, v) < 0.01 and out.dtype == torch.float16
    if window == 10_000:
        assert torch.equal(out, v)
        v[0, 0, 7, 3] = torch.inf
        assert (run(call, (q, k, v, None))[0][0, 0, :, 3] == torch.inf).all()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nan_spreads_no_further_than_in_full_precision(which, is_causal):
    call = Call(400, 400, 64, is_causal=is_causal)
    tensors = dict(zip("qkv", call.tensors(), strict=False))
    tensors[which][0, 0, 150, 3] = torch.nan
    q, k, v = tensors.values()
    scores = (q @ k.mT * 64**-0.5).masked_fill(~seen(call, None), -torch.inf)
    expected = (scores.softmax(-1) @ v).isnan()
    out, _ = by_reference(q, k, v, call.map(), "mxfp8", "mxfp4", is_causal=is_causal)
    assert expected.any() and not (out.isnan() & ~expected).any()
    assert out.isnan().any()


def test_a_small_mean_of_v_leaves_no_bias():
    """A sixteenth of bfloat16 numbers lies halfway between two e4m3 numbers: rounding all these one way adds up."""
    v = torch.randn(1, 1, 65536, 8, generator=torch.Generator().manual_seed(0))
    for mean, taken in ((0.0155, False), (0.4, True)):
        units = quantiser.value_units((v + mean).bfloat16())
        assert (units.mean != 0).all() == taken
        error = (
            quantiser.quantised_v((v + mean).bfloat16(), units) * units.scale
            + units.mean
            - (v + mean).bfloat16()
        )
        assert error.mean().abs() < 3 * error.std() / error.numel() ** 0.5


def test_a_mean_that_no_tile_needs_hides_no_small_output():
    # The first key has all of the probability and no value; what the second adds is far below V's mean.
    q, k, v = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 128, 64), torch.ones(1, 1, 128, 64)
    q[..., 0], k[..., 0, 0], v[..., 0, :] = 8.0, 64.0, 0.0
    layout = Call(1, 128, 64).layout
    of_high = build_map(Dense(Class.HIGH).classes(layout), layout)
    out, _ = by_reference(q, k, v, of_high, "bf16", "int8", smooth_k=False)
    assert torch.allclose(out, torch.tensor(127 * math.exp(-64.0)), rtol=1e-2, atol=0.0)


def test_zeros_give_the_mean_of_v():
    call = Call(300, 300, 64)
    v = call.tensors()[2]
    zeros = torch.zeros_like(v)
    out, _ = by_reference(zeros, zeros, v, call.map(), "mxfp8", "mxfp4")
    assert relative_l2(out, v.mean(-2, keepdim=True).expand_as(v)) < 0.05


def test_probabilities_keep_clear_of_e4m3s_subnormals():
    """LOW with outlier channels and values far from zero: unshifted, small probabilities cost twice the error."""
    call = Call(1024, 1024, 64, low="int8", window=0, sink=0)
    q, k, v, _ = call.tensors()
    k[..., 3] *= 8
    v = v + 4
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out, _ = by_reference(q, k, v, call.map(), "mxfp8", "int8")
    assert relative_l2(out, exact) < 0.01


@pytest.mark.parametrize(("high", "low"), [("mxfp8", "mxfp4"), ("bf16", "int8"), ("bf16", "bf16")])
def test_two_halves_of_the_keys_merge_to_the_whole(high, low):
    """The log-sum-exp is that of the call's own scores, whatever mean was taken from the keys of each half."""
    call = Call(300, 512, 64, high=high, low=low, window=0, sink=0)
    q, k, v, _ = call.tensors()
    k[:, :, 256:] += 3.0 * torch.randn(64, generator=torch.Generator().manual_seed(1))  # another mean
    half = Call(300, 256, 64, high=high, low=low, window=0, sink=0)
    outs, lses = zip(*(
        by_reference(q, k[:, :, part], v[:, :, part], half.map(), high, low)
        for part in (slice(0, 256), slice(256, 512))
    ), strict=True)  # fmt: skip
    lse = torch.logaddexp(*lses)
    merged = sum(out * (one - lse).exp()[..., None] for out, one in zip(outs, lses, strict=True))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scores = q.double() @ k.double().mT * 64**-0.5
    exact_lse = scores.logsumexp(-1)
    # Rounding to e4m3 changes a number by 2.6 % in the root mean square; these errors are independent, so that a sum of
    # probabilities is off by 2.6 % of their norm.
    of_rounding = 0.026 * scores.softmax(-1).norm(dim=-1).mean()
    bounds = {"mxfp4": (0.3, 0.3), "int8": (0.04, 0.02), "bf16": (0.04, 0.003)}[low]  # P·V of LOW is FP8
    assert relative_l2(merged, exact) < bounds[0]
    assert (lse - exact_lse).abs().mean() < bounds[1] + of_rounding
