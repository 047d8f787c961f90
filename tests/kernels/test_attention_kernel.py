"""The fused kernel against the reference: same tiles, same order, so the same numbers.

One list of calls for the interpreter and for the GPU. On a GPU exp2 and the products' order of addition differ
in the last bits, so that now and then a probability rounds to the neighbouring e4m3 or bf16 number.
"""

import math
from functools import partial

import pytest
import torch

from dma_diffusers.kernels.lowerings import (
    BLOCK_SCALED_ARCHITECTURES,
    NATIVE,
    Storage,
    architecture,
    choose,
    named,
)
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.fine_mask import hide_empty_slots
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class, build_map
from tests.kernels.calls import (
    GRID_CALLS,
    HIDDEN,
    HIDING_CALLS,
    NAMED_CALLS,
    Call,
    as_the_kernel,
    by_reference,
    launched,
    random_calls,
    relative_l2,
    with_hidden,
)
from tests.kernels.format_calls import FORMAT_CALLS
from tests.kernels.guarded import guarded
from tests.kernels.lse_bounds import lse_bounds

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]


def run(call: Call, device: torch.device, tensors=None, lowering="native", skipped=None, target=None):
    q, k, v, mask = call.tensors(device) if tensors is None else tensors
    return launched(
        q, k, v, call.map(), call.high, call.low, lowering=lowering,
        key_mask=mask, is_causal=call.is_causal, token_order=call.token_order_on(device),
        fine_mask=call.fine_mask_on(device),
        masks_all=not call.masks_text, **call.ropes(device), norms=call.norms(device), **call.prepared,
        skip_below=call.skip_below, skipped=skipped, target=target,
    )[:2]  # fmt: skip


def expected(call: Call, device: torch.device, lowering: str, skipped=None, target=None, by=by_reference):
    q, k, v, mask = call.tensors(device)
    return by(
        q, k, v, call.map(), call.high, call.low,
        key_mask=mask, is_causal=call.is_causal, token_order=call.token_order_on(device),
        fine_mask=call.fine_mask_on(device),
        **call.ropes(device), norms=call.norms(device), **call.prepared,
        **as_the_kernel(call, lowering, device, target),
        skip_below=call.skip_below, skipped=skipped,
    )  # fmt: skip


def skip_what_triton_gets_wrong(call: Call, lowering: str, device: torch.device) -> None:
    """Where there is no block-scaled MMA, Triton widens its operands; Triton 3.6 can't in these cases."""
    from dma_diffusers.kernels.quantiser.operands import padded_dim

    formats = call.map().used(*(precision.qk for precision in Precisions.parse(call.high, call.low)))
    if missing := {name for name in formats if name} - named(lowering).stores.keys():
        pytest.skip(f"{lowering} multiplies no {', '.join(missing)}")
    blocks = [name for name in formats if name and NATIVE.get(name) is Storage.BLOCK]
    if lowering != "native" or device.type == "cpu" or not blocks:
        return
    if architecture(device) in BLOCK_SCALED_ARCHITECTURES:
        return
    if "nvfp4" in blocks or formats[0] is None or padded_dim(call.head_dim) == 128:
        pytest.skip("Triton 3.6 asserts on widened NVFP4, and miscompiles LOW alone and 128 channels")


