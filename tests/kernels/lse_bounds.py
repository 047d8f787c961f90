"""How far a sum of rounded probabilities may move with the last bits of the scores."""

from unittest import mock

import torch

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.quantiser import reference as quantiser
from tests.kernels.calls import by_reference


def lse_bounds(slack: float, *positional, **given) -> tuple[torch.Tensor, torch.Tensor]:
    """The least log-sum-exps and the largest, where scores less their row's maximum are off by `slack`, in base 2.

    A probability near the edge of two roundings may then fall either way: with two keys one in e4m3 moves the
    log-sum-exp by up to .04. Rounding and adding are monotone, so that no choice leads beyond what all probabilities
    give that are smaller by 2^slack, or larger, before they are rounded. Arguments as of `by_reference`.
    """
    rounded, power, found = quantiser.rounded_p, reference.e4m3_power, []
    for shift in (-slack, slack):
        with (
            mock.patch.object(quantiser, "rounded_p", lambda p, pv, by=2.0**shift: rounded(p * by, pv)),
            mock.patch.object(reference, "e4m3_power", lambda x, by=shift: power(x + by)),
        ):
            found.append(by_reference(*positional, **given)[1])
    return found[0], found[1]
