"""V's channels may be rotated before V is stored in 8 bits; the output is turned back."""

import pytest
import torch

from dma_diffusers.kernels import operator
from dma_diffusers.kernels.formats import Rotations, rotate
from dma_diffusers.kernels.lowerings import Storage
from dma_diffusers.kernels.quantiser import reference
from tests.kernels.calls import relative_l2
from tests.kernels.oracle import hadamard_matrix

EVERYWHERE = {"high": "bf16", "policy": "dense(everywhere=low)"}


@pytest.mark.parametrize(("words", "expected"), [
    ("none", ("none", "none")), ("hadamard32", ("hadamard32", "none")), ("none/head_dim", ("none", "head_dim")),
])  # fmt: skip
def test_words(words, expected):
    assert Rotations.parse(words) == expected


@pytest.mark.parametrize(
    "words", ["", "/", "hadamard16/", "none/hadamard8", "none/none/none", None, 32, ["none"]]
)
def test_words_of_another_form_are_refused_in_one_line(words):
    with pytest.raises(ValueError) as error:
        Rotations.parse(words)
    assert str(error.value) == (
        f"unknown rotation {words!r}: choose from none, hadamard16, hadamard32, head_dim, for Q and K, or as in "
        f"none/head_dim for V too"
    )


def test_a_block_that_does_not_divide_the_head_is_refused():
    q = torch.randn(1, 1, 20, 40)
    with pytest.raises(ValueError, match="hadamard16 needs a head_dim that 16 divides, and head_dim is 40"):
        operator.attention(q, q, q, rotation="none/hadamard16")


def with_large_tokens(size: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, where each channel of v is large at one token of its own, to which nobody attends."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, 64, generator=generator)
    large = 4 * torch.arange(64)
    q[..., 0], k[..., 0], k[..., large, 0] = 10.0, 0.0, -40.0
    v[..., large, torch.arange(64)] = size
    return q, k, v


@pytest.mark.parametrize(("pv", "size", "gain"), [("int8", 100.0, 5.0), ("fp8", 2.0**17, 5.0)])
def test_large_tokens_of_single_channels_spoil_less(pv, size, gain):
    """64 channels share what would spoil one: the range of int8, and that of e4m3, which has 17 binades."""
    q, k, v = with_large_tokens(size)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    given = EVERYWHERE | {"low": f"bf16/{pv}", "smooth_v": False}  # the mean is that of the large tokens
    plain, rotated = (
        relative_l2(operator.attention(q, k, v, rotation=words, **given).out, exact)
        for words in ("none", "none/head_dim")
    )
    assert rotated * gain < plain
    assert rotated < 0.05


@pytest.mark.parametrize("smooth_v", [True, False])
def test_the_output_is_turned_back_with_a_mean_or_without(smooth_v):
    """A channel that is large throughout has a scale of its own: rotated, V errs as much as before."""
    q, k, v = torch.randn(3, 2, 2, 300, 64, generator=torch.Generator().manual_seed(1))
    v[..., 5] *= 30
    v += 3.0
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = {
        words: relative_l2(
            operator.attention(q, k, v, low="bf16/fp8", rotation=words, smooth_v=smooth_v, **EVERYWHERE).out,
            exact,
        )
        for words in ("none", "none/hadamard16", "none/head_dim")
    }
    assert 0.001 < errors["none"] < 0.03
    assert all(0.7 < error / errors["none"] < 1.4 for error in errors.values())


def test_bf16_values_are_left_alone():
    q, k, v = torch.randn(3, 1, 2, 200, 64, generator=torch.Generator().manual_seed(2))
    plain, rotated = (
        operator.attention(q, k, v, low="int8/bf16", rotation=words, **EVERYWHERE).out
        for words in ("none", "none/head_dim")
    )
    assert torch.equal(plain, rotated)


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rotation", "head_dim"), [("hadamard16", 80), ("head_dim", 64)])
def test_stored_values_are_those_of_the_rotated_ones(rotation, head_dim, kernel_device):
    """They are the reference's bit for bit, and within half a step of e4m3 of a product with a dense matrix."""
    from dma_diffusers.kernels.formats import block_of, get_format
    from dma_diffusers.kernels.quantiser.launch import Source, encode, statistics_of
    from dma_diffusers.kernels.quantiser.operands import Stored

    v = 2 + torch.randn(1, 2, 131, head_dim, generator=torch.Generator().manual_seed(4)).to(kernel_device)
    block = block_of(rotation, head_dim)
    known = statistics_of(None, v, rotated_values=block)
    classes = [
        Stored(get_format("bf16"), Storage.PLAIN, values) for values in (Storage.PLAIN, Storage.CHANNEL)
    ]
    found = encode(Source(v=v, rotated_values=block), tuple(classes), known)
    turned = rotate(v, rotation)
    units = reference.value_units(turned)
    scale, mean = known.v_units.view(1, 2, 2, -1)[..., :head_dim].unbind(2)
    assert torch.equal(scale[:, :, None], units.scale) and torch.equal(mean[:, :, None], units.mean)
    elements = found.values[Storage.CHANNEL].float()[:, :, :131, :head_dim]
    assert torch.equal(elements, reference.quantised_v(turned, units))
    assert torch.equal(found.values[Storage.PLAIN][:, :, :131, :head_dim], turned.bfloat16())
    dense = (v.cpu().double() @ hadamard_matrix(rotation, head_dim)).to(v.device)
    difference = (elements.double() * units.scale + units.mean - dense).abs()
    assert (difference <= (dense - units.mean).abs() / 16 + units.scale * 2.0**-10 + 1e-5).all()
