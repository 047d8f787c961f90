"""The quantiser's kernel against the codecs: the same bytes."""

from dataclasses import replace

import pytest
import torch

from dma_diffusers.kernels.call import Call as AttentionCall
from dma_diffusers.kernels.formats import block_of, fake_quantize, get_format, pack, rotate
from dma_diffusers.kernels.lowerings import FAITHFUL, NATIVE, Storage, named
from dma_diffusers.kernels.precision import Precision
from dma_diffusers.kernels.quantiser import reference
from tests.kernels.calls import Call, relative_l2
from tests.kernels.oracle import rotated
from tests.kernels.test_statistics_kernel import padded_units

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
FORMATS = ["mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4"]


def known(mean: torch.Tensor | None = None):
    """Statistics that say that keys have this mean `[B, H, 1, D]`."""
    from dma_diffusers.kernels.quantiser.launch import Statistics
    from dma_diffusers.kernels.quantiser.operands import padded_dim

    if mean is None:
        return Statistics(None, None)
    padded = torch.nn.functional.pad(mean, (0, padded_dim(mean.shape[-1]) - mean.shape[-1]))
    return Statistics(padded.flatten(0, 2).contiguous(), None)


def stored_as(fmt: str, storage: Storage, values: Storage = Storage.PLAIN):
    """A class of this format of Q·K, whose V is in bf16 unless it is said."""
    from dma_diffusers.kernels.quantiser.operands import Stored

    return Stored(get_format(fmt), storage, values)


def encode(q, k, v, classes, factor=1.0, statistics=None, **options):
    """The quantiser's `encode`; what it reads is named among its options."""
    from dma_diffusers.kernels.quantiser import launch

    named = {
        name: options.pop(name)
        for name in ("q_rope", "k_rope", "key_mask", "token_order", "rotated_block")
        if name in options
    }
    return launch.encode(launch.Source(q, k, v, factor, **named), classes, statistics or known(), **options)


def encoded_q(x, fmt, amax=None, factor=1.0, stores=NATIVE, **options):
    """Q as one format's operand, through the kernel."""

    classes = (stored_as(fmt, stores[fmt]), None)
    return encode(x, None, None, classes, factor, amax=(amax, None), **options).q[0]


def encoded_k(x, fmt, amax=None, mean=None, stores=NATIVE, **options):
    """K as one format's operand, through the kernel; no mean means none is subtracted."""

    classes = (stored_as(fmt, stores[fmt]), None)
    return encode(None, x, None, classes, 1.0, known(mean), amax=(None, amax), **options).k[0]


def decoded(data: torch.Tensor, fmt: str) -> torch.Tensor:
    """Elements of a block format from their bytes, scales left out."""
    element = get_format(fmt).element
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return element.decode(nibbles if element.bits == 4 else data)