def assert_agree(call: Call, device: torch.device, lowering: str, target: str | None = None) -> None:
    """In the interpreter only sums differ, in their order; on Hopper, FP8 MMA also keeps few bits of a sum."""
    skip_what_triton_gets_wrong(call, lowering, device)
    counts = [torch.zeros(call.batch, call.heads, dtype=torch.int32, device=device) for _ in range(2)]
    skipped, reference_skipped = counts if call.skip_below is not None else (None, None)
    out, lse = run(call, device, lowering=lowering, skipped=skipped, target=target)
    reference_out, reference_lse = expected(call, device, lowering, reference_skipped, target)
    assert torch.equal(*counts) and (call.skip_below is None or (skipped > 0).all())
    assert out.shape == reference_out.shape and out.dtype == reference_out.dtype
    is_fp8 = device.type == "cuda" and (call.low == "fp8" or call.low.startswith("mxfp6"))
    tolerance = (
        1e-3 if "nvfp4" in (call.high, call.low) else 1e-4
    )  # its tensor scale multiplies finished sums
    if device.type == "cuda":
        tolerance = 1e-2 if is_fp8 else 2e-3
    if call.dtype == torch.bfloat16:  # a difference in float32's last bits may round to the next output
        tolerance += torch.finfo(torch.bfloat16).eps / 4
    assert relative_l2(out, reference_out) <= tolerance
    assert torch.equal(lse.isinf(), reference_lse.isinf())
    finite = reference_lse.isfinite()
    sizes = 1e-5 * reference_lse[finite].abs()
    # A score may be off by more than the sum of many: on a GPU products are added in another order.
    slack = (1e-4 if device.type == "cpu" else 1e-3) + (sizes.max().item() if finite.any() else 0.0)
    least, largest = expected(
        call, device, lowering, target=target, by=partial(lse_bounds, 2 * slack / math.log(2))
    )
    beyond = torch.maximum(lse - largest, least - lse)[finite] - sizes
    # hopper.py's sums of FP8 probabilities are products of its MMA, and begin anew in each piece of the keys.
    is_split = as_the_kernel(call, lowering, device, target)["means_by_codes"] and call.map().has_low
    assert (beyond <= (5e-2 if is_fp8 else 1e-2 if is_split else 1e-4)).all()
    if is_split and not is_fp8:
        # In calls that skip, scores are large: one probability is much of a sum.
        assert (beyond <= 1e-4).float().mean() >= (0.5 if call.skip_below is None else 0.2)


OLDER_CALLS = [
    Call(500, 500, 64, high="bf16", low="int8/bf16"),
    Call(300, 700, 128, heads=4, kv_heads=2, high="bf16", low="int8/bf16", masks_keys=True),
    Call(
        700, 700, 128, high="bf16", low="int8/bf16", is_causal=True, tokens_first=True, dtype=torch.bfloat16
    ),
    Call(500, 500, 72, high="bf16", low="int8/bf16", has_rope=True, has_norms=True, text=(0, 20)),
    Call(300, 300, 200, high="bf16", low="int8/bf16"),
    Call(500, 500, 64, high="bf16", low="int8/fp16", is_causal=True),
    Call(300, 416, 128, heads=4, high="bf16/fp16", low="int8/fp16", masks_keys=True, means=2),
    Call(500, 500, 64, high="bf16", low="int8"),
    Call(500, 500, 128, high="bf16", low="fp8", window=0, sink=0),
    Call(500, 500, 128, high="mxfp8", low="mxfp4"),
    Call(640, 640, 64, high="bf16", low="int8/bf16", means=2),
    Call(300, 300, 128, high="mxint4", low="int4/bf16", masks_keys=True),
    Call(301, 301, 128, high="bf16", low="int8/bf16", means=1, window=0, sink=0),
    Call(300, 300, 64, high="bf16", low="mxfp4", means=2),
    Call(700, 700, 64, high="bf16", low="int8/bf16", has_token_order=True, empty_slots=68),
    Call(640, 640, 64, high="bf16", low="int8/bf16", skip_below=0.05),
]


@pytest.mark.parametrize("call", OLDER_CALLS, ids=str)
def test_without_tma_operands_are_read_by_pointers(call, kernel_device):
    """As on an RTX 40: the variant of sm_89 has everything that those of older GPUs have."""
    lowering = choose("sm_89", call.head_dim, call.high, call.low).lowering
    assert_agree(call, kernel_device, lowering, target="sm_89")


def test_each_head_has_its_own_window(kernel_device):
    call = Call(500, 500, 64, heads=4, kv_heads=2, high="bf16", low="int8", text=(0, 20))
    q, k, v, _ = call.tensors(kernel_device)

    def out(window: int | tuple[int, ...]) -> torch.Tensor:
        precision_map = build_map(Diagonal(window, 0).classes(call.layout), call.layout)
        return launched(q, k, v, precision_map, call.high, call.low)[0]

    windows = (384, 0, 128, 10_000)
    together = out(windows)
    for head, window in enumerate(windows[:3]):  # alone, the last would have nothing LOW
        assert torch.equal(together[:, head], out(window)[:, head])
    assert relative_l2(together[:, 3], out(10_000)[:, 3]) < 1e-2 < relative_l2(together[:, 3], out(0)[:, 3])


@pytest.mark.parametrize("lowering", ["native", "faithful"])
@pytest.mark.parametrize("call", [*NAMED_CALLS, *GRID_CALLS, *FORMAT_CALLS], ids=str)
def test_named_calls(call, lowering, kernel_device):
    assert_agree(call, kernel_device, lowering)


