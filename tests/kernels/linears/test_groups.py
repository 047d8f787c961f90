"""Groups of input channels: what they hold, and what they refuse."""

import pytest

from dma_diffusers.kernels.linears.groups import Groups


def test_bits_count_elements_and_scales():
    assert Groups.whole("fp8", 100).average_bits == 8
    assert Groups.whole("nvfp4", 64).average_bits == 4.5
    assert Groups(("mxfp4", "mxfp8"), (96, 32)).average_bits == pytest.approx(5.25)


def test_narrow_channels_come_first():
    groups = Groups(("mxfp4", "mxfp6_e2m3", "mxfp8"), (96, 160, 128))
    assert (groups.in_features, groups.narrow, groups.wide, groups.block) == (384, 96, 288, 32)
    assert [(format.bits, channels.start, channels.stop) for format, channels in groups.slices] == [
        (4, 0, 96), (6, 96, 256), (8, 256, 384)]  # fmt: skip
    assert Groups.whole("int8", 7).block is None and Groups.whole("int8", 7).has_row_scales


@pytest.mark.parametrize(("formats", "widths", "message"), [
    ((), (), "each group has a format and a width"),
    (("mxfp4", "mxfp8"), (64,), "each group has a format and a width"),
    (("mxint8",), (64,), "no linear layer stores 'mxint8': choose from bf16, fp8, int8, nvfp4, mxfp4"),
    (("fp8", "mxfp8"), (64, 64), "fp8 shares no layer with other formats: got fp8 | mxfp8"),
    (("mxfp8", "mxfp4"), (64, 64), "groups go from few bits to many"),
    (("mxfp6_e2m3", "mxfp6_e3m2"), (64, 64), "groups go from few bits to many"),
    (("mxfp4",), (48,), "the width of a group in mxfp4 must be a multiple of 32, got 48"),
    (("nvfp4",), (48,), "the width of a group in nvfp4 must be a multiple of 32, got 48"),
    (("fp8",), (0,), "the width of a group in fp8 must be a multiple of 1, got 0"),
])  # fmt: skip
def test_others_are_refused_in_one_line(formats, widths, message):
    with pytest.raises(ValueError) as caught:
        Groups(formats, widths)
    assert message in str(caught.value) and "\n" not in str(caught.value)