def numbers_of(operand, head_dim: int) -> torch.Tensor:
    """The numbers that an operand with scales of rows or tiles or none stores, float32 `[rows, head_dim]`."""
    numbers = operand.elements.flatten(0, 2)
    if numbers.shape[1] < max(head_dim, 64):
        numbers = decoded(numbers.view(torch.uint8), "int4")
    numbers = numbers.float()
    if operand.scales is not None:
        numbers = numbers * operand.scales.repeat_interleave(len(numbers) // len(operand.scales))[:, None]
    return numbers[:, :head_dim]


def without_negative_zeros(operand, fmt: str) -> torch.Tensor:
    """An operand's bytes, with 0 for −0: channels and tokens that are padded with zeros differ in their signs."""
    data = operand.elements.view(torch.uint8)
    return data.where(data != 128, 0) if fmt in ("fp8", "mxfp8") else data


def tiles_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[B, H, S, D]` padded with zeros to whole tiles and `dim` columns, `[B·H·tiles·128, dim]`."""
    x = torch.nn.functional.pad(x, (0, dim - x.shape[-1], 0, -x.shape[-2] % 128))
    return x.reshape(-1, dim)


def plain_scales(operand, columns: int) -> torch.Tensor:
    """An operand's scales, uint8 `[rows, columns]`, out of the MMA's layout."""
    scales = operand.scales.view(torch.uint8)
    if scales.ndim == 2:
        return scales.reshape(-1, columns)
    tiles = scales.shape[1]
    scales = scales.reshape(tiles, columns // 4, 32, 4, 4)  # tile, group, row % 32, row // 32, column % 4
    return scales.permute(0, 3, 2, 1, 4).reshape(-1, columns)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (111, 40), (257, 128), (130, 256)])
@pytest.mark.parametrize("is_key", [False, True])
def test_bytes_equal_the_codec(fmt, length, head_dim, is_key, kernel_device):
    from dma_diffusers.kernels.quantiser.operands import padded_dim

    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, 3, length, head_dim, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (2, 3, length, 1), generator=generator).float())
    x[..., : head_dim // 2][..., ::3, :] = 0  # blocks and rows of zeros
    x = x.to(kernel_device)
    mean = x.mean(-2, keepdim=True)
    value = x - mean if is_key else x * 0.3
    amax = value.abs().amax((-2, -1), keepdim=True)
    operand = encoded_k(x, fmt, amax, mean) if is_key else encoded_q(x, fmt, amax, 0.3)
    dim = padded_dim(head_dim)
    per_row = amax.expand(2, 3, -(-length // 128) * 128, 1).reshape(-1, 1)
    expected = pack(tiles_of(value, dim), fmt, tensor_amax=per_row)
    block = 16 if fmt == "nvfp4" else 32
    nonzero = (tiles_of(value, dim).unflatten(-1, (-1, block)) != 0).any(-1)
    assert torch.equal(plain_scales(operand, dim // block)[nonzero], expected.scales[nonzero])
    assert torch.equal(
        decoded(operand.elements.flatten(0, 2), fmt), decoded(expected.data, fmt)
    )  # zeros may differ in sign


@pytest.mark.parametrize("fmt", ["int8", "fp8", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(
    ("rotation", "head_dim"),
    [("hadamard16", 64), ("hadamard16", 80), ("hadamard32", 96), ("hadamard32", 128), ("head_dim", 8),
     ("head_dim", 64), ("head_dim", 128), ("head_dim", 256)],
)  # fmt: skip
@pytest.mark.parametrize("is_key", [False, True])
def test_rotated_channels_have_the_bits_of_the_definition(fmt, rotation, head_dim, is_key, kernel_device):
    """The kernel stores the same of a tensor that it rotates as of one that torch has rotated."""
    if fmt == "fp8" and head_dim < 16 and kernel_device.type == "cuda":
        pytest.skip("ptxas miscompiles it, and lowerings refuse it")
    x = torch.randn(1, 2, 200, head_dim, generator=torch.Generator().manual_seed(head_dim))
    x[..., 5] *= 100
    x = x.to(kernel_device)
    mean = x.mean(-2, keepdim=True) if is_key else None
    expected = rotate(x - mean if is_key else x * 0.3, rotation)
    amax = expected.abs().amax((-2, -1), keepdim=True)
    block = block_of(rotation, head_dim)
    if is_key:
        found, plain = encoded_k(x, fmt, amax, mean, rotated_block=block), encoded_k(expected, fmt, amax)
    else:
        found, plain = encoded_q(x, fmt, amax, 0.3, rotated_block=block), encoded_q(expected, fmt, amax)
    assert torch.equal(without_negative_zeros(found, fmt), without_negative_zeros(plain, fmt))
    assert torch.equal(found.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    unrotated = encoded_k(x, fmt, amax, mean) if is_key else encoded_q(x, fmt, amax, 0.3)
    assert not torch.equal(found.elements.view(torch.uint8), unrotated.elements.view(torch.uint8))


def test_bf16_is_not_rotated(kernel_device):
    x = torch.randn(1, 1, 130, 64, device=kernel_device)
    order = torch.arange(130, dtype=torch.int32, device=kernel_device)
    found, expected = (
        encoded_q(x, "bf16", token_order=order, rotated_block=block).elements for block in (32, 1)
    )
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("values", [Storage.PLAIN, Storage.CHANNEL])
@pytest.mark.parametrize("fmt", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("case", "length", "head_dim"),
    [
        ("plain", 1, 64),
        ("masked", 111, 40),
        ("ordered", 111, 40),
        ("plain", 300, 128),
        ("ordered", 1173, 128),
    ],
)
def test_means_are_the_references(length, head_dim, case, fmt, values, kernel_device):
    """Bit for bit, whatever the hidden keys and values hold; V's transposed tokens have the same means."""
    generator = torch.Generator().manual_seed(length)
    k, v = (torch.randn(2, 2, length, head_dim, generator=generator) for _ in range(2))
    k += torch.randn(head_dim, generator=generator)
    mean = k.mean(-2, keepdim=True)
    seen = torch.rand(2, length, generator=generator) > 0.4 if case == "masked" else torch.ones(2, length) > 0
    smoothed, hidden = k - mean, ~seen[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)
    token_order = key_mask = None
    if case == "ordered":
        token_order = torch.randperm(length + 45, generator=generator)
        token_order = torch.where(token_order < length, token_order, -1).int()
        smoothed, v_slots = (
            torch.nn.functional.pad(x, (0, 0, 0, 1))[:, :, token_order] for x in (smoothed, v)
        )
        seen = (token_order >= 0).expand(2, -1)
    expected = reference.means_of(smoothed, v_slots if case == "ordered" else v, seen)
    if case == "masked":
        key_mask = torch.nn.functional.pad(seen, (0, -length % 128)).to(torch.uint8).to(kernel_device)
    statistics = known(mean)._replace(v_units=torch.ones(4, 2, 64 if head_dim <= 64 else 128))
    statistics = type(statistics)(*(x.to(kernel_device) for x in statistics))
    stored = replace(stored_as(fmt, NATIVE[fmt]), values=values)
    means = encode(
        None, k.to(kernel_device), v.to(kernel_device), (stored_as("int8", Storage.TILE), None), 1.0, statistics,
        of_means=stored, key_mask=key_mask, transposed_v=True,
        token_order=None if token_order is None else token_order.to(kernel_device),
    ).means  # fmt: skip
    rows = expected.k.shape[2]
    for found, own, is_bf16 in (
        (means.k, expected.k, fmt == "bf16"), (means.v, expected.v, values is Storage.PLAIN),
    ):  # fmt: skip
        own = own.bfloat16() if is_bf16 else own
        assert found.dtype == own.dtype and torch.equal(found[..., :head_dim].cpu(), own)
        assert (found[..., head_dim:] == 0).all()
    torch.testing.assert_close(means.log_counts[:, :rows].cpu(), expected.log_counts, rtol=0, atol=1e-6)
    assert (means.log_counts[:, rows:] == -torch.inf).all() and means.log_counts.shape[1] % 128 == 0


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_block_is_nan_and_no_other(fmt, bad, kernel_device):
    x = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    amax = reference.finite_amax(x, (-2, -1))
    x[0, 0, 5, 70] = bad
    block = 16 if fmt == "nvfp4" else 32
    scales = plain_scales(encoded_q(x, fmt, amax), 128 // block)
    is_nan = scales == (0x7F if fmt == "nvfp4" else 0xFF)
    assert is_nan[5, 70 // block] and is_nan.sum() == 1


def test_both_classes_in_one_pass(kernel_device):

    x = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    stored = [stored_as(name, Storage.BLOCK) for name in ("mxfp8", "mxfp4")]
    together = encode(x, None, None, tuple(stored), 1.0).q
    alone = [encoded_q(x, "mxfp8"), encoded_q(x, "mxfp4")]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.elements, other.elements) and torch.equal(one.scales, other.scales)


def in_order(transposed: torch.Tensor) -> torch.Tensor:
    """Transposed values `[B, H, D, tiles·128]` as `[B, H, tiles·128, D]`; of 16 tokens 8h+2j+p lies at 4j+2h+p."""
    return transposed.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4).mT


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_equal_the_reference(transposed, pv, kernel_device):
    from dma_diffusers.kernels.quantiser.launch import statistics_of
    from dma_diffusers.kernels.quantiser.operands import Stored

    v = torch.randn(2, 2, 300, 40, generator=torch.Generator().manual_seed(2)).to(kernel_device) * 5
    v[..., 20] *= 2.0 ** torch.arange(4.0, device=kernel_device).view(2, 2, 1)
    v[..., 21], v[..., 22], v[..., 23] = 0.0, 1e-40, 448.0
    v[0, 0, 3, 7], v[0, 0, 4, 8], v[0, 0, 5, 9] = torch.nan, torch.inf, -torch.inf
    units = reference.value_units(v)
    stored = Stored.by(named("native"), Precision("int8", pv), "sm_90")
    result = encode(None, None, v, (None, stored), 1.0, statistics_of(None, v), transposed_v=transposed)
    assert torch.equal(result.v_units, padded_units(units, 64))
    elements = result.values[stored.values].float()
    elements = (in_order(elements) if transposed and pv == "fp8" else elements).flatten(0, 2)
    expected = tiles_of(reference.quantised_v(v, units, pv).float(), 64)
    torch.testing.assert_close(elements, expected, rtol=0, atol=0, equal_nan=True)
    assert elements.nan_to_num(0).abs().max() > 200  # the scale brings channels up to e4m3's range


@pytest.mark.parametrize("is_key", [False, True])
@pytest.mark.parametrize("fmt", ["fp8", "int8", "int8_tile", "int4"])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (111, 40), (257, 128), (130, 256)])
def test_shared_scales_equal_the_reference(fmt, length, head_dim, is_key, kernel_device):
    x = torch.randn(2, 3, length, head_dim, generator=torch.Generator().manual_seed(length)).to(kernel_device)
    x[..., length // 2, :] = 0
    mean = 0.1 * x.mean(-2, keepdim=True)
    operand = encoded_k(x, fmt, None, mean) if is_key else encoded_q(x, fmt, None, 0.3)
    expected = reference.quantised_k(x - mean, fmt) if is_key else reference.quantised_q(x * 0.3, fmt)
    expected = tiles_of(expected, head_dim)
    assert torch.equal(numbers_of(operand, head_dim), expected)
    assert operand.scales.isfinite().all() and (operand.scales > 0).all()
    assert operand.scales.numel() == 6 * -(-length // 128) * (1 if is_key else 128)


@pytest.mark.parametrize("is_key", [False, True])
@pytest.mark.parametrize("fmt", ["fp8", "int8"])
def test_the_reference_is_the_codec_but_for_ties(fmt, is_key):
    """It multiplies by a rounded inverse: only a number halfway between two others may go to the other one."""
    x = torch.randn(2, 3, 300, 64, generator=torch.Generator().manual_seed(5))
    x[:, 0] = (60 * x[:, 0]).round().clamp(-253, 253) / 2 * 0.3  # ties of int8
    x[:, 0, :, 0] = 127 * 0.3
    expected = fake_quantize(x, replace(get_format(fmt), block_rows=128 if is_key else 1))
    values = (reference.quantised_k if is_key else reference.quantised_q)(x, fmt)
    same = torch.isclose(values, expected, rtol=1e-6, atol=0)
    assert (same | torch.isclose(x, (values + expected) / 2, rtol=1e-6, atol=0)).all()
    assert same[:, 1:].float().mean() > 0.9999


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_nan_and_no_other(fmt, bad, kernel_device):
    x = torch.randn(1, 1, 128, 64, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    x[0, 0, 5, 30] = bad
    is_nan = numbers_of(encoded_q(x, fmt), 64).isnan()
    assert is_nan[5].all() and is_nan.sum() == 64


@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_key_spoils_itself_or_in_int8_its_tile(fmt, bad, kernel_device):
    x = torch.randn(1, 1, 300, 64, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    sound = numbers_of(encoded_k(x, fmt), 64)
    x[0, 0, 135, 30] = bad
    numbers = numbers_of(encoded_k(x, fmt), 64)
    expected = tiles_of(reference.quantised_k(x, fmt), 64)
    is_nan = numbers.isnan()
    assert torch.equal(is_nan[:300], expected.isnan()[:300])
    assert is_nan[128:256].all() and is_nan.sum() == 128 * 64 if fmt == "int8" else is_nan.sum() == 1
    assert torch.equal(numbers[~is_nan], sound[~is_nan])


@pytest.mark.parametrize("fmt", ["fp8", "int8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_hidden_keys_are_encoded_as_zeros(fmt, bad, kernel_device):
    """They change no other key's scale, whatever they hold."""
    x = torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    mask = torch.zeros(2, 384, dtype=torch.uint8, device=kernel_device)
    mask[:, :300] = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) > 0.5
    hidden = (mask[:, :300] == 0)[:, None, :, None]
    amax = x.masked_fill(hidden, 0).abs().amax((-2, -1), keepdim=True)
    expected = encoded_k(x.masked_fill(hidden, 0), fmt, amax)
    operand = encoded_k(x.masked_fill(hidden, bad), fmt, amax, key_mask=mask)
    assert torch.equal(operand.elements.view(torch.uint8), expected.elements.view(torch.uint8))
    assert torch.equal(operand.scales.view(torch.uint8), expected.scales.view(torch.uint8))


def spanning(span: int, device: torch.device) -> torch.Tensor:
    """Rows of two blocks of 32, the second `span` binades under the first."""
    x = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(span))
    x[..., 0], x[..., 32] = 7.9, 7.9  # blocks reach their format's largest binade
    x[..., 32:] *= 2.0**-span
    return x.to(device)


@pytest.mark.parametrize(("fmt", "span"), [("mxfp4", 14), ("mxfp6_e2m3", 11), ("mxfp6_e3m2", 9)])
def test_reencoded_rows_are_the_same_numbers(fmt, span, kernel_device):
    """As far as the scales of a row's blocks may lie apart (14 binades for e2m1: 2^-8 to 2^6), and no further."""
    for distance, is_exact in ((0, True), (span, True), (span + 1, False)):
        x = spanning(distance, kernel_device)
        inexact = torch.zeros(1, dtype=torch.int32, device=kernel_device)
        operand = encoded_q(x, fmt, stores=FAITHFUL, inexact_rows=inexact)
        numbers, expected = numbers_of(operand, 64), tiles_of(fake_quantize(x, fmt), 64)
        differs = (numbers != expected).any(-1)
        assert operand.elements.dtype == torch.float8_e4m3fn
        assert differs.sum() == inexact.item()
        assert differs.any().item() is not is_exact
        assert relative_l2(numbers[:, :32], expected[:, :32]) == 0


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp8_e5m2", "nvfp4", "mxint8", "mxint6"])
def test_plain_numbers_are_the_same_numbers(fmt, kernel_device):
    x = torch.randn(2, 1, 200, 72, generator=torch.Generator().manual_seed(3)).to(kernel_device)
    x *= torch.exp2(torch.arange(200.0, device=kernel_device) / 4 - 20)[:, None]
    amax = x.abs().amax((-2, -1), keepdim=True)
    operand = encoded_q(x, fmt, amax, stores=FAITHFUL)
    numbers = numbers_of(operand, 72).reshape(2, 1, -1, 72)
    if operand.tensor_scale is not None:
        numbers = numbers * operand.tensor_scale[:, None, None, None]
    expected = tiles_of(fake_quantize(x, fmt, tensor_amax=amax), 72).reshape(2, 1, -1, 72)
    assert relative_l2(numbers, expected) < (1e-6 if fmt.startswith("nv") else 1e-30)


@pytest.mark.parametrize("fmt", ["mxfp4", "bf16"])
def test_rope_and_offset(fmt, kernel_device):
    """q is rotated before anything else; the offset is what K's mean contributes to each row's scores."""

    call = Call(130, 130, 40, heads=4, has_rope=True)
    q, k, _, _ = call.tensors(kernel_device)
    rope = call.ropes(kernel_device)["q_rope"]
    turned = rotated(q.cpu(), tuple(table.cpu() for table in rope))
    mean = k.mean(-2, keepdim=True)
    rounds = fmt == "bf16"
    stored = stored_as(fmt, FAITHFUL[fmt])
    count = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    result = encode(
        q, k, None, (stored, None), 0.7, known(mean), q_rope=rope, wants_offset=True, inexact_rows=count
    )
    operand, offset = result.q[0], result.offset
    expected = turned.bfloat16() if rounds else fake_quantize(turned * 0.7, fmt)
    assert (
        relative_l2(numbers_of(operand, 40), tiles_of(expected.float(), 40)) < 1e-2
    )  # ties may fall otherwise
    rows = turned.bfloat16().double() if rounds else turned.double()
    expected_offset = (rows * mean.cpu().double().repeat_interleave(2, 1)).sum(-1) * 0.7
    torch.testing.assert_close(
        offset.reshape(1, 4, -1)[..., :130].cpu().double(),
        expected_offset,
        rtol=1e-4,
        atol=1e-2 if rounds else 1e-5,
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("empty_slots", [0, 70])
@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("bf16", "int8"), ("bf16", "bf16")])
def test_an_order_gives_the_bytes_of_gathered_tokens(pair, empty_slots, transposed, kernel_device):
    """Empty slots are zeros."""
    from dma_diffusers.kernels.quantiser.launch import statistics_of

    call = Call(200, 200, 40, heads=4, batch=2, has_rope=True, has_token_order=True, empty_slots=empty_slots)
    q, k, v, _ = call.tensors(kernel_device)
    v[..., 3, 5] = torch.inf
    ropes = call.ropes(kernel_device)
    values = (Storage.PLAIN, Storage.CHANNEL)
    stored = tuple(stored_as(name, NATIVE[name], each) for name, each in zip(pair, values, strict=True))
    statistics = statistics_of(k, v, ropes["k_rope"])
    options = {"wants_offset": True, "transposed_v": transposed}
    found = encode(
        q, k, v, stored, 0.3, statistics, token_order=call.token_order_on(kernel_device), **options, **ropes
    )

    v_means = statistics.v_units[:, 1, :40].view(2, -1, 1, 40)
    v_in_slots = torch.where(call.token_order_on(kernel_device)[:, None] >= 0, call.in_slots(v), v_means)
    gathered = (call.in_slots(q), call.in_slots(k), v_in_slots)
    turned = {name: tuple(map(call.in_slots, rope)) for name, rope in ropes.items()}
    is_taken = torch.nn.functional.pad(call.token_order >= 0, (0, -len(call.token_order) % 128)).to(
        kernel_device
    )
    key_mask = is_taken.to(torch.uint8).expand(2, -1).contiguous()
    expected = encode(*gathered, stored, 0.3, statistics, key_mask=key_mask, **options, **turned)
    for one, other in zip(found.q + found.k, expected.q + expected.k, strict=True):
        assert torch.equal(one.elements.view(torch.uint8), other.elements.view(torch.uint8))
        assert one.scales is other.scales is None or torch.equal(one.scales, other.scales)
    assert torch.equal(
        found.values[Storage.CHANNEL].view(torch.uint8), expected.values[Storage.CHANNEL].view(torch.uint8)
    )
    assert torch.equal(found.offset, expected.offset)
    assert torch.equal(
        found.values[Storage.PLAIN].flatten(0, 2)[:, :40], tiles_of(call.in_slots(v), 40).bfloat16()
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_go_to_even(fmt, kernel_device):
    """Halfway between every two neighbouring numbers of the element, in blocks whose scale is one."""
    element, block = get_format(fmt).element, get_format(fmt).block
    codes = torch.arange(2 ** (element.bits - 1), dtype=torch.uint8)
    numbers = element.decode(codes)
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[:-1] + numbers[1:]) / 2
    ties = torch.cat([ties, -ties])
    blocks = torch.nn.functional.pad(ties, (0, -len(ties) % (block - 1))).reshape(-1, block - 1)
    blocks = torch.cat([torch.full((len(blocks), 1), element.max), blocks], dim=1)  # amax is q_max
    x = torch.zeros(1, 1, len(blocks), 64)
    x[..., :block] = blocks
    amax = torch.full((1, 1, 1, 1), 448.0 * element.max)  # tensor scale one
    operand = encoded_q(x.to(kernel_device), fmt, amax.to(kernel_device))
    expected = pack(x[0, 0], fmt, tensor_amax=amax[0, 0])
    assert torch.equal(decoded(operand.elements[0, 0, : len(blocks)].cpu(), fmt), decoded(expected.data, fmt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 41])
@pytest.mark.parametrize(("changes", "rounds_twice"), [(False, False), (True, False), (True, True)])
def test_rows_may_begin_at_any_element(dtype, head_dim, changes, rounds_twice, kernel_device):
    """Where two channels lie in one aligned word, they are read together; elsewhere one by one."""
    from dma_diffusers.kernels.quantiser.launch import Source, are_paired, statistics_of
    from dma_diffusers.kernels.quantiser.launch import encode as launch
    from dma_diffusers.kernels.quantiser.operands import Stored

    has_rope = changes and head_dim % 2 == 0
    call = Call(
        200, 200, head_dim, dtype=dtype, has_rope=has_rope, has_norms=changes, rounds_twice=rounds_twice
    )
    q, k, v, _ = call.tensors(kernel_device)
    shifted = [torch.nn.functional.pad(x, (1, head_dim % 2))[..., 1 : 1 + head_dim] for x in (q, k)]
    assert are_paired(q, k) == (head_dim == 64) and not are_paired(shifted[0])
    ropes, norms = call.ropes(kernel_device), call.norms(kernel_device)
    stored = [Stored(get_format(name), Storage.ROW, Storage.PLAIN) for name in ("bf16", "int8")]
    stored[0] = replace(stored[0], storage=Storage.PLAIN)
    found = []
    for one, other in ((q, k), shifted):
        known = statistics_of(other, None, ropes["k_rope"], norms=norms)
        found.append(launch(Source(one, other, None, 0.3, **ropes, norms=norms), stored, known))
    for one, other in zip(*(x.q + x.k for x in found), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.elements.view(torch.uint8), other.elements.view(torch.uint8))
            assert one.scales is None or torch.equal(one.scales, other.scales)
    changed = reference.changed_q(AttentionCall(q, k, v, **ropes, norms=norms))
    expected = tiles_of(reference.quantised_q(changed * 0.3, "int8"), head_dim)
    differs = (numbers_of(found[0].q[1], head_dim) - expected).abs() > 1e-6 * expected.abs().max()
    # A GPU's inverse root is approximate: rounding to 16 bits hides that, and few float32 numbers move by a step.
    assert differs.float().mean() <= (1e-3 if changes and dtype == torch.float32 else 0)
