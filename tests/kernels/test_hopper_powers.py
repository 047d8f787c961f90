"""LOW's powers of two on sm_90, some of which are interpolated: their errors, and what the compiler makes of them."""

import pytest
import torch

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.attention.reference import INTERPOLATED_GROUPS, interpolated_power
from tests.kernels.calls import Call, by_reference, relative_l2


def in_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).double()


def test_interpolated_powers_have_no_bias_and_small_errors():
    x = torch.linspace(-12, 8, 200_001)
    found = interpolated_power(x).double()
    error = found / 2 ** x.double() - 1
    assert error.mean().abs() < 5e-4 and error.square().mean().sqrt() < 0.0092 and error.abs().max() < 0.03
    assert (found.diff() >= 0).all()


def test_rounded_to_e4m3_they_are_like_exact_ones():
    """Next to others in one sum, they may be no larger on average: in no binade, down to e4m3's subnormal numbers."""
    x = torch.linspace(-9, 8, 170_001)
    power = 2 ** x.double()
    found, rounded = in_e4m3(interpolated_power(x)), in_e4m3(power)
    is_normal = x > -6
    errors = [((each / power - 1)[is_normal]).square().mean().sqrt() for each in (found, rounded)]
    assert errors[0] < 1.02 * errors[1]
    sums = [each[:-1].view(17, -1).sum(1) for each in (found, rounded)]
    assert ((sums[0] / sums[1])[3:] - 1).abs().max() < 1e-3
    assert ((sums[0] / sums[1])[:3] - 1).abs().max() < 1e-2
    assert in_e4m3(interpolated_power(torch.tensor([-torch.inf, -1e30, -11.0, 0.0, 8.0]))).tolist() == [
        0,
        0,
        0,
        1,
        256,
    ]
    assert interpolated_power(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_attention_errs_no_more(groups, monkeypatch):
    """On normal inputs, a share of interpolated probabilities adds less than 1 % to the error."""
    precision_map = Call(512, 512, 64, window=0, sink=0).map()
    q, k, v = torch.randn(3, 1, 2, 512, 64, generator=torch.Generator().manual_seed(0))
    expected, errors = (q.double() @ k.double().mT / 8).softmax(-1) @ v.double(), []
    for share in (0, groups):
        monkeypatch.setattr(reference, "INTERPOLATED_GROUPS", share)
        out, _ = by_reference(q, k, v, precision_map, "bf16", "int8", sums_rounded=True)
        errors.append(relative_l2(out, expected))
    assert 0.02 < errors[0] != errors[1] < 1.01 * errors[0]


def test_each_way_is_taken_for_its_own_keys_alone():
    """A condition on a thread's registers is decided when compiled: of 64 scores, it interpolates its share."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted")
    from dma_diffusers.kernels.ahead_of_time import compile as ahead
    from dma_diffusers.kernels.ahead_of_time.sass import loops

    launched = list(ahead.launches("sm_90", None, "int8", 64))[-1]
    of_low = [loop for loop in loops(ahead.compile_launch(*launched, "sm_90").asm["cubin"]) if loop["matrix"]]
    assert len(of_low) == 6  # two of each warpgroup
    for loop in of_low:
        interpolated = 8 * INTERPOLATED_GROUPS
        assert loop["every"]["mufu"] == 64 - interpolated + 2  # two for the rescale
        assert loop["every"].get("packed", 0) == interpolated  # two for each pair
