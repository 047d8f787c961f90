"""Whatever precision a program asks for, the metrics' convolutions run in float32, and it is asked for again after."""

import pytest
import torch

from dma_diffusers.eval.metrics.float32 import exact_float32


@pytest.mark.parametrize("asked", ["ieee", "tf32"])
def test_convolutions_are_exact_inside_and_as_before_outside(asked):
    cudnn = torch.backends.cudnn
    at_first, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, asked
    try:
        with pytest.raises(InterruptedError), exact_float32():
            assert (cudnn.conv.fp32_precision, cudnn.deterministic) == ("ieee", True)
            raise InterruptedError
        assert (cudnn.conv.fp32_precision, cudnn.deterministic) == (asked, False)
    finally:
        cudnn.conv.fp32_precision = at_first