@pytest.mark.parametrize("lowering", ["native", "faithful"])
@pytest.mark.parametrize("call", random_calls(100), ids=str)
def test_random_calls(call, lowering, kernel_device):
    assert_agree(call, kernel_device, lowering)


@pytest.mark.parametrize("lowering", ["native", "faithful"])
@pytest.mark.parametrize(
    "call",
    [Call(512, 512, 128, low="nvfp4"), Call(300, 300, 64, low="nvfp4", window=0, sink=0),
     Call(257, 257, 72, high="nvfp4", low="nvfp4", is_causal=True)],
    ids=str,
)  # fmt: skip
def test_nvfp4(call, lowering, kernel_device):
    assert_agree(call, kernel_device, lowering)


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
def test_maps_of_each_head_and_batch(pair, kernel_device):
    call = Call(384, 384, 64, batch=2, heads=2, high=pair[0], low=pair[1])
    q, k, v, _ = call.tensors(kernel_device)
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([Class.HIGH, Class.LOW, Class.SKIP])[
        torch.randint(0, 3, (2, 2, 3, 3), generator=generator)
    ]
    classes[0, 0, 0] = Class.SKIP
    precision_map = build_map(classes, call.layout)
    out, lse, _ = launched(q, k, v, precision_map, *pair)
    reference_out, reference_lse = by_reference(q, k, v, precision_map, *pair)
    assert relative_l2(out, reference_out) <= (1e-4 if kernel_device.type == "cpu" else 2e-3)
    assert (out[0, 0, :128] == 0).all() and (lse[0, 0, :128] == -torch.inf).all()
    assert torch.equal(lse.isinf(), reference_lse.isinf())


@pytest.mark.parametrize("call", [
    Call(500, 500, 128), Call(300, 300, 64, low="nvfp4", is_causal=True), Call(640, 640, 128, means=2),
    Call(513, 513, 128, skip_below=0.05),
], ids=str)  # fmt: skip
def test_as_on_an_rtx_50(call, kernel_device):
    """The variant of sm_120 takes half a KV tile at a time, and transposed V."""
    assert_agree(call, kernel_device, "native", target="sm_120")


@pytest.mark.parametrize("pair", [("bf16", "int8"), ("bf16/fp8", "mxfp8/bf16"), ("bf16/fp16", "int8/fp16")])
@pytest.mark.parametrize("skip_below", [None, 0.05])
def test_the_sum_has_probabilities_as_rounded(skip_below, pair, kernel_device):
    """Then an output is a mean of values: where they are all alike, it is that value, but for sums' last bits."""
    call = Call(500, 500, 64, high=pair[0], low=pair[1], means=2, smooth_v=False, skip_below=skip_below)
    q, k, v, _ = call.tensors(kernel_device)
    out, _ = run(call, kernel_device, (q, k, torch.ones_like(v), None))
    assert (out - 1).abs().max() < last_bits(call, kernel_device)


def last_bits(call: Call, device: torch.device) -> float:
    """So much of a mean of values that are all alike is lost: by Hopper's FP8 MMA 2^-13·32·(1 + 2 + 3 + 4)/4."""
    is_fp8 = "fp8" in (precision.pv for precision in Precisions.parse(call.high, call.low))
    return 1e-5 if device.type == "cpu" else 1e-2 if is_fp8 else 1e-3


