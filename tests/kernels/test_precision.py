"""Precisions in words, and the formats that each architecture has by default."""

import pytest

from dma_diffusers.kernels.defaults import FORMAT_PAIRS, default_formats
from dma_diffusers.kernels.formats import FORMATS
from dma_diffusers.kernels.lowerings import KERNEL_ARCHITECTURES, LOWERINGS
from dma_diffusers.kernels.precision import Precision, Precisions


@pytest.mark.parametrize(
    ("high", "low", "expected", "words"),
    [
        ("bf16", "int8", ("bf16/bf16", "int8/fp8"), ("bf16", "int8")),
        ("bf16/bf16", "int8/fp8", ("bf16/bf16", "int8/fp8"), ("bf16", "int8")),
        ("mxfp8/fp8", "mxfp4/bf16", ("mxfp8/fp8", "mxfp4/bf16"), ("mxfp8/fp8", "mxfp4/bf16")),
        ("bf16", "bf16/mxint8", ("bf16/bf16", "bf16/mxint8"), ("bf16", "bf16/mxint8")),
    ],
)
def test_words_say_formats_and_leave_out_defaults(high, low, expected, words):
    found = Precisions.parse(high, low)
    assert tuple(map(str, found)) == expected
    assert found.words == words
    assert Precisions.parse(*found.words) == found


def test_the_format_of_pv_is_that_of_the_class():
    assert Precisions.parse("int8", "int8") == (Precision("int8", "bf16"), Precision("int8", "fp8"))


@pytest.mark.parametrize(("high", "low", "has_low", "expected"), [
    ("bf16", "int8", True, "int8/fp8"), ("bf16", "int8", False, "bf16/bf16"), ("mxfp8", "mxfp4", True, "mxfp8/bf16"),
    ("mxfp8", "mxfp6_e2m3", True, "mxfp8/bf16"), ("bf16", "mxfp4", True, "bf16/bf16"),
    ("mxfp8", "mxfp8/bf16", True, "mxfp8/bf16"), ("mxfp4", "nvfp4", True, "mxfp4/bf16"),
])  # fmt: skip
def test_means_have_the_cheaper_precision_of_8_bits_or_more(high, low, has_low, expected):
    assert str(Precisions.parse(high, low).of_means(has_low)) == expected


@pytest.mark.parametrize("words", ["", "/", "int8/", "/fp8", "int8/fp8/bf16", None, {}])
@pytest.mark.parametrize("place", [0, 1])
def test_words_of_another_form_are_refused_in_one_line(words, place):
    pair = ["bf16", "bf16"]
    pair[place] = words
    with pytest.raises(ValueError) as error:
        Precisions.parse(*pair)
    assert str(error.value) == (
        f"precision {words!r} is neither a format of Q·K, as in int8, nor the formats of Q·K and P·V, as in "
        f"int8/bf16; the formats are {', '.join(FORMATS)}"
    )


@pytest.mark.parametrize("words", ["fp3", "fp3/bf16", "int8/fp3"])
def test_unknown_formats_are_refused(words):
    with pytest.raises(ValueError, match=f"unknown format 'fp3': choose from {', '.join(FORMATS)}"):
        Precisions.parse("bf16", words)


@pytest.mark.parametrize("words", ["fp16", "fp16/bf16"])
def test_a_format_of_values_alone_is_none_of_scores(words):
    with pytest.raises(ValueError, match=f"'{words}' has Q·K in fp16, .* P·V alone: write int8/fp16"):
        Precisions.parse("bf16", words)
    assert Precisions.parse("bf16", "int8/fp16").low == Precision("int8", "fp16")


def test_every_architecture_with_a_kernel_has_default_formats_that_it_multiplies():
    assert set(FORMAT_PAIRS) == set(KERNEL_ARCHITECTURES)
    pytest.importorskip("triton")
    native = LOWERINGS[0]
    for architecture, pairs in FORMAT_PAIRS.items():
        assert default_formats(architecture) == pairs[0]
        for pair in pairs:
            assert native.refuses(architecture, 128, Precisions.parse(*pair)) is None
    assert default_formats("cpu") == default_formats("sm_100")
