"""This module compares pools and rows with MEAN tiles to importance as it was, with skipped tiles, at equal cost.

`python -m dma_diffusers.eval.recordings.equal_cost recordings -o equal_cost.json` measures, on the recordings that
`routers` makes, what eval/results/routing.md tells of it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from dma_diffusers.eval.cost import means_clocks, tile_clocks
from dma_diffusers.eval.recordings.routers import (
    FARTHEST_BEFORE,
    PROMPTS,
    RECORDED,
    STEPS,
    Call,
    by_pools,
    by_rows,
    call_of,
    products,
    recorded,
    relative_errors,
    softmax,
    top,
)
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.eval.simulator.predict import MACHINES
from dma_diffusers.kernels.quantiser import reference as quantiser
from dma_diffusers.kernels.routing import reference as routing
from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, tiles
from dma_diffusers.kernels.tiling.precision_map import MEANS_TILES
from dma_diffusers.memory import EVERY

CASES = (("sm_90", "bf16"), ("sm_100", "bf16"), ("sm_100", "mxfp8"))  # the target and HIGH
HEADS, K_TILES, HEAD_DIM = 24, tiles(16_384), 128  # of the call whose cost counts
SHARES = (0.25, 0.5)  # of the pairs, where the rest is skipped
AGO = 6
BEFORE = "pools of 128, every 4th token"
# Microseconds of such a call on an H200, in eval/results/h200_routing.txt and h200_routers.txt. A memory measures in
# every sixth step, and recalls in the others.
ROUTING = {BEFORE: 59.2, "pools of 32": 99.0, "rows": 261.0, "memory": (261.0 + (EVERY - 1) * 13.0) / EVERY}
OURS = tuple(ROUTING)[1:]


def share_left(share: float, router: str, target: str, high: str) -> float:
    """Return the share of HIGH pairs, the rest MEAN, that costs as much as `share` did with the rest skipped.

    Tiles cost what `eval.cost` predicts. It counts pools as nothing, so that routing costs the clocks that it took on
    an H200, whatever the target.
    """
    machine = MACHINES["h200"]
    clocks_of_microsecond = machine.multiprocessors * machine.hz * 1e-6 / (HEADS * K_TILES**2)
    low = "int8"  # there are no such tiles
    means = means_clocks(target, HEAD_DIM, high, low, has_low=False) * math.ceil(K_TILES / MEANS_TILES)
    more = means / K_TILES + (ROUTING[router] - ROUTING[BEFORE]) * clocks_of_microsecond
    return share - more / tile_clocks(target, HEAD_DIM, high, low)[0]


def errors(call: Call, earlier: Call, text_tiles: int) -> dict[str, list[float]]:
    """Return the relative L2 errors of the output at `SHARES` for every "target, HIGH | router | who has the share".

    earlier: the same call `AGO` steps before. Tiles of text are HIGH and outside the shares. Where a share is no whole
    number of pairs, some Q tiles have one more than the others, any of them: the squared error is the expected one.
    """
    rows = routing.sample(count=routing.ROWS).expand(call.q.shape[1] // TILE, -1)
    keys = routing.sample(count=routing.KEYS)
    every_fourth = torch.arange(0, TILE, routing.SAMPLE_STRIDE)
    scores = {
        BEFORE: by_pools(call, every_fourth, 1, FARTHEST_BEFORE),
        "pools of 32": by_pools(call, routing.sample(), routing.SUBTILES),
        "rows": by_rows(call, rows, keys),
        "memory": by_rows(earlier, rows, keys),
    }
    wanted = (softmax(call.q @ call.k.mT) @ call.v).unflatten(1, (-1, TILE))

    def error(router: str, who: str, share: float, of_high: torch.Tensor, rest: torch.Tensor | None) -> float:
        offered = scores[router][:, text_tiles:, text_tiles:]
        of_whom = offered.numel() if who == "heads" else offered.shape[-1]
        few, over = divmod(share * of_whom, 1)
        chosen = [top(offered, count / of_whom, who) for count in (few, few + 1)]
        maps = [F.pad(each, (text_tiles, 0, text_tiles, 0), value=True) for each in chosen]
        fewer, more = relative_errors(of_high, rest, maps, wanted)
        return math.sqrt((1 - over) * fewer**2 + over * more**2)

    found = {}
    for target, high in CASES:
        name, parts = f"{target}, {high}", _parts(call, high)
        for who in ("heads", "tile"):
            found[f"{name} | {BEFORE} | {who}"] = [error(BEFORE, who, x, parts[0], None) for x in SHARES]
        for router in OURS:
            left = [share_left(share, router, target, high) for share in SHARES]
            found[f"{name} | {router} | tile"] = [error(router, "tile", x, *parts) for x in left]
    return found


def _parts(call: Call, high: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what pairs add in HIGH and by the means of sub-tiles, as `routers` does; P·V is exact."""
    q, k, v = call
    k_means, v_means = (x.unflatten(1, (-1, SUBTILE)).mean(2) for x in (k, v))
    largest = (q @ k.mT).amax(-1, keepdim=True)
    q = quantiser.quantised_q(q[None], high)[0]
    k, k_means = (quantiser.quantised_k(x[None], high)[0] for x in (k, k_means))
    of_means = products(q @ k_means.mT + math.log2(SUBTILE) - largest, v_means, TILE // SUBTILE)
    return products(q @ k.mT - largest, v, TILE), of_means


def compare(recordings: Recordings) -> dict[str, list[list[float]]]:
    """Return errors at `SHARES` for each prompt, means over modules and `STEPS`, conditional calls alone."""
    by_place = {(r.prompt, r.module, r.call, r.step): r for r in recordings}
    found: dict[str, dict[int, list[list[float]]]] = {}
    for recording in recordings:
        if recording.call or recording.step not in STEPS:
            continue
        earlier = by_place[recording.prompt, recording.module, 0, recording.step - AGO]
        calls = (call_of(recordings, each) for each in (recording, earlier))
        for choice, of_shares in errors(*calls, recording.layout.text_length // TILE).items():
            found.setdefault(choice, {}).setdefault(recording.prompt, []).append(of_shares)
    means = {
        choice: [torch.tensor(calls).mean(0).tolist() for calls in by_prompt.values()]
        for choice, by_prompt in found.items()
    }
    return {
        choice: [[round(x, 4) for x in of_share] for of_share in zip(*of_prompts, strict=True)]
        for choice, of_prompts in means.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the recordings of `routers` are, or go: 3.3 GB")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    left = {
        f"{target}, {high} | {router}": [
            round(share_left(share, router, target, high), 4) for share in SHARES
        ]
        for target, high in CASES
        for router in OURS
    }
    results = {
        name: compare(recorded(name, count, arguments.folder, RECORDED)) for name, count in PROMPTS.items()
    }
    found = {"shares": SHARES, "shares_left": left, **results}
    arguments.output.write_text(json.dumps(found, separators=(",", ":")))


if __name__ == "__main__":
    main()