@pytest.mark.parametrize("words", ["int8", "bf16/fp8"])
@pytest.mark.parametrize("skip_below", [None, 0.05])
def test_the_sum_lacks_what_rounding_takes(skip_below, words, kernel_device):
    """All keys but the first have the probability 2^-.9375, of which e4m3 takes 4 %."""
    prepared = {"smooth_k": False, "smooth_v": False, "skip_below": skip_below}
    call = Call(300, 300, 64, high=words, low=words, window=0, sink=0, **prepared)
    q, k = torch.zeros(2, 1, 2, 300, 64, device=kernel_device)
    q[..., 0] = 0.9375 * math.log(2) * 64**0.5
    k[..., 0, 0] = 1
    out, _ = run(call, kernel_device, (q, k, torch.ones_like(k), None))
    assert (out - 1).abs().max() < last_bits(call, kernel_device)


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
def test_a_row_that_sees_nothing_is_zero(pair, kernel_device):
    call = Call(200, 200, 64, batch=2, high=pair[0], low=pair[1])
    q, k, v, _ = call.tensors(kernel_device)
    mask = torch.stack([torch.zeros(200, dtype=torch.bool), torch.ones(200, dtype=torch.bool)]).to(
        kernel_device
    )
    out, lse = run(call, kernel_device, (q, k, v, mask))
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("fp8", "int8"), ("int8", "fp8"), ("bf16", "int8")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("skip_below", [None, 0.05])
def test_nan_is_where_the_reference_has_it(skip_below, which, bad, pair, kernel_device):
    """No tile with NaN scores is skipped."""
    if skip_below is not None and which == "v":
        pytest.skip("values of a skipped tile are not looked at, but on tcgen05, which multiplies them by 0")
    call = Call(400, 400, 64, is_causal=True, high=pair[0], low=pair[1], skip_below=skip_below)
    tensors = dict(zip("qkv", call.tensors(kernel_device), strict=False))
    tensors[which][0, 0, 150, 3] = bad
    q, k, v = tensors.values()
    out, _ = run(call, kernel_device, (q, k, v, None))
    reference_out, _ = by_reference(
        q, k, v, call.map(), *pair, is_causal=True, skip_below=skip_below,
        skip_rows=as_the_kernel(call, "native", kernel_device)["skip_rows"],
    )  # fmt: skip
    assert torch.equal(out.isnan(), reference_out.isnan()) and out.isnan().any() and not out.isnan().all()


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8"), ("int8", "fp8"), ("bf16", "nvfp4")])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_hidden_keys_may_hold_anything(pair, bad, kernel_device):
    """A number that isn't finite reaches neither K's mean nor a scale of the keys beside it."""
    call = Call(300, 300, 64, batch=2, high=pair[0], low=pair[1], masks_keys=True, window=0, sink=0)
    skip_what_triton_gets_wrong(call, "native", kernel_device)
    q, k, v, mask = call.tensors(kernel_device)
    outs = []
    for content in (torch.nan, bad):
        hidden = k.masked_fill(~mask[:, None, :, None], content)
        outs.append(run(call, kernel_device, (q, hidden, v, mask))[0])
    assert torch.equal(*outs)
    reference_out, _ = by_reference(q, hidden, v, call.map(), *pair, key_mask=mask)
    assert relative_l2(outs[0], reference_out) <= (1e-3 if kernel_device.type == "cpu" else 1e-2)


