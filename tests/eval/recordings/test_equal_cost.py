"""Pools and rows with MEAN tiles beside importance as it was, at equal cost."""

import json
from pathlib import Path

import pytest
import torch

from dma_diffusers.eval.cost import clocks_of_pairs, pairs, tile_clocks
from dma_diffusers.eval.recordings.equal_cost import (
    BEFORE,
    CASES,
    HEAD_DIM,
    K_TILES,
    OURS,
    SHARES,
    errors,
    share_left,
)
from dma_diffusers.eval.recordings.routers import Call
from dma_diffusers.kernels.tiling.layout import TILE, Layout
from dma_diffusers.kernels.tiling.policies import Importance
from dma_diffusers.kernels.tiling.precision_map import Class


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_means_with_fewer_high_tiles_cost_what_skipping_does(case, share):
    """With equal routers, whose cost is the same, the cost that `eval.cost` predicts for both policies is equal."""
    target, high = case
    left = share_left(share, BEFORE, target, high)
    skipping, means = (
        clocks_of_pairs(
            pairs(Importance(budget, beyond=beyond), Layout(K_TILES * TILE, K_TILES * TILE)),
            target, HEAD_DIM, high, "int8",
        )
        for budget, beyond in ((share, Class.SKIP), (left, Class.MEAN))
    )  # fmt: skip
    assert left < share and means.item() == skipping.item()


def test_a_slower_router_leaves_less_and_costs_what_it_takes():
    """Rows took 261 µs on an H200, and pools of 128 took 59; attention in bf16 took 5,155."""
    for case in CASES:
        assert share_left(0.5, "rows", *case) < share_left(0.5, "pools of 32", *case) < 0.5
        assert share_left(0.5, "pools of 32", *case) < share_left(0.5, "memory", *case) < 0.5
    less = share_left(0.5, BEFORE, "sm_90", "bf16") - share_left(0.5, "rows", "sm_90", "bf16")
    assert less == pytest.approx((261 - 59.2) / 5155, rel=0.05)
    of_bf16, of_mxfp8 = (tile_clocks("sm_100", HEAD_DIM, high, "int8")[0] for high in ("bf16", "mxfp8"))
    of_router = [
        share_left(0.5, BEFORE, "sm_100", high) - share_left(0.5, "rows", "sm_100", high)
        for high in ("bf16", "mxfp8")
    ]
    assert of_router[1] / of_router[0] == pytest.approx(of_bf16 / of_mxfp8)


def call(tiles: int, equal: bool = False) -> Call:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 128 * tiles, 64, generator=generator) * 0.3
    k, v = (torch.randn(2, 128 * tiles, 64, generator=generator) for _ in range(2))
    if equal:  # all keys of a sub-tile, and their values
        k, v = (x[:, ::32].repeat_interleave(32, 1) for x in (k, v))
    return Call(q, k, v)


def test_means_of_equal_keys_err_by_rounding_alone_where_skipping_errs():
    same = call(8, equal=True)
    found = errors(same, same, text_tiles=0)
    assert len(found) == len(CASES) * (2 + len(OURS))
    for choice, of_shares in found.items():
        of_means, (few, many) = BEFORE not in choice, of_shares
        assert (max(of_shares) < (0.05 if "mxfp8" in choice else 0.01)) == of_means
        assert of_means or many < few
    assert found["sm_90, bf16 | memory | tile"][0] < 0.1 * found["sm_100, mxfp8 | memory | tile"][0]


def test_a_broken_share_errs_between_its_neighbours():
    """A share of 6 pairs is 1.5 of them, whose squared error is the mean of those of 1 and of 2."""
    of_six, of_shares = call(6), {}
    for shares in ((0.25,), (1 / 6, 1 / 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dma_diffusers.eval.recordings.equal_cost.SHARES", shares)
            found = errors(of_six, of_six, 0)[f"sm_90, bf16 | {BEFORE} | tile"]
            of_shares |= dict(zip(shares, found, strict=True))
    one, broken, two = (of_shares[share] ** 2 for share in (1 / 6, 0.25, 1 / 3))
    assert two < broken < one and broken == pytest.approx((one + two) / 2)


def test_tiles_of_text_are_high():
    """The one pair without text is that of each share, so that HIGH's rounding alone is left."""
    of_two = call(2)
    found = errors(of_two, of_two, text_tiles=1)
    for router in (BEFORE, *OURS):
        assert max(found[f"sm_90, bf16 | {router} | tile"]) < 0.01


def test_the_page_says_what_the_committed_result_holds():
    folder = Path(__file__).parents[3] / "eval" / "results"
    result, page = (
        json.loads((folder / "routers_equal_cost.json").read_text()),
        (folder / "routing.md").read_text(),
    )
    for case, left in result["shares_left"].items():
        formats, router = case.split(" | ")
        assert left == [round(share_left(share, router, *formats.split(", ")), 4) for share in SHARES]
        cells = []
        for demo in ("demo-video", "demo"):
            of_ours, *of_before = (
                [sum(prompts) / len(prompts) for prompts in result[demo][f"{formats} | {choice}"]]
                for choice in (f"{router} | tile", f"{BEFORE} | heads", f"{BEFORE} | tile")
            )
            for at, error in enumerate(of_ours):
                ratios = ", ".join(f"{error / each[at]:.2f}"[1:] for each in of_before)
                cells.append(f"{error:.4f}"[1:] + f" ({ratios})")
        assert f"| {' | '.join(cells)} |" in page
