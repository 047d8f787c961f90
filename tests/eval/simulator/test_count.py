"""Tiles counted, against published figures and against the brute-force mask."""

import random

import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.eval.simulator.count import Count, end_to_end
from dma_diffusers.kernels.tiling.neighborhood import neighborhood
from tests.kernels.neighborhoods import brute_mask, draw_axes, pairs_seen, tile_of_tokens

# End to end, from arXiv 2504.16922: FLUX at 4K, and HunyuanVideo at 720p over 5 s.
FLUX = {(1, 1): 1.76, (16, 1): 1.84, (16, 16): 1.88}
HUNYUAN = {
    (1, 1, 1): 1.73, (2, 1, 1): 1.78, (1, 1, 8): 1.99, (2, 1, 8): 2.02, (1, 8, 8): 2.17, (2, 8, 8): 2.20,
    (16, 8, 8): 2.23,
}  # fmt: skip


def flux(stride=(16, 16), **kwargs) -> Count:
    return Count(neighborhood((256, 256), (80, 80), stride)[0], (16, 16), (16, 8), **kwargs)


def hunyuan(stride=(16, 8, 8), **kwargs) -> Count:
    return Count(neighborhood((30, 48, 80), (18, 24, 24), stride)[0], (4, 8, 8), (2, 8, 8), **kwargs)


@pytest.mark.parametrize(("count", "share", "published"), [
    *((flux(stride), 0.518, figure) for stride, figure in FLUX.items()),
    *((hunyuan(stride), 0.607, figure) for stride, figure in HUNYUAN.items()),
])  # fmt: skip
def test_published_figures(count, share, published):
    assert end_to_end(count.speedup_worst, share) == pytest.approx(published, abs=0.02)


def test_perfect_fits():
    assert (flux().all, flux().worst, flux().mean, flux().cut) == (512, 50, 50, 0)
    assert (hunyuan().all, hunyuan().worst, hunyuan().mean, hunyuan().cut) == (900, 81, 81, 0)
    assert flux((1, 1)).cut > 0.5 and hunyuan((1, 8, 8)).cut > 0.1
    assert hunyuan().padding == pytest.approx((2 / 30, 0))


@pytest.mark.parametrize("with_text", [False, True])
def test_counts_are_those_of_the_brute_force_mask(with_text):
    rng = random.Random(2)
    for _ in range(150):
        axes = draw_axes(rng)
        q_tile, kv_tile = (tuple(rng.randint(1, 6) for _ in axes) for _ in range(2))
        text = rng.randint(1, 20) if with_text else 0
        count = Count(axes, q_tile, kv_tile, text)
        mask = F.pad(brute_mask(axes), (0, text, 0, text), value=True)
        tiles = []
        for box in (q_tile, kv_tile):
            of_grid = tile_of_tokens(axes, box)
            size = torch.Size(box).numel()
            tiles.append(of_grid + [max(of_grid) + 1 + token // size for token in range(text)])
        seen, pairs = pairs_seen(mask, *tiles)
        visits = (seen > 0).sum(-1)
        grid_q, grid_kv = (max(tile_of_tokens(axes, box)) + 1 for box in (q_tile, kv_tile))
        assert count.all == seen.shape[1]
        assert count.worst == visits[:grid_q].max()
        assert count.mean == pytest.approx(visits.double().mean().item())
        of_grid = seen[:grid_q, :grid_kv]
        cut = (of_grid > 0) & (of_grid < pairs[:grid_q, :grid_kv])
        assert count.cut == pytest.approx((cut.sum() / (of_grid > 0).sum()).item(), abs=1e-6)
        if all(axis.dilation == 1 for axis in axes):
            assert count.speedup_mean == pytest.approx(seen.numel() / visits.sum().item())
            if not text:
                assert count.speedup_worst == pytest.approx(count.all / count.worst)
        assert count.speedup_worst <= count.speedup_mean + 1e-9


def test_text_is_visited_by_all_and_visits_all():
    with_text = flux(text=512)  # 2 Q tiles of 256, 4 KV tiles of 128
    assert (with_text.text_tiles, with_text.all, with_text.worst) == ((2, 4), 516, 54)
    assert with_text.mean == pytest.approx((256 * 54 + 2 * 516) / 258)
    assert with_text.speedup_worst == pytest.approx(258 * 516 / (256 * 54 + 2 * 516))
    assert with_text.cost == pytest.approx(1 / with_text.speedup_worst)  # nothing is padded


def test_dilation_is_measured_by_dense_attention_without_it():
    axes, _ = neighborhood((64,), (16,), dilation=(3,))  # residue classes of 22, 21 and 21
    count = Count(axes, (16,), (8,))
    assert count.grid_tiles == (6, 9)
    assert count.worst == 3
    assert count.speedup_worst == pytest.approx(4 * 8 / (6 * 3))


def test_padding_costs():
    axes, _ = neighborhood((30, 48, 80), (30, 48, 80))
    assert Count(axes, (4, 8, 8), (2, 8, 8)).cost == pytest.approx(32 / 30)
    assert Count(axes, (4, 8, 8), (2, 8, 8)).speedup_worst == 1


def test_end_to_end():
    assert end_to_end(10, 0.5) == pytest.approx(1 / 0.55)
    assert end_to_end(10, 0.5, (15, 50)) == pytest.approx(1 / (0.5 + 0.5 * (0.3 + 0.7 / 10)))
    assert end_to_end(7, 0.5, (28, 28)) == end_to_end(7, 0) == end_to_end(1, 0.7) == 1
    assert end_to_end(7, 1) == pytest.approx(7)


@pytest.mark.parametrize(
    ("share", "steps"), [(1.1, (0, 1)), (-0.1, (0, 1)), (float("nan"), (0, 1)), (0.5, (3, 2)), (0.5, (0, 0))]
)
def test_impossible_shares(share, steps):
    with pytest.raises(ValueError, match=r"share must lie|K/N"):
        end_to_end(2, share, steps)