@pytest.mark.parametrize(
    ("call", "lowering"),
    [(call, "native") for call in HIDING_CALLS]
    + [(call, "faithful") for call in HIDING_CALLS if call.high == "mxfp8"],
    ids=str,
)
def test_hidden_keys_change_nothing(call, lowering, kernel_device):
    """Not a bit changes, whatever they hold, and however large their values are."""
    skip_what_triton_gets_wrong(call, lowering, kernel_device)
    tensors = call.tensors(kernel_device)
    out, lse = run(call, kernel_device, with_hidden(tensors, 0.0, 0.0), lowering)
    assert out.isfinite().all()
    for content in HIDDEN:
        other, other_lse = run(call, kernel_device, with_hidden(tensors, *content), lowering)
        assert torch.equal(other, out) and torch.equal(other_lse, lse)


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
@pytest.mark.parametrize("window", [0, 128, 10_000])
def test_the_largest_fp16_values_stay_finite(window, pair, kernel_device):
    """Infinity stays infinite where V is in bf16."""
    call = Call(300, 300, 64, high=pair[0], low=pair[1], window=window, sink=window, dtype=torch.float16)
    skip_what_triton_gets_wrong(call, "native", kernel_device)
    q, k, v, _ = call.tensors(kernel_device)
    v[:, 0], v[:, 1] = 65504.0, -65504.0
    out, _ = run(call, kernel_device, (q, k, v, None))
    assert relative_l2(out, v) < 0.01 and out.dtype == torch.float16
    if window == 10_000:
        v[0, 0, 7, 3] = torch.inf
        assert (run(call, kernel_device, (q, k, v, None))[0][0, 0, :, 3] == torch.inf).all()


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("int8", "fp8")])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_zeros(size, pair, kernel_device):
    """Also of next to nothing: the scales' product is below the smallest float."""
    call = Call(300, 300, 64, high=pair[0], low=pair[1])
    q, k, v, _ = call.tensors(kernel_device)
    q, k = q * size, k * size
    out, _ = run(call, kernel_device, (q, k, v, None))
    reference_out, _ = by_reference(q, k, v, call.map(), *pair)
    assert relative_l2(out, reference_out) <= (1e-4 if kernel_device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
def test_same_inputs_same_bits(pair, kernel_device):
    call = Call(400, 400, 64, high=pair[0], low=pair[1], dtype=torch.bfloat16)
    assert torch.equal(run(call, kernel_device)[0], run(call, kernel_device)[0])


@pytest.mark.parametrize("changes", [
    {"heads": 4, "masks_keys": True}, {"text": (0, 50), "has_rope": True}, {"window": 1000}, {"window": 0, "sink": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
@pytest.mark.parametrize("length", [111, 200])
def test_an_order_gives_the_bits_of_tokens_permuted_before_and_after(length, pair, changes, kernel_device):
    dtype = torch.float32 if length == 111 else torch.bfloat16
    call = Call(length, length, 64, high=pair[0], low=pair[1], dtype=dtype, has_token_order=True, **changes)
    skip_what_triton_gets_wrong(call, "native", kernel_device)
    token_order, inverse = call.token_order_on(kernel_device), call.token_order.argsort().to(kernel_device)
    q, k, v, mask = call.tensors(kernel_device)
    ropes = call.ropes(kernel_device)
    permuted = launched(
        *(x[:, :, token_order] for x in (q, k, v)), call.map(), *pair,
        key_mask=None if mask is None else mask[:, token_order],
        **{name: rope and tuple(table[token_order] for table in rope) for name, rope in ropes.items()},
    )  # fmt: skip
    out, lse, _ = launched(q, k, v, call.map(), *pair, key_mask=mask, token_order=token_order, **ropes)
    assert torch.equal(out, permuted[0][:, :, inverse]) and torch.equal(lse, permuted[1][:, :, inverse])


@pytest.mark.parametrize("empty_slots", [0, 40])
@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8"), ("bf16", "bf16")])
def test_what_an_order_does_not_name_is_left_alone(pair, empty_slots, kernel_device):
    """Rows that it leaves out stay as they were, numbers that are no token's read and write nothing."""
    call = Call(
        300, 300, 64, batch=2, high=pair[0], low=pair[1], has_token_order=True, empty_slots=empty_slots
    )
    q, k, v, _ = call.tensors(kernel_device)
    token_order = call.token_order
    slots = (token_order >= 0).nonzero()[[5, 130, 131, 299], 0]
    left_out = token_order[slots]
    token_order[slots] = torch.tensor([-1, 300, 2**31 - 1, -(2**31)], dtype=torch.int32)
    fine_mask = hide_empty_slots(token_order.where(token_order < 300, -1)).to(kernel_device)
    out, lse, _ = launched(
        q,
        k,
        v,
        call.map(),
        *pair,
        token_order=token_order.to(kernel_device),
        fine_mask=fine_mask,
        run=guarded,
    )
    is_left_out = torch.zeros(300, dtype=torch.bool)
    is_left_out[left_out.long()] = True
    for x in (out[..., 0], out[..., 63], lse):
        assert torch.equal(x.isnan().cpu(), is_left_out.expand(2, 2, 300))


def test_a_key_mask_hides_what_an_order_does_not_name(kernel_device):
    call = Call(300, 300, 64, batch=2, high="bf16", low="int8", masks_keys=True, has_token_order=True)
    q, k, v, mask = call.tensors(kernel_device)
    options = {"high": call.high, "low": call.low, "key_mask": mask, "return_lse": False}
    nobody, strange = call.token_order, call.token_order
    slots = torch.tensor([5, 130, 131, 299])
    nobody[slots] = -1
    strange[slots] = torch.tensor([-2, 300, 2**31 - 1, -(2**31)], dtype=torch.int32)
    expected, found = (
        launched(q, k, v, call.map(), token_order=token_order.to(kernel_device), **options)[0]
        for token_order in (nobody, strange)
    )
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and not found.isnan().all()


@pytest.mark.parametrize("everywhere", [Class.HIGH, Class.LOW])
def test_only_what_the_map_reads_is_encoded(everywhere, kernel_device):
    recorded = []
    call = Call(256, 256, 64)
    q, k, v, _ = call.tensors(kernel_device)
    launched(
        q, k, v, build_map(Dense(everywhere).classes(call.layout), call.layout), "mxfp8", "mxfp4",
        run=lambda kernel, grid, *arguments, **options: recorded.append(
            (kernel.fn.__name__, dict(zip(kernel.arg_names, arguments, strict=False)))
        ),
    )  # fmt: skip
    assert [name for name, _ in recorded] == ["statistics", "encode", "attend"]
    found, given, is_low = recorded[0][1], recorded[1][1], everywhere == Class.LOW
    assert (found["v"] is not None) == (given["v"] is not None) == is_low
    elements = [given[name] for name in ("q_high", "q_low", "k_high", "k_low")]
    assert [x is None for x in elements] == [is_low, not is_low, is_low, not is_low]


@pytest.mark.parametrize("has_token_order", [False, True])
@pytest.mark.parametrize(("high", "low", "everywhere", "names"), [
    ("bf16", "int8", None, ["statistics", "encode", "attend"]), ("bf16", "int8", Class.HIGH, ["attend"]),
    ("bf16", "int8", Class.LOW, ["statistics", "encode", "attend"]),
    ("bf16", "bf16", Class.LOW, ["statistics", "encode", "attend"]),
])  # fmt: skip
def test_two_launches_before_the_attention_kernel_or_none(
    high, low, everywhere, names, has_token_order, kernel_device
):
    """An order adds none, but what was read where the model has it is gathered."""
    recorded = []
    call = Call(512, 512, 64, high=high, low=low, dtype=torch.bfloat16, has_token_order=has_token_order)
    q, k, v, _ = call.tensors(kernel_device)
    whole = None if everywhere is None else build_map(Dense(everywhere).classes(call.layout), call.layout)
    launched(
        q, k, v, whole or call.map(), high, low, token_order=call.token_order_on(kernel_device),
        run=lambda kernel, grid, *arguments, **options: recorded.append(kernel.fn.__name__.removesuffix("_hopper")),
    )  # fmt: skip
    assert recorded == (["encode", "attend"] if has_token_order and len(names) == 1 else names)


def test_v_is_read_where_it_lies(kernel_device):
    """A model's own bf16 values need no copy for HIGH tiles, in either layout."""
    from dma_diffusers.kernels.attention.strides import bf16_for_tma

    for tokens_first in (False, True):
        v = Call(300, 300, 64, dtype=torch.bfloat16, tokens_first=tokens_first).tensors(kernel_device)[2]
        assert bf16_for_tma(v).data_ptr() == v.data_ptr()
    odd = Call(300, 300, 36, dtype=torch.bfloat16).tensors(kernel_device)[2]
    assert all(stride % 8 == 0 for stride in bf16_for_tma(odd).stride()[:-1])


def one_head_innermost(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, the head dimension of size 1 with a stride of 1, as einops leaves it."""
    return x[:, 0].clone().unsqueeze(-1).movedim(-1, 1)


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
def test_strides_that_models_leave(pair, kernel_device):
    """Dimensions of size 1 with odd strides, RoPE tables laid out differently, a transposed key mask."""
    call = Call(
        256, 256, 64, batch=2, heads=1, kv_heads=1, high=pair[0], low=pair[1], window=0, sink=0,
        dtype=torch.bfloat16, has_rope=True, masks_keys=True,
    )  # fmt: skip
    q, k, v, mask = call.tensors(kernel_device)
    ropes = call.ropes(kernel_device)
    plain = launched(q, k, v, call.map(), *pair, key_mask=mask, **ropes)
    cos, sin = ropes["k_rope"]
    ropes["k_rope"] = cos, torch.stack((sin, sin), dim=-1)[..., 0]
    odd = (one_head_innermost(x) for x in (q, k, v))
    result = launched(*odd, call.map(), *pair, key_mask=mask.t().contiguous().t(), **ropes)
    assert torch.equal(result[0], plain[0]) and torch.equal(result[1], plain[1])


@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8")])
def test_two_halves_of_the_keys_merge_to_the_whole(pair, kernel_device):
    """Each half takes its own mean from its keys: the kernel gives that back in the log-sum-exp."""
    call = Call(200, 512, 64, high=pair[0], low=pair[1], window=100_000)
    q, k, v, _ = call.tensors(kernel_device)
    k[:, :, 256:] += 3.0
    half = Call(200, 256, 64, high=pair[0], low=pair[1], window=100_000)
    parts = [
        launched(q, k[:, :, part], v[:, :, part], half.map(), *pair)[:2]
        for part in (slice(0, 256), slice(256, 512))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (one - lse).exp()[..., None] for out, one in parts)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_l2(merged, exact) < (0.01 if pair[0] == "bf16" else 0.06)


def test_the_device_of_the_tensors_is_taken():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = Call(300, 300, 64, high="bf16", low="int8")
    here, there = (run(call, torch.device("cuda", index))[0].cpu() for index in (0, 1))
    assert torch.equal(here, there)
