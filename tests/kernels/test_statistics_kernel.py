"""The kernel of the statistics against the reference: K's mean and V's units."""

import pytest
import torch

from dma_diffusers.kernels.quantiser import reference
from tests.kernels.calls import Call

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]


def padded_units(units, dim: int) -> torch.Tensor:
    """V's units as the kernels have them: `[B·Hkv, 2, dim]`, scales of 1 and means of 0 past the head dimension."""
    scale, mean = (x.flatten(0, 2) for x in units)
    scale = torch.nn.functional.pad(scale, (0, dim - scale.shape[-1]), value=1.0)
    return torch.stack((scale, torch.nn.functional.pad(mean, (0, dim - mean.shape[-1]))), 1)


@pytest.mark.parametrize("smooths_v", [False, True])
@pytest.mark.parametrize("has_rope", [False, True])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (130, 40), (700, 128), (9000, 16)])
def test_statistics_equal_the_reference(length, head_dim, has_rope, smooths_v, kernel_device):
    """K's mean to the last bit, which K's elements depend on, over the same sample; V's units too."""
    from dma_diffusers.kernels.quantiser.launch import statistics_of

    call = Call(length, length, head_dim, heads=2, kv_heads=2, batch=2, has_rope=has_rope)
    _, k, v, _ = call.tensors(kernel_device)
    k[..., 1], k[..., length // 2, 3], k[..., length // 3, 5] = torch.nan, torch.inf, -torch.inf
    v[..., 2], v[..., length // 2, 3], v[..., length // 3, 5] = -torch.inf, torch.inf, torch.nan
    rope = call.ropes(kernel_device)["k_rope"]
    v[..., 7] += 100
    found = statistics_of(k, v, rope, smooths_v=smooths_v)
    assert torch.equal(found.mean[:, :head_dim], reference.key_mean(k, rope).flatten(0, 2))
    units = reference.value_units(v, smooths=smooths_v)
    assert torch.equal(found.v_units, padded_units(units, found.v_units.shape[-1]))
    assert (units.scale[..., 2] == 1).all() and (found.mean[:, head_dim:] == 0).all()
    assert ((units.mean[..., 7] - 100).abs() < 5).all() if smooths_v else (units.mean == 0).all()
    of_k, of_v = statistics_of(k, None, rope), statistics_of(None, v, smooths_v=smooths_v)
    assert torch.equal(of_k.mean, found.mean) and torch.equal(of_v.v_units, found.v_units)
    assert of_k.v_units is None and of_v.mean is None


def test_a_channel_whose_mean_float32_cannot_add_keeps_it(kernel_device):
    from dma_diffusers.kernels.quantiser.launch import statistics_of

    v = torch.zeros(1, 1, 300, 64, device=kernel_device)
    v[..., 3], v[..., 4] = 3e38, 1e30
    units = reference.value_units(v)
    assert units.mean[0, 0, 0, 3] == 0 and units.scale.isfinite().all()
    assert (units.mean[0, 0, 0, 4] - v[0, 0, 0, 4]).abs() <= units.scale[0, 0, 0, 4]
    assert torch.equal(statistics_of(None, v).v_units, padded_units(units, 64))


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (130, 40), (700, 128), (9000, 16)])
def test_statistics_of_keys_that_are_seen(length, head_dim, tokens_first, kernel_device):
    """In the second batch entry the mean's sample has none of them, if it is not all keys."""
    from dma_diffusers.kernels.quantiser.launch import statistics_of

    call = Call(length, length, head_dim, batch=2, masks_keys=True, has_rope=True)
    _, k, v, mask = call.tensors(kernel_device)
    mask[1, :: max(1, length // 1024)] = False
    mask = mask.t().contiguous().t() if tokens_first else mask
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, 1e30), v.masked_fill(hidden, 1e30)
    k[0, 0, :, 1], v[0, 0, :, 2] = torch.nan, torch.inf
    rope = call.ropes(kernel_device)["k_rope"]
    found = statistics_of(k, v, rope, mask)
    mean, units = reference.key_mean(k, rope, mask), reference.value_units(v, mask)
    assert torch.equal(found.mean[:, :head_dim], mean.flatten(0, 2)) and (mean[1] == 0).all()
    assert torch.equal(found.v_units, padded_units(units, found.v_units.shape[-1]))
    assert max(units.mean.abs().max(), mean.abs().max(), units.scale.max()) < 10
    assert (mean[0] != 0).any() or length == 1
